"""Training on the CPU: forward and backward of `tiled` against dense SDPA, exact gradients, memory by length, a million tokens.

    python benchmarks/training_cpu.py               # rates, gradients, memory: about 5 minutes on two cores
    python benchmarks/training_cpu.py --quick       # the same at small sizes: about a minute
    python benchmarks/training_cpu.py --million     # one call over a million tokens, rows checked in float64

Batch 1, 4 heads, head dimension 64, float32. What is measured:

- *rates*: forward and backward, gradients of q, k and v, beside ``scaled_dot_product_attention(is_causal=True)`` forward and
  backward, in turns; medians. The work is 14 floating-point operations (4 forward, 10 backward) for each pair computed and each
  entry of a head: for `tiled` the pairs of its schedule, masked ones included, for SDPA half the square. ``SDPA / tiled`` is
  the time saved.
- *gradients*: at one length, `tiled` and SDPA with the mask as a tensor, both in float32, against SDPA in float64: the largest
  error of each, as a share of the largest entry. `tiled` may be three times as far off as SDPA, which adds in another order.
- *memory*: growth of the resident memory at its highest during forward and backward, window 1024, each length in a process of its
  own; beside it the bytes of the results alone (output, LSE, and the gradients of q, k and v).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from measure import bytes_text, length_text, median, time_text
from tqdm import tqdm

HEADS, HEAD_DIM = 4, 64
OPERATIONS = 14  # for each pair and entry: products of q k and p v; again q k, and those for dv, dp, dq, dk
PATTERNS = ("window512", "window", "causal_documents", "alibi")
RATE_LENGTHS, GRADIENT_LENGTH = (4096, 8192), 2048
MEMORY_LENGTHS = (4096, 8192, 16384, 32768, 65536)
FAST_PATTERN, FAST_LENGTH = "window512", 8192
MILLION, WINDOW = 2**20, 1024
# Targets of issue 3. Twice the length may take a little more than twice the memory: the heap is not returned to the byte.
RATE_RATIO, SPEEDUP, ERROR_RATIO, GROWTH = 0.7, 4.0, 3.0, 2.2


def inputs(length: int, heads: int = HEADS) -> list[Any]:
    """q, k, v, which want gradients, and the gradient of the output; the same for every run."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, HEAD_DIM, generator=generator) for _ in range(4)]
    return [*(t.requires_grad_() for t in tensors[:3]), tensors[3]]


# ---- rates ---------------------------------------------------------------------------------------------------


