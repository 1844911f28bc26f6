"""The bytes that the compiled passes read: a ``Call`` of ``codegen/cpp/call.h``, field by field, each 8 bytes wide."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch

__all__ = ["HEAD", "KINDS", "OF_GRADIENTS", "OF_PATTERN", "call_block", "first_of", "place_of", "whole_vectors"]

# Fields between the scale and those of the pattern, and, at the end of these, those of gradients.
FIXED, OF_GRADIENTS = 50, 15
# From the batch to the LSE.
HEAD = struct.Struct("=8qd20q")
# From there to the end of the fields of gradients.
OF_PATTERN = struct.Struct(f"={FIXED - 20}q")
# How elements of q, k, v and out are told of, where the computation is not in their own type.
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.lru_cache(maxsize=64)
def _layout(more: int) -> struct.Struct:
    return struct.Struct(f"=8qd{FIXED + more}q")


def call_block(sizes: Sequence[int], scale: float, rest: Sequence[int]) -> bytes:
    """``sizes``: batch .. q_offset; ``rest``: all that follows the scale, in order."""
    return _layout(len(rest) - FIXED).pack(*sizes, scale, *rest)


def place_of(t: torch.Tensor) -> tuple[int, int, int, int]:
    """Where a tensor ``(batch, heads, length, width)`` lies, whose rows have no gaps."""
    batch, head, row, _ = t.stride()
    return t.data_ptr(), batch, head, row


def first_of(t: torch.Tensor | None) -> int:
    """Where a tensor begins; 0: there is none."""
    return 0 if t is None else t.data_ptr()


def whole_vectors(n: int, width: int) -> int:
    """The least multiple of ``width`` that has room for ``n`` entries.

    >>> whole_vectors(20, 16)
    32
    """
    return -(-n // width) * width
