"""A mask as a union of clauses; a clause is a conjunction of two-sided bounds on separable forms, plus what is not separable.

Input: a boolean sympy expression. Output: :class:`Clause` objects, whose ``bounds`` read ``low <= q_part + kv_part <= high`` with
``q_part`` free of ``kv_idx`` and ``kv_part`` free of ``q_idx``. Bounds on the same form are intersected here, so that
``0 <= q_idx - kv_idx < w`` is one bound and is exact at the corners of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from sparsedsl.lang import functions as fn
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead

__all__ = ["Clause", "KeyBound", "bound_of", "clauses", "literals", "monotone", "only_difference"]

# Distributing & over | multiplies clauses; beyond this many an alternative stays whole and is decided tile by tile.
MAX_CLAUSES = 32


@dataclass(frozen=True)
class KeyBound:
    """``low <= q_part + kv_part <= high``; ``None`` is no bound. ``low`` and ``high`` do not read positions."""

    q_part: sympy.Expr
    kv_part: sympy.Expr
    low: sympy.Expr | None
    high: sympy.Expr | None

    @property
    def couples(self) -> bool:
        """Whether it relates queries to keys."""
        return self.q_part != 0 and self.kv_part != 0

    @property
    def same_function(self) -> bool:
        """Whether the form is ``f(q_idx) - f(kv_idx)``, zero on the diagonal."""
        return sympy.expand(self.q_part.xreplace({Q_IDX: KV_IDX}) + self.kv_part) == 0

    @property
    def exact(self) -> bool:
        """Whether ``kv_part`` within the limits that the extremes of ``q_part`` over a tile leave means that some query fits."""
        if self.low is None or self.high is None or _gapless(self.q_part):
            return True
        # Equal values of one monotone function: the nearest query of the tile has the value if any has.
        return self.low == 0 and self.high == 0 and self.same_function

    @property
    def holds_on_diagonal(self) -> bool:
        """Whether every pair ``q_idx == kv_idx`` satisfies the bound (given that it can be satisfied, ``low <= high``)."""
        if not self.same_function:
            return False
        below = self.low is None or self.low.is_nonpositive or self.high == 0
        above = self.high is None or self.high.is_nonnegative or self.low == 0
        return bool(below and above)


@dataclass(frozen=True)
class Clause:
    """``bounds`` and ``rest`` all hold. ``rest`` are conditions the interval solver cannot use."""

    bounds: tuple[KeyBound, ...]
    rest: tuple[Boolean, ...]

    @functools.cached_property
    def tight(self) -> bool:
        """Whether every key in the solved outer interval of a query tile is allowed for some query of the tile.

        For one key, each bound allows an interval of queries. The solver intersects each with the tile; intervals that meet
        pairwise have a common point (Helly), so it remains that the bounds meet each other: there is one, or all hold at
        ``q_idx == kv_idx``.
        """
        coupled = [bound for bound in self.bounds if bound.couples]
        if self.rest or not all(bound.exact for bound in coupled):
            return False
        return len(coupled) <= 1 or all(bound.holds_on_diagonal for bound in coupled)


@functools.lru_cache(maxsize=4096)
def monotone(expr: sympy.Expr, symbol: sympy.Symbol) -> int | None:
    """+1 if ``expr`` never falls as ``symbol`` grows, -1 if it never rises, 0 if it does not depend on it, None if unknown."""
    if symbol not in facts(expr).symbols:
        return 0
    if expr == symbol:
        return 1
    if isinstance(expr, (sympy.Add, sympy.Min, sympy.Max)):
        signs = {monotone(term, symbol) for term in expr.args} - {0}
        return signs.pop() if len(signs) == 1 else None
    if isinstance(expr, sympy.Mul):
        fixed = sympy.Mul(*(f for f in expr.args if symbol not in facts(f).symbols))
        moving = [f for f in expr.args if symbol in facts(f).symbols]
        sign = 1 if fixed.is_nonnegative else -1 if fixed.is_nonpositive else None
        inner = monotone(moving[0], symbol) if len(moving) == 1 else None
        return sign * inner if sign is not None and inner is not None else None
    if isinstance(expr, (sympy.floor, sympy.ceiling)):
        return monotone(expr.args[0], symbol)
    if isinstance(expr, TableRead) and expr.spec.monotone:
        *others, last = expr.args
        return monotone(last, symbol) if all(symbol not in facts(i).symbols for i in others) else None
    return None


def _gapless(expr: sympy.Expr) -> bool:
    """Whether a query range makes ``expr`` take every integer between its extremes."""
    if monotone(expr, Q_IDX) is None:
        return False
    moving = sympy.Add(*(t for t in sympy.Add.make_args(expr) if Q_IDX in facts(t).symbols))
    if moving in (Q_IDX, -Q_IDX):
        return True
    moving = -moving if moving.could_extract_minus_sign() else moving
    if not isinstance(moving, sympy.floor):
        return False
    numerator, denominator = moving.args[0].as_numer_denom()
    return denominator.is_Integer and numerator.coeff(Q_IDX) == 1 and Q_IDX not in facts(numerator - Q_IDX).symbols


@functools.lru_cache(maxsize=1024)
def only_difference(expr: sympy.Basic) -> bool:
    """Whether ``expr`` depends on positions only through ``q_idx - kv_idx``: then tiles on one diagonal are alike."""
    delta = sympy.Dummy("delta", integer=True)
    moved = expr.xreplace({Q_IDX: KV_IDX + delta})
    if KV_IDX not in facts(moved).symbols:
        return True
    moved = moved.replace(lambda node: isinstance(node, sympy.Add), lambda node: sympy.expand(node))
    return KV_IDX not in facts(moved).symbols


def literals(expr: Boolean) -> list[Boolean]:
    """The distinct relations ``expr`` is built of."""
    return sorted(expr.atoms(Relational), key=sympy.default_sort_key)


@functools.lru_cache(maxsize=1024)
def clauses(expr: Boolean) -> tuple[Clause, ...]:
    """The union of clauses equal to ``expr``; the empty union is the mask that allows nothing."""
    found = (_clause(conjunction) for conjunction in _dnf(expr, False))
    return tuple(dict.fromkeys(c for c in found if c is not None))


def _dnf(expr: Boolean, negate: bool) -> list[tuple[Boolean, ...]]:
    """Union of conjunctions of relations (and of wholes too large to distribute)."""
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return [()] if isinstance(expr, BooleanTrue) != negate else []
    if isinstance(expr, sympy.Not):
        return _dnf(expr.args[0], not negate)
    if isinstance(expr, sympy.Xor):
        first, *others = expr.args
        second = sympy.Xor(*others)
        return _dnf(sympy.Or(sympy.And(first, sympy.Not(second)), sympy.And(sympy.Not(first), second)), negate)
    if isinstance(expr, (sympy.And, sympy.Or)):
        parts = [_dnf(part, negate) for part in expr.args]
        if isinstance(expr, sympy.Or) != negate:
            union = [conjunction for part in parts for conjunction in part]
            return union if len(union) <= MAX_CLAUSES else [(sympy.Not(expr) if negate else expr,)]
        product: list[tuple[Boolean, ...]] = [()]
        for part, whole in sorted(zip(parts, expr.args, strict=True), key=lambda pair: len(pair[0])):
            if len(product) * len(part) > MAX_CLAUSES:
                part = [(sympy.Not(whole) if negate else whole,)]
            product = [left + right for left in product for right in part]
        return product
    relation = sympy.Not(expr) if negate else expr
    if not isinstance(relation, Relational):
        return (
            [(relation,)] if not isinstance(relation, (sympy.And, sympy.Or, BooleanTrue, BooleanFalse)) else _dnf(relation, False)
        )
    split = _split(relation)
    return [(relation,)] if split is None else _dnf(split, False)


def _split(relation: Relational) -> Boolean | None:
    """A relation rewritten without Min, Max, Abs and Where at linear places, and ``!=`` as two inequalities where both can be solved."""
    difference = relation.lhs - relation.rhs
    if not difference.is_integer:
        return None
    node = next((t for t in sympy.Add.make_args(difference) for t in [t.as_coeff_Mul()[1]] if _branches(t)), None)
    if isinstance(relation, sympy.Ne):
        bound = bound_of(sympy.Eq(difference, 0, evaluate=False)) if node is None else None
        solvable = bound is not None and None not in (monotone(bound.q_part, Q_IDX), monotone(bound.kv_part, KV_IDX))
        is_bool = isinstance(relation.lhs, TableRead) and relation.lhs.spec.dtype == "bool"
        if node is None and (not solvable or is_bool):
            return None
        return sympy.Or(sympy.Le(difference, -1), sympy.Ge(difference, 1))
    if node is None:
        return None
    if isinstance(relation, sympy.Eq):
        return sympy.And(sympy.Le(difference, 0), sympy.Ge(difference, 0))
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        difference, strict = -difference, isinstance(relation, sympy.Gt)
    else:
        strict = isinstance(relation, sympy.Lt)

    parts = (term.as_coeff_Mul() for term in sympy.Add.make_args(difference))
    factor = next(number for number, core in parts if core == node)
    # The node may stand elsewhere in the difference too, inside another function or a product: there it stays.
    rest = difference - factor * node

    def below(value: sympy.Expr) -> Boolean:
        replaced = rest + factor * value
        return sympy.Lt(replaced, 0) if strict else sympy.Le(replaced, 0)

    if isinstance(node, fn.Where):
        condition, a, b = node.args
        return sympy.Or(sympy.And(condition, below(a)), sympy.And(sympy.Not(condition), below(b)))
    alternatives = (node.args[0], -node.args[0]) if isinstance(node, fn.Abs) else node.args
    largest = not isinstance(node, sympy.Min)
    rising = factor > 0
    return (sympy.And if largest == rising else sympy.Or)(*(below(a) for a in alternatives))


def _branches(node: sympy.Basic) -> bool:
    return isinstance(node, (sympy.Min, sympy.Max, fn.Abs, fn.Where))


def bound_of(relation: Boolean) -> KeyBound | None:
    """``relation`` as a bound on a separable integer form, or None."""
    if not isinstance(relation, Relational) or isinstance(relation, sympy.Ne):
        return None
    difference = sympy.expand(relation.lhs - relation.rhs)
    if not difference.is_integer:
        return None
    q_part = kv_part = fixed = sympy.Integer(0)
    for term in sympy.Add.make_args(difference):
        reads_q, reads_kv = Q_IDX in facts(term).symbols, KV_IDX in facts(term).symbols
        if reads_q and reads_kv:
            return None
        if reads_q:
            q_part += term
        elif reads_kv:
            kv_part += term
        else:
            fixed += term
    if q_part == 0 and kv_part == 0:
        return None
    low: sympy.Expr | None = -fixed
    high: sympy.Expr | None = -fixed
    if isinstance(relation, (sympy.Le, sympy.Lt)):
        low, high = None, -fixed - int(isinstance(relation, sympy.Lt))
    elif isinstance(relation, (sympy.Ge, sympy.Gt)):
        low, high = -fixed + int(isinstance(relation, sympy.Gt)), None
    lead = kv_part if q_part == 0 else q_part
    if lead.could_extract_minus_sign():
        q_part, kv_part = -q_part, -kv_part
        low, high = (None if high is None else -high), (None if low is None else -low)
    content = sympy.gcd_list([t.as_coeff_Mul()[0] for t in sympy.Add.make_args(q_part + kv_part)])
    if content.is_Integer and content > 1 and (q_part / content).is_integer and (kv_part / content).is_integer:
        q_part, kv_part = sympy.expand(q_part / content), sympy.expand(kv_part / content)
        low = None if low is None else sympy.ceiling(low / content)
        high = None if high is None else sympy.floor(high / content)
    return KeyBound(q_part, kv_part, low, high)


def _tightest(values: Iterable[sympy.Expr | None], choose: type) -> sympy.Expr | None:
    known = [v for v in values if v is not None]
    return choose(*known) if known else None


def _clause(conjunction: tuple[Boolean, ...]) -> Clause | None:
    """Sort a conjunction into merged bounds and the rest; None if two bounds contradict each other."""
    grouped: dict[tuple[sympy.Expr, sympy.Expr], list[KeyBound]] = {}
    rest: list[Boolean] = []
    for relation in dict.fromkeys(conjunction):
        bound = bound_of(relation)
        if bound is None or monotone(bound.kv_part, KV_IDX) is None or monotone(bound.q_part, Q_IDX) is None:
            rest.append(relation)
        else:
            grouped.setdefault((bound.q_part, bound.kv_part), []).append(bound)
    merged = []
    for (q_part, kv_part), bounds in grouped.items():
        low = _tightest((bound.low for bound in bounds), fn.Max)
        high = _tightest((bound.high for bound in bounds), fn.Min)
        if low is not None and high is not None and (high - low).is_negative:
            return None
        merged.append(KeyBound(q_part, kv_part, low, high))
    return Clause(tuple(merged), tuple(rest))
