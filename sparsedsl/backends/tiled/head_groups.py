"""How the heads of a call fall into head groups, and its queries into blocks that fit a bounded scratch.

A *head group* is a run of query heads that share both a list of selected blocks and a key/value head. A *block* is a box of
batch entries, head groups and
queries: many queries of one head group, or many head groups where queries are few (decoding). Within a block queries are numbered through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Block", "HeadGroups"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Block:
    """Ranges of batch entries, head groups and queries (by number in the call, not by position)."""

    batch: range
    head_groups: range
    rows: range

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Batch entries, head groups, queries of each."""
        return len(self.batch), len(self.head_groups), len(self.rows)

    @property
    def at_batch(self) -> slice:
        """Its batch entries as an index."""
        return slice(self.batch.start, self.batch.stop)

    @property
    def at_rows(self) -> slice:
        """Its queries as an index."""
        return slice(self.rows.start, self.rows.stop)

    @functools.cached_property
    def queries(self) -> int:
        """Lists in the block: queries of all its head groups."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class HeadGroups:
    """``count`` head groups of ``heads`` query heads each, for every one of ``batch`` entries and ``rows`` queries."""

    batch: int
    rows: int
    count: int
    heads: int
    kv_heads: int
    list_heads: int

    @staticmethod
    def of(q: Tensor, kv_heads: int, list_heads: int) -> HeadGroups:
        """Those of ``q (B, Hq, Sq, D)``; both counts of heads divide Hq."""
        count = math.lcm(kv_heads, list_heads)
        return HeadGroups(q.shape[0], q.shape[2], count, q.shape[1] // count, kv_heads, list_heads)

    @property
    def queries(self) -> int:
        """Queries of all head groups and batch entries."""
        return self.batch * self.count * self.rows

    def blocks(self, most: int, *, one_head_group: bool) -> Iterator[Block]:
        """All queries of all head groups in blocks of about ``most``; with ``one_head_group`` no block has two head groups or
        batch entries."""
        if one_head_group or most < 2 * self.rows:
            step = math.ceil(self.rows / math.ceil(self.rows / max(most, 1))) if self.rows else 1
            sides = 1, 1, step
        elif most < 2 * self.rows * self.count:
            sides = 1, most // max(self.rows, 1), self.rows
        else:
            sides = most // max(self.rows * self.count, 1), self.count, self.rows
        for batch in _cut(self.batch, sides[0]):
            for head_groups in _cut(self.count, sides[1]):
                for rows in _cut(self.rows, sides[2]):
                    yield Block(batch, head_groups, rows)

    def heads_of(self, block: Block) -> range:
        """The query heads of a block."""
        return range(block.head_groups.start * self.heads, block.head_groups.stop * self.heads)

    def view(self, x: Tensor, block: Block) -> Tensor:
        """The part of ``x (B, Hq, Sq, ...)`` that a block has, as a view ``(batch, head_groups, queries, heads, ...)``."""
        part = x.unflatten(1, (self.count, self.heads))
        part = part[block.at_batch, block.head_groups.start : block.head_groups.stop, :, block.at_rows]
        return part.transpose(2, 3)

    def take(self, x: Tensor, block: Block, dtype: torch.dtype, beyond: float = 0.0) -> Tensor:
        """That part copied: ``(queries + 1, heads, ...)``, with ``beyond`` for a query more that stands for none."""
        part = self.view(x, block)
        taken = torch.empty((block.queries + 1, *part.shape[3:]), dtype=dtype, device=x.device)
        taken[:-1].view(part.shape).copy_(part)
        taken[-1] = beyond
        return taken

    def lists(self, indices: Tensor, block: Block) -> Tensor:
        """The lists ``(queries, W)`` of a block, from ``indices (B or 1, Hs, Sq, W)``."""
        batch = slice(0, 1) if indices.shape[0] == 1 else block.at_batch
        heads = [head_group * self.list_heads // self.count for head_group in block.head_groups]
        part = indices[batch, heads, block.at_rows]
        return part.expand(*block.sizes, part.shape[-1]).reshape(block.queries, part.shape[-1])

    def kv_lines(self, block: Block, device: torch.device) -> Tensor:
        """For each query of a block the number ``b * Hkv + kv head`` of what it reads."""
        head_group = torch.arange(block.head_groups.start, block.head_groups.stop, device=device) * self.kv_heads // self.count
        batch = torch.arange(block.batch.start, block.batch.stop, device=device) * self.kv_heads
        return (batch[:, None, None] + head_group[None, :, None]).expand(block.sizes).reshape(-1)


def _cut(size: int, step: int) -> Iterator[range]:
    for start in range(0, size, max(step, 1)):
        yield range(start, min(start + max(step, 1), size))
