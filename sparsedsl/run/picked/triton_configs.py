"""How the kernels over picked chunks are compiled: tile sizes, warps and stages for what a call needs, and jobs for ahead-of-time builds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.aot import Job
from sparsedsl.gpu.estimates import family
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.loading import triton
from sparsedsl.gpu.targets import Target

__all__ = ["KERNELS", "PickedShape", "config_of", "constants_of", "function", "job_of", "pack_of", "rows_of"]

# kernel -> its module in codegen/kernels
KERNELS = {
    "picked_forward": "picked_forward", "picked_merge": "picked_forward", "picked_grad_q": "picked_backward",
    "picked_grad_kv": "picked_backward",
}  # fmt: skip
SMALLEST, MOST_ROWS = 16, 64


@dataclass(frozen=True)
class PickedShape:
    """What the kernels are specialised for, beside dtype and widths of heads: tokens of a ``chunk``; query heads side by side in a tile
    (``pack``); ``weighted``, ``one``, ``interval`` as in the call; ``merged``: a tile has several queries."""

    shape: Shape
    chunk: int
    pack: int
    weighted: bool = False
    one: bool = False
    interval: bool = False
    merged: bool = True


def pack_of(heads: int, kv_heads: int, list_heads: int) -> int:
    """How many adjacent query heads of those that share list and key head lie in one tile.

    >>> pack_of(16, 4, 4), pack_of(16, 4, 1), pack_of(12, 4, 6), pack_of(160, 1, 1)
    (4, 4, 1, 40)
    """
    shared = heads // math.lcm(kv_heads, list_heads)
    return next(pack for pack in range(min(shared, MOST_ROWS), 0, -1) if shared % pack == 0)


def rows_of(pack: int) -> int:
    """Rows of a tile of queries: few heads side by side would need many queries to fill a large one, whose union then holds much that
    each query did not pick.

    >>> [rows_of(pack) for pack in (1, 2, 4, 8, 16, 40)]
    [16, 32, 32, 64, 64, 64]
    """
    return 16 if pack == 1 else 32 if pack <= 4 else MOST_ROWS
