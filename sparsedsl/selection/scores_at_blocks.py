"""Scores where something was picked, and totals over all that could be: differentiable, and never rows x blocks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.selection.candidates import Candidates
from sparsedsl.selection.chunking import cut, rows_at_once
from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.scores import ScoreSource
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["lse_over_candidates", "selected_scores"]

Tensor = torch.Tensor


def selected_scores(source: ScoreSource, selected: SelectedBlocks) -> Tensor:
    """The scores at the selected blocks: ``(B, H, R, W)``, aligned with ``selected.indices``, -inf in empty slots. Differentiable once.

    H is the greater of the heads of source and lists. Backward computes the scores of the selected blocks again and adds
    gradients up in a fixed order; a block nobody picked gets exactly 0. Both passes work through the rows in pieces.

    >>> from sparsedsl.selection.ranking import top_k
    >>> from sparsedsl.selection.scores import DotScores
    >>> source = DotScores(torch.ones(1, 1, 1, 2), torch.eye(2).view(1, 1, 2, 2).requires_grad_(), scale=3.0)
    >>> selected_scores(source, top_k(source, 1))
    tensor([[[[3.]]]], grad_fn=<_SelectedScoresBackward>)
    """
    known = selected.scores
    if (
        known is not None
        and known.source is source
        and not (torch.is_grad_enabled() and any(leaf.tensor.requires_grad for leaf in source.leaves()))
    ):
        return known.values
    return _SelectedScores.apply(source, selected.indices, *(leaf.tensor for leaf in source.leaves()))


def lse_over_candidates(source: ScoreSource, candidates: Candidates | None = None) -> Tensor:
    """``log sum exp`` of each row's scores over its candidates, ``(B, Hs, R)``; -inf where there are none. Differentiable once.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> lse_over_candidates(TensorScores(torch.zeros(1, 1, 2, 4)), Candidates(end=torch.tensor([1, 0])))
    tensor([[[0., -inf]]])
    """
    return _TotalScores.apply(source, candidates or Candidates(), *(leaf.tensor for leaf in source.leaves()))


class _SelectedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: ScoreSource, indices: Tensor, *tensors: Tensor) -> Tensor:
        ctx.source = source.on([tensor.detach() for tensor in tensors])
        ctx.save_for_backward(indices, *tensors)
        batch, heads, rows, _ = source.shape
        heads, width = max(heads, indices.shape[1]), indices.shape[3]
        scores = torch.empty((batch, heads, rows, width), dtype=source.dtype, device=source.device)
        for some in _row_pieces(source, indices):
            chosen = indices[:, :, some]
            block = ctx.source.narrowed(some, slice(0, source.shape[3])).at(chosen.clamp(min=0))
            scores[:, :, some] = block.masked_fill_(repeat_kv(chosen, heads) < 0, float("-inf"))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        indices, *tensors = ctx.saved_tensors
        sums = _Gradients(ctx.source, tensors, ctx.needs_input_grad[2:])
        for some in _row_pieces(ctx.source, indices):
            chosen = indices[:, :, some]
            grad = grads[0][:, :, some].masked_fill(repeat_kv(chosen, grads[0].shape[1]) < 0, 0.0)

            def again(part: ScoreSource, chosen: Tensor = chosen, grad: Tensor = grad) -> tuple[Tensor, Tensor]:
                return part.at(chosen.clamp(min=0)), grad

            sums.add(some, slice(0, ctx.source.shape[3]), again)
        return None, None, *sums.results()


class _TotalScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: ScoreSource, candidates: Candidates, *tensors: Tensor) -> Tensor:
        ctx.source, ctx.candidates = source.on([tensor.detach() for tensor in tensors]), candidates
        batch, heads, rows, _ = source.shape
        totals = torch.full((batch, heads, rows), float("-inf"), dtype=source.dtype, device=source.device)
        for some, tile in _tiles(source, candidates):
            part = totals[:, :, some]
            scores = candidates.scored(ctx.source, some, tile)
            torch.logaddexp(part, torch.logsumexp(scores, dim=-1), out=part)
        ctx.save_for_backward(totals, *tensors)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        totals, *tensors = ctx.saved_tensors
        sums = _Gradients(ctx.source, tensors, ctx.needs_input_grad[2:])
        for some, tile in _tiles(ctx.source, ctx.candidates):
            total = totals[:, :, some, None]
            total = total.masked_fill(total == float("-inf"), 0.0)

            def again(part: ScoreSource, some: slice = some, tile: slice = tile, total: Tensor = total) -> tuple[Tensor, Tensor]:
                scores = part.scores()
                share = ctx.candidates.mask_(scores.detach().clone(), some, tile) - total
                return scores, share.exp_() * grads[0][:, :, some, None]

            sums.add(some, tile, again)
        return None, None, *sums.results()


class _Gradients:
    """Gradients of a source's tensors, put together from pieces, each of which is computed again on leaves of its own."""

    def __init__(self, source: ScoreSource, tensors: list[Tensor], needed: tuple[bool, ...]) -> None:
        self.source, self.tensors, self.needed = source, tensors, needed
        self.sums = [
            torch.zeros_like(tensor, dtype=accumulated(tensor.dtype)) if need else None
            for tensor, need in zip(tensors, needed, strict=True)
        ]

    def add(self, rows: slice, blocks: slice, results: Callable[[ScoreSource], tuple[Tensor, Tensor]]) -> None:
        """Add what follows from ``results(part) = (values, their gradient)`` of the source of some rows and blocks."""
        narrow = self.source.narrowed(rows, blocks)
        with torch.enable_grad():
            leaves = [
                (leaf.tensor.detach().to(accumulated(leaf.tensor.dtype)) if need else leaf.tensor.detach()).requires_grad_(need)
                for leaf, need in zip(narrow.leaves(), self.needed, strict=True)
            ]
            values, gradient = results(narrow.on(leaves))
            found = iter(torch.autograd.grad(values, [x for x in leaves if x.requires_grad], gradient, allow_unused=True))
        for whole, leaf in zip(self.sums, self.source.leaves(), strict=True):
            if whole is not None and (part := next(found)) is not None:
                whole[leaf.part(rows, blocks)] += part

    def results(self) -> list[Tensor | None]:
        """One for each tensor, in its dtype."""
        return [None if x is None else x.to(tensor.dtype) for x, tensor in zip(self.sums, self.tensors, strict=True)]


def _row_pieces(source: ScoreSource, indices: Tensor) -> Iterator[slice]:
    return cut(0, source.shape[2], rows_at_once(source.pair_bytes * max(1, indices.shape[3])))


def _tiles(source: ScoreSource, candidates: Candidates) -> Iterator[tuple[slice, slice]]:
    rows, blocks = source.shape[2:]
    r, u = source.tile(4)
    for some in cut(0, rows, r):
        for tile in cut(*candidates.span(some, blocks), u):
            yield some, tile
