"""What a condition says about a number: ``kv_idx <= 9`` gives every ``a*kv_idx + c`` a limit where it holds.

Input: a boolean sympy expression. Output: its :class:`Fact` s, one list for each way in which it can hold.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

__all__ = ["Fact", "Facts", "alternatives", "at_least", "fact_of"]

# Arms of nested choices that are looked into for a sign.
DEPTH = 4


@dataclass(frozen=True)
class Fact:
    """``low <= form <= high``, all integer, ``None`` is no limit; or, with ``unequal``, ``form != low``."""

    form: sympy.Expr
    low: sympy.Expr | None
    high: sympy.Expr | None
    unequal: bool = False

    def applied(self, expr: sympy.Expr) -> tuple[sympy.Rational, sympy.Expr] | None:
        """``(ratio, rest)`` with ``expr == ratio * form + rest`` and fewer terms in ``rest`` than in ``expr``; None if there is none."""
        terms, of_form = (sympy.expand(e).as_coefficients_dict() for e in (expr, self.form))
        core = next((term for term in of_form if term in terms), None)
        if core is None:
            return None
        ratio = terms[core] / of_form[core]
        rest = sympy.expand(expr - ratio * self.form)
        left = [term for term in rest.as_coefficients_dict() if term != 1]
        return (ratio, rest) if len(left) < sum(term != 1 for term in terms) else None

    def has(self, part: sympy.Basic) -> bool:
        """Whether it reads ``part``."""
        return any(side is not None and side.has(part) for side in (self.form, self.low, self.high))


Facts = tuple[Fact, ...]


@functools.lru_cache(maxsize=4096)
def fact_of(relation: Boolean) -> Fact | None:
    """What a relation between integers says, or None."""
    if not isinstance(relation, Relational):
        return None
    constant, form = sympy.expand(relation.lhs - relation.rhs).as_coeff_Add()
    if not form.is_integer or form.is_Number:
        return None
    limit = -constant
    match relation:
        case sympy.Le():
            return Fact(form, None, limit)
        case sympy.Lt():
            return Fact(form, None, limit - 1)
        case sympy.Ge():
            return Fact(form, limit, None)
        case sympy.Gt():
            return Fact(form, limit + 1, None)
        case sympy.Eq():
            return Fact(form, limit, limit)
    return Fact(form, limit, limit, unequal=True)


def alternatives(condition: Boolean) -> tuple[Facts, ...]:
    """For each of the ways in which ``condition`` can hold, facts that are true then; perhaps not all."""
    ways = condition.args if isinstance(condition, sympy.Or) else (condition,)
    return tuple(_facts(way) for way in ways)


def _facts(condition: Boolean) -> Facts:
    parts = condition.args if isinstance(condition, sympy.And) else (condition,)
    return tuple(fact for fact in map(fact_of, parts) if fact is not None)


def at_least(expr: sympy.Expr, bound: int, facts: Facts, depth: int = DEPTH) -> bool:
    """Whether an integer is known to be at least ``bound`` (0 or 1) where ``facts`` hold.

    >>> from sparsedsl.lang.symbols import KV_IDX
    >>> (positive,) = alternatives(KV_IDX >= 1)
    >>> at_least(2 * KV_IDX - 1, 1, positive), at_least(2 * KV_IDX - 1, 1, ())
    (True, False)
    """
    arms = getattr(expr, "arms", None)
    if arms is not None:
        return depth > 0 and all(
            at_least(value, bound, facts + more, depth - 1) for condition, value in arms for more in alternatives(condition)
        )
    if expr.is_positive if bound else expr.is_nonnegative:
        return True
    for fact in facts:
        applied = fact.applied(expr)
        if applied is None:
            continue
        ratio, rest = applied
        if fact.unequal:
            if bound and ratio * fact.low + rest == 0 and at_least(expr, 0, tuple(f for f in facts if f is not fact), depth):
                return True
            continue
        limit = fact.low if ratio > 0 else fact.high
        if limit is not None and rest.is_Number and ratio * limit + rest >= bound:
            return True
    return False
