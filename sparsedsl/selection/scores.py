"""Scores that drive a choice, given in blocks on demand: rows of queries against blocks of keys.

A source holds what its scores are made of and never all of them. Narrowed to some rows and blocks it is a small source of the same
kind, whose :meth:`~ScoreSource.scores` are a plain tensor.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.gemm import product_nt
from sparsedsl.selection.chunking import is_small, tile_shape
from sparsedsl.selection.gather import repeat_kv, take

__all__ = ["DerivedSource", "DotScores", "Leaf", "ScoreSource", "TensorScores"]

Tensor = torch.Tensor
Source = TypeVar("Source", bound="ScoreSource")


class Leaf(NamedTuple):
    """A tensor that scores are made of, and what its last two dimensions are: ``(row, D)``, ``(block, D)`` or ``(row, block)``."""

    tensor: Tensor
    over: Literal["rows", "blocks", "cells"]

    def part(self, rows: slice, blocks: slice) -> tuple[slice, ...]:
        """Where the rows and blocks lie in the tensor. A dimension of one is for all rows or blocks."""
        if self.over == "cells":
            size = self.tensor.shape[-2:]
            return (
                slice(None),
                slice(None),
                *(part if n > 1 else slice(None) for n, part in zip(size, (rows, blocks), strict=True)),
            )
        return (slice(None), slice(None), rows if self.over == "rows" else blocks)


class ScoreSource(ABC):
    """Scores ``(batch, heads, rows, blocks)``, float32 (float64 where a tensor they are made of is)."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries, heads, rows, blocks."""

    @property
    @abstractmethod
    def cell_bytes(self) -> int:
        """Scratch memory that one (row, block) takes in :meth:`scores`, over all batch entries and heads."""

    @property
    def pair_bytes(self) -> int:
        """Scratch memory that one (row, picked block) takes in :meth:`at` and its backward pass, over all batch entries and heads."""
        return self.cell_bytes

    @property
    def row_bytes(self) -> int:
        """Scratch memory that a row takes where its tensors are cast, over all batch entries and heads."""
        return self._line_bytes("rows")

    @property
    def block_bytes(self) -> int:
        """The same of a block."""
        return self._line_bytes("blocks")

    def tile(self, tensors: int) -> tuple[int, int]:
        """Rows and blocks of a tile for work that holds about so many tensors like the scores."""
        batch, heads, rows, blocks = self.shape
        if is_small(rows, blocks, batch * heads):
            return max(1, rows), max(1, blocks)
        return tile_shape(tensors * self.cell_bytes, *self.shape[2:], self.row_bytes, self.block_bytes)

    def _line_bytes(self, over: str) -> int:
        sizes = (leaf.tensor.shape for leaf in self.leaves() if leaf.over == over)
        return sum(batch * heads * width for batch, heads, _, width in sizes) * self.dtype.itemsize

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
        """The scores at the blocks ``indices (B|1, Hi, rows, W)``, differentiable: ``(B, H, rows, W)``, H the greater of Hi and heads.

        Raises:
            UnsupportedError: scores of this kind have no gradient.
            ShapeError: more lists than groups of :class:`GroupedScores`.
        """
        raise UnsupportedError(
            f"scores at picked blocks: {type(self).__name__} only drives a choice and has no gradient; "
            "use DotScores, BoundScores or TensorScores, or sums and groups of these"
        )

    def narrowed(self: Source, rows: slice, blocks: slice) -> Source:
        """The source of some rows and blocks only; views, no copies."""
        return self.on([leaf.tensor[leaf.part(rows, blocks)] for leaf in self.leaves()])

    def block(self, rows: slice, blocks: slice) -> Tensor:
        """The scores of some rows and blocks, ``(batch, heads, r, u)``."""
        return self.narrowed(rows, blocks).scores()

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float64."""
        return torch.float64 if any(leaf.tensor.dtype == torch.float64 for leaf in self.leaves()) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.leaves()[0].tensor.device


@dataclass(frozen=True, eq=False)
class DerivedSource(ScoreSource):
    """Scores made of those of one ``source``; what a subclass does not say otherwise is as there."""

    source: ScoreSource

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        return self.source.shape

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def cell_bytes(self) -> int:
        return self.source.cell_bytes

    @property
    def row_bytes(self) -> int:
        return self.source.row_bytes

    @property
    def block_bytes(self) -> int:
        return self.source.block_bytes

    @property
    def device(self) -> torch.device:
        return self.source.device

    def leaves(self) -> tuple[Leaf, ...]:
        return self.source.leaves()


@dataclass(frozen=True, eq=False)
class TensorScores(ScoreSource):
    """Given scores ``values (B|1, H, R|1, U|1)``; a dimension of one serves every batch entry, row or block of a sum.

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
        return self.values.to(accumulated(self.values.dtype), copy=True)

    def at(self, indices: Tensor) -> Tensor:
        batch, heads, _, blocks = self.values.shape
        size = (max(batch, indices.shape[0]), max(heads, indices.shape[1]), indices.shape[2])
        values = repeat_kv(self.values.to(accumulated(self.values.dtype)), size[1]).expand(*size, blocks)
        places = repeat_kv(indices.long(), size[1]).expand(*size, -1)
        return values.expand(places.shape) if blocks == 1 else values.gather(-1, places)


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

    @classmethod
    def known(cls, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> DotScores:
        """Of tensors that are known to fit, and the type of the scores: nothing is looked at again."""
        made = object.__new__(cls)
        (batch, heads, rows, _), (_, others, blocks, _) = a.shape, b.shape
        vars(made).update(a=a, b=b, scale=scale, dtype=dtype, shape=(batch, max(heads, others), rows, blocks))
        return made

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.a.dtype, self.b.dtype) else torch.float32

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        return self.a.shape[0], max(self.a.shape[1], self.b.shape[1]), self.a.shape[2], self.b.shape[2]

    @functools.cached_property
    def cell_bytes(self) -> int:
        return 2 * self.dtype.itemsize * self.shape[0] * self.shape[1]

    @functools.cached_property
    def pair_bytes(self) -> int:
        return self.cell_bytes * 2 * (self.a.shape[3] + 4)

    def leaves(self) -> tuple[Leaf, ...]:
        return Leaf(self.a, "rows"), Leaf(self.b, "blocks")

    def on(self, tensors: Sequence[Tensor]) -> DotScores:
        return DotScores(tensors[0], tensors[1], self.scale)

    def scores(self) -> Tensor:
        a, b = self.a.to(self.dtype) * self.scale, self.b.to(self.dtype)
        batch, heads, rows, blocks = self.shape
        if b.shape[1] > a.shape[1]:
            return _grouped_product(b, a).view(batch, heads, blocks, rows).mT
        return _grouped_product(a, b).view(batch, heads, rows, blocks)

    def at(self, indices: Tensor) -> Tensor:
        heads = max(self.shape[1], indices.shape[1])
        rows = take(self.b, indices).to(self.dtype)  # (B, Hg, r, W, D)
        a = repeat_kv(self.a.to(self.dtype) * self.scale, heads)
        groups = rows.shape[1]
        grouped = a.unflatten(1, (groups, heads // groups)).transpose(2, 3)  # (B, Hg, r, G, D)
        return (grouped @ rows.mT).transpose(2, 3).flatten(1, 2)


def _grouped_product(a: Tensor, b: Tensor) -> Tensor:
    """``a (B, Ha, M, D)`` times ``b (B, Hb, N, D)`` transposed, Ha a multiple of Hb: ``(B * Hb, Ha / Hb * M, N)``."""
    batch, heads, blocks, width = b.shape
    x, y = a.reshape(batch * heads, -1, width), b.reshape(batch * heads, blocks, width)
    if (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        and 0 not in (*x.shape, blocks)
    ):
        return product_nt(*(z if z.stride()[1:] == (width, 1) else z.contiguous() for z in (x, y)))
    return torch.bmm(x, y.mT)


def _check_4d(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise ShapeError(f"scores: {name} is {tensor.dtype} {tuple(tensor.shape)}; wanted a float tensor of four dimensions")


def _four(x: Tensor) -> tuple[int, int, int, int]:
    batch, heads, rows, blocks = x.shape
    return batch, heads, rows, blocks
