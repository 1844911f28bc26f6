"""Keys or values as lines of chunks: read chunk by chunk in the dtype of accumulation, never whole; and sums of their shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedsl.backends.tiled.selected_invert import ChunkTile

__all__ = ["ChunkSums", "Chunks"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Chunks:
    """``x (B, H, S, D)`` of any strides, ``tokens`` a chunk, ``blocks`` chunks a line; a chunk's number is ``(b * H + h) * blocks + c``."""

    x: Tensor
    tokens: int
    blocks: int
    dtype: torch.dtype

    def length(self, piece: ChunkTile) -> int:
        """Tokens of each chunk of a piece."""
        return self.x.shape[2] - (self.blocks - 1) * self.tokens if piece.ragged else self.tokens

    def read(self, piece: ChunkTile) -> Tensor:
        """The chunks of a piece: ``(chunks, length, D)``, contiguous."""
        heads = self.x.shape[1]
        if len(piece.chunks) == 1:
            (number,) = piece.chunks
            line, start = number // self.blocks, number % self.blocks * self.tokens
            # A slice ends with the keys: the last chunk may be ragged.
            return self.x[line // heads, line % heads, start : start + self.tokens].to(self.dtype).contiguous()[None]
        numbers = torch.tensor(piece.chunks, device=self.x.device)
        lines, chunks = numbers // self.blocks, numbers % self.blocks
        if piece.ragged:
            return self.x[:, :, (self.blocks - 1) * self.tokens :][lines // heads, lines % heads].to(self.dtype)
        whole = self.x.shape[2] // self.tokens
        by_chunk = self.x[:, :, : whole * self.tokens].unflatten(2, (whole, self.tokens))
        return by_chunk[lines // heads, lines % heads, chunks].to(self.dtype)


class ChunkSums:
    """A gradient of :class:`Chunks`, added up chunk by chunk. A chunk is in one piece of a block at most."""

    def __init__(self, like: Chunks) -> None:
        batch, heads, self.size, width = like.x.shape
        self.like, self.lead = like, (batch, heads)
        self.sums = torch.zeros((batch * heads * like.blocks, like.tokens, width), dtype=like.dtype, device=like.x.device)

    def add(self, piece: ChunkTile, values: Tensor) -> None:
        """Add ``values (chunks, length, D)``."""
        sums = self.sums[:, : values.shape[1]]
        if len(piece.chunks) == 1:
            sums[piece.chunks[0]].add_(values[0])
        else:
            sums.index_add_(0, torch.tensor(piece.chunks, device=sums.device), values)

    def join(self, other: ChunkSums) -> None:
        """Add the sums of another part of the queries."""
        self.sums.add_(other.sums)

    def whole(self, factor: float = 1.0) -> Tensor:
        """The sums, times ``factor``, as ``(B, H, S, D)`` in the dtype of the tensor they are a gradient of."""
        sums = self.sums if factor == 1.0 else self.sums.mul_(factor)
        return sums.view(*self.lead, self.like.blocks * self.like.tokens, sums.shape[2])[:, :, : self.size].to(self.like.x.dtype)
