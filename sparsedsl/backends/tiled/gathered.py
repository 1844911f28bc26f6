"""Scattered tiles in the ``tiled`` lowering: for one row of tiles at a time, the keys of its tiles are copied side by side.

Memory is bounded by the keys taken at once. Full tiles come first and are never masked; partial ones follow, with the mask evaluated
on their pairs only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.analysis.lists import BlockLists, TileRows
from sparsedsl.backends.tiled.tile_jobs import ResiduePass, TileJob
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.tiling.cost import heads_at_once
from sparsedsl.tiling.cutting import CUTTING
from sparsedsl.tiling.schedule import KeyRange, StridedSeries

__all__ = ["scattered_jobs"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Gathered(KeyRange):
    """A key range whose keys are listed: ``index`` (length,) int64, counted from the residue's first key."""

    index: Tensor


def scattered_jobs(residue: ResiduePass, lists: BlockLists, heads: range) -> Iterator[TileJob]:
    """The jobs of work of all rows of tiles, heads of a row after each other so that they share its masks."""
    run = residue.run
    rows_of_tiles = lists.shape[2]
    bounds = [part.counts.reshape(-1).cumsum(0, dtype=torch.int64).tolist() for part in (lists.full, lists.partial)]
    for line in range(lists.shape[0] * lists.shape[1] * rows_of_tiles):
        group, row = divmod(line, rows_of_tiles)
        height = min(lists.block[0], lists.q_rows - row * lists.block[0])
        several = heads_at_once(height * run.group, run.batch * run.shared)
        key_ranges = _segments(
            residue,
            lists,
            [_part(p, b, line) for p, b in zip((lists.full, lists.partial), bounds, strict=True)],
            CUTTING.now.keys,
        )
        if not key_ranges:
            continue
        series = StridedSeries(group, residue.first + row * lists.block[0], height, 1, 0, ())
        for low, high in residue.head_spans(group, heads):
            for head in range(low, high, several):
                yield ScatteredJob(residue, series, key_ranges, head, min(head + several, high))


def _part(part: TileRows, bounds: list[int], line: int) -> Tensor:
    """The columns of one row of tiles."""
    return part.columns[bounds[line - 1] if line else 0 : bounds[line]].to(torch.int64)


def _segments(residue: ResiduePass, lists: BlockLists, parts: list[Tensor], most: int) -> list[KeyRange]:
    """The keys of the full and of the partial tiles of a row, at most ``most`` at a time, with the mask for the partial ones."""
    width, residual = lists.block[1], residue.plan.residue.mask
    columns, whole = torch.cat(parts), parts[0].numel()
    found: list[KeyRange] = []
    step = max(1, most // width)
    for begin in range(0, columns.numel(), step):
        few = columns[begin : begin + step]
        index = (few[:, None] * width + torch.arange(width, device=few.device)).reshape(-1)
        full = min(max(0, whole - begin), few.numel()) * width
        inside = index < lists.kv_len
        if not bool(inside[-1]) or not bool(inside[max(0, full - 1)]):  # a ragged last tile ends either kind
            full, index = int(inside[:full].sum()), index[inside]
        masks = () if full == index.numel() else ((full, index.numel(), residual),)
        first = int(few[0]) * width
        found.append(Gathered(first, index.numel(), 0, masks, (index - residue.first_key).to(residue.k.device)))
    return found


class ScatteredJob(TileJob):
    """One row of tiles for some heads, on keys that are copied."""

    def keys(self, t: Tensor, key_range: KeyRange) -> Tensor:
        """The listed keys of every head: ``(X, length, D)``."""
        ratio = self.residue.ratio
        first, last = self.low // ratio, (self.high - 1) // ratio
        return self.of_heads(t[first : last + 1].index_select(1, self._index(key_range)))

    @staticmethod
    def _index(key_range: KeyRange) -> Tensor:
        listed: Any = key_range  # jobs of this kind have no others
        return listed.index

    def env(self, key_range: KeyRange, low: int, high: int, transposed: bool) -> dict[str, Any]:
        """Positions of the listed keys."""
        env = super().env(key_range, low, high, transposed)
        kv = self._index(key_range)[low:high] + self.residue.first_key
        env["kv_idx"] = kv.view(1, -1, 1, 1) if transposed else kv.view(1, 1, 1, -1)
        return env

    def place(self, expr: Any, key_range: KeyRange, low: int, high: int) -> tuple[Any, ...]:
        """No two rows of tiles share a mask; the heads of a row do where they are alike."""
        heads = (self.low, self.high) if expr.free_symbols & {BATCH, HEAD} else None
        first = self._index(key_range)[0].item()
        return ("scattered", self.series.group, self.q_start, first, low, high, heads, expr)

    def add_keys(self, total: Tensor, key_range: KeyRange, grad: Tensor, factor: float = 1.0) -> None:
        """Add to the listed keys, head by head."""
        for x in range(grad.shape[0]):
            total[(self.low + x) // self.residue.ratio].index_add_(0, self._index(key_range), grad[x], alpha=factor)
