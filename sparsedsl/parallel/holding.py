"""Which rows ranks hold, and the ways of rows between them that follow from it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from sparsedsl.parallel.sending import Route, all_to_all

__all__ = ["Held"]

Tensor = torch.Tensor


class Held:
    """Which rank holds which rows, seen from one: ``rows`` of each, rising, in whole blocks of every size that is asked for."""

    def __init__(self, rows: Sequence[Tensor], rank: int, group: Any) -> None:
        self.rows, self.rank, self.group = rows, rank, group
        self.length = sum(part.numel() for part in rows)
        self._routes: dict[int, Route] = {}
        self._behind: dict[int, Route] = {}

    def blocks(self, rank: int, size: int) -> Tensor:
        """The numbers of the blocks of ``size`` rows that a rank holds."""
        rows = self.rows[rank]
        return rows[rows % size == 0] // size

    def to_all(self, size: int) -> Route:
        """One row for each block of every rank, to all of them."""
        if size not in self._routes:
            self._routes[size] = self._to_all([self.blocks(rank, size) for rank in range(len(self.rows))])
        return self._routes[size]

    def _to_all(self, numbers: Sequence[Tensor]) -> Route:
        """A row for each of the numbers that ranks have, to all of them, in the order of the numbers."""
        own, others = torch.arange(numbers[self.rank].numel()), [rank for rank in range(len(self.rows)) if rank != self.rank]
        to_each = [0 if rank == self.rank else own.numel() for rank in range(len(self.rows))]
        from_each = [0 if rank == self.rank else numbers[rank].numel() for rank in range(len(self.rows))]
        places = torch.cat([numbers[rank] for rank in (self.rank, *others)]).argsort().argsort()
        return Route(own.repeat(len(others)), (to_each, from_each), own, places, self.group)

    # ---- runs of neighbours -----------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def runs(self) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        """Of each rank its runs of neighbours: the first row, its position, how many there are."""
        return tuple(map(_runs, self.rows))

    @functools.cached_property
    def runs_to_all(self) -> Route:
        """A row for each run, to all ranks, in the order of positions."""
        return self._to_all([torch.tensor([position for _, position, _ in runs], dtype=torch.int64) for runs in self.runs])

    @functools.cached_property
    def run_order(self) -> Tensor:
        """Of the runs of all ranks, rank by rank, the order of their positions."""
        return torch.tensor([position for runs in self.runs for _, position, _ in runs], dtype=torch.int64).argsort()

    def behind(self, distance: int) -> Route:
        """For each row the one so many positions before it, in order, without those that would lie before the first one."""
        if distance not in self._behind:
            rows = self.rows[self.rank]
            self._behind[distance] = self.fetched(rows[rows >= distance] - distance, 1)[0]
        return self._behind[distance]

    # ---- rows that are asked for ------------------------------------------------------------------------------------------------------

    def fetched(self, units: Tensor, size: int) -> tuple[Route, Tensor]:
        """The rows of these blocks of ``size`` (rising numbers), from whoever holds them, and the positions of the rows. Ranks tell each
        other what they want: this waits for the numbers."""
        world, device = len(self.rows), units.device
        holder = torch.zeros(-(-self.length // size), dtype=torch.int64)
        for rank in range(world):
            holder[self.blocks(rank, size)] = rank
        holder = holder.to(device)[units]
        asked = [units[holder == rank] for rank in range(world)]
        own = asked[self.rank]
        asked[self.rank] = own[:0]
        number = torch.tensor([part.numel() for part in asked], device=device)
        wanted_of = all_to_all(number, [1] * world, [1] * world, self.group).tolist()
        wanted = all_to_all(torch.cat(asked), number.tolist(), wanted_of, self.group)
        rows = self.rows[self.rank].to(device)
        to_each = [self._positions(part, size) for part in wanted.split(wanted_of)]
        from_each = [self._positions(part, size) for part in asked]
        kept = self._positions(own, size)
        positions = torch.cat([kept, *from_each])
        rising, order = positions.sort()
        counts = [part.numel() for part in to_each], [part.numel() for part in from_each]
        places, taken = order.argsort(), torch.searchsorted(rows, kept)
        return Route(torch.searchsorted(rows, torch.cat(to_each)), counts, taken, places, self.group), rising

    def _positions(self, units: Tensor, size: int) -> Tensor:
        positions = (units[:, None] * size + torch.arange(size, device=units.device)).flatten()
        return positions[positions < self.length]


def _runs(rows: Tensor) -> tuple[tuple[int, int, int], ...]:
    """
    >>> _runs(torch.tensor([4, 5, 6, 9]))
    ((0, 4, 3), (3, 9, 1))
    """
    if not rows.numel():
        return ()
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), (rows.diff() != 1).nonzero()[:, 0] + 1])
    counts = torch.cat([firsts[1:], torch.tensor([rows.numel()])]) - firsts
    return tuple(zip(firsts.tolist(), rows[firsts].tolist(), counts.tolist(), strict=True))
