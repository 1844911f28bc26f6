"""Scores made of others place by place: cut off below 0, times a factor for each row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.scores import DerivedSource, Leaf

__all__ = ["ReluScores", "WeightedScores"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class ReluScores(DerivedSource):
    """``max(score, 0)``; a NaN stays one.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> ReluScores(TensorScores(torch.tensor([[[[-1.0, 2.0]]]]))).scores()
    tensor([[[[0., 2.]]]])
    """

    @property
    def pair_bytes(self) -> int:
        return self.source.pair_bytes

    def on(self, tensors: Sequence[Tensor]) -> ReluScores:
        return ReluScores(self.source.on(tensors))

    def narrowed(self, rows: slice, blocks: slice) -> ReluScores:
        return ReluScores(self.source.narrowed(rows, blocks))

    def scores(self) -> Tensor:
        scores = self.source.scores()
        return scores.relu() if torch.is_grad_enabled() and scores.requires_grad else scores.relu_()

    def at(self, indices: Tensor) -> Tensor:
        return self.source.at(indices).relu()


@dataclass(frozen=True, eq=False)
class WeightedScores(DerivedSource):
    """``factor * score`` with ``factors (B|1, Hf, R, 1)``, one a row; Hf and the heads of the scores divide each other.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> WeightedScores(TensorScores(torch.ones(1, 1, 2, 2)), torch.tensor([2.0, -1.0]).view(1, 1, 2, 1)).scores()
    tensor([[[[ 2.,  2.],
              [-1., -1.]]]])
    """

    factors: Tensor

    def __post_init__(self) -> None:
        (batch, heads, rows, _), wanted = self.source.shape, self.factors.shape
        least, most = sorted((heads, wanted[1]))
        if len(wanted) != 4 or wanted[0] not in (1, batch) or wanted[2:] != (rows, 1) or not least or most % least:
            raise ShapeError(
                f"weighted scores: factors are {tuple(wanted)} for scores {self.source.shape}; wanted (B or 1, heads that divide or are a "
                f"multiple, {rows}, 1)"
            )

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, rows, blocks = self.source.shape
        return batch, max(heads, self.factors.shape[1]), rows, blocks

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.source.dtype, self.factors.dtype) else torch.float32

    @property
    def cell_bytes(self) -> int:
        return self.source.cell_bytes + 8 * self.shape[0] * self.shape[1]

    @property
    def pair_bytes(self) -> int:
        return self.source.pair_bytes + 8 * self.shape[0] * self.shape[1]

    def leaves(self) -> tuple[Leaf, ...]:
        return (*self.source.leaves(), Leaf(self.factors, "rows"))

    def on(self, tensors: Sequence[Tensor]) -> WeightedScores:
        return WeightedScores(self.source.on(tensors[:-1]), tensors[-1])

    def narrowed(self, rows: slice, blocks: slice) -> WeightedScores:
        return WeightedScores(self.source.narrowed(rows, blocks), self.factors[:, :, rows])

    def scores(self) -> Tensor:
        return self._times(self.source.scores())

    def at(self, indices: Tensor) -> Tensor:
        return self._times(self.source.at(indices))

    def _times(self, scores: Tensor) -> Tensor:
        heads = max(scores.shape[1], self.factors.shape[1])
        return repeat_kv(scores, heads) * repeat_kv(self.factors.to(self.dtype), heads)
