"""The pattern that runs in a call: the layer's pattern, moved to the keys the cache hands out, without padding, within sequences.

Input: a pattern whose indices are cache slots, and the :class:`DerivedForm` of the call. Output: a pattern over local key indices, with
tables for what is data: ``hf_valid[b, kv]``, ``hf_sequence[b, i]``, ``hf_position[b, i]``, ``hf_start[0]``,
``hf_slot[kv]``, ``hf_stop[0]``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy

from sparsedsl.lang.expressions import Mask, Score, b, kv_idx, q_idx, table
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.tables import table_reads
from sparsedsl.models.native import left_padding

__all__ = ["PROVIDED", "DerivedForm", "derive", "moves_freely"]

_valid = table("hf_valid", dtype=bool)
_sequence = table("hf_sequence")
_position = table("hf_position", values_in=(0, 2**31 - 1))
_start = table("hf_start", values_in=(0, 2**31 - 1))
_slot = table("hf_slot", monotone=True, values_in=(0, 2**31 - 1))
_stop = table("hf_stop", values_in=(1, 2**31 - 1))

PROVIDED = frozenset({"sinks", "left_padding"})  # tables of a pattern that models.apply binds at every call


@dataclass(frozen=True)
class DerivedForm:
    """What a call has besides queries, keys and values. ``cropped``: the first key is not slot 0. ``gaps``: keys between others are
    missing, and the last ones are those of the queries."""

    padded: bool = False
    packed: bool = False
    cropped: bool = False
    gaps: bool = False


@functools.lru_cache(maxsize=1024)
def moves_freely(pattern: Pattern) -> bool:
    """Whether the pattern depends on ``q_idx - kv_idx`` only, so that moving both indices changes nothing."""
    distance = sympy.Symbol("distance", integer=True)
    fixed = {Q_IDX, KV_IDX, Q_LEN, KV_LEN}
    return not any(expr.subs(Q_IDX, KV_IDX + distance).free_symbols & fixed for expr in pattern.exprs)


def derive(pattern: Pattern, form: DerivedForm) -> Pattern:
    """The pattern that runs in calls of this form."""
    mask, score = pattern.mask, pattern.score
    if not form.padded:
        mask, score = _replace(mask, _no_left_padding(mask)), _replace(score, _no_left_padding(score))
    if form.cropped and not moves_freely(pattern):
        start = _start[0].expr
        move = {symbol: symbol + start for symbol in (Q_IDX, KV_IDX, Q_LEN, KV_LEN)}
        mask, score = _replace(mask, move), _replace(score, move)
    if form.gaps:
        place = {Q_IDX: _slot[q_idx].expr, KV_IDX: _slot[kv_idx].expr, Q_LEN: _stop[0].expr, KV_LEN: _stop[0].expr}
        mask, score = _replace(mask, place), _replace(score, place)
    if form.packed:
        if not moves_freely(pattern):
            place = {Q_IDX: _position[b, q_idx].expr, KV_IDX: _position[b, kv_idx].expr}
            mask, score = _replace(mask, place), _replace(score, place)
        mask = mask & (_sequence[b, q_idx] == _sequence[b, kv_idx])
    if form.padded:
        mask = mask & _valid[b, kv_idx]
    return Pattern(mask, score, pattern.sink, pattern.scale)


def _replace(expression: Any, values: dict[Any, Any]) -> Any:
    """The same expression with symbols or reads replaced, all at once."""
    if not values:
        return expression
    kind: type[Mask] | type[Score] = type(expression)
    return kind(expression.expr.subs(values, simultaneous=True), expression.bound)


def _no_left_padding(expression: Any) -> dict[Any, Any]:
    return {read: sympy.Integer(0) for read in table_reads(expression.expr) if read.spec == left_padding.spec}
