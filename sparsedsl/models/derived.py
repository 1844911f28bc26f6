"""The pattern that runs in a call: the layer's pattern, its indices moved to the keys that the cache hands out, without padding.

Input: a pattern whose indices count the real tokens of a row, or cache slots, and the :class:`DerivedForm` of the call. Output: a pattern
over local key indices, with tables for what is data; ``MaskRequest.tables`` makes them.

Real tokens that are neighbours, wherever padding stands, lie a shift away from their slots, which keeps tile lists in closed form; a
pattern that reads differences of indices only needs none. With padding between them, and in packed rows, a table says which is which.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, replace
from typing import Any

import sympy
from sympy.core.relational import Relational

from sparsedsl.lang.expressions import Mask, Score, b, kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.table_reads import table
from sparsedsl.lang.tables import table_reads
from sparsedsl.models.native import left_padding
from sparsedsl.program.branches import Attend
from sparsedsl.program.graph import Program
from sparsedsl.program.rebuilding import rebuilt

__all__ = ["PROVIDED", "DerivedForm", "derive", "derived_program", "moves_freely"]

_COUNT = (0, 2**31 - 1)
_valid = table("hf_valid", dtype=bool)
_first = table("hf_first", values_in=(-(2**31), 2**31 - 1))
_end = table("hf_end", values_in=(-(2**31), 2**31 - 1))
_place = table("hf_place", monotone=True, values_in=_COUNT)
_sequence = table("hf_sequence")
_position = table("hf_position", values_in=_COUNT)
_index = table("hf_index", values_in=_COUNT)
_length = table("hf_length", values_in=_COUNT)
_start = table("hf_start", values_in=_COUNT)
_slot = table("hf_slot", monotone=True, values_in=_COUNT)
_stop = table("hf_stop", values_in=_COUNT)

PROVIDED = frozenset({"sinks", "left_padding"})  # tables of a pattern that models.apply binds at every call


@dataclass(frozen=True)
class DerivedForm:
    """What a call has besides queries, keys and values. ``padded``: some slots hold no token; ``holes``: also between tokens of a row.
    ``cropped``: the first key is not slot 0. ``gaps``: keys between others are missing, and the last ones are those of the queries.
    ``slots``: the pattern's indices are cache slots, in packed rows the positions given."""

    padded: bool = False
    holes: bool = False
    packed: bool = False
    cropped: bool = False
    gaps: bool = False
    slots: bool = False


@functools.lru_cache(maxsize=1024)
def moves_freely(pattern: Pattern) -> bool:
    """Whether the pattern depends on ``q_idx - kv_idx`` only, so that moving both indices changes nothing."""
    distance = sympy.Symbol("distance", integer=True)
    fixed = {Q_IDX, KV_IDX, Q_LEN, KV_LEN}
    return not any(expr.subs(Q_IDX, KV_IDX + distance).free_symbols & fixed for expr in pattern.exprs)


def derive(pattern: Pattern, form: DerivedForm) -> Pattern:
    """The pattern that runs in calls of this form."""
    mask, score = pattern.mask, pattern.score
    if not (form.padded and form.slots):
        mask, score = _replace(mask, _no_left_padding(mask)), _replace(score, _no_left_padding(score))
    free = moves_freely(replace(pattern, mask=mask, score=score, causal=False))
    by_place = form.holes and not form.slots
    if form.gaps or by_place or not free:
        move = _moves(form)
        mask, score = _replace(mask, move, keep=_orders(mask.expr)), _replace(score, move)
    if form.packed:
        mask = mask & (_sequence[b, q_idx] == _sequence[b, kv_idx])
    if form.padded:
        mask = mask & _is_real(kv_idx, form)
        if not (form.slots or by_place) and (_looks_up(mask) or _looks_up(score)):
            mask = mask & _is_real(q_idx, form)  # padding would look tables up where no token stands
    return replace(pattern, mask=mask, score=score, causal=False)


def _moves(form: DerivedForm) -> dict[Any, Any]:
    """What the four indices and lengths of the pattern are in local indices."""
    if form.packed:
        place = _position if form.slots else _index
        move = {Q_IDX: place[b, q_idx].expr, KV_IDX: place[b, kv_idx].expr}
        return move if form.slots else {**move, Q_LEN: _length[b, q_idx].expr, KV_LEN: _length[b, kv_idx].expr}
    if form.padded and not form.slots:
        first, tokens = _first[b].expr, (_end[b] - _first[b]).expr
        if form.holes:
            return {Q_IDX: _place[b, q_idx].expr, KV_IDX: _place[b, kv_idx].expr, Q_LEN: tokens, KV_LEN: tokens}
        return {Q_IDX: Q_IDX - first, KV_IDX: KV_IDX - first, Q_LEN: tokens, KV_LEN: tokens}
    if form.gaps:
        return {Q_IDX: _slot[q_idx].expr, KV_IDX: _slot[kv_idx].expr, Q_LEN: _stop[0].expr, KV_LEN: _stop[0].expr}
    start = _start[0].expr
    return {symbol: symbol + start for symbol in (Q_IDX, KV_IDX, Q_LEN, KV_LEN)} if form.cropped else {}


def _is_real(index: Any, form: DerivedForm) -> Mask:
    return _valid[b, index] if form.holes else (index >= _first[b]) & (index < _end[b])


def _looks_up(expression: Any) -> bool:
    """Whether it reads a table by where a token stands."""
    return any(read.free_symbols & {Q_IDX, KV_IDX} for read in table_reads(expression.expr))


def _orders(expr: Any) -> set[Any]:
    """Comparisons that ask which of the two tokens comes first: slots tell as well as places, and in closed form."""

    def asks_the_order(atom: Any) -> bool:
        difference = atom.lhs - atom.rhs
        for sign in (1, -1):
            constant = difference - sign * (Q_IDX - KV_IDX)
            if constant.is_Integer:
                near, far = ([bool(atom.func(sign * d + constant, 0)) for d in (-k, k)] for k in (1, 2**40))
                return near == far
        return False

    return {atom for atom in expr.atoms(Relational) if asks_the_order(atom)}


def _replace(expression: Any, values: dict[Any, Any], keep: set[Any] = frozenset()) -> Any:  # type: ignore[assignment]
    """The same expression with symbols or reads replaced, all at once, but in the parts to keep."""
    if not values:
        return expression
    kind: type[Mask] | type[Score] = type(expression)
    kept = {part: sympy.Dummy() for part in keep}
    replaced = expression.expr.xreplace(kept).subs(values, simultaneous=True)
    return kind(replaced.xreplace({dummy: part for part, dummy in kept.items()}), expression.bound)


def _no_left_padding(expression: Any) -> dict[Any, Any]:
    return {read: sympy.Integer(0) for read in table_reads(expression.expr) if read.spec == left_padding.spec}


def derived_program(program: Program, form: DerivedForm) -> Program:
    """A program of attentions alone as it runs in calls of this form, each as its pattern would."""
    return rebuilt(
        program, lambda node: dataclasses.replace(node, pattern=derive(node.pattern, form)) if isinstance(node, Attend) else node
    )
