"""Systems that choose, reorder and remember, on the CPU: against dense SDPA, and against FlexAttention where it can say the same.

    python benchmarks/systems_cpu.py                         # all, 2K to 32K: about 20 minutes on two cores
    python benchmarks/systems_cpu.py --systems pbs tsa --lengths 8192
    python benchmarks/systems_cpu.py --quick                 # 1K and 2K, few rounds: two minutes
    python benchmarks/systems_cpu.py --decode-16m            # HSA: one step over 16 million tokens, time and memory (5 GiB)
    python benchmarks/systems_cpu.py --selection-memory      # top-16 of 16,384 chunks for 64K queries: memory
    python benchmarks/systems_cpu.py --scaling               # HSA: cost by length at a fixed number of chunks
    python benchmarks/systems_cpu.py --ring-decode           # Ring-linear: state and cost of a step, beside a cache

Batch 1, float32. Systems that choose by structure run on queries, keys and values captured from a full-attention layer of Gemma 3 270M
on real text (``activations.py``; ``--made-up``: without a model), the others on random numbers. Each group of systems on the same
inputs, with one dense SDPA, takes turns in one process a length; times are medians, ratios medians of the ratios within a round.

- *ours*: backend ``tiled``; *choosing*, *moving*, *attending*: its parts, by node (``systems_split.py``).
- *SDPA*: dense and causal, heads of keys repeated beforehand. *flex*: the same program on backend ``flex``, choosing included, up to
  the lengths that ``systems_cases.py`` says: it is given choices of single queries as tables.
- *density*: pairs of a query and a row of keys or slots that attend, of all causal pairs.
- *fwd + bwd*: of systems that train, up to ``--train-to``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import systems_claims
import systems_sizes
import systems_table
from systems_cases import SYSTEMS
from tqdm import tqdm

LENGTHS, QUICK_LENGTHS = (2048, 4096, 8192, 16384, 32768), (1024, 2048)
QUESTIONS = tuple(systems_sizes.QUESTIONS)


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--lengths", nargs="+", type=int, metavar="TOKENS", help=f"default {' '.join(map(str, LENGTHS))}")
    add("--train-to", type=int, default=16384, metavar="TOKENS", help="longest length of forward and backward (default 16384)")
    add("--rounds", type=int, help="repetitions behind each median (default 5, quick 3)")
    add("--quick", action="store_true", help="short lengths and few rounds")
    add("--made-up", action="store_true", help="made-up inputs with some structure in place of activations: no model is loaded")
    add("--no-flex", action="store_true", help="leave FlexAttention out")
    for name in QUESTIONS:
        add(f"--{name}", action="store_true", help=f"{systems_sizes.QUESTIONS[name].help} instead of the table")
    add("--size", type=int, help="chunks, queries or tokens of these, in place of the full size")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/systems[_<question>]_<machine>.json)")
    options = parser.parse_args(arguments)
    asked = [name for name in QUESTIONS if getattr(options, name.replace("-", "_"))]
    if len(asked) > 1:
        parser.error(f"one question at a time; got {' and '.join('--' + name for name in asked)}")
    if options.size is not None and not asked:
        parser.error("--size goes with " + ", ".join(f"--{name}" for name in QUESTIONS))
    options.question = asked[0] if asked else None
    options.lengths = sorted(options.lengths or (QUICK_LENGTHS if options.quick else LENGTHS))
    options.rounds = options.rounds or (3 if options.quick else 5)
    return options


def groups(names: list[str]) -> list[list[str]]:
    """Systems that share their inputs."""
    found: dict[Any, list[str]] = {}
    for name in names:
        found.setdefault((SYSTEMS[name].shape, SYSTEMS[name].captured), []).append(name)
    return list(found.values())


def measure_all(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every group at every length, the short ones first, each written down when it is there; a process that dies is named and costs its
    group at that length."""
    records: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    order = list(SYSTEMS)
    if not options.made_up and any(SYSTEMS[name].captured for name in options.systems):
        from activations import captured

        captured(options.lengths[-1])  # once, and not while something is measured
    jobs = [(names, length) for length in options.lengths for names in groups(options.systems)]
    with tqdm(jobs, unit="group") as bar:
        for names, length in bar:
            bar.set_description(f"{length} tokens, {' '.join(names)}")
            words = [",".join(names), str(length), str(options.rounds), str(int(length <= options.train_to))]
            found, death = measure.run_child(
                [__file__, "--child", *words, str(int(options.made_up)), str(int(not options.no_flex))]
            )
            records += list(found.values())
            records.sort(key=lambda record: (order.index(record["system"]), record["length"]))
            if death is not None:
                lost.append({"systems": names, "length": length, "why": death})
            write({"records": records, "lost": lost})
    return {"records": records, "lost": lost}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the tables; 0 whatever came out."""
    options = options_from(arguments)
    facts, start = measure.machine(), time.perf_counter()
    name = "systems" + (f"_{options.question.replace('-', '_')}" if options.question else "")
    settings = {"batch": 1, "dtype": "float32", "backend": "tiled"}
    settings |= {
        key: getattr(options, key) for key in ("systems", "lengths", "train_to", "rounds", "quick", "made_up", "no_flex", "size")
    }
    path, rates = options.out or measure.result_path(name, facts), measure.rates()

    def write(result: dict[str, Any]) -> None:
        ends = {"load_average_end": measure.load(), "benchmark_s": round(time.perf_counter() - start)}
        measure.write_json(path, {"benchmark": name, "machine": facts | ends, "settings": settings, "rates": rates} | result)

    if options.question is not None:
        question = systems_sizes.QUESTIONS[options.question]
        result = question.measure(options.size)
        text = question.text(result)
    else:
        result = measure_all(options, write)
        text = systems_table.table(result["records"], {name: system.title for name, system in SYSTEMS.items()})
        text += "\n\n" + systems_claims.claims_text(result["records"], systems_sizes.ring_state_bytes())
        text += "".join(f"\n\nlost: {' '.join(one['systems'])} at {one['length']}: {one['why']}" for one in result["lost"])
    write(result)
    print(f"Systems on the CPU. {measure.describe(facts)}\n\n{text}\n\nwritten to {path}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        systems_table.child(sys.argv[2].split(","), *map(int, sys.argv[3:8]))
    elif sys.argv[1:2] == ["--question-child"]:
        systems_sizes.child(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
