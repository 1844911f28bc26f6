"""Scores of blocks from strided sums along antidiagonals (XAttention): the mass of each block of keys in each block of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.selection.chunking import cut
from sparsedsl.selection.scores import DotScores, Leaf, ScoreSource

__all__ = ["AntidiagonalScores", "antidiagonal"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class AntidiagonalScores(ScoreSource):
    """The mass of blocks, made by :func:`antidiagonal`. The scores of a row add up to its strided rows, ``tokens / stride``."""

    q: Tensor  # (B, Hq, Sq, D)
    k: Tensor  # (B, Hkv, Skv, D)
    log_totals: Tensor  # (B, Hq, strided rows): normalisers over all keys
    stride: int
    tokens: int  # of a block
    scale: float
    first_row: int  # positions of the first query and key, in strides
    first_column: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, rows, _ = self.q.shape
        return batch, heads, -(-rows // self.tokens), -(-self.k.shape[2] // self.tokens)

    @property
    def cell_bytes(self) -> int:
        cells = (self.tokens // self.stride) ** 2
        return 4 * accumulated(self.q.dtype).itemsize * cells * self.q.shape[0] * self.q.shape[1]

    @property
    def row_bytes(self) -> int:
        return super().row_bytes * self.tokens

    @property
    def block_bytes(self) -> int:
        return super().block_bytes * self.tokens

    def leaves(self) -> tuple[Leaf, ...]:
        return Leaf(self.q, "rows"), Leaf(self.k, "blocks")

    def on(self, tensors: Sequence[Tensor]) -> AntidiagonalScores:
        return replace(self, q=tensors[0], k=tensors[1])

    def narrowed(self, rows: slice, blocks: slice) -> AntidiagonalScores:
        """Rows and blocks are blocks; the normalisers stay those of all keys."""
        cells = self.tokens // self.stride
        return replace(
            self,
            q=self.q[:, :, rows.start * self.tokens : rows.stop * self.tokens],
            k=self.k[:, :, blocks.start * self.tokens : blocks.stop * self.tokens],
            log_totals=self.log_totals[:, :, rows.start * cells : rows.stop * cells],
            first_row=self.first_row + rows.start * cells,
            first_column=self.first_column + blocks.start * cells,
        )

    def scores(self) -> Tensor:
        cells = self.tokens // self.stride
        mass = (self.logits() - self.log_totals[..., None]).exp()
        rows, columns = mass.shape[2:]
        mass = F.pad(mass, (0, -columns % cells, 0, -rows % cells))
        return mass.unflatten(3, (-1, cells)).unflatten(2, (-1, cells)).sum((3, 5))

    def logits(self) -> Tensor:
        """Of strided rows against strided columns, -inf where the column comes later: entry ``[m, n]`` is the scaled sum over
        ``i < stride`` of ``q[stride * m + stride - 1 - i] . k[stride * n + i]``; tokens beyond the end are zeros."""
        q, k = (F.pad(x, (0, 0, 0, -x.shape[2] % self.stride)).unflatten(2, (-1, self.stride)) for x in (self.q, self.k))
        logits = DotScores(q.flip(3).flatten(3), k.flatten(3), self.scale).scores()
        row = self.first_row + torch.arange(logits.shape[2], device=logits.device)
        column = self.first_column + torch.arange(logits.shape[3], device=logits.device)
        return logits.masked_fill_(column > row[:, None], float("-inf"))


@torch.no_grad()
def antidiagonal(
    q: Tensor, k: Tensor, *, stride: int, block: int, scale: float | None = None, q_offset: int = 0
) -> AntidiagonalScores:
    """Scores ``(B, Hq, ceil(Sq / block), ceil(Skv / block))`` of q ``(B, Hq, Sq, D)`` and k ``(B, Hkv, Skv, D)``, normalised here.

    Args:
        stride: tokens that are summed along an antidiagonal; divides ``block``.
        block: tokens of a row and of a block of the scores.
        scale: of the strided logits; None: ``D ** -0.5 / stride``.
        q_offset: position of the first query, a multiple of ``block``.

    Raises:
        PatternError: ``stride`` does not divide ``block``.
        ShapeError: ``q_offset`` is not a multiple of ``block``.

    >>> source = antidiagonal(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), stride=1, block=2)
    >>> source.scores()
    tensor([[[[2.0000, 0.0000],
              [1.1667, 0.8333]]]])
    """
    if stride < 1 or block < 1 or block % stride:
        raise PatternError(f"antidiagonal: block {block} is not a multiple of stride {stride}; choose a stride that divides it")
    if q_offset % block:
        raise ShapeError(
            f"antidiagonal: q_offset is {q_offset}; wanted a multiple of the block of {block}, so that rows are whole blocks"
        )
    scale = q.shape[3] ** -0.5 / stride if scale is None else scale
    rows = -(-q.shape[2] // stride)
    totals = torch.full((*q.shape[:2], rows), float("-inf"), dtype=accumulated(q.dtype), device=q.device)
    source = AntidiagonalScores(q, k, totals, stride, block, scale, q_offset // stride, 0)
    cells = block // stride
    r, u = source.tile(1)
    for some in cut(0, source.shape[2], r):
        part = totals[:, :, some.start * cells : some.stop * cells]
        reach = min(source.shape[3], q_offset // block + some.stop)
        for tile in cut(0, reach, u):
            torch.logaddexp(part, torch.logsumexp(source.narrowed(some, tile).logits(), dim=-1), out=part)
    return source
