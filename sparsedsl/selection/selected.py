"""What a selection comes out as: for each unit of queries the numbers of the units of keys it picked, as compact lists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Picks"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Picks:
    """Index lists ``(B, Hs, U, W)`` int32, ascending, -1 after the end; ``counts (B, Hs, U)`` int32.

    B may be 1 and Hs divides the query heads: head ``h`` of ``H`` reads row ``h * Hs // H``. List ``u`` belongs to the queries at positions
    ``(first + u) * q_unit ..``; ``kv_unit`` tokens make a unit of keys, of which there are ``units``, the last one possibly ragged.
    """

    indices: Tensor
    counts: Tensor
    q_unit: int
    kv_unit: int
    units: int
    first: int = 0

    def table(self) -> Tensor:
        """The lists as booleans ``(B, Hs, U, units)``: for small problems only."""
        lead = self.indices.shape[:-1]
        table = torch.zeros((*lead, self.units + 1), dtype=torch.bool, device=self.indices.device)
        place = torch.where(self.indices < 0, self.units, self.indices).long()
        return table.scatter_(-1, place, True)[..., : self.units]

    def finer(self, size: int, keys: int) -> Picks:
        """The same choice in units of ``size`` keys, which divides ``kv_unit``; ``keys`` in all.

        >>> lists = torch.tensor([[[[0, 1], [1, -1]]]], dtype=torch.int32)
        >>> Picks(lists, (lists >= 0).sum(-1, dtype=torch.int32), q_unit=1, kv_unit=4, units=2).finer(2, keys=6).indices[0, 0]
        tensor([[ 0,  1,  2, -1],
                [ 2, -1, -1, -1]], dtype=torch.int32)
        """
        parts, units = self.kv_unit // size, -(-keys // size)
        steps = torch.arange(parts, dtype=torch.int32, device=self.indices.device)
        fine = (self.indices[..., None] * parts + steps).masked_fill((self.indices < 0)[..., None], -1).flatten(3)
        fine = fine.masked_fill(fine >= units, -1)
        return Picks(fine, (fine >= 0).sum(-1, dtype=torch.int32), self.q_unit, size, units, self.first)

    def rows(self, part: slice) -> Picks:
        """The lists of some units of queries, numbered from the first of the call."""
        return Picks(
            self.indices[:, :, part], self.counts[:, :, part], self.q_unit, self.kv_unit, self.units, self.first + part.start
        )

    def scattered(self, values: Tensor) -> Tensor:
        """Values ``(B, H, U, W)`` of the slots by unit, ``(B, H, U, units)``, 0 elsewhere; Hs divides H. For small problems only."""
        indices = self.indices.repeat_interleave(values.shape[1] // self.indices.shape[1], 1).expand(values.shape)
        table = values.new_zeros((*values.shape[:3], self.units + 1))
        place = torch.where(indices < 0, self.units, indices).long()
        return table.scatter(-1, place, values)[..., : self.units]
