"""Everything that is measured on CPU but for lists, memory of choosing and a real model, in parts.

    python benchmarks/cpu.py                                 # all parts: hours
    python benchmarks/cpu.py --quick                         # all parts at small sizes: about five minutes
    python benchmarks/cpu.py patterns --lengths 8192 --dims 64 --dtypes float32
    python benchmarks/cpu.py systems --works hsa moba --train

| part | question | minutes on two cores, about |
|---|---|---|
| `patterns` | forward, against `tiled`, FlexAttention by hand, dense SDPA and a product | 8K: 8 a width and dtype; 32K: 20 |
| `training` | forward and backward, against `tiled` and dense SDPA | 3 |
| `systems` | what chooses, reorders, remembers, against dense SDPA (`--train`, `--activations`) | 8K: 4; 32K: 10; 128K: 20 |
| `linear` | decays and write rules from the data, against token by token and dense SDPA | 4 |
| `decode` | a step with 8K, 32K and a million keys, against the dense step | 3 |
| `calls` | what a call takes beside its compiled passes | 1 |
| `first` | the first call of a process, C++ built before and not | 1 |
| `memory` | peak of a forward call, and of forward and backward, at 32K | 4 |

What does not fit into a time is cut with ``--works``, ``--lengths``, ``--dims`` and ``--dtypes``.

The head of each module (``cpu_patterns.py``, ...) says what exactly is measured. Every work at a length runs in a process of its own, its
rivals in turns, in alternating order; times are medians, ratios medians of those within a round. Dense attention that takes more than 4 s
is measured once. *useful* is what has to be computed and no more, *product* a 1,536-square float32 product of torch in the same turns.

A part writes ``results/cpu_<part>_<machine>.json``. Records that are there from the same clean commit, torch and number of threads stay, so
that a part can be measured piece by piece. A work that dies is named, and costs its records at that length.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cpu_calls
import cpu_decode
import cpu_first
import cpu_linear
import cpu_memory
import cpu_patterns
import cpu_record
import cpu_systems
import measure
from cpu_record import Job, Part
from tqdm import tqdm

PARTS: dict[str, Part] = {
    "patterns": cpu_patterns.PATTERNS,
    "training": cpu_patterns.TRAINING,
    "systems": cpu_systems.SYSTEMS_PART,
    "linear": cpu_linear.LINEAR,
    "decode": cpu_decode.DECODE,
    "calls": cpu_calls.CALLS,
    "first": Part(cpu_first.WORKS, cpu_first.measure_first, lengths=(2048,), quick_lengths=(2048,), quick=("window",), rounds=3),
    "memory": cpu_memory.MEMORY,
}
QUICK_ROUNDS = 3
SAME = ("work", "title", "length", "head_dim", "dtype", "train", "inputs")  # records that replace each other


# ---- the command line ----------------------------------------------------------------------------------------


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default all)")
    add("--quick", action="store_true", help="few works, small sizes, few rounds: shows that it works")
    add("--works", nargs="+", metavar="NAME", help="patterns and systems by name (default: those of the part)")
    add("--lengths", nargs="+", type=int, metavar="TOKENS")
    add("--dims", nargs="+", type=int, metavar="D", help="widths of heads")
    add("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"))
    add("--train", action="store_true", help="systems: forward and backward")
    add("--activations", action="store_true", help="systems: q, k and v of Gemma 3 270M on real text")
    add("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    add("--rounds", type=int, help="repetitions behind each median")
    add("--out", type=Path, metavar="FILE", help="of a single part, in place of benchmarks/results/cpu_<part>_<machine>.json")
    options = parser.parse_args(arguments)
    options.parts = options.parts or list(PARTS)
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"parts are {', '.join(PARTS)}; got {', '.join(unknown)}")
    if options.out is not None and len(options.parts) > 1:
        parser.error(f"--out is the file of one part; got {' '.join(options.parts)}")
    if (options.train or options.activations) and options.parts != ["systems"]:
        parser.error(f"--train and --activations go with the part systems alone; got {' '.join(options.parts)}")
    known = {name for part in options.parts for name in PARTS[part].works}
    if unknown := [name for name in options.works or () if name not in known]:
        parser.error(f"--works of {' '.join(options.parts)} are {', '.join(sorted(known))}; got {', '.join(unknown)}")
    return options


def jobs_of(name: str, options: argparse.Namespace) -> list[list[Job]]:
    """What a run measures of a part, short lengths first; each list in a process of its own."""
    part, quick = PARTS[name], options.quick
    rounds = options.rounds or (min(QUICK_ROUNDS, part.rounds) if quick else part.rounds)
    few = 1 if quick else None
    sizes = list(itertools.product(options.dims or part.dims[:few], options.dtypes or part.dtypes[:few]))
    works = [work for work in options.works if work in part.works] if options.works else part.quick if quick else part.works
    return [
        [Job(name, work, length, dim, dtype, rounds, options.train, options.activations) for dim, dtype in sizes]
        for length in sorted(options.lengths or (part.quick_lengths if quick else part.lengths))
        for work in works
        if options.works or not part.skips(work, length, options.train)
    ]


# ---- a part --------------------------------------------------------------------------------------------------


def run_part(name: str, options: argparse.Namespace) -> None:
    """Measure, write after every work, print the table and how goals were met."""
    facts, start = measure.machine(), time.perf_counter()
    title = f"cpu_{name}" + "_train" * options.train + "_activations" * options.activations + "_quick" * options.quick
    path = options.out or measure.result_path(title, facts)
    settings = {key: value for key, value in vars(options).items() if key not in ("parts", "out")}
    records, lost = kept(path, facts), list[dict[str, Any]]()
    jobs = jobs_of(name, options)
    if options.activations:
        from activations import captured

        captured(max(group[0].length for group in jobs))  # once, and not while something is measured
    for group in tqdm(jobs, desc=name, unit="work"):
        found, death = measure.run_child([__file__, "--child", json.dumps([dataclasses.asdict(job) for job in group])])
        run = {"commit": facts["commit"], "date": facts["date"]}
        new = [record | run for record in found.values()]
        records = [record for record in records if not any(same(record, other) for other in new)] + new
        if death is not None:
            lost.append({"work": group[0].work, "length": group[0].length, "why": death})
        targets = PARTS[name].targets(records)
        ends = {"load_average_end": measure.load(), "benchmark_s": round(time.perf_counter() - start)}
        content = {"benchmark": title, "machine": facts | ends, "settings": settings, "records": records, "lost": lost}
        measure.write_json(path, content | {"targets": targets})
    print(f"## {name}\n\n{measure.describe(facts)}\n\n{cpu_record.table(records)}\n")
    if verdicts := measure.verdicts(PARTS[name].targets(records)):
        print(f"{verdicts}\n")
    for one in lost:
        print(f"lost: {one['work']} at {one['length']}: {one['why']}")
    print(f"written to {path}\n", flush=True)


def kept(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of an earlier run that may stand beside new ones: of the same code, with as many threads."""
    if not path.exists() or facts["commit"].endswith("-dirty") or facts["commit"] == "unknown":
        return []
    content = json.loads(path.read_text())
    if content["machine"]["torch"] != facts["torch"]:
        return []
    wanted = facts["commit"], facts["torch_threads"]
    return [record for record in content["records"] if (record["commit"], record["threads"]) == wanted]


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a record is of the same thing as another."""
    return all(one.get(key) == other.get(key) for key in SAME)


def child(words: str) -> None:
    """Measure in this process, and print a JSON object for each record."""
    numbers = itertools.count()
    for job in (Job(**given) for given in json.loads(words)):
        for record in PARTS[job.part].measure(job):
            print(json.dumps({str(next(numbers)): record}), flush=True)


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure the parts one after the other; 0 however goals were met."""
    options = options_from(None if arguments is None else list(arguments))
    if options.threads is not None:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes that measure
        torch.set_num_threads(options.threads)
    for name in options.parts:
        run_part(name, options)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        sys.exit(main())
