"""Which blocks each row may choose: limits, which spare the work outside them, and a rule within."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsedsl.selection.chunking import PIECES, cut, few_widths, is_small, rows_at_once
from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.scores import ScoreSource

__all__ = ["Candidates", "IntervalRule", "PairRule", "TableRule", "Within", "any_of_group"]

Tensor = torch.Tensor
CAST_BYTES = 4 * 2**20  # scratch memory of blocks that are cast at a time
PairRule = Callable[[Tensor, Tensor], Tensor]
"""Row numbers ``(r,)`` and block numbers ``(u,)``, int64 on the scores' device -> bool that broadcasts to ``(B, Hs, r, u)``."""


@dataclass(frozen=True, eq=False)
class IntervalRule:
    """A block of ``kv_block`` keys is allowed where some interval of some query of the row reaches into it.

    ``ends``: first and last key of each interval, int64 ``(B|1, H|1, R, queries of a row)``; a last key of -1: there is none. ``heads``:
    of the scores; where the ends have more, one head of a group is enough.
    """

    ends: tuple[tuple[Tensor, Tensor], ...]
    kv_block: int
    heads: int

    @functools.cached_property
    def blocks(self) -> tuple[Tensor, Tensor]:
        """First and last block of each range of a row, int32 ``(B|1, 1 or heads, R, ranges)``, those of all its queries and of all heads of
        a group; a last block of -1: there is none."""
        firsts, lasts = [], []
        for first, last in self.ends:
            first, last = torch.broadcast_tensors(first, last)
            there = last >= 0
            firsts.append(self._by_row(torch.div(first, self.kv_block, rounding_mode="floor")))
            lasts.append(self._by_row(torch.div(last, self.kv_block, rounding_mode="floor").masked_fill(~there, -1)))
        both = (torch.cat(torch.broadcast_tensors(*parts), dim=3) for parts in (firsts, lasts))
        first, last = (part.to(torch.int32).contiguous() for part in both)
        return first, last

    def _by_row(self, ends: Tensor) -> Tensor:
        """``(B, H, R, Q)`` -> of each row those of all its queries and of all heads of a group, ``(B, 1 or heads, R, ..)``."""
        if ends.shape[1] not in (1, self.heads):
            ends = ends.unflatten(1, (self.heads, -1)).permute(0, 1, 3, 2, 4).flatten(3)
        return ends

    def __call__(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Whether each row may have each block."""
        verdict = None
        for first, last in self.ends:
            low, high = (end.index_select(2, rows)[..., None] for end in (first, last))
            inside = ((blocks >= low // self.kv_block) & (blocks <= high // self.kv_block) & (high >= 0)).any(3)
            verdict = inside if verdict is None else verdict | inside
        assert verdict is not None
        return any_of_group(verdict, self.heads)


@dataclass(frozen=True, eq=False)
class TableRule:
    """What a table ``(B, Hs, R, U)`` says."""

    table: Tensor

    def __call__(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Whether each row may have each block."""
        return self.table[:, :, rows][..., blocks]


@dataclass(frozen=True, eq=False)
class Within:
    """What ``rule`` and ``allowed`` both say."""

    rule: PairRule
    allowed: PairRule

    def __call__(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """Whether each row may have each block."""
        return self.rule(rows, blocks) & self.allowed(rows, blocks)


def any_of_group(flags: Tensor, heads: int) -> Tensor:
    """Flags ``(B, H, ..)`` for ``heads`` groups of heads, or one: true where they are for some head of the group."""
    return flags if flags.shape[1] in (1, heads) else flags.unflatten(1, (heads, -1)).any(2)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Row ``i`` of the scores may choose the blocks ``begin[i] <= block < end[i]`` that ``allowed`` allows.

    Limits bound everything, forced blocks too; ``allowed`` bounds what is scored and may leave out blocks that are forced.

    Args:
        begin: int ``(R,)`` or ``(B|1, Hs|1, R)``, or None for 0.
        end: the same, or None for all blocks.
        allowed: a :data:`PairRule`, or None. Rows are counted from the first row of the scores, blocks from 0.
        reach: from a slice of rows to ``(least begin, greatest end)`` of these, on the host. Blocks outside the reach of a tile of
            rows are never looked at. Not needed where the limits lie on the CPU; limits on a GPU are not read back, so that without
            it every block is scored there.

    >>> Candidates(end=torch.tensor([0, 1, 3])).span(slice(1, 3), blocks=8)
    (0, 3)
    """

    begin: Tensor | None = None
    end: Tensor | None = None
    allowed: PairRule | None = None
    reach: Callable[[slice], tuple[int, int]] | None = None

    def span(self, rows: slice, blocks: int) -> tuple[int, int]:
        """First block and the one after the last that any row of ``rows`` may choose."""
        if self.reach is not None:
            low, high = self.reach(rows)
        else:
            low = 0 if self.begin is None or self.begin.device.type != "cpu" else int(self.begin[..., rows].min())
            high = blocks if self.end is None or self.end.device.type != "cpu" else int(self.end[..., rows].max())
        low = min(max(0, low), blocks)
        return low, max(low, min(high, blocks))

    def scored(self, source: ScoreSource, rows: slice, blocks: slice) -> Tensor:
        """The scores of some rows and blocks, -inf where a row may not choose. Up to an eighth more is computed and not looked at."""
        if rows == slice(0, source.shape[2]) and is_small(
            rows.stop, blocks.stop - blocks.start, source.shape[0] * source.shape[1]
        ):
            return self.mask_(source.block(rows, blocks), rows, blocks)
        parts = []
        # On a CPU in pieces that its caches hold: larger ones are new memory every time, a page fault for every 4 KiB.
        most = CAST_BYTES if source.device.type == "cpu" else PIECES.now.bytes
        for tile in cut(blocks.start, blocks.stop, max(1, most // max(1, source.block_bytes))):
            stop = min(source.shape[3], tile.start + few_widths(tile.stop - tile.start))
            parts.append(source.block(rows, slice(tile.start, stop))[..., : tile.stop - tile.start])
        return self.mask_(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), rows, blocks)

    def mask_(self, scores: Tensor, rows: slice, blocks: slice) -> Tensor:
        """-inf in ``scores (B, Hs, r, u)`` where a row may not choose; in place."""
        if self.allowed is not None:
            scores.masked_fill_(~self.allowed(*_numbers(rows, blocks, scores.device)), float("-inf"))
        return self._outside_(scores, rows, blocks, float("-inf"))

    def at(self, places: Tensor, rows: slice, blocks: slice, heads: int) -> Tensor | None:
        """Whether each row may choose the blocks ``places (B|1, Hi, r, W)``, which lie in ``blocks``: bool ``(B, H, r, W)``, H
        the greater of Hi and ``heads``, those of the scores. None: all may.
        """
        if self.allowed is None and self.begin is None and self.end is None:
            return None
        heads = max(heads, places.shape[1])
        verdict = torch.ones((), dtype=torch.bool, device=places.device)
        wanted = repeat_kv(places.long(), heads)
        for limit, name in ((self.begin, "ge"), (self.end, "lt")):
            if limit is not None:
                here = limit[..., rows].to(places.device, non_blocking=True)[..., None]
                here = here if here.ndim < 4 else repeat_kv(here, heads)
                verdict = verdict & getattr(wanted, name)(here)
        if self.allowed is None:
            return verdict
        # The rule is of rows and blocks: it is asked for all blocks of a few rows at a time.
        width, found = blocks.stop - blocks.start, []
        step = rows_at_once(16 * wanted.shape[0] * heads * max(1, width))
        for some in cut(rows.start, rows.stop, step):
            flags = self.allowed(*_numbers(some, blocks, places.device))
            flags = flags[(None,) * (4 - flags.ndim)]
            here = wanted[:, :, some.start - rows.start : some.stop - rows.start] - blocks.start
            lead = max(flags.shape[0], here.shape[0])
            flags = repeat_kv(flags, heads).expand(lead, heads, here.shape[2], width)
            found.append(flags.gather(3, here.expand(lead, -1, -1, -1)))
        return verdict & torch.cat(found, dim=2)

    def within(self, rule: PairRule, rows: slice, blocks: slice, like: Tensor) -> Tensor:
        """Which pairs ``rule`` names within the limits: bool of the shape of ``like (B, Hs, r, u)``."""
        named = rule(*_numbers(rows, blocks, like.device)).expand(like.shape).clone()
        return self._outside_(named, rows, blocks, False)

    def _outside_(self, table: Tensor, rows: slice, blocks: slice, value: float | bool) -> Tensor:
        """``value`` outside the limits, in place: only columns that lie outside for some row are touched, where limits can be read."""
        block = torch.arange(blocks.start, blocks.stop, device=table.device)
        size = len(block)
        if self.begin is not None:
            begin = self.begin[..., rows]
            stop = min(max(0, int(begin.max()) - blocks.start), size) if begin.device.type == "cpu" else size
            limit = begin.to(table.device, non_blocking=True)[..., None]
            table[..., :stop].masked_fill_(block[:stop] < limit, value)
        if self.end is not None:
            end = self.end[..., rows]
            start = min(max(0, int(end.min()) - blocks.start), size) if end.device.type == "cpu" else 0
            limit = end.to(table.device, non_blocking=True)[..., None]
            table[..., start:].masked_fill_(block[start:] >= limit, value)
        return table


def _numbers(rows: slice, blocks: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(rows.start, rows.stop, device=device), torch.arange(blocks.start, blocks.stop, device=device)
