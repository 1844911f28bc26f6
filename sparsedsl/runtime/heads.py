"""Small pieces of tensor work that rules of the lowering share; the dense meaning has its own."""

from __future__ import annotations

import functools

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.torch_private import transforms_active

__all__ = ["NEVER", "alike", "lse_merge", "reduced", "repeat_kv", "together"]

Tensor = torch.Tensor
NEVER = float("-inf")


def repeat_kv(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """``x`` with its heads repeated to ``heads``."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def alike(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their types: means of half-precision keys are float32."""
    first = tensors[0].dtype
    for t in tensors:
        if t.dtype is not first:
            break
    else:
        return list(tensors)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the larger number of heads."""
    heads = max(x.shape[1], y.shape[1])
    if heads % x.shape[1] or heads % y.shape[1]:
        raise ShapeError(f"{x.shape[1]} and {y.shape[1]} heads do not fit: one must be a multiple of the other")
    return repeat_kv(x, heads), repeat_kv(y, heads)


def reduced(x: Tensor, heads: int, how: str) -> Tensor:
    """Heads in dimension 1 joined to ``heads``."""
    groups = x.unflatten(1, (heads, x.shape[1] // heads))
    return groups.amax(2) if how == "max" else getattr(groups, how)(2)


def lse_merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over branches that were normalised by themselves."""
    lses = torch.stack([lse for _, lse in parts])
    peak = lses.amax(0).detach()
    peak = torch.where(peak == NEVER, 0.0, peak)
    weights = torch.exp(lses - peak)
    total = weights.sum(0)
    empty = total == 0
    lse = torch.where(empty, NEVER, peak + torch.log(torch.where(empty, 1.0, total)))
    shares = weights / torch.where(empty, 1.0, total)
    weighed = ((share[..., None], part.to(share.dtype)) for share, (part, _) in zip(shares, parts, strict=True))
    out = torch.mul(*next(weighed))
    # In place where nobody looks back: fresh memory for each branch takes longer than the sum.
    add = torch.addcmul if torch.is_grad_enabled() or transforms_active() else torch.Tensor.addcmul_
    for share, part in weighed:
        out = add(out, share, part)
    return out, lse
