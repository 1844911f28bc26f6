"""Ranges of numbers where conditions hold: the arms of a choice under its condition, an index under the mask that guards it.

Python integers only: nothing wraps. A range is narrowed by every relation that says something about the same form, whether the solver
of tiles can use it or not: ``0 <= pos[q_idx] - pos[kv_idx] < n`` limits that difference whatever the table holds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from sparsedsl.analysis.intervals import Intervals, Range, TableRanges
from sparsedsl.analysis.mask_clauses import Clause, clauses
from sparsedsl.lang.conditions import Fact, Facts, fact_of
from sparsedsl.lang.functions import Where
from sparsedsl.lang.tables import TableRead

__all__ = ["GuardedIntervals", "facts_of"]


class _Never(Exception):
    """The facts contradict each other: no value at all."""


@functools.lru_cache(maxsize=1024)
def facts_of(clause: Clause) -> Facts:
    """Everything a clause says about integers."""
    bounds = [Fact(bound.q_part + bound.kv_part, bound.low, bound.high) for bound in clause.bounds]
    return (*bounds, *(fact for fact in map(fact_of, clause.rest) if fact is not None))


class GuardedIntervals(Intervals):
    """:class:`Intervals` in Python integers, of values for which ``facts`` hold.

    >>> import sparsedsl as sd
    >>> known = GuardedIntervals({"kv_idx": (0, 99)}, TableRanges({}))
    >>> known.range(sd.where(sd.kv_idx < 10, sd.kv_idx, 0).expr)
    (0, 9)
    """

    def __init__(self, ranges: Mapping[str, Range], tables: TableRanges, facts: Facts = ()):
        super().__init__(ranges, tables)
        self.facts = facts
        self._plain = GuardedIntervals(ranges, tables) if facts else self

    def within(self, expr: sympy.Expr, ways: Iterable[Clause], *, unread: TableRead | None = None) -> Range | None:
        """The range of ``expr`` where one of ``ways`` holds, by facts that do not read ``unread``; None if none can hold."""
        found: list[Range] = []
        for clause in ways:
            facts = self.facts + tuple(fact for fact in facts_of(clause) if unread is None or not fact.has(unread))
            try:
                found.append(GuardedIntervals(self.ranges, self.tables, facts).range(expr) if facts else self.range(expr))
            except _Never:
                continue
        return (min(low for low, _ in found), max(high for _, high in found)) if found else None

    def _compute(self, expr: sympy.Basic) -> Range:
        low, high = self._choice(expr) if isinstance(expr, Where) else super()._compute(expr)
        if not self.facts or not isinstance(expr, sympy.Expr) or expr.is_Number or not expr.is_integer:
            return low, high
        for fact in self.facts:
            low, high = self._narrowed(expr, fact, low, high)
        if low > high:
            raise _Never
        return low, high

    def _narrowed(self, expr: sympy.Expr, fact: Fact, low: Any, high: Any) -> Range:
        applied = fact.applied(expr)
        if applied is None or not applied[0].is_Integer:
            return low, high
        ratio, rest = applied
        least, most = (None if v is None else self._plain.range(sympy.expand(ratio * v + rest)) for v in (fact.low, fact.high))
        if fact.unequal:
            assert least is not None
            if least[0] == least[1]:
                return low + (low == least[0]), high - (high == least[0])
            return low, high
        if ratio < 0:
            least, most = most, least
        return (low if least is None else max(low, least[0])), (high if most is None else min(high, most[1]))

    def _choice(self, expr: Where) -> Range:
        """Each arm where its condition can hold."""
        found = []
        for condition, value in expr.arms:
            _, ever = self.range(condition)
            arm = self.within(value, clauses(condition)) if ever else None
            found += [] if arm is None else [arm]
        if not found:
            raise _Never
        return min(low for low, _ in found), max(high for _, high in found)
