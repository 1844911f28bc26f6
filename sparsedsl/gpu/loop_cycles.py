"""Cycles that an SM needs for one turn of a kernel's loop, from the instructions in it: good for comparing kernels, not for predicting.

The units of an SM work side by side; each part is what its busiest unit needs. *Matrix* is the tensor core, or shared memory where the
operands come from there too slowly. *Rest* is everything else: issue slots, exponentials, arithmetic; on AMD the vector unit, which does
these one after the other. Memory, latency and launches are left out. A kernel lies between :attr:`Cycles.serial`, where the two parts
wait for each other, and :attr:`Cycles.overlapped`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsedsl.gpu.estimates import TENSOR_MEMORY_ROWS
from sparsedsl.gpu.machine_loops import LoopCounts, MatrixCounts
from sparsedsl.gpu.targets import Target

__all__ = ["Cycles", "cycles", "products_a_cycle"]

# Of one of an SM's parts, lanes a cycle. A100 has half the fp32 units of what came after.
_SPECIAL, _INTEGER = 4, 16
_MULTIPLY_ADD = {80: 16}
_VECTOR = 16  # of AMD's, for all but special functions
_SHARED_BYTES = 128.0  # a cycle of an SM, from shared memory
_OPERAND_BYTES = 2  # fp16 and bf16
_CLOCK = 1.7e9  # what rates are peaks of, nearly; products a cycle are a power of two


@dataclass(frozen=True)
class Cycles:
    """``matrix`` and ``rest`` of one turn, of one SM that runs one block."""

    matrix: float
    rest: float

    @property
    def serial(self) -> float:
        """One after the other: one block an SM, whose warps all wait for the same products."""
        return self.matrix + self.rest

    @property
    def overlapped(self) -> float:
        """At the same time: what is shorter is hidden behind the other."""
        return max(self.matrix, self.rest)


def products_a_cycle(target: Target) -> int:
    """Multiplications of 16-bit numbers a cycle that the matrix units of one SM do.

    >>> from sparsedsl.gpu.targets import TARGETS
    >>> [products_a_cycle(TARGETS[name]) for name in ("sm_80", "sm_90", "sm_100")]
    [1024, 2048, 4096]
    """
    return 1 << round(math.log2(target.half_tflops * 1e12 / 2 / target.sms / _CLOCK))


def cycles(counts: LoopCounts, warps: int, target: Target) -> Cycles:
    """Cycles of a turn of a block of ``warps`` warps.

    Raises:
        UnsupportedError: the machine code does not say the shape of its matrix instructions.
    """
    a_part = max(1.0, warps / target.schedulers)  # warps that share a part's units
    lanes = target.warp_size
    special = counts.special * lanes / _SPECIAL
    if target.backend == "hip":
        rest = special + (counts.integer + counts.multiply_add) * lanes / _VECTOR
    else:
        multiply_add = _MULTIPLY_ADD.get(target.arch if isinstance(target.arch, int) else 0, 32)
        slots = counts.issued - counts.matrix_issued
        rest = max(slots, special, counts.integer * lanes / _INTEGER, counts.multiply_add * lanes / multiply_add)
    return Cycles(sum(_matrix(kind, warps, target) for kind in counts.matrix), a_part * rest)


def _matrix(kind: MatrixCounts, warps: int, target: Target) -> float:
    units = kind.products(warps) / products_a_cycle(target)
    if kind.warps == 1:  # operands in registers
        return units
    rows, columns, inner = kind.shape
    if kind.warps == 0:
        units *= max(1.0, TENSOR_MEMORY_ROWS / rows)
    read = (columns + rows * kind.from_shared) * inner * _OPERAND_BYTES
    return max(units, kind.times(warps) * read / _SHARED_BYTES)
