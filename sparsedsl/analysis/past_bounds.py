"""How far back a clause of a mask looks, and at which first keys: numbers that its bounds say, before anything is proved.

Input: a clause of a mask under which ``kv_idx <= q_idx``. Output: a :class:`Share`, the keys of the past that its pairs may ask for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational

from sparsedsl.analysis.mask_clauses import Clause, KeyBound, bound_of
from sparsedsl.lang import functions as fn
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead, table_reads

__all__ = ["Share", "share_of"]

# Periods of conditions on the key that are looked at; the residues of longer ones are no short list.
MAX_PERIOD = 1 << 12


@dataclass(frozen=True)
class Share:
    """Keys that cover a clause: the last ``recent`` of a query, its own included, or the ``first`` ones, or those whose remainder
    modulo ``every`` is among ``residues``. ``recent`` and ``first`` may read ``h`` and ``b``."""

    recent: sympy.Expr = sympy.S.Zero
    first: sympy.Expr = sympy.S.Zero
    every: int | None = None
    residues: tuple[int, ...] = ()


def share_of(clause: Clause) -> Share | None:
    """The smallest share that the bounds of a clause say; None: they say none.

    >>> import sparsedsl as sd
    >>> from sparsedsl.analysis.mask_clauses import clauses
    >>> share_of(clauses(((sd.q_idx // 64 - sd.kv_idx // 64 <= 2) & (sd.kv_idx <= sd.q_idx)).expr)[0]).recent
    192
    """
    found = [*clause.bounds, *(bound for part in clause.rest if (bound := bound_of(part)) is not None)]
    recents: list[sympy.Expr] = []
    firsts: list[sympy.Expr] = []
    for bound in found:
        for q_slope, kv_slope, most in _inequalities(bound):
            if q_slope > 0 and kv_slope == -q_slope:
                recents += _counts(most / q_slope)
            elif q_slope >= 0 and q_slope + kv_slope > 0:  # the query is at or after the key
                firsts += _counts(most / (q_slope + kv_slope))
    recent, first = (fn.Min(*parts) if parts else None for parts in (recents, firsts))
    if recent is not None and (first is None or not (first.is_Integer and recent.is_Integer and first < recent)):
        return Share(recent=recent)
    if first is not None:
        return Share(first=first)
    every, residues = _periodic([part for part in clause.rest if part.free_symbols == {KV_IDX} and not table_reads(part)])
    return None if every is None or len(residues) == every else Share(every=every, residues=residues)


def _counts(last: sympy.Expr) -> list[sympy.Expr]:
    """How many numbers there are from 0 to ``last``, if it is one for all positions and lengths."""
    last = sympy.expand(last)
    if last.free_symbols - {HEAD, BATCH}:
        return []
    number, rest = last.as_coeff_Add()
    if not rest.is_integer or not number.is_Rational:
        return []
    count = rest + sympy.floor(number) + 1
    return [sympy.Integer(max(0, int(count))) if count.is_Integer else count]


def _inequalities(bound: KeyBound) -> Iterator[tuple[sympy.Rational, sympy.Rational, Any]]:
    """``(a, c, most)`` with ``a * q_idx + c * kv_idx <= most`` for every pair of the bound."""
    q_line, kv_line = line(bound.q_part, Q_IDX), line(bound.kv_part, KV_IDX)
    if q_line is None or kv_line is None:
        return
    least, most = q_line[1] + kv_line[1], q_line[2] + kv_line[2]
    if bound.high is not None:
        yield q_line[0], kv_line[0], bound.high - least
    if bound.low is not None:
        yield -q_line[0], -kv_line[0], most - bound.low


def line(expr: sympy.Expr, symbol: sympy.Symbol) -> tuple[Any, Any, Any] | None:
    """``(slope, least, most)``: ``expr`` lies between ``slope * symbol + least`` and the same with ``most``; None: no line is known.

    >>> import sparsedsl as sd
    >>> line((sd.q_idx // 64 + 3).expr, Q_IDX)
    (1/64, 129/64, 3)
    """
    zero = sympy.Integer(0)
    if expr == symbol:
        return sympy.Integer(1), zero, zero
    if expr.is_Rational:
        return zero, expr, expr
    if isinstance(expr, sympy.Add):
        parts = [line(term, symbol) for term in expr.args]
        return None if None in parts else tuple(sum(ends) for ends in zip(*parts, strict=True))
    if isinstance(expr, sympy.Mul):
        number, rest = expr.as_coeff_Mul()
        inner = line(rest, symbol) if number.is_Rational and rest != expr else None
        if inner is None:
            return None
        slope, low, high = (number * end for end in inner)
        return (slope, low, high) if number > 0 else (slope, high, low)
    if isinstance(expr, (sympy.floor, sympy.ceiling)):
        inner = line(expr.args[0], symbol)
        if inner is None:
            return None
        # Of a quotient of whole numbers by n, rounding takes away at most (n - 1) / n.
        numerator, divisor = expr.args[0].as_numer_denom()
        rounded = 1 - sympy.Integer(1) / divisor if divisor.is_Integer and numerator.is_integer else sympy.Integer(1)
        slope, low, high = inner
        return (slope, low - rounded, high) if isinstance(expr, sympy.floor) else (slope, low, high + rounded)
    if isinstance(expr, sympy.Mod) and expr.args[1].is_Integer and expr.args[1] > 0:
        return zero, zero, expr.args[1] - 1
    if isinstance(expr, TableRead) and expr.spec.values_in is not None:
        low, high = expr.spec.values_in
        return zero, sympy.Integer(low), sympy.Integer(high)
    return None


def _periodic(conditions: list[Any]) -> tuple[int | None, tuple[int, ...]]:
    """Period and remainders of the keys for which conditions hold that read the key in remainders alone."""
    read, periods = [], [1]
    for condition in conditions:
        mods = [node for node in condition.atoms(sympy.Mod) if KV_IDX in node.free_symbols]
        found = [_period(node) for node in mods]
        hidden = condition.xreplace({node: sympy.Dummy(integer=True) for node in mods})
        if not isinstance(condition, Relational) or KV_IDX in hidden.free_symbols or None in found:
            continue
        read.append(condition)
        periods += [period for period in found if period is not None]
    period = math.lcm(*periods)
    if not read or period > MAX_PERIOD:
        return None, ()
    holds = evaluate(sympy.And(*read), {"kv_idx": torch.arange(period)})
    return period, tuple(holds.expand(period).nonzero().flatten().tolist())


def _period(node: sympy.Basic) -> int | None:
    """After how many keys ``inner % modulus`` is what it was."""
    inner, modulus = node.args
    slope = line(inner, KV_IDX)
    if slope is None or not modulus.is_Integer or inner.free_symbols != {KV_IDX}:
        return None
    floors = [part.args[0].as_numer_denom()[1] for part in inner.atoms(sympy.floor)]
    if not all(divisor.is_Integer for divisor in floors):
        return None
    return abs(int(modulus)) * math.lcm(1, *map(int, floors))
