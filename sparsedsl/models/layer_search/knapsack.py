"""One option a layer, least divergence for every total cost: the multiple-choice knapsack, exact for whole costs.

Input: what each option costs, in whole units, and what it is expected to lose. Output: a :class:`Frontier`, the totals that are worth
anything, each with the options that reach it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsedsl.errors import PatternError

__all__ = ["UNITS", "Frontier", "frontier", "in_units"]

UNITS = 100_000  # steps between the cheapest and the dearest assignment, where costs are no small whole numbers


def in_units(costs: Sequence[Sequence[float]], units: int = UNITS) -> list[list[int]]:
    """Costs as whole numbers, each layer's least as 0.

    Whole costs are divided by what divides them all, and stay exact, if their totals then lie within ``units``; others are rounded to steps
    of which the range of all totals has ``units``, so that a total is off by at most half a step a layer.

    >>> in_units([[3.0, 9.0], [6.0, 6.0]])
    [[0, 1], [0, 0]]
    >>> in_units([[0.5, 1.0], [0.25, 0.5]], units=3)
    [[0, 2], [0, 1]]
    """
    if not all(row and all(0 <= cost < math.inf for cost in row) for row in costs):
        raise PatternError(f"costs must be numbers of at least 0, at least one a layer; got {[list(row) for row in costs]!r}")
    above = [[cost - min(row) for cost in row] for row in costs]
    total = sum(max(row) for row in above)
    if all(float(cost).is_integer() for row in above for cost in row):
        common = math.gcd(*(int(cost) for row in above for cost in row)) or 1
        if total / common <= units:
            return [[int(cost) // common for cost in row] for row in above]
    return [[round(cost / total * units) for cost in row] for row in above]


@dataclass(frozen=True)
class Frontier:
    """The assignments that nothing beats: no other one costs as little and loses less.

    ``totals``: their costs in units, falling. ``losses``: what each is expected to lose, rising. ``_picked``: layer x total -> option.
    """

    totals: tuple[int, ...]
    losses: tuple[float, ...]
    _costs: tuple[tuple[int, ...], ...]
    _picked: np.ndarray

    def __len__(self) -> int:
        return len(self.totals)

    def options(self, place: int) -> tuple[int, ...]:
        """The option of each layer, of the assignment at ``place``."""
        left, found = self.totals[place], []
        for costs, picked in zip(reversed(self._costs), self._picked[::-1], strict=True):
            found.append(int(picked[left]))
            left -= costs[found[-1]]
        return tuple(reversed(found))

    def cheapest(self, limit: float) -> int:
        """The place of the cheapest assignment that is expected to lose no more than ``limit``; 0 where none is."""
        return max((place for place, loss in enumerate(self.losses) if loss <= limit), default=0)


def frontier(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> Frontier:
    """The frontier of ``costs[layer][option]``, whole numbers of at least 0, against ``losses[layer][option]``, which add up.

    Time and memory follow layers x the largest total. Of two assignments that cost the same the one that loses less counts; of two that
    lose the same the cheaper one.

    >>> front = frontier([[0, 3], [0, 2]], [[0.5, 0.0], [0.4, 0.1]])
    >>> list(zip(front.totals, front.losses, (front.options(i) for i in range(len(front)))))
    [(5, 0.1, (1, 1)), (3, 0.4, (1, 0)), (2, 0.6, (0, 1)), (0, 0.9, (0, 0))]
    """
    size = sum(max(row) for row in costs) + 1
    best = np.full(size, math.inf)
    best[0] = 0.0
    picked = np.zeros((len(costs), size), dtype=np.int16)
    for layer, (row, lost) in enumerate(zip(costs, losses, strict=True)):
        now = np.full(size, math.inf)
        for option, (cost, loss) in enumerate(zip(row, lost, strict=True)):
            shifted = best[: size - cost] + loss
            better = shifted < now[cost:]
            now[cost:][better] = shifted[better]
            picked[layer, cost:][better] = option
        best = now
    least = np.minimum.accumulate(best)
    kept = np.flatnonzero(np.isfinite(best) & (best < np.concatenate([[math.inf], least[:-1]])))[::-1]
    return Frontier(
        tuple(int(total) for total in kept), tuple(float(best[total]) for total in kept), tuple(map(tuple, costs)), picked
    )
