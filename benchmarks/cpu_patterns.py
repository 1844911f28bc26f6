"""Parts ``patterns`` and ``training`` of ``cpu.py``: static patterns, batch 1, 4 heads, against what else there is on CPU.

*ours* is generated C++ (backend ``cpp``), checks included, compiled before; *tiled* our other backend; *flex* compiled FlexAttention with
mask and score written by hand (``cases.py``), one kernel for each length and width, its mask made before; *SDPA* dense and causal, whatever
the pattern. *Useful* operations are 4 for each allowed pair and entry of a head forward, 14 forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import measure
import torch
from cases import BLOCK, CASES
from cpu_record import Job, Part, Record, judge, measured, new_record
from torch.nn.functional import scaled_dot_product_attention

import sparsedsl as sd

__all__ = ["PATTERNS", "SUITE", "TRAINING"]

HEADS = 4
SUITE = (
    "window256", "window", "window4096", "sinks", "dilated", "causal_documents", "chunked", "prefix", "alibi", "softcap",
    "blocks5", "blocks10", "blocks25",
)  # fmt: skip
TRAINED = ("window512", "window", "causal", "causal_documents", "alibi", "blocks10")
FORWARD, BOTH = 4, 14  # operations a pair and entry: q k and p v; again q k, and those for dv, dp, dq, dk
# Goals. FlexAttention's time over ours, by width, of the whole suite and of any pattern; useful rate over that of a product;
# our float32 over our bfloat16; dense attention's time over ours, forward and backward.
SPEEDUPS, LEAST_SPEEDUP = {64: 2.0, 128: 1.8}, 1.3
RATES = {"causal": 0.85, "window": 0.85, "window4096": 0.85, "window256": 0.6, "blocks10": 0.6}
HALF_WIDTH = 0.95
TRAINING_SPEEDUPS = {("window512", 8192): 9.0}


def inputs(job: Job, dtype: str, count: int) -> list[torch.Tensor]:
    """Random numbers, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, job.length, job.dim)
    return [torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for _ in range(count)]


@functools.cache
def allowed(name: str, length: int) -> float:
    """Pairs of a query and a key that attend, over all heads."""
    tables: dict[str, Any] = dict(CASES[name].tables(length))
    return sd.analyse(CASES[name].declare(), length, heads=HEADS, **tables).density * length**2 * HEADS


# ---- forward -------------------------------------------------------------------------------------------------


@functools.cache
def _mask_by_hand(name: str, length: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    mask_mod: Any = CASES[name].mask_mod(CASES[name].tables(length))
    return create_block_mask(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK, _compile=True)


def measure_pattern(job: Job) -> Iterator[Record]:
    """One record."""
    from torch.nn.attention.flex_attention import flex_attention

    # What does not fit into the compile cache would run uncompiled, silently: twenty times slower.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    case, mask = CASES[job.work], _mask_by_hand(job.work, job.length)
    tables: dict[str, Any] = dict(case.tables(job.length))
    torch._dynamo.reset()
    flex = torch.compile(flex_attention, dynamic=False)
    ours, tiled = (sd.compile(case.declare(), backend=backend) for backend in ("cpp", "tiled"))
    q, k, v = qkv = inputs(job, job.dtype, 3)
    actions: dict[str, Callable[[], Any]] = {
        "ours": functools.partial(ours, *qkv, **tables),
        "tiled": functools.partial(tiled, *qkv, **tables),
        "flex": lambda: flex(q, k, v, score_mod=case.score_mod, block_mask=mask),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if job.dtype != "float32":
        actions["own_float32"] = functools.partial(ours, *inputs(job, "float32", 3), **tables)
    record = new_record(job, case.title)
    with torch.no_grad():
        measured(record, actions, job.rounds, operations=FORWARD * job.dim * allowed(job.work, job.length))
        record["largest_difference"] = float((actions["ours"]() - actions["flex"]()).abs().max())
    _judge_pattern(record)
    yield record


def _judge_pattern(record: Record) -> None:
    over = record["over_ours"]
    if record["work"] in SUITE and record["head_dim"] in SPEEDUPS:
        judge(record, "flex / ours", over["flex"], at_least=LEAST_SPEEDUP)
    if record["work"] in RATES and record["dtype"] == "float32":
        judge(record, "useful / product", record["rate_ratio"], at_least=RATES[record["work"]])
    if record["dtype"] == "bfloat16":
        judge(record, "own float32 / ours", over["own_float32"], at_least=HALF_WIDTH)


def pattern_targets(records: list[Record]) -> list[dict[str, Any]]:
    """Of the suite as far as it was measured: the geometric mean and the lowest of FlexAttention's time over ours, by width and dtype."""
    found = []
    for dim, dtype in sorted({(record["head_dim"], record["dtype"]) for record in records}):
        own = [r for r in records if (r["head_dim"], r["dtype"]) == (dim, dtype) and r["work"] in SUITE]
        among = {f"{r['work']}/{r['length']}": r["over_ours"]["flex"] for r in own}
        if among and dim in SPEEDUPS:
            where = f"flex / ours, D {dim}, {dtype}, {len(among)} cases"
            mean = measure.geometric_mean(among.values())
            found.append(measure.target(f"{where}, geometric mean", mean, at_least=SPEEDUPS[dim]))
            lowest = min(among, key=lambda name: among[name])
            found.append(measure.target(f"{where}, lowest ({lowest})", among[lowest], at_least=LEAST_SPEEDUP))
    return found


# ---- forward and backward ------------------------------------------------------------------------------------


def measure_training(job: Job) -> Iterator[Record]:
    """One record: the output and the gradients of q, k and v."""
    case = CASES[job.work]
    tables: dict[str, Any] = dict(case.tables(job.length))
    *leaves, grad_out = inputs(job, job.dtype, 4)
    for leaf in leaves:
        leaf.requires_grad_()

    def both(run: Callable[..., Any], **words: Any) -> Any:
        return torch.autograd.grad(run(*leaves, **words), leaves, grad_out)

    ours, tiled = (sd.compile(case.declare(), backend=backend) for backend in ("cpp", "tiled"))
    actions = {
        "ours": functools.partial(both, ours, **tables),
        "tiled": functools.partial(both, tiled, **tables),
        "sdpa": functools.partial(both, scaled_dot_product_attention, is_causal=True),
    }
    record = measured(new_record(job, case.title), actions, job.rounds, operations=BOTH * job.dim * allowed(job.work, job.length))
    wanted = TRAINING_SPEEDUPS.get((job.work, job.length))
    if wanted is not None and (job.dim, job.dtype) == (64, "float32"):
        judge(record, "SDPA / ours", record["over_ours"]["sdpa"], at_least=wanted)
    yield record


PATTERNS = Part(
    works={name: CASES[name].title for name in (*SUITE, "causal")}, measure=measure_pattern, lengths=(8192, 32768), quick_lengths=(2048,),
    quick=("window", "blocks10"), dims=(64, 128), dtypes=("float32", "bfloat16"), targets=pattern_targets,
)  # fmt: skip
TRAINING = Part(
    works={name: CASES[name].title for name in (*TRAINED, *(name for name in SUITE if name not in TRAINED))}, measure=measure_training,
    lengths=(8192,), quick_lengths=(2048,), quick=("window512",), skips=lambda work, length, train: work not in TRAINED,
)  # fmt: skip
