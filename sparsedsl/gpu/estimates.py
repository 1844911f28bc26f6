"""What a config needs of a GPU, estimated before anything is compiled: shared memory, registers, descriptors. Loads nothing.

Estimates keep out what obviously cannot run; what a compiled kernel really needs is read from its binary
(:mod:`sparsedsl.gpu.resources`). They err towards letting a candidate pass.
"""

from __future__ import annotations

from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import Target

__all__ = [
    "TENSOR_MEMORY_ROWS",
    "family",
    "has_descriptors",
    "idle_rows",
    "impossible",
    "registers",
    "repeats",
    "rows_of_a_warp",
    "shared_bytes",
    "warps_of",
]

# Of a product in tensor memory: one of 64 rows takes as long, and shorter ones are left to units that are slower yet.
TENSOR_MEMORY_ROWS = 128

# Numbers of a thread beside its share of the tiles: pointers, bounds, row maxima and sums.
_BESIDE_TILES = 40
# Of a tile, for each warp: matrix instructions of a warp, or its part of one of a warp group, are so many rows high; AMD's have 64 lanes.
_ROWS_OF_A_WARP, _ROWS_OF_64_LANES = 16, 32


def family(target: Target) -> str:
    """The generation of matrix units: "ampere" (also for later consumer cards), "hopper", "blackwell", "cdna".

    >>> from sparsedsl.gpu.targets import target_named
    >>> family(target_named("sm_90"))
    'hopper'
    """
    return {"wgmma": "hopper", "tcgen05": "blackwell", "v_mfma": "cdna"}.get(target.matrix[0].split(".")[0], "ampere")


def has_descriptors(shape: Shape, target: Target) -> bool:
    """Whether tensor descriptors can read K and V: the target has them, and rows are multiples of 16 bytes."""
    rows = (shape.head_dim * shape.itemsize, shape.head_dim_v * shape.itemsize)
    return family(target) in ("hopper", "blackwell") and shape.aligned and all(size % 16 == 0 for size in rows)


def impossible(kernel: str, shape: Shape, target: Target, config: Config) -> str | None:
    """Why a config cannot run on ``target`` by the estimates, or None if nothing speaks against it."""
    if config.descriptors and not has_descriptors(shape, target):
        return f"no tensor descriptors on {target.name} for rows of {shape.head_dim} and {shape.head_dim_v} numbers"
    needed = shared_bytes(kernel, shape, target, config)
    if needed > target.shared_per_block:
        return f"about {needed:,} bytes of shared memory, {target.name} has {target.shared_per_block:,} a block"
    most = target.registers_per_thread
    held = registers(kernel, shape, target, config)
    if held > most:
        return f"about {held} registers a thread, {target.name} has {most}"
    threads = config.warps * target.warp_size
    if threads * min(held, most) > target.registers_per_sm:
        return f"about {threads * held:,} registers a block, {target.name} has {target.registers_per_sm:,}"
    return None


def repeats(kernel: str, shape: Shape, target: Target, config: Config) -> float:
    """How often a program does each product and exponential: warps beyond one for 16 rows of a tile (32 on AMD) compute what others do.

    Rows are queries, or keys where gradients of keys are made. Tensor memory is shared out by columns too, and decode tiles, which are
    one row of warps high, are computed by columns.

    >>> from sparsedsl.gpu.targets import target_named
    >>> [repeats("grad_kv", Shape("float16", 128, 128), target_named("sm_90"), Config(64, n, 8, 2)) for n in (64, 128)]
    [2.0, 1.0]
    >>> [repeats("forward", Shape("float16", 64, 64), target_named("gfx942"), Config(n, 64, 4, 1)) for n in (64, 128)]
    [2.0, 1.0]
    """
    if kernel in ("delta", "merge", "decode") or not shape.matrix_units or family(target) == "blackwell":
        return 1.0
    rows = config.block_n if kernel == "grad_kv" else config.block_m
    return max(1.0, config.warps / (rows / rows_of_a_warp(target)))


