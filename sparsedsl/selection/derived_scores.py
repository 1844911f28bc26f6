"""Scores made of other scores, block by block: mass of a softmax, larger blocks. Still never rows x blocks at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from sparsedsl.selection.candidates import Candidates
from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.scores import DerivedSource, Leaf, ScoreSource
from sparsedsl.selection.scores_at_blocks import lse_over_candidates

__all__ = ["OverlapScores", "RegroupedScores", "SoftmaxScores", "softmax_scores"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class SoftmaxScores(DerivedSource):
    """``exp(score - total)`` at the candidates, 0 elsewhere. ``totals (B, H, R, 1)``: LSE of each row over its candidates; None: worked
    out when they are asked for, of all of them.

    ``first``: the numbers of its first row and block in the whole, by which the candidates are asked. ``learns``: whether gradients were
    wanted where it was made, which may be elsewhere than where the totals are asked for.
    """

    totals: Tensor | None
    candidates: Candidates
    first: tuple[int, int] = (0, 0)
    learns: bool = field(default_factory=torch.is_grad_enabled)

    @functools.cached_property
    def known_totals(self) -> Tensor:
        """The totals."""
        if self.totals is not None:
            return self.totals
        with torch.set_grad_enabled(self.learns):
            return lse_over_candidates(self.source, self.candidates)[..., None]

    @property
    def cell_bytes(self) -> int:
        return 2 * self.source.cell_bytes

    def leaves(self) -> tuple[Leaf, ...]:
        return (*self.source.leaves(), Leaf(self.known_totals, "cells"))

    def on(self, tensors: Sequence[Tensor]) -> SoftmaxScores:
        return replace(self, source=self.source.on(tensors[:-1]), totals=tensors[-1])

    def narrowed(self, rows: slice, blocks: slice) -> SoftmaxScores:
        first = self.first[0] + rows.start, self.first[1] + blocks.start
        return SoftmaxScores(self.source.narrowed(rows, blocks), self.known_totals[:, :, rows], self.candidates, first)

    def scores(self) -> Tensor:
        scores = self.source.scores()
        _, _, rows, blocks = self.shape
        some, tile = (slice(n, n + size) for n, size in zip(self.first, (rows, blocks), strict=True))
        scores = self.candidates.mask_(scores, some, tile)
        totals = self.known_totals
        return (scores - totals.masked_fill(totals == float("-inf"), 0.0)).exp_()

    def at(self, indices: Tensor) -> Tensor:
        scores = self.source.at(indices)
        rows, blocks = (slice(n, n + size) for n, size in zip(self.first, self.shape[2:], strict=True))
        allowed = self.candidates.at(indices + self.first[1], rows, blocks, self.shape[1])
        if allowed is not None:  # before the exponential, whose gradient would be infinity times 0
            scores = torch.where(allowed, scores, float("-inf"))
        totals = repeat_kv(self.known_totals, scores.shape[1])
        return (scores - totals.masked_fill(totals == float("-inf"), 0.0)).exp()


def softmax_scores(source: ScoreSource, candidates: Candidates) -> SoftmaxScores:
    """The softmax of ``source`` over the candidates of each row.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> softmax_scores(TensorScores(torch.zeros(1, 1, 2, 2)), Candidates(end=torch.tensor([1, 2]))).scores()
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])
    """
    return SoftmaxScores(source, None, candidates)


@dataclass(frozen=True, eq=False)
class RegroupedScores(DerivedSource):
    """Scores of ``size`` neighbouring blocks as one: their sum, mean or maximum. The last group may be ragged."""

    size: int
    how: str = "sum"

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, rows, blocks = self.source.shape
        return batch, heads, rows, -(-blocks // self.size)

    @property
    def cell_bytes(self) -> int:
        return self.source.cell_bytes * (self.size + 1)

    @property
    def pair_bytes(self) -> int:
        return self.source.pair_bytes * (self.size + 1)

    @property
    def block_bytes(self) -> int:
        return self.source.block_bytes * self.size

    def on(self, tensors: Sequence[Tensor]) -> RegroupedScores:
        return replace(self, source=self.source.on(tensors))

    def narrowed(self, rows: slice, blocks: slice) -> RegroupedScores:
        fine = slice(blocks.start * self.size, min(blocks.stop * self.size, self.source.shape[3]))
        return replace(self, source=self.source.narrowed(rows, fine))

    def scores(self) -> Tensor:
        scores = self.source.scores()
        return self._joined(scores)

    def at(self, indices: Tensor) -> Tensor:
        fine = self.source.shape[3]
        steps = torch.arange(self.size, device=indices.device)
        places = indices.long()[..., None] * self.size + steps
        there = repeat_kv(places < fine, max(self.shape[1], indices.shape[1]))
        parts = self.source.at(places.clamp(max=max(fine - 1, 0)).flatten(3)).unflatten(3, (-1, self.size))
        if self.how == "max":
            return torch.where(there, parts, float("-inf")).amax(4)
        total = torch.where(there, parts, 0.0).sum(4)
        return total / there.sum(4).clamp(min=1) if self.how == "mean" else total

    def _joined(self, scores: Tensor) -> Tensor:
        missing = -scores.shape[3] % self.size
        if missing and self.how == "mean":
            whole = scores.shape[3] // self.size * self.size
            parts = [scores[..., :whole].unflatten(3, (-1, self.size)).mean(4), scores[..., whole:].mean(3, keepdim=True)]
            return torch.cat(parts, dim=3)
        if missing:
            scores = torch.nn.functional.pad(scores, (0, missing), value=0.0 if self.how == "sum" else float("-inf"))
        groups = scores.unflatten(3, (-1, self.size))
        return groups.amax(4) if self.how == "max" else getattr(groups, self.how)(4)


@dataclass(frozen=True, eq=False)
class OverlapScores(DerivedSource):
    """Mass of blocks from mass of windows that overlap.

    Both are counted in strips, the tokens from one window's first to the next one's: a window covers ``length`` strips, a block ``size``.
    ``how``: ``"strips"``, the sum over windows, each as often as it shares a strip with the block; ``"max"``, the greatest that shares
    one. There are ``blocks`` of them; those that no window touches have mass 0.

    ``first``: the strip where the first block begins, less the first window of ``source``.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> windows = TensorScores(torch.tensor([[[[1.0, 2.0, 4.0]]]]))
    >>> OverlapScores(windows, length=2, size=2, how="strips", blocks=3).scores()
    tensor([[[[ 4., 10.,  0.]]]])
    """

    length: int
    size: int
    how: str
    blocks: int
    first: int = 0

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        return *self.source.shape[:3], self.blocks

    @property
    def cell_bytes(self) -> int:
        return 3 * self.source.cell_bytes * self.size

    @property
    def pair_bytes(self) -> int:
        return self.cell_bytes * max(1, self.blocks)

    @property
    def block_bytes(self) -> int:
        return self.source.block_bytes * self.size

    def on(self, tensors: Sequence[Tensor]) -> OverlapScores:
        return replace(self, source=self.source.on(tensors))

    def narrowed(self, rows: slice, blocks: slice) -> OverlapScores:
        """Windows that touch any of the blocks."""
        windows = self.source.shape[3]
        start, stop = (self.first + part * self.size for part in (blocks.start, blocks.stop))
        low = min(max(0, start - self.length + 1), windows)
        high = max(low, min(stop, windows))
        count = blocks.stop - blocks.start
        return replace(self, source=self.source.narrowed(rows, slice(low, high)), blocks=count, first=start - low)

    def scores(self) -> Tensor:
        mass = self.source.scores()
        strips = self.blocks * self.size
        # Strips before the first block and behind the last are of windows that touch others.
        padded = torch.nn.functional.pad(mass, (self.length - 1, max(0, self.first + strips - mass.shape[3])))
        found = None
        for step in range(self.length):  # the windows that begin so many strips before a strip
            begin = self.first + self.length - 1 - step
            part = padded[..., begin : begin + strips]
            found = part if found is None else found + part if self.how == "strips" else torch.maximum(found, part)
        assert found is not None
        groups = found.unflatten(3, (self.blocks, self.size))
        return groups.sum(4) if self.how == "strips" else groups.amax(4)

    def at(self, indices: Tensor) -> Tensor:
        heads = max(self.shape[1], indices.shape[1])
        size = (max(self.shape[0], indices.shape[0]), heads, indices.shape[2], self.blocks)
        return repeat_kv(self.scores(), heads).expand(size).gather(3, repeat_kv(indices.long(), heads).expand(*size[:3], -1))
