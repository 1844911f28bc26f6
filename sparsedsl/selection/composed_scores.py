"""Scores made of others: reduced over heads, added up, and the bound of a page."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.scores import DotScores, Leaf, ScoreSource

__all__ = ["BoundScores", "GroupedScores", "SumScores"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class GroupedScores(ScoreSource):
    """``source`` with the heads of each of ``heads_out`` groups reduced: one choice for a KV group, or for all heads.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> GroupedScores(TensorScores(torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)), 1, "mean").scores()
    tensor([[[[3.]]]])
    """

    source: ScoreSource
    heads_out: int
    how: Literal["sum", "mean", "max"] = "sum"

    def __post_init__(self) -> None:
        if self.heads_out < 1 or self.source.shape[1] % self.heads_out:
            raise ShapeError(
                f"grouped scores: heads_out {self.heads_out} does not divide the {self.source.shape[1]} heads of the scores"
            )
        if self.how not in ("sum", "mean", "max"):
            raise ShapeError(f"grouped scores: how is {self.how!r}; wanted 'sum', 'mean' or 'max'")

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        batch, _, rows, blocks = self.source.shape
        return batch, self.heads_out, rows, blocks

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def cell_bytes(self) -> int:
        return self.source.cell_bytes + 8 * self.shape[0] * self.heads_out

    @property
    def pair_bytes(self) -> int:
        return self.source.pair_bytes

    def leaves(self) -> tuple[Leaf, ...]:
        return self.source.leaves()

    def on(self, tensors: Sequence[Tensor]) -> GroupedScores:
        return GroupedScores(self.source.on(tensors), self.heads_out, self.how)

    def narrowed(self, rows: slice, blocks: slice) -> GroupedScores:
        return GroupedScores(self.source.narrowed(rows, blocks), self.heads_out, self.how)

    def scores(self) -> Tensor:
        return self._reduced(self.source.scores())

    def at(self, indices: Tensor) -> Tensor:
        if self.heads_out % indices.shape[1]:
            raise ShapeError(
                f"grouped scores: {indices.shape[1]} heads of lists do not divide {self.heads_out} groups; choose by group"
            )
        return self._reduced(self.source.at(indices))

    def _reduced(self, scores: Tensor) -> Tensor:
        groups = scores.unflatten(1, (self.heads_out, -1))
        if self.how == "max":
            return groups.amax(2)
        return groups.sum(2) if self.how == "sum" else groups.mean(2)


@dataclass(frozen=True, eq=False)
class SumScores(ScoreSource):
    """``sum_i factors[i] * sources[i]``: a bias, noise, a penalty. Fewer heads are spread; sizes of one serve all.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> bias = TensorScores(torch.tensor([0.0, 10.0]).view(1, 1, 1, 2))
    >>> SumScores((TensorScores(torch.ones(1, 1, 2, 2)), bias), (1.0, 0.5)).scores()
    tensor([[[[1., 6.],
              [1., 6.]]]])
    """

    sources: tuple[ScoreSource, ...]
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sources or (self.factors is not None and len(self.factors) != len(self.sources)):
            raise ShapeError(
                f"sum of scores: {len(self.sources)} sources and factors {self.factors}; wanted a factor for each source"
            )
        shape = self.shape
        for source in self.sources:
            fits = all(n in (1, m) for n, m in zip(source.shape[::2] + source.shape[3:], shape[::2] + shape[3:], strict=True))
            if not fits or shape[1] % source.shape[1]:
                raise ShapeError(
                    f"sum of scores: shapes {[one.shape for one in self.sources]} do not fit; wanted the same "
                    "(batch, heads, rows, blocks), or one in its place, or heads that divide the most"
                )

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        sizes = zip(*(source.shape for source in self.sources), strict=True)
        batch, heads, rows, blocks = (0 if 0 in some else max(some) for some in sizes)  # one in the place of none is none
        return batch, heads, rows, blocks

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return torch.float64 if any(source.dtype == torch.float64 for source in self.sources) else torch.float32

    @property
    def cell_bytes(self) -> int:
        return 2 * max(source.cell_bytes for source in self.sources) + 8 * self.shape[0] * self.shape[1]

    @property
    def pair_bytes(self) -> int:
        return sum(source.pair_bytes for source in self.sources)

    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for source in self.sources for leaf in source.leaves())

    def on(self, tensors: Sequence[Tensor]) -> SumScores:
        rest = list(tensors)
        parts = []
        for source in self.sources:
            count = len(source.leaves())
            parts.append(source.on(rest[:count]))
            rest = rest[count:]
        return SumScores(tuple(parts), self.factors)

    def narrowed(self, rows: slice, blocks: slice) -> SumScores:
        return SumScores(tuple(source.narrowed(rows, blocks) for source in self.sources), self.factors)

    def scores(self) -> Tensor:
        return self._added([source.scores() for source in self.sources])

    def at(self, indices: Tensor) -> Tensor:
        return self._added([source.at(indices) for source in self.sources])

    def _added(self, parts: list[Tensor]) -> Tensor:
        heads = max(part.shape[1] for part in parts)
        factors = self.factors or (1.0,) * len(parts)
        total = repeat_kv(parts[0], heads) * factors[0]
        for part, factor in zip(parts[1:], factors[1:], strict=True):
            total = total + repeat_kv(part, heads) * factor
        return total


@dataclass(frozen=True, eq=False)
class BoundScores(ScoreSource):
    """``scale * sum_d max(q_d * low_d, q_d * high_d)``: no key between ``low`` and ``high (B, Hk, U, D)`` has a greater logit.

    ``q (B, Hq, R, D)``; ``scale`` is positive. ``low`` and ``high`` are those of :func:`sparsedsl.selection.proxies.bounds`.

    >>> q, low, high = (torch.tensor([[[x]]]) for x in ([1.0, -2.0], [0.0, 1.0], [3.0, 4.0]))
    >>> BoundScores(q, low, high).scores()
    tensor([[[[1.]]]])
    """

    q: Tensor
    low: Tensor
    high: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.low.shape != self.high.shape:
            raise ShapeError(
                f"bound scores: low is {tuple(self.low.shape)} and high is {tuple(self.high.shape)}; wanted the same shape"
            )
        DotScores(self.q, self.low)

    @classmethod
    def known(cls, q: Tensor, low: Tensor, high: Tensor, scale: float, dtype: torch.dtype) -> BoundScores:
        """Of tensors that are known to fit, and the type of the scores: nothing is looked at again."""
        made = object.__new__(cls)
        vars(made).update(q=q, low=low, high=high, scale=scale, dtype=dtype, shape=DotScores.known(q, low, scale, dtype).shape)
        return made

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self._products().dtype

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        return DotScores(self.q, self.low).shape

    @property
    def cell_bytes(self) -> int:
        return self._products().cell_bytes

    @property
    def pair_bytes(self) -> int:
        return self._products().pair_bytes

    def leaves(self) -> tuple[Leaf, ...]:
        return Leaf(self.q, "rows"), Leaf(self.low, "blocks"), Leaf(self.high, "blocks")

    def on(self, tensors: Sequence[Tensor]) -> BoundScores:
        return BoundScores(tensors[0], tensors[1], tensors[2], self.scale)

    def scores(self) -> Tensor:
        return self._products(self.q.relu(), (-self.q).relu()).scores()

    def at(self, indices: Tensor) -> Tensor:
        return self._products(self.q.relu(), (-self.q).relu()).at(indices)

    def _products(self, positive: Tensor | None = None, negative: Tensor | None = None) -> SumScores:
        positive, negative = (self.q if part is None else part for part in (positive, negative))
        return SumScores((DotScores(positive, self.high, self.scale), DotScores(negative, self.low, -self.scale)))