def idle_rows(kernel: str, shape: Shape, target: Target, config: Config) -> float:
    """How much longer than its numbers a product takes, as rows of the unit lie idle: in tensor memory 64 rows take as long as 128.

    >>> from sparsedsl.gpu.targets import target_named
    >>> [idle_rows("forward", Shape("float16", 64, 64), target_named("sm_100"), Config(n, 64, 4, 2)) for n in (64, 128)]
    [2.0, 1.0]
    """
    if kernel in ("delta", "merge", "decode") or not shape.matrix_units or family(target) != "blackwell":
        return 1.0
    rows = config.block_n if kernel == "grad_kv" else config.block_m
    return max(1.0, TENSOR_MEMORY_ROWS / rows)


def rows_of_a_warp(target: Target) -> int:
    """Rows of a tile that a warp has to itself: more warps than tile rows over this repeat each other's work.

    >>> from sparsedsl.gpu.targets import target_named
    >>> [rows_of_a_warp(target_named(name)) for name in ("sm_80", "sm_90", "gfx942")]
    [16, 16, 32]
    """
    return _ROWS_OF_64_LANES if family(target) == "cdna" else _ROWS_OF_A_WARP


def warps_of(rows: int, target: Target) -> int:
    """The most warps of which none repeats what others do on a tile of so many rows; on NVIDIA four at least, which is a warp group.

    >>> from sparsedsl.gpu.targets import target_named
    >>> [[warps_of(rows, target_named(name)) for rows in (32, 64, 128)] for name in ("sm_90", "gfx942")]
    [[4, 4, 8], [1, 2, 4]]
    """
    return max(1 if family(target) == "cdna" else 4, rows // rows_of_a_warp(target))


def shared_bytes(kernel: str, shape: Shape, target: Target, config: Config) -> int:
    """Estimated bytes of shared memory of one program: staged tiles, and resident ones where operands come from there.

    >>> from sparsedsl.gpu.targets import target_named
    >>> shared_bytes("forward", Shape("float16", 64, 64), target_named("sm_90"), Config(128, 64, 4, 2)) // 1024
    48
    """
    if kernel in ("delta", "merge"):
        return 0
    m, n, d, dv = config.block_m, config.block_n, shape.columns, shape.columns_v
    queries, keys = m * d, n * (d + dv)
    if kernel in ("forward", "decode"):
        staged, resident = keys, queries
    elif kernel == "grad_kv":
        staged, resident = m * (d + dv), keys
    else:
        staged, resident = keys, m * (d + dv)
    # Matrix units of Hopper and later read from shared memory; before, resident tiles lie in registers, but gradients of logits are
    # turned there where gradients of keys are made.
    if family(target) not in ("hopper", "blackwell") or not shape.matrix_units:
        resident = m * n if kernel == "grad_kv" and family(target) == "ampere" and shape.matrix_units else 0
    # AMD's pipeline holds the tile in flight in registers.
    buffers = max(1, config.stages - 1) if family(target) == "cdna" else config.stages
    return (staged * buffers + resident) * shape.itemsize


def registers(kernel: str, shape: Shape, target: Target, config: Config) -> int:
    """Estimated registers of a thread: its share of the accumulators and logits, all in fp32, and of what feeds the next product."""
    m, n, d, dv = config.block_m, config.block_n, shape.columns, shape.columns_v
    threads = config.warps * target.warp_size
    words = shape.itemsize / 4
    if kernel in ("delta", "merge"):
        return _BESIDE_TILES + 2 * m * dv // threads
    tiles = m * n * (1 + words)  # logits, and probabilities as an operand
    if kernel in ("forward", "decode"):
        accumulators = m * dv
    elif kernel == "grad_kv":
        accumulators, tiles = n * (d + dv), tiles + m * n
    else:
        accumulators, tiles = m * d, tiles + m * n
    return int(_BESIDE_TILES + (accumulators + tiles) / threads)
