"""Keys, or distances, that all queries of a head see: flags of the best, or of those that hold a share; how far apart two scores are."""

from __future__ import annotations

import torch
from torch.nn import functional

from sparsedsl.selection.stable_topk import best

__all__ = ["flags_of_best", "flags_of_blocks", "flags_of_share", "in_blocks", "shannon_distance"]

Tensor = torch.Tensor


@torch.no_grad()
def flags_of_best(scores: Tensor, count: int, among: Tensor | None, forced: Tensor | None) -> Tensor:
    """Which of ``scores (B, H, N)`` are the ``count`` best of each head: bool, of equal ones the earlier. ``among``: candidates, bool like
    the scores or a part of them; ``forced``: candidates that come first, and count.

    >>> flags_of_best(torch.tensor([[[1.0, 3.0, 3.0, 2.0]]]), 2, None, torch.tensor([False, False, False, True]))
    tensor([[[False,  True, False,  True]]])
    """
    largest = torch.finfo(scores.dtype).max
    ranked = scores.nan_to_num(nan=largest, posinf=largest)
    if forced is not None:
        ranked = ranked.masked_fill(forced, float("inf"))
    if among is not None:
        ranked = ranked.masked_fill(~among, float("-inf"))
    values, places = best(ranked, count)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, values > float("-inf"))


@torch.no_grad()
def flags_of_share(scores: Tensor, share: float, among: Tensor | None, forced: Tensor | None, *, inclusive: bool) -> Tensor:
    """Which of ``scores (B, H, N)``, at least 0, are the fewest that hold ``share`` of their sum: bool. ``inclusive``: the one that reaches
    it too. 1 means all candidates. ``forced`` come on top.

    >>> flags_of_share(torch.tensor([[[1.0, 5.0, 1.0, 3.0]]]), 0.75, None, None, inclusive=True)
    tensor([[[False,  True, False,  True]]])
    """
    candidates = torch.ones_like(scores, dtype=torch.bool) if among is None else among.expand(scores.shape)
    if share == 1:  # when rounded sums reach 1 is a matter of chance
        return candidates
    mass = scores.masked_fill(~candidates, 0.0)
    total = mass.sum(-1, keepdim=True)
    mass = mass / total.masked_fill(total == 0, 1.0)
    ranked, order = mass.masked_fill(~candidates, -1.0).sort(dim=-1, descending=True, stable=True)
    sums = ranked.clamp(min=0).cumsum(-1)
    kept = (sums < share).sum(-1, keepdim=True) + int(inclusive)
    taken = torch.arange(scores.shape[-1], device=scores.device) < kept
    flags = torch.zeros_like(candidates).scatter(-1, order, taken)
    return candidates & (flags if forced is None else flags | forced)


@torch.no_grad()
def flags_of_blocks(
    scores: Tensor,
    block: int,
    among: Tensor | None,
    forced: Tensor | None,
    *,
    count: int | None,
    share: float | None,
    inclusive: bool,
) -> Tensor:
    """Which blocks of ``scores (B, H, N)`` have the greatest sums: bool ``(B, H, ceil(N / block))``. ``count`` of them; or
    ``n // block + 1`` where ``n`` single ones hold ``share``. ``among`` and ``forced`` are of single ones, and a block is of those that any
    in it is of; what is forced comes first, and counts.

    >>> flags_of_blocks(torch.tensor([[[1.0, 5.0, 1.0, 3.0]]]), 2, None, None, count=1, share=None, inclusive=True)
    tensor([[[ True, False]]])
    """
    parts = scores if among is None else scores.masked_fill(~among, 0.0)
    some = None if among is None else in_blocks(among.expand(scores.shape).to(scores.dtype), block) > 0
    named = None if forced is None else in_blocks(forced.expand(scores.shape).to(scores.dtype), block) > 0
    if named is not None and some is not None:
        named = in_blocks((forced & among).expand(scores.shape).to(scores.dtype), block) > 0  # type: ignore[operator]
    sums = in_blocks(parts, block)
    if count is not None:
        return flags_of_best(sums, count, some, named)
    assert share is not None
    if share == 1:
        return torch.ones_like(sums, dtype=torch.bool) if some is None else some
    few = flags_of_share(scores, share, among, None, inclusive=inclusive).sum(-1, keepdim=True) // block + 1
    ranked = sums if some is None else sums.masked_fill(~some, float("-inf"))
    ranked = ranked if named is None else ranked.masked_fill(named, float("inf"))
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    taken = (torch.arange(sums.shape[-1], device=sums.device) < few).expand(sums.shape)
    flags = torch.zeros_like(sums, dtype=torch.bool).scatter(-1, order, taken)
    flags = flags if named is None else flags | named
    return flags if some is None else flags & some


def in_blocks(scores: Tensor, block: int) -> Tensor:
    """``scores (.., N)`` summed up in blocks, the last one perhaps ragged.

    >>> in_blocks(torch.tensor([1.0, 2.0, 3.0]), 2)
    tensor([3., 3.])
    """
    return functional.pad(scores, (0, -scores.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


@torch.no_grad()
def shannon_distance(x: Tensor, y: Tensor) -> Tensor:
    """The Jensen-Shannon distance of ``x`` and ``y (B, H, N)``, each as shares of its sum: ``(B, H)``.

    >>> shannon_distance(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])) ** 2  # nothing in common: log(2)
    tensor([[0.6931]])
    """
    p, r = (part / part.sum(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny) for part in (x, y))
    mean = (p + r) / 2
    apart = torch.xlogy(p, p) + torch.xlogy(r, r) - 2 * torch.xlogy(mean, mean)
    return (apart.sum(-1) / 2).clamp(min=0.0).sqrt()
