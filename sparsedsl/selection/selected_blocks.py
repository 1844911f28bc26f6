"""What a selection comes out as: for each block of queries the numbers of the blocks of keys it picked, as compact lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["KnownScores", "SelectedBlocks"]

Tensor = torch.Tensor


class KnownScores(NamedTuple):
    """Scores of what was chosen, ``(B, Hs, U, W)`` like the lists, -inf after the end, without gradients; and what they are scores of."""

    source: object
    values: Tensor


@dataclass(frozen=True, eq=False)
class SelectedBlocks:
    """Index lists ``(B, Hs, U, W)`` int32, ascending, -1 after the end; ``counts (B, Hs, U)`` int32.

    B may be 1 and Hs divides the query heads: head ``h`` of ``H`` reads row ``h * Hs // H``. List ``u`` belongs to the queries at positions
    ``(first + u) * q_block ..``; ``kv_block`` tokens make a block of keys, of which there are ``blocks``, the last one possibly
    ragged. ``scores``: those of the blocks, if they were kept.
    """

    indices: Tensor
    counts: Tensor
    q_block: int
    kv_block: int
    blocks: int
    first: int = 0
    scores: KnownScores | None = None

    def table(self) -> Tensor:
        """The lists as booleans ``(B, Hs, U, blocks)``: for small problems only."""
        lead = self.indices.shape[:-1]
        table = torch.zeros((*lead, self.blocks + 1), dtype=torch.bool, device=self.indices.device)
        place = torch.where(self.indices < 0, self.blocks, self.indices).long()
        return table.scatter_(-1, place, True)[..., : self.blocks]

    def finer(self, size: int, keys: int) -> SelectedBlocks:
        """The same choice in blocks of ``size`` keys, which divides ``kv_block``; ``keys`` in all.

        >>> lists = torch.tensor([[[[0, 1], [1, -1]]]], dtype=torch.int32)
        >>> SelectedBlocks(lists, (lists >= 0).sum(-1, dtype=torch.int32), q_block=1, kv_block=4, blocks=2).finer(2, keys=6).indices[0, 0]
        tensor([[ 0,  1,  2, -1],
                [ 2, -1, -1, -1]], dtype=torch.int32)
        """
        parts, blocks = self.kv_block // size, -(-keys // size)
        steps = torch.arange(parts, dtype=torch.int32, device=self.indices.device)
        fine = (self.indices[..., None] * parts + steps).masked_fill((self.indices < 0)[..., None], -1).flatten(3)
        fine = fine.masked_fill(fine >= blocks, -1)
        return SelectedBlocks(fine, (fine >= 0).sum(-1, dtype=torch.int32), self.q_block, size, blocks, self.first)

    def of_rows(self, tokens: int, rows: int) -> SelectedBlocks:
        """The same choice among so many rows of ``tokens`` keys each, whole ones in a block; what there is no row for is left out.

        >>> lists = torch.tensor([[[[0, 2]]]], dtype=torch.int32)
        >>> SelectedBlocks(lists, lists.new_tensor([[[2]]]), q_block=1, kv_block=4, blocks=3).of_rows(4, rows=2).indices
        tensor([[[[ 0, -1]]]], dtype=torch.int32)
        """
        size = self.kv_block // tokens
        blocks = -(-rows // size)
        if blocks >= self.blocks:
            return SelectedBlocks(self.indices, self.counts, self.q_block, size, blocks, self.first, self.scores)
        there = self.indices.masked_fill(self.indices >= blocks, -1)  # the last ones of a list
        return SelectedBlocks(there, (there >= 0).sum(-1, dtype=torch.int32), self.q_block, size, blocks, self.first)

    def rows(self, part: slice) -> SelectedBlocks:
        """The lists of some blocks of queries, numbered from the first of the call."""
        return SelectedBlocks(
            self.indices[:, :, part], self.counts[:, :, part], self.q_block, self.kv_block, self.blocks, self.first + part.start
        )

    def scattered(self, values: Tensor) -> Tensor:
        """Values ``(B, H, U, W)`` of the slots by block, ``(B, H, U, blocks)``, 0 elsewhere; Hs divides H. For small problems only."""
        indices = self.indices.repeat_interleave(values.shape[1] // self.indices.shape[1], 1).expand(values.shape)
        table = values.new_zeros((*values.shape[:3], self.blocks + 1))
        place = torch.where(indices < 0, self.blocks, indices).long()
        return table.scatter(-1, place, values)[..., : self.blocks]
