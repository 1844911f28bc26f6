"""How the kernels over picked chunks are compiled: tile sizes, warps, stages; and jobs for builds without a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparsedsl.codegen.to_triton_selected import SelectedSource, selected_source
from sparsedsl.gpu.aot import TABLES, BuildJob
from sparsedsl.gpu.estimates import family, warps_of
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.loading import load
from sparsedsl.gpu.targets import Target

__all__ = [
    "SelectedShape",
    "block_of",
    "config_of",
    "constants_of",
    "function",
    "job_of",
    "largest_tile",
    "most_rows",
    "pack_of",
    "rows_of",
]

SMALLEST, MOST_ROWS = 16, 64
KIB = 1024


def largest_tile(target: Target) -> int:
    """Bytes of a tile of keys that a kernel may have at most: beside it lies one of values, and in the backward pass the queries.

    >>> from sparsedsl.gpu.targets import TARGETS
    >>> [largest_tile(TARGETS[name]) // KIB for name in ("sm_80", "sm_89", "sm_90")]
    [64, 32, 64]
    """
    return 32 * KIB if family(target) == "ampere" and target.shared_per_block < 128 * KIB else 64 * KIB


@dataclass(frozen=True)
class SelectedShape:
    """What the kernels are specialised for, beside dtype and widths of heads: tokens of a ``chunk``; query heads side by side in
    a tile (``pack``); ``weighted``, ``softmax1``, ``interval`` as in the call; ``merged``: a tile has several queries; ``learned``: the
    backward kernels write gradients of tables."""

    shape: Shape
    chunk: int
    pack: int
    weighted: bool = False
    softmax1: bool = False
    interval: bool = False
    merged: bool = True
    learned: bool = False


def most_rows(kernel: str, chunk: int, shape: Shape, target: Target) -> int:
    """Rows of a tile of queries at most: beside a tile of keys that is long and wide, more would not fit the registers.

    >>> from sparsedsl.gpu.targets import TARGETS
    >>> [most_rows("selected_forward", 64, Shape("bfloat16", width, width), TARGETS["sm_90"]) for width in (64, 128, 256)]
    [64, 64, 32]
    """
    if kernel == "selected_grad_kv":  # what is summed there is as large as the keys, whatever the rows
        return 16 if family(target) == "cdna" else 32
    width = max(block_of(shape.head_dim), block_of(shape.head_dim_v)) * shape.itemsize
    taken = block_of(chunk) * width
    if taken > 1 << 15 or (family(target) == "cdna" and width > 256):
        return 16
    if family(target) == "ampere" and 2 * (32 + block_of(chunk)) * width > target.shared_per_block:
        return 16  # keys, values, queries and gradients of out lie there at the same time
    if kernel == "selected_grad_q" and width > 128 and largest_tile(target) < 64 * KIB:
        return 32  # of the cards with little shared memory, the latest spill beside 64 rows
    return 32 if taken > 1 << 14 or chunk > 64 else MOST_ROWS


def pack_of(heads: int, kv_heads: int, list_heads: int, most: int = MOST_ROWS) -> int:
    """How many adjacent query heads of those that share list and key head lie in one tile, ``most`` at most.

    >>> pack_of(16, 4, 4), pack_of(16, 4, 1), pack_of(12, 4, 6), pack_of(160, 1, 1)
    (4, 4, 1, 40)
    """
    shared = heads // math.lcm(kv_heads, list_heads)
    return next(pack for pack in range(min(shared, most), 0, -1) if shared % pack == 0)


def rows_of(pack: int, most: int = MOST_ROWS) -> int:
    """Rows of a tile of queries, ``most`` at most. Few heads side by side would need many queries to fill a large tile, and the
    union of their chunks would hold much that each of them did not pick.

    >>> [rows_of(pack) for pack in (1, 2, 4, 8, 16, 40)]
    [16, 32, 32, 64, 64, 64]
    """
    return min(most, 16 if pack == 1 else 32 if pack <= 4 else MOST_ROWS)


def function(kernel: str, source: SelectedSource | None = None) -> Any:
    """Triton's function of a kernel, as ``source`` writes it; None: without a mask or a score.

    Raises:
        UnsupportedError: Triton is not installed.
    """
    return load((source or selected_source()).texts[kernel])[kernel]


def block_of(width: int) -> int:
    """A tile's side for ``width`` numbers: products on matrix units have no other."""
    return max(SMALLEST, 1 << (width - 1).bit_length())


def constants_of(
    kernel: str, chosen: SelectedShape, config: Config, source: SelectedSource | None = None, **flags: bool
) -> dict[str, Any]:
    """Values of the constant arguments of ``kernel``. ``flags``: SAVE, SPLIT, HAS_GRAD_LSE, where they are not true."""
    shape = chosen.shape
    aligned = shape.aligned and shape.head_dim % 8 == 0 and shape.head_dim_v % 8 == 0
    values = {
        "CHUNK": chosen.chunk, "HEAD_DIM": shape.head_dim, "HEAD_DIM_V": shape.head_dim_v, "BLOCK_D": block_of(shape.head_dim),
        "BLOCK_DV": block_of(shape.head_dim_v), "BLOCK_N": config.block_n, "ROWS": config.block_m, "WEIGHTED": chosen.weighted,
        "SOFTMAX1": chosen.softmax1, "INTERVAL": chosen.interval, "MERGED": chosen.merged, "SAVE": True, "SPLIT": True,
        "HAS_GRAD_LSE": True, "ALIGN": 8 if aligned else 1, "PRECISION": shape.precision,
    }  # fmt: skip
    return {name: (values | flags)[name] for name in function(kernel, source).arg_names if name in values}


def job_of(
    kernel: str, chosen: SelectedShape, config: Config, target: Target, source: SelectedSource | None = None, **flags: bool
) -> BuildJob:
    """What there is to compile for ``target`` ahead of time, as ``source`` writes it; None: without a mask or a score."""
    source = source or selected_source()
    fixed = constants_of(kernel, chosen, config, source, **flags)
    data = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}[chosen.shape.dtype]
    pointers = {f"{name}_ptr": data for name in ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")}
    pointers |= {f"{name}_ptr": "*i32" for name in ("chunks", "owners", "counts", "first", "last", "starts", "places")}
    pointers |= {"scale": "fp32"} | dict.fromkeys(fixed, "constexpr")
    for one in source.arguments.get(kernel, ()):
        kind, _, table = one.type.partition(":")
        pointers[one.name] = TABLES[source.pattern.tables[table].dtype] if kind == "*table" else one.type
    names = function(kernel, source).arg_names
    signature = {name: pointers.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    return BuildJob(source.texts[kernel], kernel, signature, fixed, config, source.fp_fusion, target)


def config_of(kernel: str, chosen: SelectedShape, target: Target) -> Config:
    """A config that fits on ``target`` and spills nothing in loops of 16-bit types, chosen without a device.

    ``block_m``: rows of a tile of queries, or of a step over a chunk's queries; ``block_n``: keys of a tile, which in the passes
    by queries is a chunk.
    """
    if kernel == "selected_merge":
        return Config(SMALLEST, SMALLEST, 1, 1)
    shape = chosen.shape
    widths = block_of(shape.head_dim), block_of(shape.head_dim_v)
    rows, keys = most_rows(kernel, chosen.chunk, shape, target), block_of(chosen.chunk)
    if kernel == "selected_grad_kv":
        keys = min(keys, 64 if max(widths) <= 128 else 32)
        rows = SMALLEST if chosen.learned else rows
    else:
        rows = rows_of(chosen.pack, rows) if chosen.merged else block_of(chosen.pack)
    loaded = (rows if kernel == "selected_grad_kv" else keys) * sum(widths) * shape.itemsize
    if family(target) == "cdna":  # what is on its way is held in registers
        warps = max(2, warps_of(keys if kernel == "selected_grad_kv" else rows, target)) if shape.itemsize == 2 else 4
        return Config(rows, keys, warps, 2 if loaded <= 1 << 14 and kernel != "selected_grad_kv" else 1)
    if family(target) == "ampere" and kernel == "selected_grad_kv":
        while keys > SMALLEST and _tiles_bytes(rows, keys, sum(widths), shape) > target.shared_per_block:
            keys //= 2
        while rows > SMALLEST and _tiles_bytes(rows, keys, sum(widths), shape) > target.shared_per_block:
            rows //= 2
    if not shape.matrix_units and loaded > target.shared_per_block // 2:
        return Config(rows, keys, 8, 1)
    if family(target) == "ampere" and _tiles_bytes(rows, keys, sum(widths), shape) > target.shared_per_block * 15 // 16:
        return Config(rows, keys, 8, 1)  # no room for a tile that is on its way
    # One tile on its way while another is computed with; two where that leaves room for a program beside this one. Where the
    # address of a loaded LSE follows from a counter, Triton gives up and waits for every tile if it is to have two on their way.
    counted = kernel == "selected_grad_q" and chosen.weighted
    deep = kernel != "selected_grad_kv" and not counted and 2 * loaded <= target.shared_per_block // 3
    # Warps beyond those that share the rows repeat products of the others; where a thread would hold too much, they do.
    widest = 128 if shape.itemsize == 2 else 64
    few = keys <= 64 and max(widths) <= widest and not (chosen.learned and kernel == "selected_grad_q")
    return Config(rows, keys, warps_of(MOST_ROWS, target) if few else 8, 3 if deep else 2)


def _tiles_bytes(rows: int, keys: int, width: int, shape: Shape) -> int:
    """Shared memory of a backward kernel that waits for every tile: queries, gradients of out, keys and values, and without matrix units
    two tiles of pairs. Read from binaries for sm_86 and sm_121: exact in float32, at most that in 16 bits."""
    return (rows + keys) * width * shape.itemsize + (0 if shape.matrix_units else 2 * rows * keys * shape.itemsize)
