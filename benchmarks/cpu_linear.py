"""Part ``linear`` of ``cpu.py``: linear attention whose decays and write rules come with the data, batch 1, 4 heads.

*ours*: backend ``cpp``. *tiled*: the same in torch. *recurrence*: token by token in torch, of the first tokens, its time multiplied (the
table shows it as a goal). *SDPA*: dense and causal, as many heads, as wide as keys. Every work is measured forward, and forward and
backward with gradients of q, k, v and the gates. *useful* counts what states and chunks of 64 tokens cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cpu_record import LIMITS, Job, Part, Record, judge, measured, new_record
from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

import sparsedsl as sd

__all__ = ["LINEAR"]

HEADS, STEPS = 4, 256  # STEPS: tokens that the recurrence is measured on
WORKS = {"gdn": "Gated DeltaNet", "kda": "KDA", "mamba2": "Mamba-2"}
PROGRAMS = {"gdn": sd.patterns.gated_delta, "kda": sd.patterns.kda, "mamba2": sd.patterns.ssd}
GOAL_AT, GOAL = 8192, 8.0  # dense attention's time over ours


def drawn(work: str, length: int, dim: int, dtype: str) -> dict[str, torch.Tensor]:
    """q, k, v and the gates: those of Mamba-2 with one group, and values of half the width."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype))

    groups, wide = (1, dim // 2) if work == "mamba2" else (HEADS, dim)
    q, k = (normalize(random(1, groups, length, dim), dim=-1) for _ in range(2))
    gates = {"g": logsigmoid(random(1, HEADS, length, *([dim] if work == "kda" else [])).float() + 2)}
    if work != "mamba2":
        gates["beta"] = random(1, HEADS, length).float().sigmoid()
    return {"q": q, "k": k, "v": random(1, HEADS, length, wide), **gates}


def recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor | None = None
) -> torch.Tensor:
    """As it is defined, token by token."""
    q, k = (x.expand(-1, v.shape[1], -1, -1).float() for x in (q * q.shape[3] ** -0.5, k))
    state, rows = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]), []
    kept = (g if g.ndim == 4 else g[..., None]).exp()
    for t in range(k.shape[2]):
        state, value = kept[:, :, t, :, None] * state, v[:, :, t].float()
        if beta is not None:
            value = beta[:, :, t, None] * (value - (k[:, :, t, None] @ state)[:, :, 0])
        state = state + k[:, :, t, :, None] * value[:, :, None]
        rows.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(rows, 2)


def measure_linear(job: Job) -> Iterator[Record]:
    """Two records: forward, and forward and backward."""
    given = drawn(job.work, job.length, job.dim, job.dtype)
    program = PROGRAMS[job.work]()
    ours, tiled = (sd.compile(program, backend=backend) for backend in ("cpp", "tiled"))
    few, short = min(job.length, STEPS), min(job.length, LIMITS.now.dense_to)
    start = {name: x[:, :, :few].contiguous() for name, x in given.items()}
    dense = {name: torch.randn(1, HEADS, short, job.dim).to(given["q"].dtype) for name in "qkv"}
    for train in (False, True):
        actions = {"ours": _action(ours, given, train), "tiled": _action(tiled, given, train)}
        actions |= {"recurrence": _action(recurrence, start, train), "sdpa": _action(_sdpa, dense, train)}
        record = new_record(dataclasses.replace(job, train=train), WORKS[job.work]) | {"heads": HEADS}
        report = sd.analyse(program, job.length, heads=given["q"].shape[1], head_dim=job.dim, head_dim_v=given["v"].shape[3],
                            sizes={"value_heads": HEADS})  # fmt: skip
        scale = {"recurrence": job.length / few, "sdpa": (job.length / short) ** 2}
        measured(record, actions, job.rounds, operations=None if train else float(report.flops), scale=scale)
        if job.length == GOAL_AT:
            judge(record, "SDPA / ours", record["over_ours"]["sdpa"], at_least=GOAL)
        judge(record, "recurrence / ours", record["over_ours"]["recurrence"], at_least=1.0)
        yield record


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _action(run: Callable[..., torch.Tensor], given: dict[str, torch.Tensor], train: bool) -> Callable[[], Any]:
    """One call, with gradients if they are wanted."""
    if not train:

        def forward() -> Any:
            with torch.no_grad():
                return run(**given)

        return forward
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    return lambda: torch.autograd.grad(run(**leaves).float().square().sum(), list(leaves.values()))


LINEAR = Part(
    works=WORKS, measure=measure_linear, lengths=(8192, 32768), quick_lengths=(1024,), quick=("gdn", "mamba2"), dims=(128,), rounds=5,
)  # fmt: skip
