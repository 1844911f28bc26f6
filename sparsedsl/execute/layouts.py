"""How the tensors of a call lie: heads before the rows, as everything inside has it, or behind them, as projections give them."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.errors import ShapeError

__all__ = ["LAYOUTS", "in_bshd", "swapped"]

# Axes of q, k, v and out, by their letters: batch, heads, sequence, dimension.
LAYOUTS = ("bhsd", "bshd")


def swapped(tensor: Any) -> Any:
    """``(B, S, H, D)`` <-> ``(B, H, S, D)``, a view of the same memory. What has no four axes is left for the check of the call."""
    return tensor.transpose(1, 2) if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 else tensor


def in_bshd(error: ShapeError) -> ShapeError:
    """An error of the check of a call whose tensors were given heads last, which it speaks of heads first."""
    return ShapeError(f"{error}. The call has layout='bshd', its tensors are (B, S, H, D); shapes are named here as (B, H, S, D)")
