"""Chunks that see the same keys -> the same rank, with even work; and exchanges of chunks that make a placement better.

Works on whole chunks: a chunk needs another one if its queries see any key of it, and every chunk counts as one. These are guides; what a
placement really costs is counted by those who call. All sums of chunks are whole numbers that float32 holds exactly, so that
every rank finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Sight", "gathered", "refined"]

Tensor = torch.Tensor
# Shares of the mean work up to which the heaviest chunks are gathered, and up to which the others fill a rank.
HEAVY, FULL = 0.9, 1.03
# How often a number is squared before ranks are summed: the 32nd power, near to the largest and yet better for every one that falls.
SQUARINGS = 5
# Multiplications that all exchanges together may take; and exchanges.
MOST_PRODUCTS, MOST_EXCHANGES = 1 << 31, 128


@dataclass(frozen=True, eq=False)
class Sight:
    """What chunks need of each other.

    needs: float32 ``(patterns, chunks, chunks)``, 1 where the queries of a chunk see keys of another. work: float64 ``(chunks,)``, pairs
    that a chunk computes. equal: ranks hold equally many.
    """

    needs: Tensor
    work: Tensor
    world: int
    equal: bool

    @property
    def count(self) -> int:
        """Chunks."""
        return self.work.numel()


class _Filling:
    """Ranks that are being filled. ``need`` and ``own``: bool ``(ranks, patterns, chunks)``."""

    def __init__(self, sight: Sight) -> None:
        count, world = sight.count, sight.world
        self.sight = sight
        self.owner = torch.full((count,), -1, dtype=torch.int64)
        self.load = torch.zeros(world, dtype=torch.float64)
        self.received = torch.zeros(world, dtype=torch.float32)
        self.room = torch.full((world,), count)
        if sight.equal:
            self.room = count // world + (torch.arange(world) < count % world).long()
        self.need = torch.zeros((world, sight.needs.shape[0], count), dtype=torch.bool)
        # Keys that a rank has no use for yet and does not hold; and what every chunk needs of itself.
        self.unseen = torch.ones_like(self.need, dtype=torch.float32)
        self.itself = sight.needs.diagonal(dim1=1, dim2=2)

    def more(self, chunk: int) -> Tensor:
        """By how much what each rank receives would grow with a chunk; less than 0 where it was sent the chunk's keys."""
        new = self.unseen.flatten(1) @ self.sight.needs[:, chunk].flatten()
        spared = self.need[:, :, chunk] & (self.unseen[:, :, chunk] == 0)
        return new - (self.unseen[:, :, chunk] * self.itself[:, chunk]).sum(1) - spared.sum(1)

    def spared(self, rank: int) -> Tensor:
        """The same with the other sign, of all chunks for one rank."""
        new = torch.einsum("pij,pj->i", self.sight.needs, self.unseen[rank])
        return self.need[rank].sum(0) + (self.unseen[rank] * self.itself).sum(0) - new

    def put(self, chunk: int, rank: int) -> None:
        self.owner[chunk] = rank
        self.load[rank] += self.sight.work[chunk]
        self.room[rank] -= 1
        self.need[rank] |= self.sight.needs[:, chunk] > 0
        held = self.owner == rank
        self.received[rank] = (self.need[rank] & ~held).sum()
        self.unseen[rank] = (~self.need[rank] & ~held).float()


def gathered(sight: Sight) -> tuple[int, ...]:
    """The heaviest chunks first, each to the rank that it makes receive the least more, as long as that is not full; then the rank that
    receives the most takes what it was to be sent; then the others, where they fit."""
    filling, work = _Filling(sight), sight.work
    share = max(1.0, float(work.sum())) / sight.world
    heaviest, left = sorted(range(sight.count), key=lambda i: (-float(work[i]), -i)), []
    for chunk in heaviest:
        fits = (filling.load + work[chunk] <= HEAVY * share) & (filling.room > 0)
        if not fits.any():
            left.append(chunk)
            continue
        # Keys are whole numbers: of ranks that would receive equally many more, the emptiest.
        more = filling.more(chunk) + filling.load / (2 * share)
        filling.put(chunk, int(torch.where(fits, more, torch.inf).argmin()))
    open_ranks = filling.room > 0
    while open_ranks.any():
        rank = int(torch.where(open_ranks, filling.received, -1).argmax())
        takes = (filling.owner < 0) & (filling.load[rank] + work <= FULL * share)
        spared = torch.where(takes, filling.spared(rank), 0)
        best = spared.max()
        if best > 0:
            filling.put(int(torch.where(spared == best, work, torch.inf).argmin()), rank)
        open_ranks[rank] = bool(best > 0) and bool(filling.room[rank] > 0)
    for chunk in left:
        if filling.owner[chunk] >= 0:
            continue
        fits = (filling.load + work[chunk] <= FULL * share) & (filling.room > 0)
        if fits.any():
            more = filling.more(chunk)
            # Where it brings no new keys rather than where few are received.
            cost = torch.where(more <= 0, more - 2 * filling.need[0].numel(), filling.received + more)
            filling.put(chunk, int(torch.where(fits, cost, torch.inf).argmin()))
        else:
            filling.put(chunk, int(torch.where(filling.room > 0, filling.load, torch.inf).argmin()))
    return tuple(filling.owner.tolist())


