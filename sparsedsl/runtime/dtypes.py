"""Which dtype is computed in."""

from __future__ import annotations

import torch

__all__ = ["accumulated"]


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums, states and the LSE for inputs of ``dtype``: float64 for float64, else float32.

    >>> accumulated(torch.bfloat16), accumulated(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
