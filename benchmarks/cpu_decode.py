"""Part ``decode`` of ``cpu.py``: one new token with a cache of keys and values, 8 heads of queries on 2 of keys, 64 wide.

*ours*: backend ``cpp``; what chooses does so from the keys alone, in every step (HSA has its landmarks). *kept summaries*: the same with
what earlier steps made of blocks that are over; half a block is not. *SDPA*: the dense step over all keys, ``enable_gqa``. Ring-linear
remembers a state in place of keys. At a million keys: the window, HSA and Ring, or what ``--works`` names; ``--lengths 16777216 --dtypes
bfloat16 --works hsa`` takes 9 GiB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import CASES
from cpu_record import Job, Part, Record, judge, measured, new_record
from cpu_systems import PROGRAM_SHAPE, PROGRAMS
from torch.nn.functional import scaled_dot_product_attention

import sparsedsl as sd

__all__ = ["DECODE"]

PATTERNS = ("window", "causal")
WORKS = {name: f"a step: {CASES[name].title}" for name in PATTERNS}
WORKS |= {name: f"a step: {PROGRAMS[name].title}" for name in ("hsa", "moba", "quest", "ring")}
FEW = 131072  # keys, beyond which only what reads few of them is measured
# Goals, at 32K: our step over the dense one.
GOAL_AT, SHARES = 32768, {"window": 0.03, "causal": 0.7, "hsa": 0.1, "moba": 0.4, "quest": 0.4}
KEPT_SHARE = 0.1
# Tokens in a block that is summed up.
BLOCKS = {"moba": 512, "quest": 16}


def measure_steps(job: Job) -> Iterator[Record]:
    """One record."""
    generator, shape = torch.Generator().manual_seed(0), PROGRAM_SHAPE
    sizes = ((shape.heads, 1), (shape.kv_heads, job.length), (shape.kv_heads, job.length))
    q, k, v = (
        torch.randn(1, heads, length, job.dim, generator=generator, dtype=getattr(torch, job.dtype)) for heads, length in sizes
    )
    with torch.no_grad():
        actions: dict[str, Callable[[], Any]] = {
            "ours": _step(job.work, q, k, v),
            "sdpa": functools.partial(scaled_dot_product_attention, q, k, v, enable_gqa=True),
        }
        if job.work in BLOCKS:
            actions["kept"] = _kept_step(job.work, q, k, v)
        record = measured(new_record(job, WORKS[job.work]), actions, job.rounds)
    if job.length == GOAL_AT and job.work in SHARES:
        judge(record, "ours / SDPA", record["median"]["ours"] / record["median"]["sdpa"], at_most=SHARES[job.work])
        if "kept" in record["median"]:
            share = record["median"]["kept"] / record["median"]["sdpa"]
            judge(record, "kept summaries / SDPA", share, at_most=KEPT_SHARE)
    yield record


def _step(work: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    """One token more."""
    length = k.shape[2]
    if work in PATTERNS:
        attn = sd.compile(CASES[work].declare(), backend="cpp")
        return lambda: attn(q, k, v, q_offset=length - 1)
    system = PROGRAMS[work]
    attn = sd.compile(system.program(q.shape[1], length), backend="cpp")
    if work == "ring":
        some = min(256, length - 1)
        _, state = attn(q.expand(-1, -1, some, -1).contiguous(), k[:, :, :some], v[:, :, :some], return_state=True)
        last = [t[:, :, -1:].contiguous() for t in (k, v)]
        return lambda: attn(q, *last, state=state, return_state=True)
    named = system.inputs(q, k)
    return lambda: attn(q, k, v, q_offset=length - 1, **named)


def _kept_step(work: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    """The step in the middle of a block, with the summaries of those before it."""
    attn = sd.compile(PROGRAMS[work].program(q.shape[1], k.shape[2]), backend="cpp")
    length = k.shape[2] - BLOCKS[work] // 2
    k, v = (x[:, :, :length].contiguous() for x in (k, v))
    kept = attn.keep_summaries()
    return lambda: attn(q, k, v, q_offset=length - 1, summaries=kept)


DECODE = Part(
    works=WORKS, measure=measure_steps, lengths=(8192, 32768, 2**20), quick_lengths=(2048,), quick=("window", "hsa"), rounds=41,
    skips=lambda work, length, train: length > FEW and work not in ("window", "hsa", "ring"),
)  # fmt: skip
