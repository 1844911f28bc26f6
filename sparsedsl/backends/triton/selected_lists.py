"""Index lists in the two forms that kernels read: the union of adjacent queries' chunks, and the queries of each chunk.

Made by torch on the device of the lists, in sizes that follow from shapes alone: nothing waits for the device, and nothing is
larger than the lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["MOST_QUERIES", "ByChunk", "Unions", "by_chunk", "unions"]

Tensor = torch.Tensor
# Who picked a chunk of a union is a bit of an int32.
MOST_QUERIES = 32


@dataclass(frozen=True, eq=False)
class Unions:
    """Chunks of each tile of ``queries`` adjacent queries: ``chunks (B, Hs, T, Wu)`` int32, ascending, -1 after the end;
    ``owners`` of the same shape, bit ``m`` set where query ``m`` of the tile picked the chunk; ``counts (B, Hs, T)`` int32."""

    chunks: Tensor
    owners: Tensor
    counts: Tensor
    queries: int


@dataclass(frozen=True, eq=False)
class ByChunk:
    """Queries of each chunk: those of chunk ``c`` of a line are ``places[line, starts[line, c] : starts[line, c + 1]]``, each as
    ``query * W + slot``, ascending. ``starts (B, Hs, blocks + 1)``, ``places (B, Hs, Sq * W)``: int32 or, where needed, int64."""

    starts: Tensor
    places: Tensor


def unions(indices: Tensor, queries: int, blocks: int) -> Unions:
    """Merge the lists ``indices (B, Hs, Sq, W)`` of every ``queries`` adjacent queries; -1 stands for none.

    ``blocks``: how many chunks there are. The width of the result is the most that a union may have.

    >>> lists = torch.tensor([[0, 2], [2, 3], [1, -1]], dtype=torch.int32)[None, None]
    >>> found = unions(lists, queries=2, blocks=4)
    >>> found.chunks.tolist(), found.owners.tolist(), found.counts.tolist()
    ([[[[0, 2, 3, -1], [1, -1, -1, -1]]]], [[[[1, 3, 2, 0], [1, 0, 0, 0]]]], [[[3, 1]]])
    """
    batch, heads, rows, width = indices.shape
    tiles = -(-rows // queries)
    padded = torch.nn.functional.pad(indices, (0, 0, 0, tiles * queries - rows), value=-1)
    padded = padded.reshape(batch, heads, tiles, queries * width)
    member = torch.arange(queries, dtype=torch.int32, device=indices.device).repeat_interleave(width)
    # Chunk and query are sorted as one number: of one chunk the queries ascend, and each stands there once.
    dtype = torch.int32 if (blocks + 1) * queries < 2**31 else torch.int64
    chosen = torch.where(padded < 0, blocks, padded).to(dtype)
    order = (chosen * queries + member).sort(dim=-1).values
    chunk, member = order // queries, order % queries
    is_new = torch.ones_like(chunk, dtype=torch.bool)
    is_new[..., 1:] = chunk[..., 1:] != chunk[..., :-1]
    most = min(queries * width, blocks)
    is_none = chunk >= blocks
    # What is no chunk goes to a place beyond the last, which is cut off.
    place = torch.where(is_none, most, is_new.cumsum(-1) - 1)
    shape = (batch, heads, tiles, most + 1)
    chunks = torch.full(shape, -1, dtype=torch.int32, device=indices.device).scatter_(-1, place, chunk.int())
    bits = torch.bitwise_left_shift(torch.ones_like(member, dtype=torch.int32), member.int())
    owners = torch.zeros(shape, dtype=torch.int32, device=indices.device).scatter_add_(-1, place, bits)
    counts = (is_new & ~is_none).sum(-1, dtype=torch.int32)
    return Unions(chunks[..., :most].contiguous(), owners[..., :most].contiguous(), counts, queries)


def by_chunk(indices: Tensor, blocks: int) -> ByChunk:
    """Invert the lists ``indices (B, Hs, Sq, W)``, -1 for none, for ``blocks`` chunks. Equal lists give equal results.

    >>> lists = torch.tensor([[0, 2], [2, 3], [1, -1]], dtype=torch.int32)[None, None]
    >>> found = by_chunk(lists, blocks=4)
    >>> found.starts.tolist(), found.places[0, 0, :5].tolist()
    ([[[0, 1, 2, 4, 5]]], [0, 4, 1, 2, 3])
    """
    chosen = torch.where(indices < 0, blocks, indices).flatten(2).contiguous()
    chunk, places = chosen.sort(dim=-1, stable=True)
    numbers = torch.arange(blocks + 1, dtype=chunk.dtype, device=chunk.device).expand(*chunk.shape[:2], -1)
    small = places.shape[-1] < 2**31
    starts = torch.searchsorted(chunk, numbers.contiguous(), out_int32=small)
    return ByChunk(starts, places.int() if small else places)
