"""Scattered tiles in the ``tiled`` lowering: for one row of tiles at a time, the keys of its tiles are copied side by side.

Memory is bounded by the keys taken at once. Full tiles come first and are never masked; partial ones follow, with the mask evaluated
on their pairs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.analysis.lists import TileLists, TileRows
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.run.tiled_units import Lane, Unit
from sparsedsl.tiling.cost import chunk_keys, strips_at_once
from sparsedsl.tiling.schedule import Family, Segment

__all__ = ["scattered_units"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Gathered(Segment):
    """A segment whose keys are listed: ``index`` (length,) int64, counted from the lane's first key."""

    index: Tensor


def scattered_units(lane: Lane, lists: TileLists, heads: range, most_heads: int) -> Iterator[Unit]:
    """The units of work of all rows of tiles, heads of a row after each other so that they share its masks."""
    run = lane.run
    rows_of_tiles = lists.shape[2]
    bounds = [part.counts.reshape(-1).cumsum(0, dtype=torch.int64).tolist() for part in (lists.full, lists.partial)]
    for line in range(lists.shape[0] * lists.shape[1] * rows_of_tiles):
        group, row = divmod(line, rows_of_tiles)
        height = min(lists.block[0], lists.q_rows - row * lists.block[0])
        most = chunk_keys(height * run.group)
        segments = [
            *_segments(lane, lists, lists.full, bounds[0], line, most, None),
            *_segments(lane, lists, lists.partial, bounds[1], line, most, lane.plan.lane.mask),
        ]
        if not segments:
            continue
        family = Family(group, lane.first + row * lists.block[0], height, 1, 0, ())
        at_once = min(most_heads, strips_at_once(height * run.group, max(segment.length for segment in segments)))
        for low, high in lane.head_spans(group, heads):
            for head in range(low, high, at_once):
                yield ScatteredUnit(lane, line, family, segments, head, min(head + at_once, high), 0, 1)


def _segments(
    lane: Lane, lists: TileLists, part: TileRows, bounds: list[int], line: int, most: int, residual: Any
) -> list[Segment]:
    columns = part.columns[bounds[line - 1] if line else 0 : bounds[line]]
    width = lists.block[1]
    found: list[Segment] = []
    for few in columns.split(max(1, most // width)):
        if not few.numel():
            continue
        index = (few.to(torch.int64)[:, None] * width + torch.arange(width, device=few.device)).reshape(-1)
        index = index[: max(0, index.numel() - max(0, int(few[-1]) * width + width - lists.kv_len))]
        masks = () if residual is None else ((0, index.numel(), residual),)
        index = (index - lane.first_key).to(lane.k.device)
        found.append(Gathered(int(few[0]) * width, index.numel(), 0, masks, index))
    return found


class ScatteredUnit(Unit):
    """One row of tiles for some heads, on keys that are copied."""

    def key_rows(self, t: Tensor, segment: Segment) -> Tensor:
        """The listed keys of one head: ``(length, D)``."""
        return t[self.low // self.lane.ratio].index_select(0, self._index(segment))

    def keys(self, t: Tensor, segment: Segment) -> Tensor:
        """The listed keys of every head: ``(X, length, D)``."""
        ratio = self.lane.ratio
        first, last = self.low // ratio, (self.high - 1) // ratio
        part = t[first : last + 1].index_select(1, self._index(segment))
        if ratio == 1 or self.high - self.low == 1:
            return part
        return part.index_select(0, torch.arange(self.low, self.high, device=t.device) // ratio - first)

    @staticmethod
    def _index(segment: Segment) -> Tensor:
        assert_listed: Any = segment
        return assert_listed.index

    def env(self, segment: Segment, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """Positions of the listed keys."""
        env = super().env(segment, low, high, transposed)
        kv = self._index(segment)[low:high] + self.lane.first_key
        env["kv_idx"] = kv.view(1, -1, 1, 1) if transposed else kv.view(1, 1, 1, -1)
        return env

    def place(self, expr: Any, segment: Segment, low: int, high: int) -> tuple[bool, tuple[Any, ...]]:
        """No two rows of tiles share a mask; the heads of a row do where they are alike."""
        heads = (self.low, self.high) if expr.free_symbols & {BATCH, HEAD} else None
        return False, (
            "scattered",
            self.family.group,
            self.family.q_start,
            self._index(segment)[0].item(),
            low,
            high,
            heads,
            expr,
        )

    def add_keys(self, total: Tensor, segment: Segment, grad: Tensor, factor: float = 1.0) -> None:
        """Add to the listed keys, head by head."""
        for x in range(grad.shape[0]):
            total[(self.low + x) // self.lane.ratio].index_add_(0, self._index(segment), grad[x], alpha=factor)
