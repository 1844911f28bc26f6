"""Scores that drive a choice, given in blocks on demand: rows of queries against units of keys.

A source holds what its scores are made of and never all of them. Narrowed to some rows and units it is a small source of the same
kind, whose :meth:`~ScoreSource.scores` are a plain tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.run.choosing.taking import spread, take, wide
from sparsedsl.run.products import product_nt

__all__ = ["BoundScores", "DotScores", "GroupedScores", "Leaf", "ScoreSource", "SumScores", "TensorScores"]

Tensor = torch.Tensor
How = Literal["sum", "mean", "max"]
Source = TypeVar("Source", bound="ScoreSource")


class Leaf(NamedTuple):
    """A tensor that scores are made of, and what its last two dimensions are: ``(row, D)``, ``(unit, D)`` or ``(row, unit)``."""

    tensor: Tensor
    over: Literal["rows", "units", "cells"]

    def part(self, rows: slice, units: slice) -> tuple[slice, ...]:
        """Where the rows and units lie in the tensor. A dimension of one is for all rows or units."""
        if self.over == "cells":
            size = self.tensor.shape[-2:]
            return (
                slice(None),
                slice(None),
                *(part if n > 1 else slice(None) for n, part in zip(size, (rows, units), strict=True)),
            )
        return (slice(None), slice(None), rows if self.over == "rows" else units)


class ScoreSource(ABC):
    """Scores ``(batch, heads, rows, units)``, float32 (float64 where a tensor they are made of is)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries, heads, rows, units."""

    @property
    @abstractmethod
    def cell_bytes(self) -> int:
        """Scratch memory that one (row, unit) takes in :meth:`scores`, over all batch entries and heads."""

    @property
    def pair_bytes(self) -> int:
        """Scratch memory that one (row, picked unit) takes in :meth:`at` and its backward pass, over all batch entries and heads."""
        return self.cell_bytes

    @abstractmethod
    def leaves(self) -> tuple[Leaf, ...]:
        """The tensors it is made of."""

    @abstractmethod
    def on(self: Source, tensors: Sequence[Tensor]) -> Source:
        """The same source made of other tensors, in the order of :meth:`leaves`."""

    @abstractmethod
    def scores(self) -> Tensor:
        """All of it, as a tensor of its own, which may be written to."""

    def at(self, indices: Tensor) -> Tensor:
        """The scores at the units ``indices (B|1, Hi, rows, W)``, differentiable: ``(B, H, rows, W)``, H the greater of Hi and heads.

        Raises:
            UnsupportedError: scores of this kind have no gradient.
            ShapeError: more lists than groups of :class:`GroupedScores`.
        """
        raise UnsupportedError(
            f"scores at picked units: {type(self).__name__} only drives a choice and has no gradient; "
            "use DotScores, BoundScores or TensorScores, or sums and groups of these"
        )

    def narrowed(self: Source, rows: slice, units: slice) -> Source:
        """The source of some rows and units only; views, no copies."""
        return self.on([leaf.tensor[leaf.part(rows, units)] for leaf in self.leaves()])

    def block(self, rows: slice, units: slice) -> Tensor:
        """The scores of some rows and units, ``(batch, heads, r, u)``."""
        return self.narrowed(rows, units).scores()

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return torch.float64 if any(leaf.tensor.dtype == torch.float64 for leaf in self.leaves()) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.leaves()[0].tensor.device


@dataclass(frozen=True, eq=False)
class TensorScores(ScoreSource):
    """Given scores ``values (B|1, H, R|1, U|1)``; a dimension of one serves every batch entry, row or unit of a sum.

    >>> TensorScores(torch.arange(6.0).view(1, 1, 2, 3)).block(slice(1, 2), slice(0, 2))
    tensor([[[[3., 4.]]]])
    """

    values: Tensor

    def __post_init__(self) -> None:
        _check_4d(values=self.values)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return _four(self.values)

    @property
    def cell_bytes(self) -> int:
        return 8 * self.values.shape[0] * self.values.shape[1]

    def leaves(self) -> tuple[Leaf, ...]:
        return (Leaf(self.values, "cells"),)

    def on(self, tensors: Sequence[Tensor]) -> TensorScores:
        return TensorScores(tensors[0])

    def scores(self) -> Tensor:
        return self.values.to(wide(self.values.dtype), copy=True)

    def at(self, indices: Tensor) -> Tensor:
        batch, heads, _, units = self.values.shape
        size = (max(batch, indices.shape[0]), max(heads, indices.shape[1]), indices.shape[2])
        values = spread(self.values.to(wide(self.values.dtype)), size[1]).expand(*size, units)
        places = spread(indices.long(), size[1]).expand(*size, -1)
        return values.expand(places.shape) if units == 1 else values.gather(-1, places)


@dataclass(frozen=True, eq=False)
class DotScores(ScoreSource):
    """``scale * a . b`` of ``a (B, Ha, R, D)`` and ``b (B, Hb, U, D)``; Ha and Hb divide each other, the scores have the more heads.

    Half precision is cast block by block. A product of the same two rows may be rounded differently in blocks of other sizes.

    >>> a, b = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 0.0], [0.0, 5.0]]]])
    >>> DotScores(a, b, scale=0.5).scores()
    tensor([[[[1.5000, 5.0000]]]])
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_4d(a=self.a, b=self.b)
        (batch, heads, _, width), other = self.a.shape, self.b.shape
        if other[0] != batch or other[3] != width or max(heads, other[1]) % max(1, min(heads, other[1])):
            raise ShapeError(
                f"dot scores: a is {tuple(self.a.shape)} and b is {tuple(other)}; wanted (B, Ha, R, D) and (B, Hb, U, D) with the same B "
                "and D, and one number of heads a multiple of the other"
            )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.a.shape[0], max(self.a.shape[1], self.b.shape[1]), self.a.shape[2], self.b.shape[2]

    @property
    def cell_bytes(self) -> int:
        return 2 * self.dtype.itemsize * self.shape[0] * self.shape[1]

    @property
    def pair_bytes(self) -> int:
        return self.cell_bytes * 2 * (self.a.shape[3] + 4)

    def leaves(self) -> tuple[Leaf, ...]:
        return Leaf(self.a, "rows"), Leaf(self.b, "units")

    def on(self, tensors: Sequence[Tensor]) -> DotScores:
        return DotScores(*tensors, scale=self.scale)

    def scores(self) -> Tensor:
        a, b = self.a.to(self.dtype) * self.scale, self.b.to(self.dtype)
        batch, heads, rows, units = self.shape
        if b.shape[1] > a.shape[1]:
            return _grouped_product(b, a).view(batch, heads, units, rows).mT
        return _grouped_product(a, b).view(batch, heads, rows, units)

    def at(self, indices: Tensor) -> Tensor:
        heads = max(self.shape[1], indices.shape[1])
        rows = take(self.b, indices).to(self.dtype)  # (B, Hg, r, W, D)
        a = spread(self.a.to(self.dtype) * self.scale, heads)
        groups = rows.shape[1]
        grouped = a.unflatten(1, (groups, heads // groups)).transpose(2, 3)  # (B, Hg, r, G, D)
        return (grouped @ rows.mT).transpose(2, 3).flatten(1, 2)


@dataclass(frozen=True, eq=False)
class BoundScores(ScoreSource):
    """``scale * sum_d max(q_d * low_d, q_d * high_d)``: no key between ``low`` and ``high (B, Hk, U, D)`` has a greater logit.

    ``q (B, Hq, R, D)``; ``scale`` is positive. ``low`` and ``high`` are those of :func:`sparsedsl.run.choosing.proxies.bounds`.

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

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._products().shape

    @property
    def cell_bytes(self) -> int:
        return self._products().cell_bytes

    @property
    def pair_bytes(self) -> int:
        return self._products().pair_bytes

    def leaves(self) -> tuple[Leaf, ...]:
        return Leaf(self.q, "rows"), Leaf(self.low, "units"), Leaf(self.high, "units")

    def on(self, tensors: Sequence[Tensor]) -> BoundScores:
        return BoundScores(*tensors, scale=self.scale)

    def scores(self) -> Tensor:
        return self._products(self.q.relu(), (-self.q).relu()).scores()

    def at(self, indices: Tensor) -> Tensor:
        return self._products(self.q.relu(), (-self.q).relu()).at(indices)

    def _products(self, positive: Tensor | None = None, negative: Tensor | None = None) -> SumScores:
        positive, negative = (self.q if part is None else part for part in (positive, negative))
        return SumScores((DotScores(positive, self.high, self.scale), DotScores(negative, self.low, -self.scale)))


@dataclass(frozen=True, eq=False)
class GroupedScores(ScoreSource):
    """``source`` with the heads of each of ``heads_out`` groups reduced: one choice for a KV group, or for all heads.

    >>> GroupedScores(TensorScores(torch.tensor([1.0, 5.0]).view(1, 2, 1, 1)), 1, "mean").scores()
    tensor([[[[3.]]]])
    """

    source: ScoreSource
    heads_out: int
    how: How = "sum"

    def __post_init__(self) -> None:
        if self.heads_out < 1 or self.source.shape[1] % self.heads_out:
            raise ShapeError(
                f"grouped scores: heads_out {self.heads_out} does not divide the {self.source.shape[1]} heads of the scores"
            )
        if self.how not in ("sum", "mean", "max"):
            raise ShapeError(f"grouped scores: how is {self.how!r}; wanted 'sum', 'mean' or 'max'")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, _, rows, units = self.source.shape
        return batch, self.heads_out, rows, units

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

    def narrowed(self, rows: slice, units: slice) -> GroupedScores:
        return GroupedScores(self.source.narrowed(rows, units), self.heads_out, self.how)

    def scores(self) -> Tensor:
        return self._reduced(self.source.scores())

    def at(self, indices: Tensor) -> Tensor:
        if self.heads_out % indices.shape[1]:
            raise ShapeError(
                f"grouped scores: lists of {indices.shape[1]} heads do not divide the {self.heads_out} groups; choose by group"
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
                    f"sum of scores: shapes {[one.shape for one in self.sources]} do not fit; wanted the same (batch, heads, rows, units), "
                    "or one in its place, or heads that divide the most"
                )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, rows, units = (max(sizes) for sizes in zip(*(source.shape for source in self.sources), strict=True))
        return batch, heads, rows, units

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

    def narrowed(self, rows: slice, units: slice) -> SumScores:
        return SumScores(tuple(source.narrowed(rows, units) for source in self.sources), self.factors)

    def scores(self) -> Tensor:
        return self._added([source.scores() for source in self.sources])

    def at(self, indices: Tensor) -> Tensor:
        return self._added([source.at(indices) for source in self.sources])

    def _added(self, parts: list[Tensor]) -> Tensor:
        heads = max(part.shape[1] for part in parts)
        factors = self.factors or (1.0,) * len(parts)
        total = spread(parts[0], heads) * factors[0]
        for part, factor in zip(parts[1:], factors[1:], strict=True):
            total = total + spread(part, heads) * factor
        return total


def _grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """``a (B, Ha, M, D)`` times ``b (B, Hb, N, D)`` transposed, Ha a multiple of Hb: ``(B * Hb, Ha / Hb * M, N)``."""
    batch, heads, units, width = b.shape
    x, y = a.reshape(batch * heads, -1, width), b.reshape(batch * heads, units, width)
    if (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        and 0 not in (*x.shape, units)
    ):
        return product_nt(x.contiguous(), y.contiguous())
    return torch.bmm(x, y.mT)


def _check_4d(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ShapeError(f"scores: {name} is {tensor.dtype} {tuple(tensor.shape)}; wanted a float tensor of four dimensions")


def _four(x: Tensor) -> tuple[int, int, int, int]:
    batch, heads, rows, units = x.shape
    return batch, heads, rows, units
