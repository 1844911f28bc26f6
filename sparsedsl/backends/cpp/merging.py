"""One softmax over two branches, in C++ and in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from sparsedsl.backends.cpp.libraries import fixed_library, parallel

__all__ = ["merged"]

Tensor = torch.Tensor
_CALL = struct.Struct("=8q")


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """See :func:`sparsedsl.runtime.heads.lse_merge`, which gives the same; None for what it does not take. Nobody wants gradients, and the
    results may lie where the first part lay."""
    if len(parts) != 2:
        return None
    (out, lse), (other, weight) = parts
    real = lse.dtype
    if not (
        out.dtype is other.dtype is weight.dtype is real
        and out.is_contiguous() and other.is_contiguous() and lse.is_contiguous() and weight.is_contiguous()
    ):  # fmt: skip
        return None
    call = _CALL.pack(
        lse.numel(), out.shape[3], out.data_ptr(), lse.data_ptr(), other.data_ptr(), weight.data_ptr(), torch.get_num_threads(),
        parallel(),
    )  # fmt: skip
    fixed_library("forward", real == torch.float64).merge_rows(call)
    return out, lse
