"""Orders and subsets of tokens: a permutation within segments, and the tokens that each head keeps."""

from __future__ import annotations

import torch

from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.selection.chunking import cut, rows_at_once
from sparsedsl.selection.stable_topk import compacted

__all__ = ["inverse", "keep_tokens", "segment_sort"]

Tensor = torch.Tensor


@torch.no_grad()
def segment_sort(score: Tensor, segment: int, *, tokens: int | None = None, descending: bool = True) -> Tensor:
    """The order of tokens in which the scores of every whole segment descend: int64 ``(B, H, tokens)``, a permutation.

    Entry ``i`` says which token comes to place ``i``. Tokens stay in their segment, those after the last whole segment in their place;
    equal scores stay in their order.

    Args:
        score: ``(B, H, N)``; what lies beyond the last whole segment is not read.
        segment: tokens of a segment.
        tokens: length of the permutation; None: N. N may lack what follows the last whole segment of ``tokens``.

    Raises:
        ShapeError: N does not cover the whole segments of ``tokens``.

    >>> segment_sort(torch.tensor([[[1.0, 2.0, 5.0, 5.0, 9.0]]]), 2)
    tensor([[[1, 0, 2, 3, 4]]])
    """
    tokens = score.shape[-1] if tokens is None else tokens
    if segment < 1:
        raise PatternError(f"segment_sort: segment is {segment}; wanted 1 or more tokens")
    whole = tokens // segment * segment
    if score.ndim != 3 or not whole <= score.shape[-1] <= tokens:
        raise ShapeError(f"segment_sort: score is {tuple(score.shape)}; wanted (B, H, N) with {whole} <= N <= {tokens}")
    segments = score[..., :whole].unflatten(-1, (whole // segment, segment))
    local = torch.sort(segments, dim=-1, descending=descending, stable=True).indices
    start = torch.arange(0, whole, segment, device=score.device)[:, None]
    tail = torch.arange(whole, tokens, device=score.device).expand(*score.shape[:2], -1)
    return torch.cat([(local + start).flatten(-2), tail], dim=-1)


def inverse(permutation: Tensor) -> Tensor:
    """The permutation ``(..., N)`` that undoes one: ``x.gather(-1, p).gather(-1, inverse(p))`` is x.

    >>> inverse(torch.tensor([2, 0, 1]))
    tensor([1, 2, 0])
    """
    places = torch.arange(permutation.shape[-1], device=permutation.device).expand(permutation.shape)
    return torch.empty_like(permutation).scatter_(-1, permutation, places)


@torch.no_grad()
def keep_tokens(score: Tensor, count: Tensor, *, always: int, total: int, at_most: int | None = None) -> tuple[Tensor, Tensor]:
    """The best ``count`` of the first P tokens and the last ``always`` of ``total``, head by head: indices int64 ``(B, H, L)``, ascending.

    Equal scores: the lower token. A batch entry that keeps fewer than L has -1 at the end.

    Args:
        score: ``(B, H, P)``, P at most ``total - always``.
        count: int ``(B,)``, how many of the P tokens each batch entry keeps.
        always: how many last tokens are kept whatever their score.
        total: number of tokens.
        at_most: a bound on ``count``, of more the lowest-numbered stay: L is ``at_most + always``. None: L is as wide as needed on CPU, and
            ``P + always`` on a GPU, where the counts are not read back.

    Returns:
        indices, and how many each batch entry keeps, int64 ``(B,)``.

    Raises:
        ShapeError: ``P + always > total``, or ``count`` is not ``(B,)``.

    >>> keep_tokens(torch.tensor([[[3.0, 1.0, 3.0, 2.0]]]), torch.tensor([2]), always=1, total=5)
    (tensor([[[0, 2, 4]]]), tensor([3]))
    """
    batch, heads, size = score.shape
    if size + always > total or always < 0 or count.shape != (batch,):
        raise ShapeError(
            f"keep_tokens: score is {tuple(score.shape)}, count {tuple(count.shape)}, always {always}, total {total}; "
            "wanted (B, H, P), (B,) and P + always <= total"
        )
    count = count.long().clamp(0, size)
    if at_most is not None:
        width = min(at_most, size)
        count = count.clamp(max=width)
    else:
        width = int(count.max()) if count.device.type == "cpu" and batch else size
    last = torch.arange(total - always, total, device=score.device)
    indices = torch.full((batch, heads, width + always), -1, dtype=torch.int64, device=score.device)
    rank = torch.arange(size, device=score.device)
    for some in cut(0, heads, rows_at_once(40 * batch * size)):
        order = torch.sort(score[:, some], dim=-1, descending=True, stable=True).indices
        kept = (rank < count[:, None, None]).expand(order.shape)
        table = torch.zeros(order.shape, dtype=torch.bool, device=score.device).scatter_(-1, order, kept)
        indices[:, some, :width] = compacted(table, width).long()
    place = (count[:, None, None] + torch.arange(always, device=score.device)).expand(-1, heads, -1)
    indices.scatter_(-1, place, last.expand(batch, heads, -1))
    return indices, count + always