def measure_rates(name: str, length: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of one pattern beside dense SDPA."""
    import torch
    from cases import CASES
    from torch.nn.functional import scaled_dot_product_attention

    import sparsedsl as sd
    from sparsedsl.runtime.call import check_call

    q, k, v, grad_out = inputs(length)
    case = CASES[name]
    tables: dict[str, Any] = dict(case.tables(length))
    attn = sd.compile(case.declare(), backend="tiled")

    def tiled() -> Any:
        return torch.autograd.grad(attn(q, k, v, **tables), (q, k, v), grad_out)

    def dense() -> Any:
        return torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad_out)

    actions: dict[str, Callable[[], Any]] = {"tiled": tiled, "sdpa": dense}
    for action in actions.values():
        action()
    found = measure.alternate(actions, rounds, limit_s=15)
    call = check_call(attn.pattern, q, k, v, tables)
    kernel: Any = attn.static.runner("tiled")
    schedule = kernel.schedule(call)
    # Pairs are counted for one head of each group of heads that the mask tells apart.
    pairs = schedule.pairs * HEADS // (schedule.groups[0] * schedule.groups[1])
    work = {"tiled": OPERATIONS * HEAD_DIM * pairs, "sdpa": OPERATIONS * HEAD_DIM * HEADS * length * length // 2}
    rates = {key: [work[key] / s for s in found[key]] for key in work}
    return {
        "pattern": name,
        "length": length,
        "seconds": {key: median(values) for key, values in found.items()},
        "rounds": len(found["tiled"]),
        "pairs_computed": pairs,
        "gflops": {key: median(values) / 1e9 for key, values in rates.items()},
        "rate_ratio": median(a / b for a, b in zip(rates["tiled"], rates["sdpa"], strict=True)),
        "sdpa_over_tiled": median(b / a for a, b in zip(found["tiled"], found["sdpa"], strict=True)),
        "load_average": measure.load(),
    }


# ---- gradients -----------------------------------------------------------------------------------------------


def measure_gradients(name: str, length: int) -> dict[str, Any]:
    """Largest errors of the output and the three gradients against float64, as shares of the largest entry."""
    import torch
    from cases import CASES
    from torch.nn.functional import scaled_dot_product_attention

    import sparsedsl as sd

    q, k, v, grad_out = inputs(length)
    case = CASES[name]
    tables: dict[str, Any] = dict(case.tables(length))
    positions = torch.arange(length)
    mask = case.mask_mod(tables)(0, 0, positions[:, None], positions)  # by hand, not ours

    def results(attend: Callable[..., Any], dtype: torch.dtype) -> list[Any]:
        tensors = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attend(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, grad_out.to(dtype))]

    def masked(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    attn = sd.compile(case.declare(), backend="tiled")
    exact = results(masked, torch.float64)
    ours, theirs = results(lambda *tensors: attn(*tensors, **tables), torch.float32), results(masked, torch.float32)

    def errors(found: list[Any]) -> dict[str, float]:
        pairs = zip(("out", "dq", "dk", "dv"), found, exact, strict=True)
        return {what: float((got - want).abs().max() / want.abs().max()) for what, got, want in pairs}

    return {"pattern": name, "length": length, "tiled": errors(ours), "sdpa": errors(theirs)}


# ---- memory --------------------------------------------------------------------------------------------------


def memory_child(length: int) -> None:
    """Peak growth of one forward and backward pass, as one JSON object."""
    import torch

    import sparsedsl as sd

    attn = sd.compile(sd.patterns.sliding_window(WINDOW), backend="tiled")

    def both(tensors: list[Any]) -> Any:
        out, lse = attn(*tensors[:3], return_lse=True)
        return out, lse, torch.autograd.grad(out, tensors[:3], tensors[3])

    both(inputs(2 * WINDOW))  # libraries loaded, threads started
    tensors = inputs(length)
    results = 4 * tensors[0].nbytes + 4 * HEADS * length
    print(json.dumps({"peak_bytes": measure.peak_bytes(lambda: both(tensors)), "result_bytes": results}))


def measure_memory(lengths: list[int]) -> list[dict[str, Any]]:
    """One record a length."""
    records = []
    for length in tqdm(lengths, desc="memory", unit="length"):
        found, death = measure.run_child([str(Path(__file__)), "--child", str(length)])
        if death is not None:
            raise RuntimeError(f"memory at {length}: {death}")
        records.append({"length": length} | found)
    return records


# ---- a million tokens ----------------------------------------------------------------------------------------


def million(length: int, checked_rows: int) -> dict[str, Any]:
    """Forward and backward at ``length`` tokens, window 1024, one head; rows of the output and of dq against float64."""
    import torch

    import sparsedsl as sd

    q, k, v, grad_out = inputs(length, heads=1)
    attn = sd.compile(sd.patterns.sliding_window(WINDOW), backend="tiled")
    kept: dict[str, Any] = {}

    def both() -> None:
        start = time.perf_counter()
        kept["out"] = attn(q, k, v)
        kept["forward_s"] = time.perf_counter() - start
        kept["grads"] = torch.autograd.grad(kept["out"], (q, k, v), grad_out)
        kept["both_s"] = time.perf_counter() - start

    first_s = measure.seconds(lambda: attn(*(t[:, :, : 2 * WINDOW].detach() for t in (q, k, v))))
    peak = measure.peak_bytes(both)
    times: dict[str, list[float]] = {"forward_s": [], "both_s": []}
    for _ in tqdm(range(3), desc="again", unit="call"):
        both()
        for key, values in times.items():
            values.append(kept[key])
    out, dq = kept["out"].detach(), kept["grads"][0]
    generator = torch.Generator().manual_seed(1)
    inner = torch.randperm(length, generator=generator)[:checked_rows].tolist()
    rows = sorted({0, length - 1, *inner[: checked_rows - 2]})
    worst = {"out": 0.0, "dq": 0.0}
    largest = {"out": 0.0, "dq": 0.0}
    for row in tqdm(rows, desc="rows in float64", unit="row"):
        want = exact_row(*(t.detach()[0, 0] for t in (q, k, v, grad_out)), row=row)
        for what, got in (("out", out), ("dq", dq)):
            worst[what] = max(worst[what], float((got[0, 0, row] - want[what]).abs().max()))
            largest[what] = max(largest[what], float(want[what].abs().max()))
    return {
        "length": length,
        "window": WINDOW,
        "heads": 1,
        "head_dim": HEAD_DIM,
        "first_call_at_2048_s": first_s,
        "forward_s": median(times["forward_s"]),
        "forward_backward_s": median(times["both_s"]),
        "peak_bytes": peak,
        "result_bytes": 4 * q.nbytes,
        "rows_checked": len(rows),
        "largest_error": worst,
        "largest_entry": largest,
        "all_finite": all(bool(t.isfinite().all()) for t in (out, *kept["grads"])),
        "load_average": measure.load(),
    }


def exact_row(q: Any, k: Any, v: Any, grad_out: Any, *, row: int) -> dict[str, Any]:
    """One row of the output and of dq in float64, written out: softmax over the window, nothing of ours. Tensors ``(S, D)``."""
    import torch

    keys = slice(max(0, row - WINDOW + 1), row + 1)
    query = q[row].double().requires_grad_()
    weights = torch.softmax(k[keys].double() @ query * HEAD_DIM**-0.5, dim=0)
    out = weights @ v[keys].double()
    (dq,) = torch.autograd.grad(out, query, grad_out[row].double())
    return {"out": out.detach(), "dq": dq}


# ---- everything ----------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Rates, gradients and memory, what the machine is taken for, and the targets with what was measured for them."""
    from cases import CASES

    result: dict[str, Any] = {"rates": measure.rates(), "records": []}
    cases = [(name, length) for name in options.patterns for length in options.lengths]
    for name, length in tqdm(cases, desc="forward and backward", unit="case"):
        result["records"].append(measure_rates(name, length, options.rounds))
    length = min(GRADIENT_LENGTH, max(options.lengths))
    masks = [name for name in options.patterns if CASES[name].score_mod is None]  # a mask tensor cannot say a score
    result["gradients"] = [measure_gradients(name, length) for name in tqdm(masks, desc="gradients", unit="pattern")]
    result["memory"] = measure_memory(options.memory_lengths)
    return result | {"targets": checks(result)}


def checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets with what was measured for them."""
    from cases import CASES

    worst = min(result["records"], key=lambda record: float(record["rate_ratio"]))
    where = f"{CASES[worst['pattern']].title}, {length_text(worst['length'])}"
    what = f"rate of tiled / rate of SDPA, forward and backward, lowest ({where})"
    found = [measure.target(what, worst["rate_ratio"], at_least=RATE_RATIO)]
    for record in result["records"]:
        if (record["pattern"], record["length"]) == (FAST_PATTERN, FAST_LENGTH):
            what = f"SDPA / tiled, {CASES[FAST_PATTERN].title}, {length_text(FAST_LENGTH)}"
            found.append(measure.target(what, record["sdpa_over_tiled"], at_least=SPEEDUP))
    if result["gradients"]:
        error = max(record["tiled"][key] / record["sdpa"][key] for record in result["gradients"] for key in record["tiled"])
        found.append(measure.target("error of tiled / error of SDPA against float64, largest", error, at_most=ERROR_RATIO))
    memory = result["memory"]
    if len(memory) >= 2:
        less, more = memory[-2:]
        growth = more["peak_bytes"] / max(less["peak_bytes"], 1) / (more["length"] / less["length"]) * 2
        what = f"memory at twice the length ({length_text(less['length'])} to {length_text(more['length'])})"
        found.append(measure.target(what, growth, at_most=GROWTH))
    return found


# ---- text ----------------------------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    """The tables, and how the targets were met."""
    from cases import CASES

    rates = []
    for record in result["records"]:
        seconds, gflops = record["seconds"], record["gflops"]
        row = [
            CASES[record["pattern"]].title,
            length_text(record["length"]),
            time_text(seconds["tiled"]),
            time_text(seconds["sdpa"]),
        ]
        row += [
            f"{record['sdpa_over_tiled']:.1f}x",
            f"{gflops['tiled']:.0f}",
            f"{gflops['sdpa']:.0f}",
            f"{record['rate_ratio']:.2f}",
        ]
        rates.append(row)
    header = ("forward and backward", "tokens", "tiled", "SDPA causal", "SDPA / tiled", "tiled GFLOP/s", "SDPA GFLOP/s", "ratio")
    parts = [measure.markdown(header, rates)]
    errors = [
        (
            f"{method}: {CASES[record['pattern']].title}, {length_text(record['length'])}",
            *(f"{e:.1e}" for e in record[key].values()),
        )
        for record in result["gradients"]
        for method, key in (("tiled", "tiled"), ("SDPA, masked", "sdpa"))
    ]
    parts.append(measure.markdown(("error against float64", "out", "dq", "dk", "dv"), errors))
    memory = [
        (
            length_text(r["length"]),
            bytes_text(r["peak_bytes"]),
            bytes_text(r["result_bytes"]),
            f"{r['peak_bytes'] / r['length']:,.0f}",
        )
        for r in result["memory"]
    ]
    parts.append(measure.markdown(("tokens", "peak memory", "results alone", "bytes a token"), memory))
    return "\n\n".join([*parts, measure.verdicts(result["targets"])])


def million_text(found: dict[str, Any]) -> str:
    """The one call in words and numbers."""
    errors = ", ".join(
        f"{what} {error:.1e} of {found['largest_entry'][what]:.2g}" for what, error in found["largest_error"].items()
    )
    rows = [
        ("tokens, window, heads, head dimension", f"{found['length']:,}, {found['window']}, 1, {found['head_dim']}"),
        ("first call of the pattern (2,048 tokens)", time_text(found["first_call_at_2048_s"])),
        ("forward (median of 3)", time_text(found["forward_s"])),
        ("forward and backward (median of 3)", time_text(found["forward_backward_s"])),
        ("peak memory (the results alone)", f"{bytes_text(found['peak_bytes'])} ({bytes_text(found['result_bytes'])})"),
        (f"largest error in {found['rows_checked']} rows against float64", errors),
    ]
    return measure.markdown(("one call", "measured"), rows)


# ---- the command line ----------------------------------------------------------------------------------------


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one pattern, short sequences, few rounds: about a minute")
    add("--million", action="store_true", help="forward and backward over a million tokens instead of the tables")
    add("--patterns", nargs="+", choices=PATTERNS, help="default: all")
    add("--lengths", nargs="+", type=int, metavar="TOKENS", help="default: 4K and 8K; one with --million")
    add("--memory-lengths", nargs="+", type=int, metavar="TOKENS", help="default: 4K to 64K")
    add("--rounds", type=int, help="repetitions behind each median (default 5, quick 3)")
    add("--rows", type=int, default=64, help="rows checked with --million (default 64)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/training_cpu[_million]_<machine>.json)")
    options = parser.parse_args(arguments)
    if options.million and options.lengths is not None and len(options.lengths) > 1:
        parser.error(f"--million takes one length; got {options.lengths}")
    options.million_length = (options.lengths or [MILLION])[0]
    quick = options.quick
    options.patterns = options.patterns or ((FAST_PATTERN,) if quick else PATTERNS)
    options.lengths = sorted(options.lengths or ((4096,) if quick else RATE_LENGTHS))
    options.memory_lengths = sorted(options.memory_lengths or ((4096, 8192) if quick else MEMORY_LENGTHS))
    options.rounds = options.rounds or (3 if quick else 5)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the tables and how the targets were met; 0 however they were met."""
    options = options_from(arguments)
    facts = measure.machine()
    start = time.perf_counter()
    if options.million:
        result: dict[str, Any] = {"million": million(options.million_length, options.rows)}
    else:
        result = measure_all(options)
    facts |= {"load_average_end": measure.load(), "benchmark_s": round(time.perf_counter() - start)}
    name = "training_cpu_million" if options.million else "training_cpu"
    path = options.out or measure.result_path(name, facts)
    settings = {
        "batch": 1,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "rounds": options.rounds,
        "quick": options.quick,
    }
    measure.write_json(path, {"benchmark": name, "machine": facts, "settings": settings} | result)
    print(f"Training on the CPU. {measure.describe(facts)}\n")
    print(million_text(result["million"]) if options.million else text(result))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        memory_child(int(sys.argv[2]))
    else:
        sys.exit(main())
