"""The problem of the golden values of linear attention: written out as formulas, so that other code can make the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Recipe", "checksum", "l2", "recipe"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Recipe:
    """Tensors in float64, B = 2, H = 2, T = 13, D = 4, Dv = 3 unless said otherwise; ``gs`` scalar, ``gv`` vector log decays, ``w`` the
    gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    gs: Tensor
    gv: Tensor
    beta: Tensor
    w: Tensor
    state: Tensor


def recipe(batch: int = 2, heads: int = 2, length: int = 13, width: int = 4, width_v: int = 3) -> Recipe:
    """Its tensors."""
    b = torch.arange(batch, dtype=torch.float64)[:, None, None, None]
    h = torch.arange(heads, dtype=torch.float64)[None, :, None, None]
    t = torch.arange(length, dtype=torch.float64)[None, None, :, None]
    d, e = (torch.arange(n, dtype=torch.float64)[None, None, None, :] for n in (width, width_v))
    g = 0.9 * t + 1.1 * h + 0.3 * b
    return Recipe(
        q=torch.sin(0.37 * (t + 1) * (d + 2) + 0.5 * h + 0.9 * b),
        k=torch.cos(0.29 * (t + 2) * (d + 1) + 0.4 * h + 0.8 * b),
        v=torch.sin(0.23 * (t + 3) * (e + 1) - 0.6 * h + 0.7 * b),
        gs=(-0.05 - 0.4 * (1 + torch.sin(g)))[..., 0],
        gv=-0.05 - 0.4 * (1 + torch.sin(g + 0.53 * (t + 1) * (d + 1))),
        beta=torch.sigmoid(torch.sin(0.8 * t + 0.6 * h + 0.2 * b))[..., 0],
        w=torch.cos(0.31 * (t + 1) * (e + 2) + 0.2 * h + 0.1 * b),
        state=torch.sin(0.7 * (d.mT + 1) * (e + 1) + 0.3 * h + 0.2 * b),
    )


def checksum(x: Any) -> float:
    """``sum_n x_n cos(n / 10)``, n the flat row-major index."""
    flat = x.detach().double().reshape(-1)
    return float((flat * torch.cos(0.1 * torch.arange(len(flat), dtype=torch.float64))).sum())


def l2(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
