"""The part of ``gpu.py`` that measures systems which choose, reorder and remember (kind ``"system"``): HSA, NHA, PBS, TSA, Ring, MoBA, NSA.

Shapes are those of the papers: batch 1, 32 heads of 128. *ours* is the program on the backend of the run, *flex* the same program with its
attentions on FlexAttention, *sdpa* dense causal attention, which computes something else: its time is the measure. Where choices
need structure, inputs are made up to have some (``systems_cases.topics``), as no model is at hand; the density stands beside the times.

Programs choose in the same torch code whatever they attend with, so *ours* and *flex* are compared with backend ``tiled`` on the same
inputs. Both round out, weights, gradients of logits and the operands of their products to the dtype, each by at most its ``eps``, so that a
row, as a vector, may be off by eight of them of its norm (or of the mean row's, where a row is the sum of what cancels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import Job
from gpu_clock import Clock
from gpu_reference import Problem
from systems_cases import SYSTEMS, Shape, density, random_qkv, topics
from systems_split import split_call

import sparsedsl as sd

__all__ = ["CHECKED", "Known", "compiled", "system_facts", "system_problem", "system_reference"]

# Tokens up to which results are compared; of longer jobs the same calls are, at this length.
CHECKED = 16384
ROUNDINGS = 8
SPLITS = 3


def system_problem(job: Job, device: str, *, dry: bool = False) -> tuple[Problem, dict[str, torch.Tensor]]:
    """q, k, v, a gradient of the output where the system trains, and the inputs by name."""
    system, dtype = SYSTEMS[job.pattern], torch.bfloat16 if device == "cuda" else torch.float16
    shape = Shape(job.heads, job.kv_heads, job.head_dim)
    draw = topics if system.captured and not dry else random_qkv
    q, k, v = draw(shape, job.length, device=device, dtype=dtype)
    d_out = random_qkv(shape, job.length, device=device, dtype=dtype, seed=1)[0] if system.trains else None
    return Problem(q, k, v, d_out, _causal, None), system.inputs(q, k)


def _causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return q_idx >= kv_idx


def compiled(job: Job, backend: str) -> Any:
    """The program of a job on a backend."""
    return sd.compile(SYSTEMS[job.pattern].program(job.heads, job.length), backend=backend)


@dataclass(frozen=True)
class Known:
    """Results by name, as backend ``tiled`` has them."""

    values: dict[str, torch.Tensor]

    def errors(self, results: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Of each result: the largest error, the worst row's share of what it is allowed, and whether that is at most 1."""
        found = {}
        for name, got in results.items():
            wanted = self.values[name]
            off, rows = got.detach().float() - wanted, wanted.norm(dim=-1)
            limit = ROUNDINGS * torch.finfo(got.dtype).eps * torch.maximum(rows, rows.square().mean().sqrt()).clamp_min(1e-30)
            worst = float((off.norm(dim=-1) / limit).max())
            found[name] = {
                "largest": float(off.abs().max()),
                "relative": float(off.norm() / wanted.norm().clamp_min(1e-30)),
                "of_allowed": worst if worst == worst else "nan",
                "right": bool(worst <= 1.0),
            }
        return found


def system_reference(job: Job, problem: Problem, named: dict[str, torch.Tensor]) -> Known:
    """What ``tiled`` makes of the same inputs; gradients where the system trains."""
    attn, trains = compiled(job, "tiled"), problem.d_out is not None
    leaves = [x.detach().requires_grad_(trains) for x in (problem.q, problem.k, problem.v)]
    with torch.set_grad_enabled(trains):
        found = {"out": attn(*leaves, **named)}
        if trains:
            found |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(found["out"], leaves, problem.d_out), strict=True))
    return Known({name: x.detach().float() for name, x in found.items()})


def system_facts(job: Job, problem: Problem, named: dict[str, torch.Tensor], backend: str, clock: Clock) -> dict[str, Any]:
    """How much attends, and where the time of ours goes: choosing, moving, attending, with the device waited for at every node."""
    attn = compiled(job, backend)
    with torch.no_grad():
        split_call(attn, problem.q, problem.k, problem.v, named, clock.wait)
        parts = [split_call(attn, problem.q, problem.k, problem.v, named, clock.wait)[1] for _ in range(SPLITS)]
    best = min(parts, key=lambda part: sum(part.values()))
    program = SYSTEMS[job.pattern].program(job.heads, job.length)
    return {"density": density(program, problem.q, problem.k, problem.v, named), "parts": best}
