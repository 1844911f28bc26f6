"""Scores that rise evenly along keys, such as ALiBi under a causal mask: one addition a pair in a kernel, where the formula takes six.

A softmax does not change if a row's logits all move by the same amount. So ``score - slope * (q_idx - kv_idx)`` is the product, plus
``slope`` times the place of the key in its tile, plus a number that all pairs of a tile share, plus one that all keys of a query share:
only the first two are worked out pair by pair.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.mask_clauses import KeyBound, clauses
from sparsedsl.lang import functions as fn
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import KV_IDX, Q_IDX, SCORE
from sparsedsl.lang.tables import table_reads

__all__ = ["Ramp", "ramp_of"]


@dataclass(frozen=True)
class Ramp:
    """A logit ``gain * score + by_query * q_idx + by_key * kv_idx + fixed``; none of the four reads a position."""

    gain: sympy.Expr
    by_query: sympy.Expr
    by_key: sympy.Expr
    fixed: sympy.Expr


@functools.lru_cache(maxsize=1024)
def ramp_of(pattern: Pattern) -> Ramp | None:
    """The ramp that a pattern's scores are for all pairs that attend, or None.

    >>> import sparsedsl as sd
    >>> ramp_of(sd.attend(sd.kv_idx <= sd.q_idx, score=sd.score - 2 * abs(sd.q_idx - sd.kv_idx))).by_key
    2
    >>> ramp_of(sd.attend(sd.q_idx >= 0, score=sd.score - 0.5 * abs(sd.q_idx - sd.kv_idx))) is None
    True
    """
    expr = pattern.score.expr
    if not {SCORE, Q_IDX, KV_IDX} <= expr.free_symbols or any(read.spec.learned for read in table_reads(expr)):
        return None
    expr = sympy.expand_mul(_signed(expr, pattern.mask.expr))
    if not (expr.is_polynomial(SCORE, Q_IDX, KV_IDX)) or _reads_positions(expr):
        return None
    found = sympy.Poly(expr, SCORE, Q_IDX, KV_IDX)
    if found.total_degree() != 1:
        return None
    parts = Ramp(*(found.coeff_monomial(term) for term in (SCORE, Q_IDX, KV_IDX, sympy.Integer(1))))
    return parts if parts.gain != 0 and parts.by_query != 0 and parts.by_key != 0 else None


def _reads_positions(expr: sympy.Expr) -> bool:
    return any(read.free_symbols & {Q_IDX, KV_IDX, SCORE} for read in table_reads(expr))


def _signed(expr: sympy.Expr, mask: Boolean) -> sympy.Expr:
    """``expr`` with distances in place of their absolute values, where the mask shows no key after its query."""
    if not _looks_back(mask):
        return expr
    distance = Q_IDX - KV_IDX
    return expr.xreplace({fn.Abs(distance): distance, fn.Abs(-distance): distance})


def _looks_back(mask: Boolean) -> bool:
    """Whether a bound of every clause says that the key is not after the query."""
    found = clauses(mask)
    return bool(found) and all(any(map(_says_so, clause.bounds)) for clause in found)


def _says_so(bound: KeyBound) -> bool:
    if (bound.q_part, bound.kv_part) == (Q_IDX, -KV_IDX):
        return bound.low is not None and bool(bound.low.is_nonnegative)
    return (bound.q_part, bound.kv_part) == (-Q_IDX, KV_IDX) and bound.high is not None and bool(bound.high.is_nonpositive)
