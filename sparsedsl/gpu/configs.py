"""Tile sizes, warps and pipeline stages of the generated kernels: a default for every target, and the space to search.

Input: the name of a kernel, what it is specialised for (:class:`Shape`), the facts of a GPU (:class:`~sparsedsl.gpu.targets.Target`).
Output: a :class:`Config`, or all that are worth a try. Loads neither torch nor Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsedsl.gpu.estimates import family, has_descriptors, impossible, repeats, warps_of
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import Target

if TYPE_CHECKING:
    from sparsedsl.codegen.to_triton import KernelSource

__all__ = ["Config", "Shape", "Work", "constants", "default_config", "of_sticks", "refusal", "space", "split_count"]

STAGES = (1, 2, 3, 4)
# Rows count as imbalanced, so that it may pay to begin with the longest, from this ratio of the longest to the mean.
IMBALANCED = 1.2
MOST_SPLITS = 128


@dataclass(frozen=True)
class Work:
    """What is known of a call's structure. ``imbalance``: the longest row of tiles over the mean; ``row_width``: keys that a query
    attends to, on average, None if not known; ``descriptors``: the source can be written with tensor descriptors."""

    imbalance: float = 1.0
    row_width: float | None = None
    descriptors: bool = False


# (block_m, block_n, warps, stages) by the wider head dimension, for numbers of 16 bits: at 64 and 128 the best by counts of instructions,
# of ampere and hopper among all (benchmarks/aot_vs_flex.py), of those that read what they need no more often than the memory gives it;
# of blackwell and cdna among a few (benchmarks/aot_tiles.py). Blackwell's products of 64 rows take as long as those of 128, and on cdna
# four warps on 64 rows do what two do, twice.
_HALF: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "ampere": {
        "forward": {32: (64, 64, 4, 3), 64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "decode": {32: (16, 64, 4, 3), 64: (16, 64, 4, 2), 128: (16, 64, 4, 3), 256: (16, 32, 4, 2)},
        "grad_q": {32: (64, 64, 4, 3), 64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
        "grad_kv": {32: (64, 64, 4, 3), 64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 32, 8, 2)},
    },
    "hopper": {
        "forward": {32: (128, 64, 8, 3), 64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
        "decode": {32: (16, 64, 4, 3), 64: (16, 64, 4, 3), 128: (16, 64, 4, 3), 256: (16, 32, 4, 2)},
        "grad_q": {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
        "grad_kv": {32: (64, 128, 8, 3), 64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 32, 8, 2)},
    },
    "blackwell": {
        "forward": {32: (128, 64, 8, 3), 64: (128, 128, 8, 2), 128: (128, 128, 8, 2), 256: (64, 64, 8, 2)},
        "decode": {32: (16, 64, 4, 3), 64: (16, 64, 4, 3), 128: (16, 64, 4, 3), 256: (16, 32, 4, 2)},
        "grad_q": {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
        "grad_kv": {32: (64, 64, 8, 3), 64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 32, 8, 2)},
    },
    "cdna": {
        "forward": {32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 4, 1), 256: (64, 32, 2, 1)},
        "decode": {32: (16, 64, 4, 2), 64: (16, 64, 4, 2), 128: (16, 64, 4, 1), 256: (16, 32, 4, 1)},
        "grad_q": {32: (64, 64, 2, 1), 64: (128, 64, 4, 1), 128: (128, 32, 4, 1), 256: (64, 16, 2, 1)},
        "grad_kv": {32: (64, 64, 2, 1), 64: (64, 128, 4, 1), 128: (32, 128, 4, 1), 256: (32, 64, 2, 1)},
    },
}
# fp32 without matrix units: each thread holds whole rows of its operands.
_SINGLE: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "forward": {32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "decode": {32: (16, 32, 4, 2), 64: (16, 32, 4, 2), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "grad_q": {32: (32, 32, 4, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "grad_kv": {32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}


def default_config(kernel: str, shape: Shape, target: Target) -> Config:
    """A config that runs everywhere on ``target`` without spilling registers in its loops, chosen without a device.

    ``kernel``: "forward", "decode", "merge", "delta", "left", "grad_q", "grad_kv", or one that begins with "grad_" (a table's gradient,
    computed tile by tile as "grad_q" is, and so is "left").
    """
    if kernel == "delta":
        return Config(64 if shape.columns_v <= 128 else 32, 16, 4, 1)
    if kernel == "merge":
        return Config(16, 16, 4, 1)
    widths = [width for width in (32, 64, 128, 256) if width >= max(shape.columns, shape.columns_v)]
    # A head in two blocks, as 96 = 64 + 32, takes more registers than one of the next power of two where both dK and dV are summed.
    split = kernel == "grad_kv" and max(shape.columns, shape.columns_v) not in (16, *widths)
    width = widths[min(split, len(widths) - 1)]
    table = _HALF[family(target)] if shape.matrix_units and shape.itemsize == 2 else _SINGLE
    config = Config(*table[kernel if kernel in table else "grad_q"][width])
    if table is _SINGLE and family(target) == "cdna":  # eight warps of 64 leave a thread half the registers
        config = replace(config, warps=4)
    if kernel == "decode":
        config = replace(config, block_m=_rows_of_decode(shape))
    return _shrunk(kernel, shape, target, config)


def _shrunk(kernel: str, shape: Shape, target: Target, config: Config) -> Config:
    """The nearest config that the estimates allow: fewer stages, then smaller tiles; for GPUs that the tables do not know."""
    while impossible(kernel, shape, target, config):
        if config.stages > 1:
            config = replace(config, stages=config.stages - 1)
        elif config.block_n > 16 and config.block_n >= config.block_m:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16 and kernel != "decode":
            config = replace(config, block_m=config.block_m // 2)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return config


def _rows_of_decode(shape: Shape) -> int:
    """Query heads of one group side by side are the rows of a decode tile."""
    return min(64, max(16, 1 << (shape.group - 1).bit_length()))


def space(kernel: str, shape: Shape, target: Target, work: Work | None = None) -> tuple[Config, ...]:
    """Every config worth a try for ``kernel``, the default first; none that the estimates rule out.

    ``work`` says which choices make a difference: rows of one length need no order, a row of 100 keys no tile of 256.
    """
    work = work or Work()
    default = default_config(kernel, shape, target)
    if kernel in ("delta", "merge"):
        more = iter([replace(default, block_m=m, warps=w) for m in (16, 32, 64, 128) for w in (2, 4, 8)])
    else:
        more = _tiles(kernel, shape, target, work)
    orders = (False, True) if work.imbalance >= IMBALANCED and kernel not in ("decode", "delta", "merge") else (False,)
    loads = (False, True) if work.descriptors and has_descriptors(shape, target) else (False,)
    found = [
        replace(config, heavy_first=heavy, descriptors=descriptors)
        for config in (default, *more)
        for heavy, descriptors in itertools.product(orders, loads)
    ]
    return tuple(config for config in dict.fromkeys(found) if not impossible(kernel, shape, target, config))


def _tiles(kernel: str, shape: Shape, target: Target, work: Work) -> Iterator[Config]:
    rows: tuple[int, ...] = (_rows_of_decode(shape),) if kernel == "decode" else (32, 64, 128)
    columns: tuple[int, ...] = (32, 64, 128) if kernel != "decode" else (32, 64, 128, 256)
    if not shape.matrix_units:
        rows, columns = tuple(min(n, 64) for n in rows if n <= 64 or kernel == "decode"), (16, 32, 64)
    if work.row_width is not None:
        # A tile wider than what a row attends to is mostly masked.
        columns = tuple(n for n in columns if n <= max(32, 2 * work.row_width)) or columns[:1]
    amd = family(target) == "cdna"
    for m, n, warps, stages in itertools.product(rows, columns, (2, 4, 8) if amd else (4, 8), (1, 2) if amd else STAGES):
        config = Config(m, n, warps, stages)
        # At least one fragment a warp, and one of its own.
        if m * n >= 16 * 16 * warps and repeats(kernel, shape, target, config) == 1.0:
            yield config


def refusal(kernel: str, shape: Shape, target: Target, work: Work, config: Config) -> str | None:
    """Why ``config``, which comes from a record, must not be launched for this call, or None: what :func:`space` never holds."""
    if kernel == "decode" and config.block_m != _rows_of_decode(shape):
        return f"tiles of {config.block_m} rows, and {shape.group} query heads share a key head"
    if config.descriptors and not work.descriptors:
        return "tensor descriptors, and the kernel has none"
    return impossible(kernel, shape, target, config)


def split_count(tiles: int, programs: int, target: Target) -> int:
    """Parts into which decode cuts the keys of a row, so that all SMs have work.

    ``tiles``: key tiles of the longest row; ``programs``: rows that run side by side without cutting, over batch and heads.

    >>> from sparsedsl.gpu.targets import target_named
    >>> sm_90 = target_named("sm_90")
    >>> split_count(tiles=512, programs=8, target=sm_90), split_count(512, 1000, sm_90), split_count(2, 8, sm_90)
    (33, 1, 1)
    """
    if programs * 5 >= target.sms * 4:  # merging costs more than the last fifth of the SMs gives
        return 1
    # Two programs an SM hide each other's waits; a part of fewer than two tiles is mostly start and end.
    return max(1, min(-(-2 * target.sms // programs), tiles // 2, MOST_SPLITS))


def of_sticks(kernel: str, shape: Shape, target: Target, config: Config, span: int | None = None) -> Config:
    """The config of a kernel that breaks sticks: narrower, since a tile of logits lies in registers several times.

    What kernels of the backward pass tell each other of a tile of keys has one width for all: ``span``, by default that of all launches for
    such a shape.

    >>> from sparsedsl.gpu.targets import target_named
    >>> str(of_sticks("grad_kv", Shape("bfloat16", 64, 64), target_named("sm_90"), Config(64, 128, 8, 2)))
    '32x32, 4 warps, 2 stages'
    """
    if kernel in ("decode", "merge"):
        return config
    half, widest = shape.matrix_units and shape.itemsize == 2, max(shape.columns, shape.columns_v)
    narrow = 32 if half and widest <= 128 else 16
    if kernel == "forward":
        return replace(config, block_n=min(config.block_n, 32))
    span = span or narrow
    rows, warps = config.block_m, config.warps
    if kernel in ("left", "grad_q"):
        rows = min(rows, 32) if half and widest > 128 else rows
    else:  # of keys, and of tables: squares
        rows = min(rows, span) if kernel == "grad_kv" else span
    if half and (widest <= 64 or kernel != "grad_kv"):
        warps = min(warps, max(4, warps_of(rows, target)))
    return replace(config, block_m=rows, block_n=span, warps=warps)


def constants(kernel: KernelSource, shape: Shape, config: Config, backend: str = "cuda") -> dict[str, Any]:
    """Values of the ``constexpr`` arguments of ``kernel``: those that it has of the following.

    BLOCK_M, BLOCK_N, BLOCK (a square tile), PRECISION, HEAVY_FIRST, HAS_GRAD_LSE (true: the larger kernel), SUMS: how float32 is summed by
    matrix units of the ``backend``, "cuda" or "hip"; ALIGN: the number of elements that all strides are a multiple of; and BLOCK_WISE: no
    tile is cut by the edge of a block of the mask: true of tiles that divide the blocks if the first query of a call begins a block.
    """
    divides = kernel.blocks is not None and not (kernel.blocks[0] % config.block_m or kernel.blocks[1] % config.block_n)
    values = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK": min(config.block_m, config.block_n),
        "PRECISION": shape.precision,
        "SUMS": "tf32x3" if shape.matrix_units and backend == "cuda" else "ieee",
        "ALIGN": 8 if shape.aligned and shape.head_dim % 8 == 0 and shape.head_dim_v % 8 == 0 else 1,
        "HEAVY_FIRST": config.heavy_first,
        "HAS_GRAD_LSE": True,
        "BLOCK_WISE": divides,
    }
    return {argument.name: values[argument.name] for argument in kernel.arguments if argument.name in values}
