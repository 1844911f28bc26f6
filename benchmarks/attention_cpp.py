"""The part of ``attention_cpu.py --backend cpp``: generated C++ against compiled FlexAttention by hand, `tiled`, and dense causal SDPA.

Batch 1, 4 heads, float32, no gradients; one process a pattern. For each head dimension and length, in turns: *cpp* and *tiled* (checks
included, the pattern compiled before), *flex* (as in ``attention_tiled.py``: one kernel by hand for each length and head dimension), *SDPA*
(dense, whatever the pattern), and a *product*: 1,536 x 1,536 x 1,536 of torch, for the rate of this machine.

Times are medians, ratios medians of the ratios within one round. *Useful* GFLOP/s count 4 operations for each pair that the pattern
allows and each entry of a head; beside them stands the rate of the product, which is about the limit. ``OMP_NUM_THREADS=1`` measures
one core.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
from attention_tiled import BATCH, BLOCK, DIMS, HEADS, LENGTHS, PATTERNS, QUICK_DIMS, QUICK_LENGTHS, QUICK_PATTERNS, ROUNDS
from measure import length_text, median, time_text
from tqdm import tqdm

__all__ = [
    "BLOCK",
    "DIMS",
    "HEADS",
    "LENGTHS",
    "PATTERNS",
    "QUICK_DIMS",
    "QUICK_LENGTHS",
    "QUICK_PATTERNS",
    "ROUNDS",
    "measure_all",
    "text",
]

PRODUCT = 1536
# Targets of issue 12: flex / cpp by head dimension, of no pattern less; useful rate over that of the product, by pattern.
SPEEDUPS, LEAST_SPEEDUP = {64: 2.0, 128: 1.8}, 1.3
RATES = {"window256": 0.6, "window": 0.85, "window4096": 0.85, "blocks10": 0.6}


def child(name: str, lengths: list[int], dims: list[int], rounds: int) -> None:
    """Measure, and print one JSON object for each head dimension and length."""
    import torch
    from cases import CASES
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.functional import scaled_dot_product_attention

    import sparsedsl as sd

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would run uncompiled, twenty times slower
    case = CASES[name]
    pattern = case.declare()
    matrix = torch.randn(PRODUCT, PRODUCT)
    for length in lengths:
        tables: dict[str, Any] = dict(case.tables(length))
        torch._dynamo.reset()
        mask: Any = create_block_mask(
            case.mask_mod(tables), None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK, _compile=True
        )
        allowed = sd.analyse(pattern, length, heads=HEADS, **tables).density * length * length * BATCH * HEADS
        for dim in dims:
            torch._dynamo.reset()
            flex = torch.compile(flex_attention, dynamic=False)
            ours = {backend: sd.compile(pattern, backend=backend) for backend in ("cpp", "tiled")}
            generator = torch.Generator().manual_seed(0)
            qkv: Any = [torch.randn(BATCH, HEADS, length, dim, generator=generator) for _ in range(3)]

            def by_hand(flex: Any = flex, qkv: Any = qkv, mask: Any = mask) -> Any:
                return flex(*qkv, score_mod=case.score_mod, block_mask=mask)

            def dense(qkv: Any = qkv) -> Any:
                q, k, v = qkv
                return scaled_dot_product_attention(q, k, v, is_causal=True)

            actions: dict[str, Callable[[], Any]] = {
                "cpp": functools.partial(ours["cpp"], *qkv, **tables),
                "tiled": functools.partial(ours["tiled"], *qkv, **tables),
                "flex": by_hand,
                "sdpa": dense,
                "product": functools.partial(torch.mm, matrix, matrix),
            }
            with torch.no_grad():
                first = {key: measure.seconds(action) for key, action in actions.items()}
                difference = float((actions["cpp"]() - by_hand()).abs().max())
                found = measure.alternate(actions, rounds, limit_s=12)
            useful = [4 * dim * allowed / s for s in found["cpp"]]
            product = [2 * PRODUCT**3 / s for s in found["product"]]
            record = {
                "length": length,
                "head_dim": dim,
                "threads": torch.get_num_threads(),
                "seconds": {key: median(values) for key, values in found.items()},
                "best_seconds": {key: min(values) for key, values in found.items()},
                "first_seconds": first,
                "rounds": len(found["cpp"]),
                "flex_over_cpp": median(b / a for a, b in zip(found["cpp"], found["flex"], strict=True)),
                "tiled_over_cpp": median(b / a for a, b in zip(found["cpp"], found["tiled"], strict=True)),
                "useful_gflops": median(useful) / 1e9,
                "product_gflops": median(product) / 1e9,
                "rate_ratio": median(a / b for a, b in zip(useful, product, strict=True)),
                "largest_difference": difference,
                "load_average": measure.load(),
            }
            print(json.dumps({f"{dim}/{length}": record}), flush=True)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """One record for each pattern, head dimension and length, and the targets."""
    records = []
    lengths, dims = (",".join(map(str, values)) for values in (options.lengths, options.dims))
    for name in tqdm(options.patterns, desc="attention", unit="pattern"):
        with tempfile.TemporaryDirectory(prefix="attention-cpu-") as cache:
            env = {} if options.keep_cache else {"TORCHINDUCTOR_CACHE_DIR": cache}
            found, death = measure.run_child([str(Path(__file__)), name, lengths, dims, str(options.rounds)], env)
        if death is not None:
            raise RuntimeError(f"{name}: {death}")
        records += [{"pattern": name} | found[f"{dim}/{length}"] for dim in options.dims for length in options.lengths]
    return {"records": records, "targets": checks(records)}


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets with what was measured for them."""
    from cases import CASES

    found = []
    for dim, wanted in SPEEDUPS.items():
        ratios = [record["flex_over_cpp"] for record in records if record["head_dim"] == dim]
        if ratios:
            found.append(measure.target(f"flex / cpp, D {dim}, geometric mean", measure.geometric_mean(ratios), at_least=wanted))
            found.append(measure.target(f"flex / cpp, D {dim}, lowest", min(ratios), at_least=LEAST_SPEEDUP))
    for name, wanted in RATES.items():
        ratios = [record["rate_ratio"] for record in records if record["pattern"] == name]
        if ratios:
            what = f"useful rate / rate of the product, {CASES[name].title}, lowest"
            found.append(measure.target(what, min(ratios), at_least=wanted))
    return found


def text(result: dict[str, Any]) -> str:
    """The table, and how the targets were met."""
    from cases import CASES

    header = ["pattern", "D", "tokens", "cpp", "tiled", "flex", "flex / cpp", "tiled / cpp", "SDPA causal", "useful GFLOP/s"]
    header += ["product GFLOP/s", "ratio"]
    rows = []
    for record in result["records"]:
        took = record["seconds"]
        row = [CASES[record["pattern"]].title, str(record["head_dim"]), length_text(record["length"])]
        row += [time_text(took[key]) for key in ("cpp", "tiled", "flex")]
        row += [f"{record[key]:.2f}" for key in ("flex_over_cpp", "tiled_over_cpp")] + [time_text(took["sdpa"])]
        rows.append([*row, *(f"{record[key]:.0f}" for key in ("useful_gflops", "product_gflops")), f"{record['rate_ratio']:.2f}"])
    return "\n\n".join([measure.markdown(header, rows), measure.verdicts(result["targets"])])


if __name__ == "__main__":
    pattern_name, given_lengths, given_dims, given_rounds = sys.argv[1:]
    child(pattern_name, [int(n) for n in given_lengths.split(",")], [int(n) for n in given_dims.split(",")], int(given_rounds))
