"""Attention on the CPU, forward: sparsedsl against FlexAttention by hand, and against dense causal SDPA.

    python benchmarks/attention_cpu.py --backend cpp         # generated C++, 8K and 16K: about 15 minutes on two cores
    python benchmarks/attention_cpu.py                       # backend `tiled`, 8K and 16K: about 12 minutes
    python benchmarks/attention_cpu.py --lengths 32768       # the same at 32K: about 12 minutes
    python benchmarks/attention_cpu.py --quick               # two patterns, one length: about a minute
    python benchmarks/attention_cpu.py --backend flex        # our lists and kernels for FlexAttention: about 15 minutes
    python benchmarks/attention_cpu.py --million             # one call over a million tokens, rows checked against the reference

What each column holds is said at the head of ``attention_cpp.py``, ``attention_tiled.py`` and ``attention_flex.py``, which hold the parts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import attention_cpp
import attention_flex
import attention_tiled
import measure
from measure import bytes_text, length_text, median, time_text
from tqdm import tqdm

PARTS: dict[str, ModuleType] = {"tiled": attention_tiled, "cpp": attention_cpp, "flex": attention_flex}
MILLION, MILLION_DIM = 2**20, 64


# ---- a million tokens --------------------------------------------------------------------------------------


def million(backend: str, length: int, checked_rows: int) -> dict[str, Any]:
    """One call at ``length`` tokens, window 1024, one head, and rows of it against the reference in float64."""
    import torch
    from cases import CASES

    import sparsedsl as sd

    pattern = CASES["window"].declare()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, MILLION_DIM, generator=generator) for _ in range(3))
    with torch.no_grad():
        warm = sd.compile(pattern, backend=backend)
        first_s = measure.seconds(lambda: warm(*(t[:, :, :4096] for t in (q, k, v))))
        kept: dict[str, Any] = {}

        def call() -> None:
            kept["out"] = sd.compile(pattern, backend=backend)(q, k, v)

        peak = measure.peak_bytes(call)
        attn = sd.compile(pattern, backend=backend)
        attn(q, k, v)
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
        "head_dim": MILLION_DIM,
        "first_call_at_4096_s": first_s,
        "lists_and_kernel_s": total_s,
        "kernel_s": median(again),
        "peak_bytes": peak,
        "output_bytes": kept["out"].nbytes,
        "rows_checked": len(rows),
        "largest_error_against_float64_reference": worst,
        "all_finite": bool(kept["out"].isfinite().all()),
        "load_average": measure.load(),
    }


def million_text(found: dict[str, Any]) -> str:
    """The one call in words and numbers."""
    error = f"{found['largest_error_against_float64_reference']:.1e}"
    memory = f"{bytes_text(found['peak_bytes'])} ({bytes_text(found['output_bytes'])})"
    rows = [
        ("tokens, window, heads, head dimension", f"{found['length']:,}, 1024, 1, {found['head_dim']}"),
        ("first call of the pattern (4,096 tokens)", time_text(found["first_call_at_4096_s"])),
        ("lists or schedule, and kernel", time_text(found["lists_and_kernel_s"])),
        ("kernel, lists or schedule remembered (median of 3)", time_text(found["kernel_s"])),
        ("peak memory of the call (the output alone)", memory),
        (f"largest error in {found['rows_checked']} rows against the float64 reference", error),
    ]
    return measure.markdown(("one call", "measured"), rows)


# ---- the command line --------------------------------------------------------------------------------------


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with what the chosen part takes where nothing was said."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--backend", choices=PARTS, default="tiled", help="which of our backends (default tiled)")
    add("--quick", action="store_true", help="two patterns, few rounds: about a minute")
    add("--million", action="store_true", help="one call over a million tokens instead of the table")
    names = list(dict.fromkeys(name for part in PARTS.values() for name in part.PATTERNS))
    add("--patterns", nargs="+", choices=names, help="default: those of the backend's part")
    add("--lengths", nargs="+", type=int, metavar="TOKENS", help="default: tiled 8K 16K, flex 4K to 32K; one with --million")
    add("--dims", nargs="+", type=int, metavar="D", help="head dimensions (default 64 128; flex: 64 only)")
    add("--rounds", type=int, help="repetitions behind each median (default: tiled 5, flex 9, quick 3)")
    add(
        "--keep-cache",
        action="store_true",
        help="use torch's compile cache: first calls in the table of patterns say nothing then",
    )
    add("--no-first-calls", action="store_true", help="leave out the first calls in new processes (tiled)")
    add("--rows", type=int, default=64, help="rows checked with --million (default 64)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/attention_<backend>[_<lengths>]_<machine>.json)")
    options = parser.parse_args(arguments)
    part, quick = PARTS[options.backend], options.quick
    if options.backend == "flex" and options.dims not in (None, [attention_flex.HEAD_DIM]):
        parser.error(f"--backend flex is measured at head dimension {attention_flex.HEAD_DIM} only; got --dims {options.dims}")
    if options.million and options.lengths is not None and len(options.lengths) > 1:
        parser.error(f"--million takes one length; got {options.lengths}")
    options.given_lengths = options.lengths
    options.patterns = options.patterns or (part.QUICK_PATTERNS if quick else part.PATTERNS)
    options.lengths = sorted(options.lengths or (part.QUICK_LENGTHS if quick else part.LENGTHS))
    options.rounds = options.rounds or (3 if quick else part.ROUNDS)
    if options.backend == "flex":
        options.dims = [attention_flex.HEAD_DIM]
    else:
        options.dims = sorted(options.dims or (attention_tiled.QUICK_DIMS if quick else attention_tiled.DIMS))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the tables and how the targets were met; 0 however they were met."""
    options = options_from(arguments)
    part = PARTS[options.backend]
    facts = measure.machine()
    start = time.perf_counter()
    if options.million:
        length = (options.given_lengths or [MILLION])[0]
        result: dict[str, Any] = {"million": million(options.backend, length, options.rows)}
    else:
        result = part.measure_all(options)
    facts |= {"load_average_end": measure.load(), "benchmark_s": round(time.perf_counter() - start)}
    name = f"attention_{options.backend}" + ("_million" if options.million else "")
    if options.given_lengths and not options.million:  # runs at other lengths stand beside each other
        name += "_" + "_".join(length_text(n).replace(",", "") for n in options.lengths)
    path = options.out or measure.result_path(name, facts)
    settings = {"batch": 1, "heads": part.HEADS, "dtype": "float32", "block": part.BLOCK}
    settings |= {key: getattr(options, key) for key in ("backend", "dims", "rounds", "quick", "keep_cache")}
    measure.write_json(path, {"benchmark": name, "machine": facts, "settings": settings} | result)
    print(f"Attention on the CPU, backend {options.backend}. {measure.describe(facts)}\n")
    print(million_text(result["million"]) if options.million else part.text(result))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
