"""Keys, or distances, that all queries of a head see: flags of the best, or of those that hold a share."""

from __future__ import annotations

import torch

from sparsedsl.selection.stable_topk import best

__all__ = ["flags_of_best", "flags_of_share"]

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