def refined(sight: Sight, owner: tuple[int, ...]) -> tuple[int, ...]:
    """The placement with chunks exchanged one for one, always the pair that helps the worst rank and its partner the most.

    What is made smaller is the sum over ranks of high powers of their work, and of the keys they receive: both are to be even, since a
    rank that receives much holds up the others whatever it computes.
    """
    count, world, patterns = sight.count, sight.world, sight.needs.shape[0]
    needs, ranks = sight.needs.movedim(0, 1), torch.tensor(owner)
    users = torch.zeros((world, patterns, count), dtype=torch.float32).index_add_(0, ranks, needs)
    load = torch.zeros(world, dtype=torch.float64).index_add_(0, ranks, sight.work)
    held = ranks == torch.arange(world)[:, None]
    received = ((users > 0) & ~held[:, None]).sum((1, 2)).double()
    mean_load, mean_received = max(1.0, float(load.mean())), max(1.0, float(received.mean()))

    def badness(load: Tensor, received: Tensor) -> Tensor:
        return _powered(load / mean_load) + _powered(received / mean_received)

    settled = torch.zeros(world, dtype=torch.bool)
    products = MOST_PRODUCTS // max(1, 2 * patterns * count * count * count // world)
    for _ in range(min(MOST_EXCHANGES, products)):
        bad = badness(load, received)
        worst = int(torch.where(settled, -1, bad).argmax())
        mine, others = (ranks == worst).nonzero()[:, 0], (ranks != worst).nonzero()[:, 0]
        if settled.all() or not mine.numel() or not others.numel():
            break
        partner = ranks[others]
        here = _received(needs, users[worst].expand(mine.numel(), -1, -1), held[worst].expand(mine.numel(), -1), mine, others)
        there = _received(needs, users[partner], held[partner], others, mine).T
        moved = sight.work[others] - sight.work[mine][:, None]
        change = badness(load[worst] + moved, here) + badness(load[partner] - moved, there) - bad[partner] - bad[worst]
        i, j = divmod(int(change.argmin()), others.numel())
        if change[i, j] >= -1e-6 * bad[worst]:
            settled[worst] = True
            continue
        settled[:] = False
        given, taken, other = int(mine[i]), int(others[j]), int(partner[j])
        ranks[given], ranks[taken] = other, worst
        users[worst] += needs[taken] - needs[given]
        users[other] -= needs[taken] - needs[given]
        load[worst] += moved[i, j]
        load[other] -= moved[i, j]
        received[worst], received[other] = here[i, j], there[i, j]
        held = ranks == torch.arange(world)[:, None]
    return tuple(ranks.tolist())


def _received(needs: Tensor, users: Tensor, held: Tensor, given: Tensor, taken: Tensor) -> Tensor:
    """What ranks receive once each chunk of ``given`` is exchanged for each of ``taken``, ``(given, taken)``.

    users, held: of the rank of each given chunk, how many of its chunks need every chunk, and which it holds.
    """
    held = held.clone()
    held[torch.arange(given.numel()), given] = False
    users = users - needs[given]
    away = ~held[:, None]
    needed, free = ((users > 0) & away).float(), ((users == 0) & away).float()
    total = needed.sum((1, 2))[:, None] + free.flatten(1) @ needs[taken].flatten(1).T
    itself = needs.diagonal(dim1=0, dim2=2)
    # A taken chunk is held then, and not sent.
    return (total - needed[:, :, taken].sum(1) - (free * itself)[:, :, taken].sum(1)).double()


def _powered(share: Tensor) -> Tensor:
    """Squared again and again: unlike ``pow`` the same to the last bit on every machine."""
    for _ in range(SQUARINGS):
        share = share * share
    return share
