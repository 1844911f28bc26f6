"""Exact operations that a kernel cannot do as torch does them, taken out of it: torch computes them once a call, into small tables.

T5's buckets are ``floor(log(distance) * ...)`` in float32, rounding included. A kernel's logarithm is an approximation, but a bucket
depends on ``q_idx - kv_idx`` alone: a table over all differences has ``q_len + kv_len - 1`` entries, and torch itself fills it
(:mod:`sparsedsl.runtime.hoisted_tables`). Input: a pattern. Output: a pattern that reads *prepared tables* in these places,
and what these hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import sympy

from sparsedsl.analysis.mask_clauses import only_difference
from sparsedsl.codegen.triton_exact import has_text
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.strict import StrictFunction
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.tables import TableSpec, read_class, table_reads

__all__ = ["Hoisted", "HoistedTable", "hoist"]

Axis = Literal["difference", "query", "key", "call"]
_INDEX = {
    "difference": Q_IDX - KV_IDX + KV_LEN - 1,
    "query": Q_IDX,
    "key": KV_IDX,
    "call": sympy.Integer(0),
}


@dataclass(frozen=True)
class HoistedTable:
    """One prepared table: ``expr`` at every place of ``axis``.

    ``axis``: ``"difference"``: entry ``i`` belongs to ``q_idx - kv_idx == i - (kv_len - 1)``, up to ``q_len - 1``; ``"query"``,
    ``"key"``: to position ``i``; ``"call"``: one entry. ``dtype``: the kind, ``"int"``, ``"bool"`` or ``"float"``. ``double``: real
    arithmetic is float64, as in all masks, not float32.
    """

    name: str
    expr: sympy.Basic
    axis: Axis
    dtype: str
    double: bool

    @property
    def reads(self) -> frozenset[str]:
        """The tables of the call that it is made of: it is filled again when one of them changes."""
        return frozenset(read.spec.name for read in table_reads(self.expr))


@dataclass(frozen=True)
class Hoisted:
    """``pattern`` reads the ``prepared`` tables by their names, beside those of the original."""

    pattern: Pattern
    prepared: tuple[HoistedTable, ...]


def hoist(pattern: Pattern) -> Hoisted:
    """Replace what kernels cannot compute exactly, wherever it depends on one of the axes alone, by reads of prepared tables.

    What depends on queries and keys in another way, on batch entry or head, or on a learned table stays, and its parts are looked at.

    >>> import sparsedsl as sd
    >>> near = sd.parse("f32_to_int64(f32_mul(f32_log(q_idx - kv_idx + 1), 3.5)) < 7")
    >>> found = hoist(sd.attend(near))
    >>> print(found.pattern.mask, "|", found.prepared[0].expr)
    exact_difference[q_idx + kv_len - kv_idx - 1] | f32_to_int64(f32_mul(f32_log(-kv_idx + q_idx + 1), 3.5)) <= 6
    """
    # Stages: find the places -> one table each -> reads of them in their stead
    places: dict[tuple[sympy.Basic, bool], HoistedTable] = {}
    taken = set(pattern.tables)
    for whole, double in ((pattern.mask.expr, True), (pattern.score.expr, False)):
        for expr, axis in dict(_places(whole)).items():
            name = _free_name(f"exact_{axis}", taken)
            taken.add(name)
            places[expr, double] = HoistedTable(name, expr, axis, _kind(expr), double)
    if not places:
        return Hoisted(pattern, ())

    def rewritten(expr: sympy.Basic, double: bool) -> sympy.Basic:
        return expr.xreplace({place: _read(p) for (place, where), p in places.items() if where == double})

    mask = Mask(rewritten(pattern.mask.expr, True), pattern.mask.bound)
    score = Score(rewritten(pattern.score.expr, False), pattern.score.bound)
    return Hoisted(replace(pattern, mask=mask, score=score), tuple(places.values()))


def _free_name(stem: str, taken: set[str]) -> str:
    return next(name for name in (stem, *(f"{stem}_{i}" for i in range(1, len(taken) + 2))) if name not in taken)


def _kind(expr: sympy.Basic) -> str:
    if not isinstance(expr, sympy.Expr):
        return "bool"
    return "int" if expr.is_integer else "float"


def _read(prepared: HoistedTable) -> sympy.Basic:
    read = read_class(TableSpec(prepared.name, prepared.dtype))(_INDEX[prepared.axis])
    return sympy.Ne(read, 0) if prepared.dtype == "bool" else read


def _places(expr: sympy.Basic) -> Iterator[tuple[sympy.Basic, Axis]]:
    """The largest subexpressions with an operation that has no text, and with an axis."""
    if not any(not has_text(node) for node in expr.atoms(StrictFunction)):
        return
    axis = _axis(expr)
    connective = isinstance(expr, (sympy.And, sympy.Or, sympy.Not, sympy.Xor))
    if axis is not None and not connective:
        yield expr, axis
        return
    yield from itertools.chain.from_iterable(_places(argument) for argument in expr.args)


def _axis(expr: sympy.Basic) -> Axis | None:
    if any(read.spec.learned for read in table_reads(expr)):
        return None
    axes: dict[frozenset[sympy.Symbol], Axis] = {
        frozenset(): "call", frozenset({Q_IDX}): "query", frozenset({KV_IDX}): "key", frozenset({Q_IDX, KV_IDX}): "difference",
    }  # fmt: skip
    axis = axes.get(frozenset(expr.free_symbols - {Q_LEN, KV_LEN}))
    return axis if axis != "difference" or only_difference(expr) else None
