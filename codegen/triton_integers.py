"""How large the integers of a kernel get: which arithmetic may leave int32, and what cannot be negative."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
from sympy.core.relational import Relational

from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.tables import TableRead

__all__ = ["LONGEST", "IntegerSizes", "fits_int32"]

# Positions and lengths up to here may be int32 in a kernel; beyond, its symbols must be int64.
LONGEST = 2**24
_LOW, _HIGH = -(2**31), 2**31 - 1


def fits_int32(*values: float) -> bool:
    """Whether all these are int32 numbers."""
    return all(_LOW <= value <= _HIGH for value in values)


class IntegerSizes:
    """Ranges of integer expressions for positions up to ``LONGEST``, whatever the lengths: rows and keys beyond them count too.

    ``tables``: what integer tables are known to hold, beside their ``values_in``.

    >>> import sparsedsl as sd
    >>> sizes = IntegerSizes({})
    >>> sizes.overflow((sd.q_idx - sd.kv_idx).expr), sizes.overflow((sd.q_idx * sd.kv_idx).expr)
    (False, True)
    """

    def __init__(self, tables: Mapping[str, tuple[int, int]]) -> None:
        from sparsedsl.analysis.intervals import Intervals, TableRanges

        class Declared(TableRanges):
            def range(self, read: TableRead, indices: Any) -> Any:
                return tables.get(read.spec.name) or super().range(read, indices)

        far = 2 * LONGEST
        longest = dict.fromkeys(("q_idx", "kv_idx", "residue"), (0, far)) | dict.fromkeys(("q_len", "kv_len"), (1, far))
        groups = dict.fromkeys(("b", "h", "unit"), (0, 2**20))
        self._intervals = Intervals({**longest, **groups, "score": (-math.inf, math.inf)}, Declared({}))

    def range(self, expr: sympy.Expr) -> tuple[float, float]:
        """The least and the largest value, infinite where nothing is known."""
        low, high = self._intervals.range(expr)
        return low, high

    def nonnegative(self, expr: sympy.Expr) -> bool:
        """Whether no value is below 0."""
        return bool(self.range(expr)[0] >= 0)

    def overflow(self, expr: sympy.Basic) -> bool:
        """Whether a partial result of integer arithmetic may leave int32, in whatever order it is done."""
        match expr:
            case Relational():
                return any(side.is_Integer and not fits_int32(int(side)) for side in expr.args)
            case sympy.Add():
                reach = [self.range(term) for term in expr.args]
                return not fits_int32(sum(min(low, 0) for low, _ in reach), sum(max(high, 0) for _, high in reach))
            case sympy.Mul():
                return math.prod(self._size(factor) for factor in expr.args) > _HIGH
            case fn.Abs():  # int32 holds -2**31, but not its absolute value
                return self._size(expr.args[0]) > _HIGH
            case sympy.Pow():
                return self._size(expr.base) ** int(expr.exp) > _HIGH
            case sympy.floor() | sympy.Mod():
                parts = expr.args[0].as_numer_denom() if isinstance(expr, sympy.floor) else expr.args
                return any(part.is_Integer and not fits_int32(2 * int(part)) for part in parts)
            case strict.StrictFunction(operation="wrap"):
                low, high = self.range(expr.args[0])
                return not fits_int32(low, high + int(expr.args[1]))
            case _:
                return False

    def _size(self, expr: sympy.Expr) -> float:
        low, high = self.range(expr)
        return max(-low, high, 1)
