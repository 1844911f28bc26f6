"""Along which axis the gradients of a learned table are summed, for each of its reads in a score."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from sparsedsl.analysis.mask_clauses import only_difference
from sparsedsl.codegen.rolling import UNIT, rolled, sums_in
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead, table_reads

__all__ = ["LearnedRead", "axis_of", "learned_reads", "rolled_reads", "rolled_score"]


@dataclass(frozen=True)
class LearnedRead:
    """One read of a learned table in the score, and along which axis its gradients are summed.

    ``axis``: "rows" (the index reads no key: summed over keys in the pass over queries), "columns" (it reads no query: summed over queries
    in the pass over keys), "difference" (it reads ``q_idx - kv_idx``: summed along diagonals), "pairs" (any other: not summed at all).
    ``units``: of a read by the running index of a sum, the first and how many: each has gradients of its own.
    """

    number: int
    read: TableRead
    axis: str
    units: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """What its gradients are called in the code."""
        return f"grad_{self.read.spec.name}_{self.number}"

    @property
    def first(self) -> int:
        """The first unit."""
        return 0 if self.units is None else self.units[0]

    @property
    def width(self) -> int:
        """How many gradients a row has room for: one for each unit, up to a power of two."""
        return 1 if self.units is None else 1 << (self.units[1] - 1).bit_length()

    def by_unit(self) -> list[TableRead]:
        """The reads of all units, in order."""
        if self.units is None:
            return [self.read]
        first, count = self.units
        return [self.read.xreplace({UNIT: sympy.Integer(first + n)}) for n in range(count)]


@functools.lru_cache(maxsize=1024)
def rolled_score(pattern: Pattern) -> sympy.Expr:
    """The score, with long sums over entries of tables as loops."""
    return rolled(pattern.score.expr, _summed_on_the_way)


def _summed_on_the_way(read: TableRead) -> bool:
    return not read.spec.learned or axis_of(read) in ("rows", "columns")


@functools.lru_cache(maxsize=1024)
def rolled_reads(pattern: Pattern) -> tuple[LearnedRead, ...]:
    """The reads of learned tables in :func:`rolled_score`, each once; a read by the running index of a sum is one.

    >>> import sparsedsl as sd
    >>> reads = rolled_reads(sd.attend(sd.kv_idx <= sd.q_idx, sd.patterns.fire(32)))
    >>> [(one.name, one.units) for one in reads if one.units]
    [('grad_fire_hidden_1', (0, 32)), ('grad_fire_hidden_bias_2', (0, 32)), ('grad_fire_out_4', (0, 32))]
    """
    score = rolled_score(pattern)
    units = {read: one.units for one in sums_in(score) for read in table_reads(one) if UNIT in facts(read).symbols}
    return _learned(score, units)


def _learned(score: sympy.Expr, units: Mapping[TableRead, tuple[int, int]]) -> tuple[LearnedRead, ...]:
    reads = sorted((read for read in table_reads(score) if read.spec.learned), key=str)
    return tuple(LearnedRead(n, read, axis_of(read), units.get(read)) for n, read in enumerate(reads))


@functools.lru_cache(maxsize=1024)
def learned_reads(pattern: Pattern) -> tuple[LearnedRead, ...]:
    """The reads of learned tables in the score, each once."""
    return _learned(pattern.score.expr, {})


def axis_of(read: TableRead) -> str:
    """Along which axis the gradients of a read are summed; see :class:`LearnedRead`."""
    free = read.free_symbols
    if KV_IDX not in free:
        return "rows"
    if Q_IDX not in free:
        return "columns"
    return "difference" if all(only_difference(index) for index in read.args) else "pairs"
