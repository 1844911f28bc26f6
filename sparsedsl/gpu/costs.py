"""Which config is expected to be the fastest where none can be measured: seconds of a kernel from counts of tiles and rates of a GPU.

Input: what is scheduled at a config's tile size (:class:`TileCounts`), the facts of a target, what one SM holds. Output: seconds, good for
ranking configs of one kernel and for nothing else. Plain numbers in and out; loads neither torch nor Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsedsl.gpu.configs import Work
from sparsedsl.gpu.estimates import family, idle_rows, registers, repeats, shared_bytes
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import Target

if TYPE_CHECKING:
    from sparsedsl.analysis.lists import BlockLists
    from sparsedsl.analysis.totals import Totals

__all__ = [
    "Held",
    "TileCounts",
    "banded_tiles",
    "cache_bytes_a_cycle",
    "estimated_held",
    "listed_tiles",
    "loaded_bytes",
    "ranked",
    "retiled",
    "seconds",
    "work_of",
]

# Cycles of one SM, at CLOCK, for what is not a product of matrices. Order of magnitude is what counts: these rank, they do not predict.
CLOCK = 1.7e9
_EXP_A_CYCLE = 16.0  # of the special function units
_LANES = 128.0  # fp32 operations a cycle
_FULL_OPERATIONS, _PARTIAL_OPERATIONS = 8.0, 16.0  # for each logit: scale, maximum, sum, conversion; and the mask
_LATENCY = 900.0  # from the second-level cache or beyond until a tile is there
_TURN = 150.0  # of a loop: bounds, barriers, rescaling
_START = 2500.0  # of a program: its own rows, first tiles, the result
# Sides of a tile for which half of the peak is reached: operands are read from shared memory m + n times for m * n products.
_HALF_PEAK = {"ampere": 20.0, "hopper": 32.0, "blackwell": 40.0, "cdna": 20.0}
# The second-level cache gives this many times what the memory does.
_CACHE_GAIN = 2.0
# Loads and stores of local memory take their issue slots, and about as long again until what they bring is there.
_LOCAL = 2.0


@dataclass(frozen=True)
class TileCounts:
    """What a kernel goes through: ``full`` and ``partial`` tiles, over all batch entries and heads; ``programs``, one a row of tiles;
    ``longest``: tiles of the longest row."""

    full: int
    partial: int
    programs: int
    longest: int


@dataclass(frozen=True)
class Held:
    """What a compiled kernel takes: ``blocks`` that one SM holds at once; ``local_share``: of a loop's instructions, how many read or
    write spilled registers."""

    blocks: int
    local_share: float = 0.0


def listed_tiles(lists: BlockLists, *, batch: int, heads: int, by_key: bool = False) -> TileCounts:
    """The counts of tile lists, for lists that were made at the config's own tile size; ``by_key``: a program is a column of tiles.

    >>> from sparsedsl.analysis.domain import Domain
    >>> from sparsedsl.analysis.tiles import classify
    >>> import sparsedsl as sd
    >>> lists = classify((sd.kv_idx <= sd.q_idx).expr, Domain(rows=256, kv_len=256), 64)
    >>> listed_tiles(lists, batch=1, heads=8)
    TileCounts(full=48, partial=32, programs=32, longest=4)
    """
    full, partial = lists.full, lists.partial
    if by_key:
        columns = lists.shape[-1]
        full, partial = full.transposed(columns), partial.transposed(columns)
    rows = full.counts + partial.counts
    copies = batch * heads // (rows.shape[0] * rows.shape[1])
    return TileCounts(full.total * copies, partial.total * copies, rows.numel() * copies, int(rows.max()) if rows.numel() else 0)


def work_of(lists: BlockLists) -> Work:
    """What a search for a config should know, from lists at any tile size: a partial tile counts as half full."""
    counts = (lists.full.counts + lists.partial.counts).float()
    mean = float(counts.mean()) if counts.numel() else 0.0
    pairs = (lists.full.total + lists.partial.total / 2) * lists.block[0] * lists.block[1]
    groups = max(1, counts.shape[0] * counts.shape[1])
    width = min(float(lists.kv_len), pairs / max(1, groups * lists.q_rows))
    return Work(imbalance=float(counts.max()) / mean if mean else 1.0, row_width=width)


def banded_tiles(
    q_len: int, kv_len: int, row_width: float, block: tuple[int, int], *, copies: int, by_key: bool = False
) -> TileCounts:
    """Counts without lists, as if the keys of a query were one run of ``row_width`` that moves with the query.

    >>> banded_tiles(4096, 4096, 1024, (128, 128), copies=1)
    TileCounts(full=224, partial=64, programs=32, longest=9)
    """
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    # The run of a row of tiles begins and ends within tiles, which are cut at multiples of the smaller side.
    width, step, side = max(1.0, row_width), min(block), max(block)
    reach = math.ceil(width / step) * step + side
    touched, full = min(columns, reach / block[1]), max(0.0, (width // step * step - side) / block[1])
    if width >= kv_len:
        touched = full = columns
    by_row, by_column = min(columns, math.ceil(reach / block[1])), min(rows, math.ceil(reach / block[0]))
    listed, whole = round(touched * rows), round(full * rows)
    programs, longest = (columns, by_column) if by_key else (rows, by_row)
    return TileCounts(whole * copies, (listed - whole) * copies, programs * copies, longest)


def retiled(totals: Totals, block: tuple[int, int], copies: int, step: int = 1) -> TileCounts:
    """Counts for tiles of ``block`` from those of tiles of 128 x 128, by their areas; ``copies``: batch entries times heads; ``step``:
    residues that a kernel takes one at a time, each dense.

    >>> from sparsedsl.analysis.report import analyse
    >>> import sparsedsl as sd
    >>> retiled(analyse(sd.kv_idx <= sd.q_idx, 4096).totals, (128, 64), copies=8)
    TileCounts(full=7936, partial=512, programs=256, longest=64)
    """
    batch, heads, rows, _ = totals.shape
    copies //= batch * heads
    smaller = 128 * 128 / (block[0] * block[1] * step)
    programs = max(1, round(rows * batch * heads * 128 / block[0]))
    longest = max(1, round(totals.most * 128 / (block[1] * step)))
    return TileCounts(round(totals.full * smaller) * copies, round(totals.partial * smaller) * copies, programs * copies, longest)


def estimated_held(kernel: str, shape: Shape, target: Target, config: Config) -> Held:
    """What an SM holds by the estimates of shared memory and registers, for a kernel that is not compiled."""
    threads = config.warps * target.warp_size
    by_registers = target.registers_per_sm // (threads * max(32, registers(kernel, shape, target, config)))
    by_shared = target.shared_per_sm // max(1, shared_bytes(kernel, shape, target, config) + target.shared_reserved)
    return Held(max(1, min(by_registers, by_shared, target.warps // config.warps, target.blocks)))


def seconds(kernel: str, shape: Shape, target: Target, config: Config, tiles: TileCounts, held: Held) -> float:
    """Expected seconds of one launch. More tiles, fewer SMs, slower units, spills in loops: never less.

    A tile costs its products, at a part of the peak that grows with its sides, and one pass over its logits, longer where the mask
    is evaluated. What of a tile's loading is not hidden by stages and by the other programs of the SM is waited for. The launch
    ends when the last program does: between one program and one row of the longest kind after the mean of all SMs.
    """
    m, n = config.block_m, config.block_n
    products = _products(kernel, shape) * 2.0 * m * n
    intensity = 2.0 * m * n / (m + n)
    share = intensity / (intensity + _HALF_PEAK[family(target)])
    # Products of warp groups that are few columns wide wait for shared memory.
    narrow = max(1.0, 0.5 + 32.0 / (m if kernel == "grad_kv" else n)) if family(target) == "hopper" else 1.0
    times = repeats(kernel, shape, target, config)
    idle = idle_rows(kernel, shape, target, config)
    cycles = times * idle * narrow * products / (_flops_a_cycle(shape, target) * share)
    logits = times * m * n
    full = cycles + logits / _EXP_A_CYCLE + logits * _FULL_OPERATIONS / _LANES
    partial = full + logits * (_PARTIAL_OPERATIONS - _FULL_OPERATIONS) / _LANES
    loaded = loaded_bytes(kernel, shape, config) / cache_bytes_a_cycle(target)
    waits = (_LATENCY / config.stages + _TURN) / held.blocks
    total = tiles.full + tiles.partial
    if total == 0:
        return tiles.programs * _START / (held.blocks * target.sms) / CLOCK
    slower = 1.0 + _LOCAL * held.local_share
    shared = slower * ((tiles.full * max(full, loaded) + tiles.partial * max(partial, loaded)) / total + waits)
    # A program at the end has its SM and the memory to itself, and nothing to hide its waits behind.
    alone = slower * ((partial if tiles.partial else full) + waits * held.blocks)
    mean = total * shared / target.sms + tiles.programs * _START / (held.blocks * target.sms)
    longest = tiles.longest * alone + _START
    last = min(longest, total / max(1, tiles.programs) * alone + _START) if config.heavy_first else longest
    return max(longest, mean + last / 2) / CLOCK


def ranked(
    kernel: str,
    shape: Shape,
    target: Target,
    candidates: Iterable[Config],
    tiles_at: Callable[[tuple[int, int]], TileCounts],
    held: Callable[[Config], Held | None] | None = None,
) -> tuple[Config, ...]:
    """Candidates, the one expected to be the fastest first; equals stay in order.

    ``tiles_at``: counts for a tile size, asked once for each; ``held``: what a compiled candidate takes, None if it does not run.
    """
    counts: dict[tuple[int, int], TileCounts] = {}
    expected: dict[Config, float] = {}
    for config in candidates:
        block = (config.block_m, config.block_n)
        if block not in counts:
            counts[block] = tiles_at(block)
        found = estimated_held(kernel, shape, target, config) if held is None else held(config)
        if found is not None:
            expected[config] = seconds(kernel, shape, target, config, counts[block], found)
    return tuple(sorted(expected, key=expected.__getitem__))


def _products(kernel: str, shape: Shape) -> int:
    """Multiplications for one pair of query and key: the inner lengths of all products of the kernel."""
    d, dv = shape.columns, shape.columns_v
    if kernel in ("forward", "decode"):
        return d + dv
    # Logits, and gradients of the probabilities; then dQ; or dK and dV.
    return (d + dv) + (d + dv if kernel == "grad_kv" else d)


def cache_bytes_a_cycle(target: Target) -> float:
    """What the second-level cache gives one SM."""
    return _CACHE_GAIN * target.memory_gb_s * 1e9 / target.sms / CLOCK


def loaded_bytes(kernel: str, shape: Shape, config: Config) -> int:
    """What one turn of a loop loads: a tile of keys and values, or of queries and gradients."""
    rows = config.block_m if kernel == "grad_kv" else config.block_n
    return rows * (shape.columns + shape.columns_v) * shape.itemsize


def _flops_a_cycle(shape: Shape, target: Target) -> float:
    """Of one SM, for products of this dtype."""
    if shape.itemsize == 2:
        tflops = target.half_tflops
    else:
        tflops = target.tf32_tflops if shape.matrix_units else target.float_tflops
    return tflops * 1e12 / target.sms / CLOCK
