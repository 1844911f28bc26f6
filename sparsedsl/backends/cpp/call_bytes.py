"""The bytes that the compiled passes read: a ``Call`` of ``codegen/cpp/call.h``, field by field, each 8 bytes wide."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch

from sparsedsl.lang.normalisers import POINTWISE, SOFTMAX, SOFTPICK, STICK_BREAKING

__all__ = [
    "HEAD",
    "KINDS",
    "OF_PATTERN",
    "OF_PLACES",
    "OF_REST",
    "WEIGHING",
    "call_block",
    "first_of",
    "place_fields",
    "place_of",
    "whole_vectors",
]

# Fields between the scale and those of the pattern; at the end of these those of places and, after them, of gradients.
FIXED, OF_PLACES, OF_REST = 59, 8, 23
# From the batch to the LSE.
HEAD = struct.Struct("=8qd20q")
# From there to the end of the fields of gradients.
OF_PATTERN = struct.Struct(f"={FIXED - 20}q")
# How elements of q, k, v and out are told of, where the computation is not in their own type.
KINDS = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 1, torch.float16: 2}
# How logits become weights, as `call.h` numbers it.
WEIGHING = {SOFTMAX: 0, POINTWISE: 1, SOFTPICK: 2, STICK_BREAKING: 3}


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


def place_fields(places: torch.Tensor | None, length: int) -> tuple[int, int, int, int]:
    """The fields of a ``Places``: int32 without gaps, ``(batch or 1, heads, positions)``; of a tensor of so many rows."""
    if places is None:
        return 0, 0, 0, 0
    batch, heads, _ = places.shape
    return places.data_ptr(), heads if batch > 1 else 0, heads, length


def first_of(t: torch.Tensor | None) -> int:
    """Where a tensor begins; 0: there is none."""
    return 0 if t is None else t.data_ptr()


def whole_vectors(n: int, width: int) -> int:
    """The least multiple of ``width`` that has room for ``n`` entries.

    >>> whole_vectors(20, 16)
    32
    """
    return -(-n // width) * width
