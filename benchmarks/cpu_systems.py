"""Part ``systems`` of ``cpu.py``: systems that choose, reorder and remember, batch 1, 8 heads of queries on 2 of keys, 64 wide.

*ours*: backend ``cpp``, choosing included. *tiled*: the same on our other backend, to 8K. *SDPA*: dense and causal with ``enable_gqa``;
beyond 32K its time is that at 32K times the square of the ratio of lengths, and the record says so (``estimated``). *ideal*: the products
of dense causal attention over those of attending and choosing, all at one rate. *useful* counts those of attending and choosing.

q, k and v are random numbers, or (``--activations``) those of a full-attention layer of Gemma 3 270M on real text, 4 heads on 1, 256 wide
(``activations.py``). With ``--train`` forward and backward, gradients of q, k, v and of all inputs that learn. Records hold what each kind
of node took in one more call (``parts``, see ``systems_split.py``), and, to 32K, the share of causal pairs that attend (``density``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from cpu_record import LIMITS, Job, Part, Record, judge, measured, new_record
from systems_cases import SYSTEMS, Shape, System, density, random_qkv
from systems_split import split_call
from torch.nn.functional import scaled_dot_product_attention

import sparsedsl as sd

__all__ = ["PROGRAMS", "PROGRAM_SHAPE", "SYSTEMS_PART", "inputs_of"]

PROGRAM_SHAPE = Shape(8, 2, 64)


def _quest(heads: int, part: int) -> Any:
    return sd.attend((sd.kv_idx <= sd.q_idx) & sd.top_k(sd.bound(sd.q, sd.k, 16 // part), 32))


PROGRAMS = {
    "hsa": SYSTEMS["hsa"], "moba": SYSTEMS["moba"], "nsa": SYSTEMS["nsa"],
    "quest": System("Quest, 32 pages of 16", _quest, PROGRAM_SHAPE, trains=True),
    "dsa": SYSTEMS["dsa"], "nha": SYSTEMS["nha"], "ring": SYSTEMS["ring"], "pbs": SYSTEMS["pbs"], "tsa": SYSTEMS["tsa"],
    "tsa_pbs": SYSTEMS["tsa_pbs"], "flexprefill": SYSTEMS["flexprefill"], "tsa_flexprefill": SYSTEMS["tsa_flexprefill"],
}  # fmt: skip
# Goals: dense attention's time over ours, as a share of the ideal; or at 8K. Where much can be won, never slower than dense.
SHARES = {"hsa": 0.7, "moba": 0.7, "nsa": 0.6, "quest": 0.5}
SPEEDUPS = {("nha", 8192): 8.0, ("ring", 8192): 15.0}
WORTH = 2.0  # an ideal beyond it
TRAINING_SHARE = 0.5  # of the goal forward


def inputs_of(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v."""
    dtype = getattr(torch, job.dtype)
    if not job.activations:
        return random_qkv(Shape(PROGRAM_SHAPE.heads, PROGRAM_SHAPE.kv_heads, job.dim), job.length, dtype=dtype)
    from activations import captured

    q, k, v = (t.to(dtype) for t in captured(job.length))
    return q, k, v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention of torch."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def measure_system(job: Job) -> Iterator[Record]:
    """One record."""
    system, (q, k, v) = PROGRAMS[job.work], inputs_of(job)
    program, named = system.program(q.shape[1], job.length), system.inputs(q, k)
    report = sd.analyse(program, job.length, heads=q.shape[1], kv_heads=k.shape[1], head_dim=q.shape[3])
    ours, tiled = (sd.compile(program, backend=backend) for backend in ("cpp", "tiled"))
    short = min(job.length, LIMITS.now.dense_to)
    actions = {"ours": _action(ours, [q, k, v], named, job.train)}
    if job.length <= LIMITS.now.tiled_to:
        actions["tiled"] = _action(tiled, [q, k, v], named, job.train)
    actions["sdpa"] = _action(dense, [t[:, :, :short] for t in (q, k, v)], {}, job.train)
    record = new_record(job, system.title)
    record |= {"inputs": "captured" if job.activations else "random", "heads": q.shape[1], "kv_heads": k.shape[1]}
    record |= {"head_dim": q.shape[3], "ideal": report.flops_dense / 2 / report.flops}
    operations = None if job.train else float(report.flops)
    measured(record, actions, job.rounds, operations=operations, scale={"sdpa": (job.length / short) ** 2})
    if short < job.length:
        record["estimated"] = {"sdpa": f"measured at {short} tokens, times the square of the ratio of lengths"}
    if not job.train:
        with torch.no_grad():
            record["parts"] = split_call(ours, q, k, v, named)[1]
            if job.length <= LIMITS.now.density_to:
                record["density"] = density(program, q, k, v, named)
    wanted = goal(job.work, job.length, record["ideal"]) * (TRAINING_SHARE if job.train else 1.0)
    if wanted:
        judge(record, "SDPA / ours", record["over_ours"]["sdpa"], at_least=wanted)
    yield record


def goal(work: str, length: int, ideal: float) -> float:
    """What dense attention's time over ours should be, forward; 0 if nothing was said."""
    least = 1.0 if ideal > WORTH else 0.0
    return max(SPEEDUPS.get((work, length), 0.0), SHARES.get(work, 0.0) * ideal, least)


def _action(run: Callable[..., Any], tensors: list[torch.Tensor], named: dict[str, Any], train: bool) -> Callable[[], Any]:
    """One call, with gradients if they are wanted."""
    if not train:

        def forward() -> Any:
            with torch.no_grad():
                return run(*tensors, **named)

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *named.values())]
    learned = dict(zip(named, leaves[3:], strict=True))
    grad_out = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(2)).to(tensors[0].dtype)
    return lambda: torch.autograd.grad(run(*leaves[:3], **learned), leaves, grad_out, allow_unused=True)


SYSTEMS_PART = Part(
    works={name: system.title for name, system in PROGRAMS.items()}, measure=measure_system, lengths=(8192, 32768, 131072),
    quick_lengths=(1024,), quick=("hsa", "ring"), skips=lambda work, length, train: train and not PROGRAMS[work].trains,
)  # fmt: skip
