"""Attention on the CPU: sparsedsl's ``flex`` backend against FlexAttention by hand, and against dense causal SDPA.

    python benchmarks/attention_cpu.py               # everything, about 15 minutes on two cores
    python benchmarks/attention_cpu.py --quick       # two patterns, two lengths: about a minute
    python benchmarks/attention_cpu.py --million     # one call over a million tokens, rows checked against the reference

Batch 1, 4 heads, head dimension 64, float32, no gradients, blocks of 128. One process a pattern, with an empty compile cache; the
lengths follow each other as they would for a user. What is measured:

- *kernel*: ``attn(q, k, v)`` with the tile lists remembered, checks included; by hand ``flex(q, k, v, block_mask=...)`` with the
  mask made before and ``flex = torch.compile(flex_attention, dynamic=False)``: one kernel a length, the best torch can do. (Left
  to itself, torch 2.13 goes dynamic at the second length, and the C++ it writes then does not compile if the mask reads a table.)
- *total*: lists and kernel: a new ``sd.compile(pattern, backend="flex")`` called once, which compiles nothing anew; by hand
  ``torch.compile(create_block_mask)`` after its first calls, then the kernel.
- *first*: the first call of each at each length, which is where compilation happens.
- *SDPA*: ``scaled_dot_product_attention(is_causal=True)``, dense, whatever the pattern.

The methods take turns; times are medians, and ``kernel ratio`` is the median of ours / by hand within the same round.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from measure import bytes_text, length_text, median, time_text
from tqdm import tqdm

PATTERNS = ("window", "sinks", "causal_documents", "dilated", "softcap", "alibi", "causal")
LENGTHS = (4096, 8192, 16384, 32768)
HEADS, HEAD_DIM, BLOCK = 4, 64, 128
# Targets of issue 2: kernel ratio about 1 at the median; mask and kernel together five times faster at 32K.
KERNEL_RATIO, TOTAL_SPEEDUP, TOTAL_AT = 1.05, 5.0, 32768
MILLION = 2**20


# ---- one pattern at all lengths, in a process of its own ---------------------------------------------------


def child(name: str, lengths: list[int], rounds: int) -> None:
    """Measure, and print one JSON object a length."""
    import torch
    from cases import CASES
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    import sparsedsl as sd

    case = CASES[name]
    pattern = case.declare()
    attn = sd.compile(pattern, backend="flex")
    flex, make_mask = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)
    # Not measured: what the first compile of a machine costs, whatever is compiled.
    torch.compile(lambda x: x.sin() + 1)(torch.zeros(1000))
    for length in lengths:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))
        tables = dict(case.tables(length))
        mask_mod = case.mask_mod(tables)

        def by_hand_mask(mask_mod: Any = mask_mod, length: int = length) -> Any:
            return make_mask(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)

        def by_hand(mask: Any, q: Any = q, k: Any = k, v: Any = v) -> Any:
            return flex(q, k, v, score_mod=case.score_mod, block_mask=mask)

        def ours(attn: Any = attn, q: Any = q, k: Any = k, v: Any = v, tables: Any = tables) -> Any:
            return attn(q, k, v, **tables)

        def ours_total() -> Any:
            return ours(sd.compile(pattern, backend="flex"))

        def dense(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        with torch.no_grad():
            first = {"ours": measure.seconds(ours), "by_hand_mask": measure.seconds(by_hand_mask)}
            mask: Any = by_hand_mask()
            first["by_hand"] = measure.seconds(functools.partial(by_hand, mask))
            error = float((ours() - by_hand(mask)).abs().max())
            actions: dict[str, Callable[[], Any]] = {
                "ours": ours,
                "by_hand": functools.partial(by_hand, mask),
                "ours_total": ours_total,
                "by_hand_total": lambda: by_hand(by_hand_mask()),
            }
            dense()
            found = measure.alternate(actions, rounds, limit_s=40)
            found["sdpa"] = measure.alternate({"sdpa": dense}, min(rounds, 3))["sdpa"]
        ratios = [a / b for a, b in zip(found["ours"], found["by_hand"], strict=True)]
        totals = [b / a for a, b in zip(found["ours_total"], found["by_hand_total"], strict=True)]
        record = {
            "length": length,
            "seconds": {key: median(values) for key, values in found.items()},
            "best_seconds": {key: min(values) for key, values in found.items()},
            "first_seconds": first,
            "rounds": len(found["ours"]),
            "kernel_ratio": median(ratios),
            "total_speedup": median(totals),
            "largest_difference": error,
            "load_average": measure.load(),
        }
        print(json.dumps({str(length): record}), flush=True)


# ---- all patterns ------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a pattern and length."""
    records = []
    lengths = ",".join(map(str, options.lengths))
    for name in tqdm(options.patterns, desc="attention", unit="pattern"):
        with tempfile.TemporaryDirectory(prefix="attention-cpu-") as cache:
            arguments = [__file__, "--child", name, lengths, str(options.rounds)]
            env = {} if options.keep_cache else {"TORCHINDUCTOR_CACHE_DIR": cache}
            found, death = measure.run_child(arguments, env)
        if death is not None:
            raise RuntimeError(f"{name}: {death}")
        records += [{"pattern": name} | found[str(length)] for length in options.lengths]
    return records


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets with what was measured for them."""
    ratio = median(record["kernel_ratio"] for record in records)
    found: list[dict[str, Any]] = [
        {"what": "median kernel ratio", "got": ratio, "limit": KERNEL_RATIO, "pass": ratio <= KERNEL_RATIO}
    ]
    for record in records:
        if record["length"] == TOTAL_AT:
            got = record["total_speedup"]
            what = f"total speed-up, {record['pattern']}, {length_text(TOTAL_AT)}"
            found.append({"what": what, "got": got, "limit": TOTAL_SPEEDUP, "pass": got >= TOTAL_SPEEDUP})
    return found


def table(records: list[dict[str, Any]]) -> str:
    """The Markdown table of steady times."""
    from cases import CASES

    header = ["pattern", "tokens", "kernel ours", "by hand", "ratio"]
    header += ["total ours", "by hand", "speed-up", "SDPA causal", "SDPA / total ours"]
    rows = []
    for record in records:
        steady = record["seconds"]
        row = [CASES[record["pattern"]].title, length_text(record["length"])]
        row += [time_text(steady["ours"]), time_text(steady["by_hand"]), f"{record['kernel_ratio']:.2f}"]
        row += [time_text(steady["ours_total"]), time_text(steady["by_hand_total"])]
        row += [f"{record['total_speedup']:.1f}x", time_text(steady["sdpa"])]
        rows.append([*row, f"{steady['sdpa'] / steady['ours_total']:.1f}x"])
    return measure.markdown(header, rows)


def first_table(records: list[dict[str, Any]]) -> str:
    """The Markdown table of first calls: compilation, summed over the lengths of one process."""
    from cases import CASES

    names = list(dict.fromkeys(record["pattern"] for record in records))
    lengths = sorted({record["length"] for record in records})
    header = ["pattern", "ours", "by hand: mask", "by hand: kernel"]
    rows = []
    for name in names:
        own = sorted((r for r in records if r["pattern"] == name), key=lambda r: int(r["length"]))
        row = [CASES[name].title]
        for key in ("ours", "by_hand_mask", "by_hand"):
            row.append(", ".join(f"{r['first_seconds'][key]:.1f}" for r in own))
        rows.append(row)
    text = ", ".join(length_text(n) for n in lengths)
    return f"First calls in s, one after the other at {text}:\n\n" + measure.markdown(header, rows)


# ---- a million tokens --------------------------------------------------------------------------------------


def million(length: int, checked_rows: int) -> dict[str, Any]:
    """One call at ``length`` tokens, window 1024, one head, and rows of it against the reference in float64."""
    import torch
    from cases import CASES

    import sparsedsl as sd

    pattern = CASES["window"].declare()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, HEAD_DIM, generator=generator) for _ in range(3))
    with torch.no_grad():
        warm = sd.compile(pattern, backend="flex")
        compile_s = measure.seconds(lambda: warm(*(t[:, :, :4096] for t in (q, k, v))))
        kept: dict[str, Any] = {}

        def call() -> None:
            kept["out"] = sd.compile(pattern, backend="flex")(q, k, v)

        peak = measure.peak_bytes(call)
        attn = sd.compile(pattern, backend="flex")
        again = [measure.seconds(lambda: attn(q, k, v)) for _ in tqdm(range(3), desc="again", unit="call")]
        total_s = measure.seconds(call)
        reference = sd.compile(pattern, backend="reference")
        rows = torch.randperm(length, generator=generator)[:checked_rows].sort().values.tolist()
        rows = sorted({0, length - 1, *rows[1:-1]}) if checked_rows >= 2 else rows
        exact_k, exact_v = k.double(), v.double()
        worst = 0.0
        for row in tqdm(rows, desc="rows against the reference", unit="row"):
            wanted = reference(q[:, :, row : row + 1].double(), exact_k, exact_v, q_offset=row)
            worst = max(worst, float((kept["out"][:, :, row : row + 1] - wanted).abs().max()))
    return {
        "pattern": "window",
        "length": length,
        "heads": 1,
        "head_dim": HEAD_DIM,
        "first_call_at_4096_s": compile_s,
        "lists_and_kernel_s": total_s,
        "kernel_s": median(again),
        "peak_bytes": peak,
        "output_bytes": kept["out"].nbytes,
        "rows_checked": len(rows),
        "largest_error_against_float64_reference": worst,
        "all_finite": bool(kept["out"].isfinite().all()),
        "load_average": measure.load(),
    }


# ---- the command line --------------------------------------------------------------------------------------


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="two patterns, two lengths, few rounds: a minute or two")
    add("--million", action="store_true", help="one call over a million tokens instead of the table")
    add("--patterns", nargs="+", choices=PATTERNS, help="default: all")
    add("--lengths", nargs="+", type=int, metavar="TOKENS", help="default: 4K to 32K; with --million one length")
    add("--rounds", type=int, help="repetitions behind each median (default 9, quick 3)")
    add("--keep-cache", action="store_true", help="use torch's compile cache: first calls say nothing then")
    add("--rows", type=int, default=64, help="rows checked with --million (default 64)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/attention_cpu_<machine>.json)")
    options = parser.parse_args(arguments)
    options.patterns = options.patterns or (("window", "causal_documents") if options.quick else PATTERNS)
    options.lengths = sorted(options.lengths or ((4096, 8192) if options.quick else LENGTHS))
    options.rounds = options.rounds or (3 if options.quick else 9)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the tables and how the targets were met; 0 however they were met."""
    given = arguments if arguments is not None else sys.argv[1:]
    options = options_from(given)
    facts = measure.machine()
    start = time.perf_counter()
    if options.million:
        length = options.lengths[0] if "--lengths" in given else MILLION
        result: dict[str, Any] = {"million": million(length, options.rows)}
    else:
        records = measure_all(options)
        result = {"records": records, "targets": checks(records)}
    facts |= {"load_average_end": measure.load(), "benchmark_s": round(time.perf_counter() - start)}
    name = "attention_million" if options.million else "attention_cpu"
    path = options.out or measure.result_path(name, facts)
    settings = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "block": BLOCK}
    settings |= {key: getattr(options, key) for key in ("rounds", "quick", "keep_cache")}
    measure.write_json(path, {"benchmark": name, "machine": facts, "settings": settings} | result)
    print(f"Attention on the CPU. {measure.describe(facts)}\n")
    if options.million:
        print_million(result["million"])
    else:
        print(table(result["records"]) + "\n\n" + first_table(result["records"]) + "\n")
        for target in result["targets"]:
            verdict = "pass" if target["pass"] else "MISS"
            print(f"{verdict}: {target['what']}: {target['got']:.2f}, target {target['limit']:g}")
    print(f"\nwritten to {path}")
    return 0


def print_million(found: dict[str, Any]) -> None:
    """The one call in words and numbers."""
    error = f"{found['largest_error_against_float64_reference']:.1e}"
    memory = f"{bytes_text(found['peak_bytes'])} ({bytes_text(found['output_bytes'])})"
    rows = [
        ("tokens, window, heads, head dimension", f"{found['length']:,}, 1024, 1, {found['head_dim']}"),
        ("first call of the pattern (4,096 tokens), with compilation", time_text(found["first_call_at_4096_s"])),
        ("lists and kernel", time_text(found["lists_and_kernel_s"])),
        ("kernel, lists remembered (median of 3)", time_text(found["kernel_s"])),
        ("peak memory of the call (the output alone)", memory),
        (f"largest error in {found['rows_checked']} rows against the float64 reference", error),
    ]
    print(measure.markdown(("one call", "measured"), rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        name, lengths, rounds = sys.argv[2:]
        child(name, [int(n) for n in lengths.split(",")], int(rounds))
    else:
        sys.exit(main())
