"""The bytes that the compiled passes read: a ``Call`` of ``codegen/cpp/call.h``, field by field, each 8 bytes wide."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch

__all__ = ["KINDS", "call_block", "place_of"]

# Fields between the scale and those of the pattern.
FIXED = 50
# How elements of q, k, v and out are told of, where the computation is not in their own type.
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.lru_cache(maxsize=64)
def _layout(more: int) -> struct.Struct:
    return struct.Struct(f"=8qd{FIXED + more}q")


def call_block(sizes: Sequence[int], scale: float, rest: Sequence[int]) -> ctypes.Array[ctypes.c_char]:
    """``sizes``: batch .. q_offset; ``rest``: all that follows the scale, in order."""
    layout = _layout(len(rest) - FIXED)
    block = ctypes.create_string_buffer(layout.size)
    layout.pack_into(block, 0, *sizes, scale, *rest)
    return block


def place_of(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Where a tensor ``(batch, heads, length, width)`` lies, whose rows have no gaps."""
    batch, head, row, _ = t.stride()
    return t.data_ptr(), batch, head, row
