"""What is known of an expression as a whole: its size, what it reads, whether all of it is of the language. Worked out once for each
distinct subexpression.

sympy's own ``free_symbols``, ``has`` and ``atoms`` walk the written-out tree each time, which is exponential where a subexpression stands
in several places: ``x = sd.where(x > 3, x - 1, x)``, repeated.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import sympy
from sympy.core.numbers import Infinity, NegativeInfinity
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from sparsedsl.errors import PatternError

__all__ = ["DEEPEST", "HIGHEST", "LARGEST", "Facts", "check_extent", "facts", "sort_key"]

# sympy's part of the language. Its automatic rewriting makes more: sqrt(x**2) -> Abs(x), log(-1) -> I*pi, sin(oo) -> AccumBounds(-1, 1).
# Our own classes say `in_language`.
_OF_SYMPY = frozenset(
    {Infinity, NegativeInfinity, BooleanTrue, BooleanFalse}
    | {sympy.Add, sympy.Mul, sympy.Pow, sympy.floor, sympy.ceiling, sympy.tanh, sympy.exp, sympy.log, sympy.sin, sympy.cos}
    | {sympy.And, sympy.Or, sympy.Not, sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne}
)

# Names, numbers and operations of one expression, each counted as often as it stands in its text; and how deep they may nest.
LARGEST, DEEPEST = 10_000, 80
HIGHEST = 63  # power of an index; that of a larger number than 1 is no int64


class Facts(NamedTuple):
    """``nodes``: how many there are in the written-out expression, as sympy counts; ``depth``: how deep they nest; ``symbols`` and
    ``reads``: the symbols and table reads in it; ``foreign``: what is not of the language."""

    nodes: float
    depth: int
    symbols: frozenset[sympy.Symbol]
    reads: frozenset[Any]
    foreign: frozenset[sympy.Basic]


_NOTHING: frozenset[Any] = frozenset()


@functools.lru_cache(maxsize=1 << 15)
def facts(expr: sympy.Basic) -> Facts:
    """The facts about ``expr``.

    >>> import sparsedsl as sd
    >>> found = facts((sd.kv_idx <= sd.q_idx).expr)
    >>> found.depth, sorted(map(str, found.symbols))
    (3, ['kv_idx', 'q_idx'])
    """
    if not expr.args:
        return Facts(0.5 if expr.is_Float else 1, 0, frozenset([expr]) if expr.is_Symbol else _NOTHING, _NOTHING, _foreign(expr))
    parts = [facts(part) for part in expr.args]
    return Facts(
        1 + sum(part.nodes for part in parts),
        1 + max(part.depth for part in parts),
        _NOTHING.union(*(part.symbols for part in parts)),
        _NOTHING.union(*(part.reads for part in parts), [expr] if getattr(expr, "reads_table", False) else ()),
        _foreign(expr).union(*(part.foreign for part in parts)),
    )


def _foreign(expr: sympy.Basic) -> frozenset[sympy.Basic]:
    if isinstance(expr, sympy.Float):
        known = abs(float(expr)) < float("inf") and (float(expr) != 0 or expr.is_zero)  # a double
    elif isinstance(expr, sympy.Integer):
        known = -(2**63) <= expr.p < 2**63
    elif isinstance(expr, sympy.Rational):
        known = max(expr.p.bit_length(), expr.q.bit_length()) <= 63
    elif isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > HIGHEST:
        known = not expr.is_integer
    else:
        known = type(expr) in _OF_SYMPY or isinstance(expr, (sympy.Symbol, sympy.NumberSymbol))
    return _NOTHING if known or getattr(expr, "in_language", False) else frozenset([expr])


@functools.lru_cache(maxsize=1 << 15)
def sort_key(expr: sympy.Basic) -> Any:
    """The key by which sympy orders the operands of ``&`` and ``|``: small ones first."""
    return facts(expr).nodes, _plain(sympy.default_sort_key(expr))


def _plain(key: Any) -> Any:
    """sympy compares its own integers a hundred times slower than Python does."""
    if isinstance(key, tuple):
        return tuple(map(_plain, key))
    return int(key) if isinstance(key, sympy.Integer) else key


def check_extent(expr: sympy.Basic) -> None:
    """Refuse what no pass over expressions could finish.

    Raises:
        PatternError: more than ``LARGEST`` nodes, or more than ``DEEPEST`` levels.
    """
    found = facts(expr)
    if found.nodes > LARGEST:
        raise PatternError(
            f"the expression is too large: written out it has {int(found.nodes):,} names, numbers and operations, and the limit is "
            f"{LARGEST:,}. A part that is used twice counts twice: look repeated parts up in a table, t = sd.table('t'); t[kv_idx]"
        )
    if found.depth > DEEPEST:
        raise PatternError(
            f"the expression nests {found.depth} operations deep, and the limit is {DEEPEST}. Write a long chain of sd.where as one "
            "table: t = sd.table('t'); t[kv_idx]"
        )
