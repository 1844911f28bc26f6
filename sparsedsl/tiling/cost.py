"""What strips cost on a machine, forward: seconds from rates that were measured once.

A strip of M rows (queries times heads of a group) and n keys is a product, the softmax passes, and a product; each costs its
arithmetic at the rate the machine reaches at that height, a pass over the logits, and the calls of the small operations.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from sparsedsl.tiling.cutting import CUTTING
from sparsedsl.tiling.schedule import StridedSeries
from sparsedsl.tuning.machine import ROWS, Machine

__all__ = [
    "class_seconds", "dense_seconds", "heads_at_once", "merge_seconds", "product_gflops", "scattered_seconds", "series_seconds"
]  # fmt: skip

# Small operations as torch's dispatcher counts them, views among them: for keys of a strip that are taken at once, listed ones that are
# copied first, a strip, a residue class whose keys do not lie one after the other, and a strip that joins what another class has put there.
CALLS, LISTED_CALLS, STRIP_CALLS, CLASS_CALLS, MERGE_CALLS = 17, 44, 17, 10, 13
# Passes over the output of a strip that joins what another class has put there.
MERGE_PASSES = 4
# Passes over all logits that a dense evaluation makes, in those of a softmax that stays in the caches, and its small operations: measured
# on two cores that other work used too, 12 ns a logit at a million logits a head, 35 at sixteen million.
DENSE_PASSES, DENSE_CALLS = 20, 40
# Logits held at once: 4 MiB of float32, about what two cores keep in their second-level caches with what is read beside it.
LOGITS = 1 << 20


def product_gflops(machine: Machine, rows: int, alone: bool) -> float:
    """GFLOP/s of products of strips of ``rows`` rows, one at a time (``alone``) or a batch of them; between the heights measured."""
    single = [max(rates) for rates in zip(machine.linear_gflops, machine.matmul_gflops, strict=True)]
    rates = single if alone else list(machine.batched_gflops)
    if rows <= ROWS[0]:
        return rates[0] * rows / ROWS[0]
    for (low, at_low), (high, at_high) in pairwise(zip(ROWS, rates, strict=True)):
        if rows <= high:
            return at_low + (at_high - at_low) * (rows - low) / (high - low)
    return rates[-1]


def heads_at_once(rows: int, heads: int) -> int:
    """For how many of ``heads`` heads a strip of ``rows`` rows is computed in one product. Only that depends on how many
    heads there are, and not which keys are taken at once: the digits of a row should not depend on other batch entries."""
    return min(heads, CUTTING.now.together or max(1, LOGITS // (max(rows, 1) * CUTTING.now.keys)))


def series_seconds(
    machine: Machine, series: StridedSeries, group: int, strips_of: int, head_dim: int, head_dim_v: int, mod_ns: float
) -> float:
    """Expected seconds for a series on ``strips_of`` heads, of ``group`` query heads each that share keys; ``mod_ns``: the price of
    modifying one logit."""
    rows, keys = series.height * group, series.keys
    together = heads_at_once(rows, strips_of)
    chunks = sum(-(-sum(key_tile.length for key_tile in span) // CUTTING.now.keys) for span in series.adjacent())
    jobs, alone = series.count * -(-strips_of // together), together == 1
    masked = sum(key_tile.length for key_tile in series.key_tiles if key_tile.residual is not None)
    seconds = 2 * rows * keys * (head_dim + head_dim_v) / (product_gflops(machine, rows, alone) * 1e9)
    seconds += rows * keys * (machine.softmax_ns + mod_ns) * 1e-9 + rows * masked * machine.pass_ns * 1e-9
    calls = jobs * (CALLS * chunks + STRIP_CALLS)
    return series.count * strips_of * seconds + calls * machine.call_us * 1e-6


def class_seconds(machine: Machine, rows: int, keys: int, heads: int, kv_heads: int, head_dim: int, head_dim_v: int) -> float:
    """Expected seconds to copy the ``keys`` of a residue class so that they lie one after the other, and to read its ``rows`` and write
    their results where they lie apart; beside its strips."""
    copied = (rows * heads + keys * kv_heads) * (head_dim + head_dim_v) * 8
    return copied / (machine.gather_gbs * 1e9) + CLASS_CALLS * machine.call_us * 1e-6


def merge_seconds(machine: Machine, series: StridedSeries, group: int, strips_of: int, head_dim_v: int) -> float:
    """Expected seconds to join the results of a series with what another residue class has put there."""
    rows = series.height * group
    jobs = series.count * -(-strips_of // heads_at_once(rows, strips_of))
    passed = MERGE_PASSES * series.count * rows * strips_of * head_dim_v
    return jobs * MERGE_CALLS * machine.call_us * 1e-6 + passed * machine.pass_ns * 1e-9


def scattered_seconds(
    machine: Machine, counts: torch.Tensor, block: tuple[int, int], group: int, strips_of: int, head_dim: int, head_dim_v: int,
    mod_ns: float,
) -> float:  # fmt: skip
    """Expected seconds for rows of tiles of ``block`` that list ``counts`` tiles each, on ``strips_of`` heads; keys are copied."""
    counts = counts.reshape(-1).to(torch.int64)
    rows, keys = block[0] * group, int(counts.sum()) * block[1] * strips_of
    taken = int(-(-counts // max(1, CUTTING.now.keys // block[1])).sum())
    seconds = 2 * rows * keys * (head_dim + head_dim_v) / (product_gflops(machine, rows, True) * 1e9)
    seconds += rows * keys * (machine.softmax_ns + mod_ns) * 1e-9
    calls = taken * LISTED_CALLS + int((counts > 0).sum()) * STRIP_CALLS
    seconds += calls * -(-strips_of // heads_at_once(rows, strips_of)) * machine.call_us * 1e-6
    return seconds + keys * (head_dim + head_dim_v) * 8 / (machine.gather_gbs * 1e9)


def dense_seconds(machine: Machine, logits: int, head_dim: int, head_dim_v: int) -> float:
    """Expected seconds of an attention that works out all logits, in plain operations that each pass over all of them: no more than the
    order of magnitude, as it depends on what the caches hold."""
    seconds = 2 * logits * (head_dim + head_dim_v) / (product_gflops(machine, ROWS[-2], False) * 1e9)
    return seconds + DENSE_PASSES * machine.softmax_ns * 1e-9 * logits + DENSE_CALLS * machine.call_us * 1e-6
