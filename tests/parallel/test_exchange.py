"""Four processes, each with its rows and the keys that they see: out, LSE and all gradients are those of one process."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from tests.parallel.ranks import assert_refused, numbers, run_on_ranks

LENGTH, WORLD, HEADS = 203, 4, 4
NEAR = sd.patterns.sliding_window(40)
CAUSAL, DOC, BIAS = kv_idx <= q_idx, sd.table("doc", monotone=True), sd.table("bias", learned=True)
KEEP = torch.rand(260, 260, generator=torch.Generator().manual_seed(1)) < 0.4
PATTERNS: dict[str, Any] = {
    "alibi": sd.attend(CAUSAL, score=sd.patterns.alibi(HEADS), sink=0.3),
    "sinks": CAUSAL & ((q_idx - kv_idx < 17) | (kv_idx < 4)),
    "documents": CAUSAL & (DOC[q_idx] == DOC[kv_idx]),
    "dilated": sd.patterns.dilated(8, 4),
    "heads": CAUSAL & (q_idx - kv_idx < sd.table("win")[sd.h]),
    "learned": sd.attend(NEAR, score=sd.tanh(sd.score * kv_idx / sd.kv_len + BIAS[q_idx - kv_idx]) * 5),
    "capped": sd.attend(NEAR, score=sd.tanh(sd.score / 3) * 3),
    "late": CAUSAL & (q_idx >= 60) & (kv_idx >= 30),
    "causal": CAUSAL,
    "both sides": abs(q_idx - kv_idx) < 9,
    "blocks": (CAUSAL & sd.table("keep", dtype=bool)[q_idx // 32, kv_idx // 32]).bind(keep=KEEP),
}


def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return (out**2).sum() + lse[lse != float("-inf")].sum()


def compared(
    plan: Any, pattern: Any, qkv: list[torch.Tensor], tables: dict[str, torch.Tensor], *, overlap: bool = False
) -> float:
    """The largest difference of all ranks' results and gradients from those of one process; of gradients of tables, which add up all pairs,
    in parts of their largest value."""
    group = dist.group.WORLD
    qkv = [x.requires_grad_() for x in qkv]
    learned = [t.requires_grad_() for t in tables.values() if t.is_floating_point()]
    dense = plan.q_len < 2000  # what the reference has memory for, on each rank
    whole = sd.attention(*qkv, pattern, return_lse=True, backend="reference" if dense else "tiled", **tables)
    want = [*whole, *torch.autograd.grad(loss(*whole), [*qkv, *learned])]
    mine = [plan.shard(x.detach(), 2, group).requires_grad_() for x in qkv]
    cp = plan.on(group, overlap=overlap)
    found = sd.attention(*mine, pattern, cp=cp, return_lse=True, backend="tiled", **tables)
    grads = torch.autograd.grad(loss(*found), [*mine, *learned])
    got = [plan.unshard(x.detach(), 2, group) for x in (*found, *grads[:3])]
    for part in grads[3:]:
        dist.all_reduce(part)
        got.append(part)
    # -inf of rows without keys is equal to itself.
    apart = [float(torch.where(a == b, 0.0, (a - b).abs()).detach().max()) for a, b in zip(got, want, strict=True)]
    sizes = [1.0] * 5 + [max(1.0, float(b.abs().max())) for b in want[5:]]
    return max(one / size for one, size in zip(apart, sizes, strict=True))


def placed(name: str, length: int, world: int, granule: int, chunk: int, method: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A plan for a pattern, and the tables of a call."""
    pattern = PATTERNS[name]
    tables = {"doc": torch.arange(length) // 37, "win": torch.tensor([3, 9, 20, 70]), "bias": numbers(40, seed=9)}
    tables = {key: table for key, table in tables.items() if key in pattern.tables}
    masked = {key: table for key, table in tables.items() if key != "bias"}
    words: dict[str, Any] = {"heads": HEADS, "granule": granule, "chunk": chunk, "method": method, "equal": method != "cuts"}
    return sd.parallel.plan({"": pattern}, length, world, **words, **masked), tables


def drawn(length: int) -> list[torch.Tensor]:
    return [numbers(2, heads, length, 8, seed=seed) for seed, heads in enumerate((HEADS, 2, 2))]


def run(rank: int) -> None:
    granules = [(1, 16), (8, 16), (16, 48), (8, 8)]
    for number, (name, pattern) in enumerate(PATTERNS.items()):
        granule, chunk = granules[number % 4]
        method = ("zigzag", "contiguous", "longest_first", "auto", "cuts")[number % 5]
        made, tables = placed(name, LENGTH, WORLD, granule, chunk, method)
        # With own keys first for every other: a sink, rows without keys and learned scores among them.
        error = compared(made, pattern, drawn(LENGTH), tables, overlap=number % 2 == 0)
        assert error < 1e-12, (name, method, error)
    # A granule that is not sent is missed: the comparison would see it.
    qkv = drawn(LENGTH)
    made = sd.parallel.plan(NEAR, LENGTH, WORLD, granule=8, chunk=16, method="contiguous")
    seen = made._needs[""].clone()
    seen[1, 5] = False  # keys before those of rank 1
    for overlap in (False, True):
        assert compared(dataclasses.replace(made, _needs={"": seen}), NEAR, qkv, {}, overlap=overlap) > 1e-3
    # The last rank holds all tokens, and others take part all the same.
    all_seen = torch.zeros_like(seen)
    all_seen[-1] = True
    made_for_one = dataclasses.replace(made, owner=(WORLD - 1,) * len(made.owner), _needs={"": all_seen})
    for overlap in (False, True):
        assert compared(made_for_one, NEAR, qkv, {}, overlap=overlap) < 1e-12
    refusals(made, qkv)


def cases(world: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Methods with length, granule and chunk."""
    short = itertools.product(("zigzag", "contiguous", "auto"), ((203, 1, 8), (517, 16, 48)))
    return [*short, ("auto", (1031, 128, 128)), ("contiguous", (2048 * world + 4, 2048, 2048))]


def campaign(rank: int, world: int) -> None:
    worst = 0.0
    for number, name in enumerate(PATTERNS):
        for method, (length, granule, chunk) in cases(world):
            made, tables = placed(name, length, world, granule, chunk, method)
            overlap = (number + length) % 2 == 0
            worst = max(worst, error := compared(made, PATTERNS[name], drawn(length), tables, overlap=overlap))
            assert error < 1e-12, (name, method, length, granule, error)
    if not rank:
        print(f"{world} ranks, {len(PATTERNS)} patterns: largest difference {worst:.1e}")


def refusals(made: sd.parallel.TokenPlan, qkv: list[torch.Tensor]) -> None:
    group = dist.group.WORLD
    rank = dist.get_rank()
    cp, mine = made.on(group), [made.shard(x.detach(), 2, group) for x in qkv]
    assert_refused(sd.UnsupportedError, "plan is for another mask", lambda: sd.attention(*mine, CAUSAL, cp=cp))
    assert_refused(sd.UnsupportedError, "takes no q_offset", lambda: sd.attention(*mine, NEAR, cp=cp, q_offset=0))
    assert_refused(sd.ArgumentError, "mesh must be a DeviceMesh with one dimension or a process group", lambda: made.on(None))
    assert_refused(sd.ShapeError, "q must hold the", lambda: sd.attention(*qkv, NEAR, cp=cp))
    assert_refused(sd.UnsupportedError, "gives no gradients", lambda: made.unshard(mine[0].clone().requires_grad_(), 2, group))
    assert_refused(sd.ShapeError, "dimension 2 has 203 rows", lambda: made.unshard(qkv[0], 2, group))
    documents = sd.parallel.plan(PATTERNS["documents"], LENGTH, WORLD, granule=8, chunk=16, doc=torch.arange(LENGTH) // 37)
    of_documents, rows = documents.on(group), [documents.shard(x.detach(), 2, group) for x in qkv]
    other = torch.arange(LENGTH) // 50
    assert_refused(
        sd.UnsupportedError,
        "of another table 'doc'",
        lambda: sd.attention(*rows, PATTERNS["documents"], cp=of_documents, doc=other),
    )
    pointwise = sd.attend(NEAR, score=sd.sigmoid(sd.score), normaliser="pointwise")
    added = sd.parallel.plan(pointwise, LENGTH, WORLD, granule=8, chunk=16).on(group, overlap=True)
    parts = [added.plan.shard(x.detach(), 2, group) for x in qkv]
    assert_refused(sd.UnsupportedError, "merges two parts", lambda: sd.attention(*parts, pointwise, cp=added))
    moba = sd.parallel.plan(sd.patterns.moba(chunk=16), LENGTH, WORLD, granule=16, chunk=16)
    assert_refused(sd.UnsupportedError, "is a program: leave it out", lambda: moba.on(group, overlap=True))
    uneven = made if rank else documents
    assert_refused(sd.UnsupportedError, "ranks have different plans", lambda: uneven.on(group))


def test_four_processes_are_one(tmp_path: Path) -> None:
    run_on_ranks(WORLD, run, tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
def test_patterns_by_placement_length_and_granule(tmp_path: Path, world: int) -> None:
    run_on_ranks(world, functools.partial(campaign, world=world), tmp_path, seconds=3000)
