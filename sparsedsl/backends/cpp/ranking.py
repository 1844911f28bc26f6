"""The best blocks of each row of scores, in C++."""

from __future__ import annotations

import functools
import struct

import torch

from sparsedsl.backends.cpp.libraries import fixed_library, parallel
from sparsedsl.errors import UnsupportedError

__all__ = ["can_rank", "lists_of_rows"]

Tensor = torch.Tensor


@functools.lru_cache(maxsize=8)
def can_rank(path: str | None) -> bool:
    """Whether it can be built here. ``path``: of the compiler."""
    try:
        fixed_library("ranking", False)
    except UnsupportedError:
        return False
    return True


def lists_of_rows(scores: Tensor, k: int, width: int, start: int, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`sparsedsl.selection.stable_topk.lists_of_rows`, which gives the same."""
    batch, heads, rows, blocks = scores.shape
    scores = scores.detach().contiguous()
    indices = torch.empty((batch, heads, rows, width), dtype=torch.int32)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32)
    more = None if extra is None else extra.expand(counts.shape).to(torch.int32).contiguous()
    if counts.numel():
        call = struct.pack(
            "=12q", scores.data_ptr(), 0 if more is None else more.data_ptr(), counts.numel(), blocks, blocks, k, width, start,
            indices.data_ptr(), counts.data_ptr(), torch.get_num_threads(), parallel(),
        )  # fmt: skip
        if fixed_library("ranking", scores.dtype == torch.float64).rank_rows(call) < 0:
            raise MemoryError("choosing blocks found no memory for a row of scores")
    return indices, counts
