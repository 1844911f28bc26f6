"""Programs that choose, and programs that run along the keys, with inputs for a sequence of any length, and how a call on ranks compares
with that of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from tests.parallel.ranks import numbers

__all__ = [
    "HEADS",
    "PROGRAMS",
    "SCANS",
    "assert_one_process",
    "by_owner",
    "drawn",
    "on_one",
    "only_wanted_keys",
    "part_of",
    "score",
]

HEADS, KV_HEADS, WIDTH = 4, 2, 8
ALLOW = ("selection reads later queries",)
CAUSAL, OWN = kv_idx <= q_idx, q_idx // 8 == kv_idx // 8
INDEX_Q, INDEX_K = sd.input("index_q", "batch heads queries 4"), sd.input("index_k", "batch one keys 4")
COARSE = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 3, among=(kv_idx // 16 + 1) * 16 <= q_idx + 1)
PROGRAMS: dict[str, Any] = {
    "hsa": sd.patterns.hsa(chunk=8, top_k=3),
    "moba": sd.patterns.moba(chunk=16, top_k=3),
    "nsa": sd.patterns.nsa(block=8, select=16, top_k=4, window=20),
    "quest": sd.attend(CAUSAL & (OWN | sd.top_k(sd.bound(sd.q, sd.k, 8), 4))),
    "dsa": sd.attend(CAUSAL & sd.top_k(sd.dot(INDEX_Q, INDEX_K).relu().over_heads("sum"), 12, among=CAUSAL)),
    "window": sd.attend(
        CAUSAL & ((q_idx - kv_idx < 40) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 1, among=CAUSAL & (kv_idx < 32)))
    ),
    # Choices of two sizes, one within the other, one for blocks of queries, one that takes away, and a sink.
    "two sizes": sd.attend(CAUSAL & (OWN | COARSE | sd.top_k(sd.bound(sd.q, sd.k, 8), 2, among=CAUSAL & COARSE)), sink=0.2),
    "blocks of queries": sd.attend(CAUSAL & (OWN | sd.top_p(sd.dot(sd.summary(sd.q, 16), sd.summary(sd.k, 16)), 0.6))),
    "taken away": sd.attend(CAUSAL & (~sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 2) | OWN)),
}
DECAYS, NEAR = [0.9, 0.8, 0.99, 1.0], q_idx - kv_idx < 9
DOCUMENTS, GATE = sd.input("documents", "batch keys"), sd.input("gate", "batch kv_heads keys 5")
DECAY, BETA = sd.input("decay", "batch kv_heads keys"), sd.input("beta", "batch kv_heads keys")
ROWS = "batch value_heads keys head_dim"
CHANNELS = sd.input("decays", ROWS)
BEHIND = sd.linear(1.0, features="elu1", normalised="sum", delay=9, first=3)
# States that fade by constants and by gates, row by row, with corrections, with documents, behind a delay, under one softmax with a
# window, beside choices; and slots.
SCANS: dict[str, Any] = {
    "constant": sd.patterns.ring_linear(DECAYS),
    "constant, documents": sd.linear(0.9, documents=DOCUMENTS),
    "gates": sd.linear(decay=DECAY, features="elu1", normalised="sum"),
    "gates, documents": sd.linear(decay=DECAY, documents=DOCUMENTS),
    "strengths": sd.linear(decay=DECAY, write=sd.input("write", "batch kv_heads keys"), normalised="max1"),
    "read before": sd.linear(decay=CHANNELS, reads="before", bonus=sd.input("bonus", "heads head_dim")),
    "series": sd.patterns.based(),
    "corrected": sd.patterns.delta_net(),
    "gated, corrected": sd.linear(decay=DECAY, beta=BETA, features="l2"),
    "corrected, rows": sd.linear(decay=CHANNELS, beta=BETA, features="l2"),
    "corrected, documents": sd.linear(decay=DECAY, beta=BETA, features="l2", documents=DOCUMENTS),
    "erased along another": sd.linear(decay=CHANNELS, erase=sd.input("erase", ROWS), along=sd.input("along", ROWS)),
    "erased, documents": sd.linear(decay=CHANNELS, erase=sd.input("erase", ROWS), documents=DOCUMENTS),
    "behind a window": sd.joint(sd.attend(CAUSAL & (NEAR | (kv_idx < 3))), BEHIND),
    "beside a choice": sd.mix(sd.linear(DECAYS), PROGRAMS["moba"], weights=sd.input("shares", "batch heads queries 2")),
    "slots": sd.patterns.nha(slots=5, window=8),
    "slots, first": sd.patterns.nha(slots=5, window=8, first=4),
    "slots, masked": sd.patterns.nha(slots=5, window=8, empty="masked"),
    "slots, documents": sd.recall(sd.slots(GATE, delay=4, documents=DOCUMENTS, temperature=4)),
    "slots, masked, documents": sd.recall(sd.slots(GATE, delay=4, empty="masked", documents=DOCUMENTS)),
    "slots, own token": sd.recall(sd.slots(GATE)),
}


def drawn(name: str, length: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """q, k, v of two batch entries, and the further inputs of a program."""
    qkv = [numbers(2, heads, length, WIDTH, seed=seed).to(dtype) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    if name in SCANS:
        return qkv, gates_of(name, length)
    more = {
        "hsa": {"retrieval_q": numbers(2, KV_HEADS, length, 5, seed=5), "landmarks": numbers(2, KV_HEADS, -(-length // 8), 5, seed=6)},
        "nsa": {"gate": numbers(2, HEADS, length, 3, seed=5).sigmoid()},
        "dsa": {"index_q": numbers(2, HEADS, length, 4, seed=5), "index_k": numbers(2, 1, length, 4, seed=6)},
    }  # fmt: skip
    return qkv, {key: x.to(dtype) for key, x in more.get(name, {}).items()}


def gates_of(name: str, length: int) -> dict[str, torch.Tensor]:
    """Inputs of a program that runs along the keys: shares, and ids of documents of which each batch entry has others."""
    sizes = {"batch": 2, "heads": HEADS, "kv_heads": KV_HEADS, "value_heads": KV_HEADS, "head_dim": WIDTH}
    found: dict[str, torch.Tensor] = {}
    for node in sd.compile(SCANS[name]).program.inputs.values():
        shape = [sizes.get(axis) or (length if axis in ("queries", "keys") else int(axis)) for axis in node.axes]
        if node.name == "documents":
            found[node.name] = torch.arange(length) // torch.tensor([[23], [50]])
        elif node.default is None:
            found[node.name] = numbers(*shape, seed=len(found) + 7).sigmoid()
            if node.name in ("erase", "along"):  # a state that is taken off more of than it holds grows without end
                found[node.name] *= 0.2
    return found


def part_of(plan: sd.parallel.TokenPlan, program: Any, name: str, x: torch.Tensor, rank: int) -> torch.Tensor:
    """The rows of a rank of an input: of tokens, or of blocks of them; or all of it, where it has none."""
    rows, node = plan.rows(rank), sd.compile(program).program.inputs.get(name)
    if node is None:
        return x.detach().index_select(2, rows)
    axis = next((i for i, one in enumerate(node.axes) if one.startswith(("queries", "keys"))), None)
    if axis is not None and "/" in node.axes[axis]:
        size = int(node.axes[axis].partition("/")[2])
        rows = rows[rows % size == 0] // size
    return x.detach() if axis is None else x.detach().index_select(axis, rows)


def on_one(plan: sd.parallel.TokenPlan) -> sd.parallel.TokenPlan:
    """The plan in which the last rank holds all, and others need nothing."""
    needs = torch.zeros_like(plan._needs[""])
    needs[-1] = True
    return dataclasses.replace(by_owner(plan, (plan.world - 1,) * len(plan.owner)), _needs={"": needs})


def by_owner(plan: sd.parallel.TokenPlan, owner: tuple[int, ...]) -> sd.parallel.TokenPlan:
    """The plan in which granules lie there, each of which everybody needs."""
    return dataclasses.replace(plan, owner=owner, _needs={"": torch.ones_like(plan._needs[""])})


def score(found: Any) -> torch.Tensor:
    """A number that all results go into."""
    out, *lse = found if isinstance(found, tuple) else (found,)
    return (out.double() ** 2).sum() + sum((x[x != float("-inf")].double().sum() for x in lse), torch.zeros(()))


def assert_one_process(
    plan: sd.parallel.TokenPlan, program: Any, name: str, length: int, bar: float = 1e-12, *, backend: str = "tiled",
    dense: int = 2000, learn: Collection[str] | None = None,
) -> tuple[float, Any]:  # fmt: skip
    """A call on ranks, and its gradients, are those of one process. Returns the largest difference, and what the rank's keys were.

    ``dense``: shorter sequences are compared with the reference. Differences are measured by the largest number where that is above 1:
    states grow with the length. ``learn``: the inputs that get gradients; None: all that can.
    """
    rank, cp = dist.get_rank(), plan.on(dist.group.WORLD)
    qkv, more = drawn(name, length)
    leaves = {
        key: x.requires_grad_(x.is_floating_point() and (learn is None or key in learn))
        for key, x in (*zip("qkv", qkv, strict=True), *more.items())
    }
    graded = [key for key, x in leaves.items() if x.requires_grad]
    has_lse = sd.compile(program).has_lse
    other = "reference" if length < dense else "tiled"
    whole = sd.attention(*qkv, program, return_lse=has_lse, backend=other, allow=ALLOW, **more)
    want = torch.autograd.grad(score(whole), [leaves[key] for key in graded], allow_unused=True)
    mine = {key: part_of(plan, program, key, x, rank).requires_grad_(x.requires_grad) for key, x in leaves.items()}
    q, k, v, *_ = mine.values()
    rest = {key: mine[key] for key in more}
    found = sd.attention(q, k, v, program, return_lse=has_lse, backend=backend, allow=ALLOW, cp=cp, **rest)
    got = torch.autograd.grad(score(found), [mine[key] for key in graded], allow_unused=True)
    worst = 0.0
    pairs = zip(found, whole, strict=True) if has_lse else [(found, whole)]
    for a, b in pairs:
        worst = max(worst, _apart(a.detach(), part_of(plan, program, "q", b, rank)))
    for key, a, b in zip(graded, got, want, strict=True):
        assert (a is None) == (b is None), (name, key)
        if key == "bonus":  # each rank has the part of its own rows
            dist.all_reduce(a)
        if a is not None and b is not None:
            worst = max(worst, _apart(a, part_of(plan, program, key, b, rank)))
    assert worst <= bar, (name, backend, worst)
    return worst, cp


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    if not a.numel():
        return 0.0
    # -inf of rows without keys is equal to itself.
    apart, largest = torch.where(a == b, 0.0, (a - b).abs()).max(), b[b.isfinite()].abs().max()
    return float(apart / largest.clamp(min=1.0))


def only_wanted_keys(plan: sd.parallel.TokenPlan, program: Any, name: str, length: int, rank: int, unit: int) -> torch.Tensor:
    """Blocks of ``unit`` keys of which a query of the rank sees one: by the choices of one process, pair by pair."""
    qkv, more = drawn(name, length)
    attn = sd.compile(program, backend="reference")
    # A value that only key j has, for every j in turn, is seen by those who see j.
    ones = torch.eye(length, dtype=torch.float64)[None, None].expand(2, KV_HEADS, -1, -1)
    weights = attn(qkv[0], qkv[1], ones, **more)
    seen = (weights[:, :, plan.rows(rank)] > 0).any(0).any(0).any(0)
    return torch.nn.functional.pad(seen, (0, -length % unit)).view(-1, unit).any(1)
