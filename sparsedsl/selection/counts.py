"""How many: counts that follow from a distribution, as tensors. Nothing is read back."""

from __future__ import annotations

import torch

from sparsedsl.errors import PatternError

__all__ = ["cover_count", "tail_count"]

Tensor = torch.Tensor


@torch.no_grad()
def cover_count(score: Tensor, mass: float, *, least: int = 1, most: int | None = None) -> Tensor:
    """How many of the greatest along the last dimension of ``score (..., N)`` cover ``mass`` of its sum: int64 ``(...)``. 1 means all.

    One more than there are sums of the greatest that are ``<= mass``, so that a sum that just reaches ``mass`` is passed by one; within
    ``least`` and ``most``, and N. Sums in float32 (float64 for float64 scores), and ``mass`` is rounded to it.

    >>> cover_count(torch.tensor([0.5, 0.3, 0.15, 0.05]), 0.5), cover_count(torch.tensor([0.5, 0.3, 0.15, 0.05]), 1.0)
    (tensor(2), tensor(4))
    """
    size = score.shape[-1]
    if mass >= 1:  # rounding may bring a sum to 1 early
        return torch.full(score.shape[:-1], size if most is None else min(most, size), device=score.device)
    shares = score / score.sum(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).tiny)
    sums = shares.sort(dim=-1, descending=True, stable=True).values.cumsum(-1)
    count = (sums <= mass).sum(-1) + 1
    return count.clamp(min=least).clamp(max=size if most is None else min(most, size))


@torch.no_grad()
def tail_count(score: Tensor, tail: float, floor: int) -> Tensor:
    """How many of ``score (B, N)`` stay if the least that hold ``tail`` of its sum are dropped: int64 ``(B,)``.

    Let n be the number of ascending sums that are ``< tail``. None is dropped if n is 0; else n + 1, the one that crosses included; but
    ``floor`` stay (all, if there are fewer). ``tail`` is a share of the mass that goes, not of what stays.

    >>> tail_count(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.25, floor=1), tail_count(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 0.05, floor=1)
    (tensor([2]), tensor([4]))
    """
    if floor < 0:
        raise PatternError(f"tail_count: floor is {floor}; wanted 0 or more")
    size = score.shape[-1]
    sums = (score / (score.sum(-1, keepdim=True) + 1e-8)).sort(dim=-1).values.cumsum(-1)
    below = (sums < tail).sum(-1)
    kept = torch.where(below == 0, size, size - below - 1)
    return kept.clamp(min=floor).clamp(max=size)
