"""Noise for a choice that is drawn on demand: the same number at the same place, however the work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparsedsl.selection.scores import Leaf, ScoreSource

__all__ = ["GumbelScores"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class GumbelScores(ScoreSource):
    """Gumbel noise ``-log(-log(u))`` of shape ``size``, a function of ``seed`` and the place alone; float32 of 23 random bits.

    Added to logits, the k greatest are a sample without replacement from their softmax. Holds no tensor.

    >>> noise = GumbelScores((1, 2, 100, 100), seed=3)
    >>> bool((noise.block(slice(7, 9), slice(40, 50)) == noise.scores()[:, :, 7:9, 40:50]).all())
    True
    """

    size: tuple[int, int, int, int]
    seed: int | Tensor
    on_device: torch.device | str = "cpu"
    first_row: int = 0
    first_block: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.size

    @property
    def cell_bytes(self) -> int:
        return 24 * self.size[0] * self.size[1]

    @property
    def device(self) -> torch.device:
        return torch.device(self.on_device)

    def leaves(self) -> tuple[Leaf, ...]:
        return ()

    def on(self, tensors: Sequence[Tensor]) -> GumbelScores:
        return self

    def narrowed(self, rows: slice, blocks: slice) -> GumbelScores:
        """The same noise, of some rows and blocks."""
        size = (*self.size[:2], rows.stop - rows.start, blocks.stop - blocks.start)
        return replace(self, size=size, first_row=self.first_row + rows.start, first_block=self.first_block + blocks.start)

    def scores(self) -> Tensor:
        return self._at(torch.arange(self.first_block, self.first_block + self.size[3], device=self.device))

    def at(self, indices: Tensor) -> Tensor:
        heads = max(self.size[1], indices.shape[1])
        return self._at(self.first_block + indices.long().repeat_interleave(heads // indices.shape[1], dim=1))

    def _at(self, blocks: Tensor) -> Tensor:
        """At the blocks that broadcast to ``(B, H, R, n)``. Lists of more heads than the noise has share its heads."""
        batch, heads, rows, _ = self.size
        lists = blocks.shape[1] if blocks.ndim == 4 else heads
        head = torch.arange(lists, device=self.device) * heads // lists
        stream = torch.arange(batch, device=self.device)[:, None] * heads + head
        row = torch.arange(self.first_row, self.first_row + rows, device=self.device)
        bits = _mixed(_mixed(_mixed(stream + (self.seed << 16))[..., None] ^ row)[..., None] ^ blocks)
        uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # never 0 nor 1
        return -(-uniform.log()).log()


def _mixed(x: Tensor) -> Tensor:
    """A permutation of 32-bit integers that leaves no pattern (two multiplications and three shifts), in int64."""
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & low
    x = ((x ^ (x >> 15)) * 0x846CA68B) & low
    return x ^ (x >> 16)
