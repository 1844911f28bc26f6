"""A pattern of one sequence as one of many that stand behind each other in one row, each with positions of its own.

Rows of a packed call are told by tables. *Places* are ``request * span + position``: rising numbers, so that a window, which is a
condition on a difference, stays a condition on a difference, and its keys stay intervals. *Positions* are what tables and scores read.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import sympy

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.relations import one_form
from sparsedsl.lang.symbols import BATCH, KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.tables import TableSpec, read_class, table_reads
from sparsedsl.lang.wrapped import Carried

__all__ = ["LAST_POSITION", "Packing", "packing_of"]

# Positions of a packed row end here, and so do its requests: places stay far from the end of int64.
LAST_POSITION = 1 << 31
# What a span may be at most for the sake of blocks that are not cut by the end of a request.
WIDEST = 1 << 36


@dataclass(frozen=True)
class Packing:
    """``pattern``: of a packed row. ``span``: from the place of one request to that of the next. ``names``: what tables are called in it,
    by what they hold of each row: its ``place``, ``position`` and ``request``, and the ``end`` of its request's queries and keys."""

    pattern: Pattern
    span: int
    names: tuple[tuple[str, str], ...]

    @property
    def wanted(self) -> dict[str, str]:
        """What the tables of the pattern hold -> their names."""
        return {what: name for what, name in self.names if name in self.pattern.tables}


_TABLES = {
    "q_place": True, "q_row_request": True, "kv_place": True, "q_position": False, "kv_position": False, "q_request": False,
    "q_end": False, "kv_end": False,
}  # fmt: skip


def packing_of(pattern: Pattern) -> Packing:
    """The pattern of rows of many requests, in which no query sees a key of another request.

    Raises:
        UnsupportedError: a sink that differs by batch entry: it is one of a row of a call.

    >>> import sparsedsl as sd
    >>> print(packing_of(sd.attend(sd.kv_idx <= sd.q_idx)).pattern.mask)  # doctest: +ELLIPSIS
    (q_place[q_idx] >= kv_place[kv_idx]) & (0 <= kv_place[kv_idx] - 4294967296*q_row_request[q_idx]) & ...
    """
    if pattern.sink is not None and BATCH in pattern.sink.expr.free_symbols:
        raise UnsupportedError(
            f"the sink {pattern.sink} reads b: one row holds all requests, and a sink of its own has each head only. Use "
            "backend='reference', which goes from request to request"
        )
    names = _names(pattern)
    told = _Told(names, _span(pattern.mask.expr))
    mask = sympy.And(told.same_request(), told.condition(pattern.mask.expr))
    made = dataclasses.replace(
        pattern, mask=Mask(mask, _carried(pattern.mask)), score=Score(told.value(pattern.score.expr), _carried(pattern.score)),
        causal=False,
    )  # fmt: skip
    return Packing(made, told.span, tuple(names.items()))


def _carried(part: Mask | Score) -> Carried:
    return Carried(dict(part.bound), part.heads)


def _names(pattern: Pattern) -> dict[str, str]:
    found = {}
    for what in _TABLES:
        name = what
        while name in pattern.tables:
            name += "_"
        found[what] = name
    return found


def _span(mask: sympy.Basic) -> int:
    """A multiple of all block sizes that the mask divides by, where that is not too large: a request then begins with a block, and the
    number of a block is that of its request and one within it."""
    sizes = [node.args[0].as_numer_denom()[1] for node in mask.atoms(sympy.floor)]
    blocks = math.lcm(*(int(size) for size in sizes if size.is_Integer))
    least = 2 * LAST_POSITION
    return -(-least // blocks) * blocks if blocks <= WIDEST else least


@dataclass(frozen=True)
class _Told:
    """Expressions of positions in one request, as expressions of rows of all."""

    names: dict[str, str]
    span: int

    def read(self, what: str) -> Any:
        row = KV_IDX if what.startswith("kv_p") else Q_IDX
        spec = TableSpec.declare(self.names[what], monotone=_TABLES[what])
        return read_class(spec)(row)

    def same_request(self) -> Any:
        """Places behind half of the span are those of rows that hold no key."""
        inside = self.read("kv_place") - self.span * self.read("q_row_request")
        return sympy.And(sympy.Le(0, inside), sympy.Lt(inside, LAST_POSITION))

    def condition(self, expr: Any) -> Any:
        """A condition on pairs of one request."""
        return one_form(self._told(expr, by_place=True))

    def value(self, expr: Any) -> Any:
        """A number for each pair: of small positions, which floats hold exactly."""
        return self._told(expr, by_place=False)

    def _told(self, expr: Any, *, by_place: bool) -> Any:
        reads = {read: read.func(*(self._index(index) for index in read.args)) for read in table_reads(expr)}
        return expr.xreplace({**reads, **(self._by_place if by_place else self._by_position)})

    def _index(self, index: Any) -> Any:
        """An index into a table. By places a difference of positions is one of rising numbers, whose bounds are those of the mask."""
        both = {Q_IDX, KV_IDX} <= index.free_symbols
        return self._told(index, by_place=both)

    @property
    def _by_place(self) -> dict[Any, Any]:
        first = self.span * self.read("q_row_request")
        return {**self._lengths, Q_IDX: self.read("q_place") - first, KV_IDX: self.read("kv_place") - first}

    @property
    def _by_position(self) -> dict[Any, Any]:
        return {**self._lengths, Q_IDX: self.read("q_position"), KV_IDX: self.read("kv_position")}

    @property
    def _lengths(self) -> dict[Any, Any]:
        return {BATCH: self.read("q_request"), Q_LEN: self.read("q_end"), KV_LEN: self.read("kv_end")}
