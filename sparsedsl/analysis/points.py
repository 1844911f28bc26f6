"""Decide tiles by interval arithmetic on the whole mask, by telling points, and by all their points. The last is exact.

A *box* or *tile* here is five int64 tensors of one length: group number, first and last query position, first and last key.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain, Groups
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.intervals import Intervals, TableRanges
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL, UNKNOWN
from sparsedsl.analysis.mask_clauses import literals, only_difference
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD

__all__ = ["Boxes", "PointDecider", "box_classes", "check_points"]

Boxes = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Points looked at in one question at most: an hour and more.
MOST_POINTS = 1 << 38


def _intervals(domain: Domain, groups: Groups, ranges: TableRanges, boxes: Boxes) -> Intervals:
    group, q_low, q_high, kv_low, kv_high = boxes
    env = groups.env(group)
    symbols: dict[str, Any] = {name: (value, value) for name, value in (env | domain.lengths).items()}
    return Intervals(symbols | {"q_idx": (q_low, q_high), "kv_idx": (kv_low, kv_high)}, ranges)


def box_classes(mask: Boolean, domain: Domain, groups: Groups, ranges: TableRanges, boxes: Boxes) -> torch.Tensor:
    """EMPTY, FULL or UNKNOWN for each box, by interval arithmetic."""
    always, ever = _intervals(domain, groups, ranges, boxes).range(mask)
    like = torch.zeros_like(boxes[1])
    always, ever = (torch.as_tensor(v, device=like.device) for v in (always, ever))
    return like + torch.where(always, FULL, torch.where(ever, UNKNOWN, EMPTY))


def check_points(tiles: Boxes) -> None:
    """Raise :class:`UnsupportedError` if there are more points in the tiles than anyone waits for."""
    _, q_low, q_high, kv_low, kv_high = tiles
    q_size, kv_size = int((q_high - q_low).max()) + 1, int((kv_high - kv_low).max()) + 1
    if q_low.numel() * q_size * kv_size > MOST_POINTS:
        raise UnsupportedError(
            f"{q_low.numel():,} tiles of {q_size:,} x {kv_size:,} tokens would have to be looked at pair by pair. Take smaller tiles "
            "(block_size=), or say the mask in bounds on q_idx, kv_idx, their difference and their quotients, which are solved"
        )


class PointDecider:
    """Exact classes of tiles of one mask over one domain."""

    def __init__(self, mask: Boolean, domain: Domain, groups: Groups, ranges: TableRanges):
        self.mask, self.domain, self.groups, self.ranges = mask, domain, groups, ranges
        self.literals = literals(mask)
        self._diagonal = {literal: only_difference(literal) for literal in self.literals}

    def diagonal(self, literal: sympy.Basic) -> bool:
        """Whether ``literal`` reads positions only through ``q_idx - kv_idx``."""
        return self._diagonal[literal] if literal in self._diagonal else only_difference(literal)

    def decide(self, tiles: Boxes) -> torch.Tensor:
        """EMPTY, PARTIAL or FULL for each tile."""
        chosen, inverse = self.representatives(tiles)
        if chosen is None or inverse is None:
            return self._decide_all(tiles)
        kinds = self._decide_all(tuple(t[chosen] for t in tiles))  # type: ignore[arg-type]
        return kinds.index_select(0, inverse)

    def representatives(self, tiles: Boxes) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Indices of tiles that stand for all others, and for each tile the place of its representative.

        Two tiles are alike if they have the same sizes and the same ``q - kv`` offset, and every relation of the mask that reads more
        than ``q_idx - kv_idx`` is decided, and decided equally, on both.
        """
        moving = [x for x in self.literals if self._diagonal[x]]
        fixed = [x for x in self.literals if not self._diagonal[x]]
        if not moving or len(fixed) > 8 or tiles[0].numel() < 64:
            return None, None
        group, q_low, q_high, kv_low, kv_high = tiles
        offset = q_low - kv_low
        key = offset - offset.min()
        sizes = (q_high - q_low) * (int((kv_high - kv_low).max()) + 1) + (kv_high - kv_low)
        if bool((sizes != sizes[0]).any()):
            key = key * (int(sizes.max()) + 1) + sizes
        if self.groups.count > 1 and any(x.free_symbols & {BATCH, HEAD} for x in moving):
            key = key * self.groups.count + group
        del sizes, offset
        number = torch.arange(key.numel(), device=key.device)
        if fixed:
            open_ = torch.zeros_like(key, dtype=torch.bool)
            intervals = _intervals(self.domain, self.groups, self.ranges, tiles)
            for literal in fixed:
                always, ever = (torch.as_tensor(v, device=key.device) for v in intervals.range(literal))
                key = key * 2 + always
                open_ = open_ | (always != ever)
            del intervals
            # Tiles with an open relation stand for themselves.
            key = torch.where(open_, int(key.max()) + 1 + number, key)
        size = int(key.max()) + 1
        if size <= EFFORT.now.kinds:
            place = torch.zeros(size, dtype=torch.int64, device=key.device)
            place.scatter_(0, key, number)
            chosen = (place.index_select(0, key) == number).nonzero()[:, 0]
            place.scatter_(0, key[chosen], torch.arange(chosen.numel(), device=key.device))
            return chosen, place.index_select(0, key)
        unique, inverse = torch.unique(key, return_inverse=True)
        chosen = torch.zeros(unique.numel(), dtype=torch.int64, device=key.device)
        chosen[inverse] = number
        return chosen, inverse

    def told(self, tiles: Boxes) -> torch.Tensor:
        """PARTIAL for tiles that a few telling points show to be so, UNKNOWN for others."""
        some, all_ = self._try_points(tiles)
        return torch.where(some & ~all_, PARTIAL, UNKNOWN)

    def _decide_all(self, tiles: Boxes) -> torch.Tensor:
        kinds = self.told(tiles)
        open_ = (kinds == UNKNOWN).nonzero()[:, 0]
        if open_.numel():
            kinds[open_] = self._every_point(tuple(t[open_] for t in tiles))  # type: ignore[arg-type]
        return kinds

    def allowed(self, group: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """The mask at pairs of some groups, all broadcast."""
        env = self.groups.env(group) | self.domain.lengths | dict(self.domain.tables) | {"q_idx": q, "kv_idx": kv}
        return evaluate(self.mask, env).expand(joined_shape(q.shape, kv.shape))

    def _try_points(self, tiles: Boxes) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether some and whether all of a few points are allowed: corners, and where the tile meets the diagonal.

        A point found allowed proves the tile non-empty, one found masked proves it not full; nothing else is concluded.
        """
        group, q_low, q_high, kv_low, kv_high = tiles
        some, all_ = [], []
        for begin in range(0, q_low.numel(), EFFORT.now.points // 8):
            part = slice(begin, begin + EFFORT.now.points // 8)
            a, b, c, d = (t[part] for t in (q_low, q_high, kv_low, kv_high))
            near_low = torch.maximum(torch.minimum(a, d), c)
            near_high = torch.maximum(torch.minimum(b, d), c)
            q = torch.stack([a, a, b, b, a, b, (a + b) // 2, b], dim=-1)
            kv = torch.stack([c, d, c, d, near_low, near_high, (c + d) // 2, (near_high - 1).clamp(min=0).maximum(c)], dim=-1)
            allowed = self.allowed(group[part][:, None], q, kv)
            some.append(allowed.any(dim=-1))
            all_.append(allowed.all(dim=-1))
        return torch.cat(some), torch.cat(all_)

    def _every_point(self, tiles: Boxes) -> torch.Tensor:
        """Exact classes, from all points of each tile."""
        group, q_low, q_high, kv_low, kv_high = tiles
        q_size, kv_size = int((q_high - q_low).max()) + 1, int((kv_high - kv_low).max()) + 1
        check_points(tiles)
        # A strip of rows at a time when a single tile exceeds the budget.
        strip = max(1, min(q_size, EFFORT.now.points // kv_size))
        step = max(1, EFFORT.now.points // (strip * kv_size))
        across = torch.arange(kv_size, device=group.device)
        kinds = []
        for begin in range(0, group.numel(), step):
            g, a, b, c, d = (t[begin : begin + step, None, None] for t in tiles)
            some = torch.zeros(g.shape[0], dtype=torch.bool, device=group.device)
            all_ = ~some
            kv = c + across
            for top in range(0, q_size, strip):
                q = a + torch.arange(top, min(top + strip, q_size), device=group.device)[:, None]
                inside = (q <= b) & (kv <= d)
                allowed = self.allowed(g, q.minimum(b), kv.minimum(d))
                some |= (allowed & inside).flatten(1).any(dim=1)
                all_ &= (allowed | ~inside).flatten(1).all(dim=1)
            kinds.append(torch.where(all_, FULL, torch.where(some, PARTIAL, EMPTY)))
        return torch.cat(kinds)
