"""Small pieces of tensor work that every evaluation of a program shares."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from sparsedsl.errors import ShapeError

__all__ = ["NEVER", "alike", "merged", "pool", "reduced", "safe_softmax", "spread", "together", "weigh"]

Tensor = torch.Tensor
NEVER = float("-inf")


def spread(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """``x`` with its heads repeated to ``heads``."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def alike(*tensors: Tensor) -> list[Tensor]:
    """All in the widest of their types: means of half-precision keys are float32."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


def together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the larger number of heads."""
    heads = max(x.shape[1], y.shape[1])
    if heads % x.shape[1] or heads % y.shape[1]:
        raise ShapeError(f"{x.shape[1]} and {y.shape[1]} heads do not fit: one must be a multiple of the other")
    return spread(x, heads), spread(y, heads)


def pool(x: Tensor, unit: int, how: str, pad: str) -> Tensor:
    """One row for each ``unit`` rows of ``(B, H, N, D)``."""
    parts = []
    for rows in x.split(unit, dim=2):
        match how:
            case "mean":
                parts.append(rows.sum(2) / (rows.shape[2] if pad == "valid" else unit))
            case "sum":
                parts.append(rows.sum(2))
            case "max" | "min":
                parts.append(getattr(rows, f"a{how}")(2))
            case _:
                parts.append(rows[:, :, 0 if how == "first" else -1])
    return torch.stack(parts, dim=2) if parts else x.new_zeros((*x.shape[:2], 0, x.shape[3]))


def reduced(x: Tensor, heads: int, how: str) -> Tensor:
    """Heads in dimension 1 joined to ``heads``."""
    groups = x.unflatten(1, (heads, x.shape[1] // heads))
    return groups.amax(2) if how == "max" else getattr(groups, how)(2)


def safe_softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension; rows without a finite entry are 0."""
    none = (x == NEVER).all(-1, keepdim=True)
    return torch.where(none, 0.0, torch.softmax(torch.where(none, 0.0, x), -1))


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over branches that were normalised by themselves."""
    lses = torch.stack([lse for _, lse in parts])
    peak = lses.amax(0).detach()
    peak = torch.where(peak == NEVER, 0.0, peak)
    weights = torch.exp(lses - peak)
    total = weights.sum(0)
    empty = total == 0
    lse = torch.where(empty, NEVER, peak + torch.log(torch.where(empty, 1.0, total)))
    shares = weights / torch.where(empty, 1.0, total)
    weighed = [share[..., None] * part.to(share.dtype) for share, (part, _) in zip(shares, parts, strict=True)]
    return functools.reduce(torch.add, weighed), lse


def weigh(scores: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Weights of chunks from their scores along the last dimension (-inf: not picked, later is more recent), and the log of their sum."""
    picked = scores != NEVER
    finite = torch.where(picked, scores, 0.0)
    if rule in ("softmax", "softmax1"):
        peak = scores.amax(-1, keepdim=True).clamp(min=0.0 if rule == "softmax1" else NEVER).detach()
        peak = torch.where(peak == NEVER, 0.0, peak)
        raised = torch.where(picked, torch.exp(finite - peak), 0.0)
        total = raised.sum(-1, keepdim=True) + (torch.exp(-peak) if rule == "softmax1" else 0.0)
        empty = total == 0
        weights = raised / torch.where(empty, 1.0, total)
        # Of softmax1 the LSE counts the zero logit: that is what it weighs against other branches.
        log_total = torch.where(empty, NEVER, peak + torch.log(torch.where(empty, 1.0, total))).squeeze(-1)
        return weights, log_total
    open_ = torch.where(picked, functional.logsigmoid(finite), NEVER)
    if rule == "stick_breaking":
        shut = torch.where(picked, functional.logsigmoid(-finite), 0.0)
        later = shut.flip(-1).cumsum(-1).flip(-1) - shut
        open_ = open_ + later
    weights = torch.exp(open_)
    total = weights.sum(-1)
    return weights, torch.where(total > 0, torch.log(torch.where(total > 0, total, 1.0)), NEVER)
