"""Lists of chunks by query, turned into lists of queries by chunk, and cut into pieces of work.

A *pair* is a query with one chunk of its list, numbered ``query * W + slot``. Pairs are sorted by chunk; chunks that were picked about as
often stand together, each with the same number of *places*, so that one batched product serves many. Nothing is larger than the lists.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from sparsedsl.tiling.cutting import CUTTING

__all__ = ["ChunkTile", "Inverted", "Sizes", "invert"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """Tokens of a chunk, chunks of a line of keys, whether the last is ragged, heads of a head group, head dims of q and v together."""

    tokens: int
    blocks: int
    ragged: bool
    heads: int
    width: int

    @functools.cached_property
    def alone(self) -> int:
        """How often a chunk is picked that is better off, on CPU, with products of its own."""
        return math.ceil(CUTTING.now.single / (self.heads * self.tokens))


@dataclass(frozen=True, eq=False)
class ChunkTile:
    """``len(chunks)`` chunks with ``load`` places each, the first at ``start``; all are whole, or all the ragged last of their line."""

    start: int
    load: int
    ragged: bool
    chunks: list[int]

    @functools.cached_property
    def places(self) -> slice:
        """Where its pairs stand."""
        return slice(self.start, self.start + self.load * len(self.chunks))


@dataclass(frozen=True, eq=False)
class Inverted:
    """``pairs (places,)``: the pair at each place, or the number of pairs where there is none. ``place (queries, W)``: where each pair
    stands, or the number of places where the list has ended."""

    pairs: Tensor
    place: Tensor
    tiles: list[ChunkTile]

    @functools.cached_property
    def queries(self) -> Tensor:
        """The query at each place; the number of queries where there is none."""
        return self.pairs // self.place.shape[1]

    @property
    def beyond(self) -> Tensor:
        """Whether a slot ``(queries, W)`` is after the end of its list."""
        return self.place == self.pairs.shape[0]


def invert(lists: Tensor, lines: Tensor, sizes: Sizes, most: int) -> Inverted:
    """Invert ``lists (queries, W)``, -1 after their ends; query ``i`` reads line ``lines[i]``, chunk ``c`` of it is ``line * blocks + c``.

    A tile holds at most about ``most`` numbers of scratch. Equal lists give equal results: every sort is stable.
    """
    total, device = lists.numel(), lists.device
    keys = lists.long() + (lines * sizes.blocks)[:, None]
    # torch sorts small integers several times faster.
    small = torch.int32 if sizes.blocks * (int(lines[-1]) + 1) < 2**31 - 1 else torch.int64
    keys = keys.masked_fill_(lists < 0, torch.iinfo(small).max).to(small)
    keys, order = torch.sort(keys.flatten(), stable=True)
    count = int((lists >= 0).sum())
    order = order[:count]

    chunks, loads = torch.unique_consecutive(keys[:count], return_counts=True)
    room = _room(loads)
    last = (chunks % sizes.blocks == sizes.blocks - 1) if sizes.ragged else torch.zeros_like(chunks, dtype=torch.bool)
    kind, by_kind = torch.sort(room * 2 + last, descending=True, stable=True)
    begin = torch.empty_like(room)
    begin[by_kind] = (kind // 2).cumsum(0) - kind // 2
    at = torch.repeat_interleave(begin - (loads.cumsum(0) - loads), loads) + torch.arange(count, device=device)

    places = int(room.sum())
    pairs = torch.full((places,), total, dtype=torch.int64, device=device)
    pairs[at] = order
    place = torch.full((total,), places, dtype=torch.int64, device=device)
    place[order] = at
    return Inverted(pairs, place.view(lists.shape), _cut(kind, chunks[by_kind].tolist(), sizes, most))


def _room(loads: Tensor) -> Tensor:
    """Places for each load: rounded up by an eighth at most, so that few sizes occur: equal ones share a batch, and oneDNN compiles
    each new size of a product, which takes longer than the product."""
    step = torch.bitwise_left_shift(torch.ones_like(loads), (torch.frexp(loads.double()).exponent - 4).clamp(min=0).long())
    return (loads + step - 1) // step * step


def _cut(kind: Tensor, chunks: list[int], sizes: Sizes, most: int) -> list[ChunkTile]:
    kinds, counts = torch.unique_consecutive(kind, return_counts=True)
    tiles, start, first = [], 0, 0
    for value, number in zip(kinds.tolist(), counts.tolist(), strict=True):
        load, ragged = value // 2, bool(value % 2)
        each = load * sizes.heads * (sizes.tokens + sizes.width) + sizes.tokens * sizes.width
        step = 1 if kind.device.type == "cpu" and load >= sizes.alone else max(1, most // each)
        for low in range(first, first + number, step):
            part = chunks[low : min(low + step, first + number)]
            tiles.append(ChunkTile(start, load, ragged, part))
            start += load * len(part)
        first += number
    return tiles
