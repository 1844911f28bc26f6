"""Weights of selected blocks from their scores, in C++."""

from __future__ import annotations

import struct

import torch

from sparsedsl.backends.cpp.libraries import fixed_library, parallel

__all__ = ["weighed_blocks"]

Tensor = torch.Tensor
_CALL = struct.Struct("=8q")
# As in codegen/cpp/weighing.cpp.
_RULES = {"softmax": 0, "softmax1": 1, "stick_breaking": 2, "sigmoid": 3, "raw": 4}


def weighed_blocks(scores: Tensor, rule: str) -> tuple[Tensor, Tensor] | None:
    """See :func:`sparsedsl.selection.weights.weights_of`, which gives the same; None for what it does not take. Nobody wants gradients."""
    if scores.dtype not in (torch.float32, torch.float64) or not scores.is_contiguous():
        return None
    weights, totals = torch.empty_like(scores), torch.empty(scores.shape[:-1], dtype=scores.dtype)
    call = _CALL.pack(
        totals.numel(), scores.shape[-1], _RULES[rule], scores.data_ptr(), weights.data_ptr(), totals.data_ptr(), torch.get_num_threads(),
        parallel(),
    )  # fmt: skip
    fixed_library("choosing", scores.dtype == torch.float64).weigh_rows(call)
    return weights, totals
