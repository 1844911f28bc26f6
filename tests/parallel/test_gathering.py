"""Chunks that see the same keys come to one rank, and exchanges are those that counting everything anew would choose."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.parallel import plan
from sparsedsl.parallel.gathering import SQUARINGS, Sight, gathered, refined

CAUSAL = kv_idx <= q_idx
DOC, KEEP = sd.table("doc", monotone=True), sd.table("keep", dtype=bool)


def random_sight(seed: int, world: int, patterns: int) -> Sight:
    generator = torch.Generator().manual_seed(seed)
    needs = (torch.rand((patterns, 11, 11), generator=generator) < 0.3).float()
    return Sight(needs, 1 + 9 * torch.rand(11, generator=generator, dtype=torch.float64), world, True)


def received(sight: Sight, owner: list[int]) -> list[int]:
    """What each rank is sent, chunk by chunk."""
    found = []
    for rank in range(sight.world):
        mine = [i for i, holder in enumerate(owner) if holder == rank]
        others = [j for j, holder in enumerate(owner) if holder != rank]
        found.append(sum(any(need[i][j] for i in mine) for need in sight.needs.tolist() for j in others))
    return found


def terms(sight: Sight, owner: list[int], means: tuple[float, float] | None = None) -> tuple[float, tuple[float, float]]:
    """The sum of high powers that exchanges make smaller, and the means that it is measured by."""
    keys = received(sight, owner)
    work = [sum(float(sight.work[i]) for i, rank in enumerate(owner) if rank == r) for r in range(sight.world)]
    means = means or (sum(work) / sight.world, max(1.0, sum(keys) / sight.world))
    power = 2**SQUARINGS
    return sum((s / means[0]) ** power + (k / means[1]) ** power for s, k in zip(work, keys, strict=True)), means


@pytest.mark.parametrize(("seed", "world", "patterns"), [(0, 2, 1), (1, 3, 1), (2, 3, 2), (3, 4, 2), (4, 5, 1)])
def test_no_exchange_is_left_that_would_help(seed: int, world: int, patterns: int) -> None:
    sight = random_sight(seed, world, patterns)
    start = [i % world for i in range(sight.count)]
    before, means = terms(sight, start)
    found = list(refined(sight, tuple(start)))
    after = terms(sight, found, means)[0]
    assert after < before and sorted(found) == sorted(start), "better, and as many chunks a rank"
    for i in range(sight.count):
        for j in range(i):
            other = list(found)
            other[i], other[j] = found[j], found[i]
            assert terms(sight, other, means)[0] >= after * (1 - 1e-4)


@pytest.mark.parametrize("equal", [True, False])
def test_every_chunk_is_gathered_on_some_rank(equal: bool) -> None:
    sight = random_sight(5, 4, 2)
    owner = gathered(Sight(sight.needs, sight.work, 4, equal))
    assert set(owner) <= set(range(4)) and len(owner) == sight.count
    if equal:
        assert sorted(owner.count(rank) for rank in range(4)) == [2, 3, 3, 3]


def test_groups_that_see_only_themselves_come_together_wherever_they_lie() -> None:
    group = torch.arange(32).remainder(4)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    found = plan(KEEP[q_idx // 64, kv_idx // 64], 2048, 4, chunk=64, granule=64, keep=group[:, None] == group)
    assert (found.imbalance, found.received) == (1, 0)
    assert 2 * found.tried["gathered"][1] < found.tried["contiguous"][1]


def test_one_long_document_among_short_ones_is_even_and_sends_little() -> None:
    ends = torch.tensor([0.02, 0.05, 0.1, 0.43, 0.5, 0.53, 0.6, 0.7, 0.72, 0.8, 0.84, 0.9]) * (1 << 16)
    doc = torch.bucketize(torch.arange(1 << 16), ends.long(), right=True)
    found = plan(CAUSAL & (DOC[q_idx] == DOC[kv_idx]), 1 << 16, 8, chunk=512, doc=doc)
    even = min(keys for way, (uneven, keys) in found.tried.items() if way != found.method and uneven < 1.05)
    assert found.imbalance < 1.05 and found.received < 0.9 * even
    assert len({found.rows(rank).numel() for rank in range(8)}) == 1


def test_many_chunks_are_gathered_by_neighbours() -> None:
    found = plan(CAUSAL, 1 << 15, 4, chunk=16, granule=16, method="gathered")
    owner = torch.tensor(found.owner).view(-1, 4)
    assert len(found.owner) == 2048 and (owner == owner[:, :1]).all()
    assert "gathered" not in plan(CAUSAL, 1 << 14, 256, granule=16).tried, "more units than are looked at"
