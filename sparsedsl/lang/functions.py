"""Functions of the IR that sympy lacks, or whose sympy form rewrites more than integer code may bear."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from sparsedsl.errors import PatternError
from sparsedsl.lang.conditions import at_least
from sparsedsl.lang.known_facts import HIGHEST, facts

__all__ = [
    "REAL_FUNCTIONS",
    "Abs",
    "BitAnd",
    "Erf",
    "Max",
    "Min",
    "Mod",
    "NotReal",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Where",
    "as_double",
    "floor_div",
    "in_language",
    "mod",
    "regrouped",
    "signs",
]


class Where(sympy.Function):
    """``Where(condition, a, b)``; like Piecewise with two arms, but never reads its condition as a set of reals."""

    in_language = True

    @classmethod
    def eval(cls, condition: sympy.Basic, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        """Decided conditions and equal arms fold away."""
        if isinstance(condition, BooleanTrue) or a == b:
            return a
        if isinstance(condition, BooleanFalse):
            return b
        return None

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[1].is_integer and self.args[2].is_integer else None

    @property
    def arms(self) -> tuple[tuple[Boolean, sympy.Expr], ...]:
        """The two values, each with the condition under which it is taken."""
        condition, a, b = self.args
        return (condition, a), (sympy.Not(condition), b)

    def _eval_is_nonnegative(self) -> bool | None:
        return self._known(0)

    def _eval_is_positive(self) -> bool | None:
        return self._known(1)

    def _known(self, bound: int) -> bool | None:
        """Each arm matters only where its condition holds: ``Where(n >= 1, n, 1)`` is positive."""
        if all(arm.is_integer for arm in self.args[1:]):
            return at_least(self, bound, ()) or None
        return True if all((arm.is_positive if bound else arm.is_nonnegative) for arm in self.args[1:]) else None

    def _eval_is_extended_real(self) -> bool | None:
        return True if self.args[1].is_extended_real and self.args[2].is_extended_real else None


class Abs(sympy.Function):
    """Absolute value; unlike sympy's, it never rewrites its argument beyond choosing one of ``x`` and ``-x``."""

    in_language = True

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        """Known signs fold away; of ``x`` and ``-x`` one stands for both."""
        if x.is_extended_nonnegative:
            return x
        if x.is_extended_nonpositive:
            return -x
        return cls(-x) if x.could_extract_minus_sign() and not (-x).could_extract_minus_sign() else None

    is_extended_nonnegative = True

    def _eval_is_integer(self) -> bool | None:
        return self.args[0].is_integer


class Mod(sympy.Mod):
    """``a % c`` of integers with the sign of ``c``. sympy's own rules are not used: ``Mod(-6*Mod(x, 4), 4)`` becomes ``2*Mod(x, 4)``."""

    in_language = True

    @classmethod
    def eval(cls, a: sympy.Expr, c: sympy.Expr) -> sympy.Expr | None:
        """By a constant: multiples of it are dropped, and a remainder of a remainder is one remainder."""
        if a == c:
            return sympy.Integer(0)
        if not c.is_Integer or c == 0:
            return None
        if a.is_Integer:
            return sympy.Integer(int(a) % int(c))
        if abs(c) == 1:
            return sympy.Integer(0)
        if isinstance(a, cls) and a.args[1].is_Integer:
            inner, divisor = a.args
            if divisor % c == 0:
                return cls(inner, c)
            if 0 < divisor <= c:
                return a
        parts = [part.as_coeff_Mul() for part in sympy.Add.make_args(a)]
        if not all(factor.is_Integer and rest.is_integer for factor, rest in parts):
            return None
        # A whole number is reduced, of a term only a multiple of c dropped: q_idx - kv_idx stays a difference.
        kept = [factor % c if rest == 1 else factor * rest for factor, rest in parts if factor % c != 0]
        reduced = sympy.Add(*kept)
        return None if reduced == a else cls(reduced, c)


class BitAnd(sympy.Function):
    """Bitwise and of two integers in two's complement; with ``2**n - 1`` it is a remainder, and is written as one."""

    in_language = True
    is_integer = True

    @classmethod
    def eval(cls, a: sympy.Expr, c: sympy.Expr) -> sympy.Expr | None:
        """Constants fold; ``x & (2**n - 1)`` becomes ``Mod(x, 2**n)``; the rest is put in one order."""
        if a.is_Integer and c.is_Integer:
            return sympy.Integer(int(a) & int(c))
        for x, y in ((a, c), (c, a)):
            if y.is_Integer and int(y) >= 0 and (int(y) + 1) & int(y) == 0:
                return Mod(x, y + 1)
        if a == c:
            return a
        if a.sort_key() > c.sort_key():
            return cls(c, a)
        return None

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative or self.args[1].is_nonnegative else None


class _Real(sympy.Function):
    """A real function of a score, kept as it was written."""

    in_language = True
    is_number = False  # sympy has no way to compute its digits

    @classmethod
    def eval(cls, x: sympy.Expr) -> None:
        return None

    def _eval_is_extended_real(self) -> bool | None:
        return self.args[0].is_extended_real


class Sigmoid(_Real):
    """``1 / (1 + exp(-x))``."""


class Softplus(_Real):
    """``log(1 + exp(x))``."""


class Relu(_Real):
    """``max(x, 0)``."""


class Erf(_Real):
    """The error function."""


@functools.lru_cache(maxsize=1 << 14)
def signs(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """The least and the largest value that follow from the signs of symbols, tables and operations, each on its own.

    sympy would also look for the roots of polynomials, which takes it seconds.

    >>> import sparsedsl as sd
    >>> signs((sd.q_len + 2 * sd.kv_idx - 4).expr), signs((sd.q_idx - sd.kv_idx).expr)
    ((-3, oo), (-oo, oo))
    """
    if expr.is_Number:
        return expr, expr
    low, high = -sympy.oo, sympy.oo
    if isinstance(expr, sympy.Add):
        parts = [signs(part) for part in expr.args]
        low, high = (sympy.Add(*side) for side in zip(*parts, strict=True))
        return (
            low if low.is_comparable or low.is_infinite else -sympy.oo,
            high if high.is_comparable or high.is_infinite else sympy.oo,
        )
    factor, rest = expr.as_coeff_Mul()
    if rest != expr:
        ends = [factor * end for end in signs(rest)]
        return (ends[0], ends[1]) if factor.is_positive else (ends[1], ends[0])
    if isinstance(expr, sympy.Mul):
        known = all(signs(part)[0] >= 0 for part in expr.args)
        low = sympy.Mul(*(signs(part)[0] for part in expr.args)) if known else low
    elif facts(expr).depth <= 5:  # of deep terms sympy is not asked the sign, since it may take very long over them
        if expr.is_extended_nonnegative:
            low = sympy.Integer(int(bool(expr.is_integer and expr.is_positive)))
        if expr.is_extended_nonpositive:
            high = sympy.Integer(0)
    return low, high


class _Extreme:
    """What :class:`Min` and :class:`Max` share: nested ones are joined, and a value that another one certainly beats is dropped.

    sympy's own rules factor all their arguments, and go further each time an expression is built again.
    """

    in_language = True
    args: Any  # sympy's
    _sign: int  # +1 if the larger value wins

    def __new__(cls, *values: sympy.Expr, **assumptions: object) -> sympy.Expr:
        # None of the operands of one that was built before beats another, so the longest is taken as it is.
        known = max((v for v in values if isinstance(v, cls)), key=lambda v: len(v.args), default=None)
        kept: list[sympy.Expr] = [] if known is None else list(known.args)
        for value in cls._joined(v for v in values if v is not known):
            if not any(cls._beats(other, value) for other in kept):
                kept = [other for other in kept if not cls._beats(value, other)] + [value]
        if len(kept) == 1:
            return kept[0]
        kept.sort(key=sympy.default_sort_key)
        extreme = sympy.Expr.__new__(cls, *kept)
        extreme._argset = frozenset(kept)
        return extreme

    @classmethod
    def _joined(cls, values: Iterable[Any]) -> Iterator[sympy.Expr]:
        for value in values:
            if isinstance(value, cls):
                yield from value.args
            else:
                yield sympy.sympify(value)

    @classmethod
    def _beats(cls, a: sympy.Expr, b: sympy.Expr) -> bool:
        return a == b or bool(signs(cls._sign * (a - b))[0] >= 0)


class Min(_Extreme, sympy.Min):
    """The smallest of some values."""

    _sign = -1


class Max(_Extreme, sympy.Max):
    """The largest of some values."""

    _sign = 1


# Public name -> function of one real number.
REAL_FUNCTIONS = {
    "cos": sympy.cos, "erf": Erf, "exp": sympy.exp, "log": sympy.log, "relu": Relu, "sigmoid": Sigmoid, "sin": sympy.sin,
    "softplus": Softplus, "sqrt": sympy.sqrt, "tanh": sympy.tanh,
}  # fmt: skip


class NotReal(PatternError):
    """An expression has no real value, such as ``log(-1)``."""


def in_language(expr: sympy.Basic) -> sympy.Basic:
    """``expr`` in the language's own words, where sympy's automatic rewriting has chosen others: ``sqrt(x**2)`` is its ``Abs(x)``.

    Raises:
        NotReal: there are none, since it is no real number: ``log(-1)``, ``0 * inf``.
    """
    if not facts(expr).foreign:
        return expr
    for node in sorted(facts(expr).foreign, key=lambda node: facts(node).nodes):
        if isinstance(node, sympy.Abs):
            expr = expr.replace(sympy.Abs, Abs)
        elif isinstance(node, sympy.sign):
            expr = expr.replace(sympy.sign, lambda x: Where(x > 0, sympy.S.One, Where(x < 0, sympy.S.NegativeOne, sympy.S.Zero)))
        elif isinstance(node, sympy.Integer) and any(
            _counts_with(node, relation) for relation in expr.atoms(sympy.core.relational.Relational)
        ):
            raise PatternError(
                f"{node} is no whole number of 64 bits, and stands in {str(expr)[:200]}. Tables hold -2**63 to 2**63 - 1: compare with "
                "one of these"
            )
        elif isinstance(node, sympy.Float) or (isinstance(node, sympy.Rational) and not getattr(expr, "is_integer", True)):
            expr = expr.xreplace({node: as_double(sympy.Float(node))})
    foreign = [node for node in facts(expr).foreign if not node.is_Rational]
    if any(isinstance(node, sympy.Pow) for node in foreign):
        raise PatternError(
            f"a power of an index above {HIGHEST} leaves the whole numbers of 64 bits; got one in {str(expr)[:200]}"
        )
    if foreign:
        raise NotReal(
            f"{min(map(str, foreign), key=len)} is no real number, and stands in {str(expr)[:200]}: see what goes into sqrt, log, a power, "
            "a quotient and sums of inf. Pairs are dropped by the mask, or with sd.where(condition, sd.score, float('-inf'))"
        )
    return expr


def _counts_with(number: sympy.Integer, relation: sympy.Basic) -> bool:
    """Whether a relation of whole numbers reads this number: as a float it would be equal to its neighbours."""
    return all(side.is_integer for side in relation.args) and number in relation.atoms(sympy.Integer)


def as_double(number: sympy.Float) -> sympy.Expr:
    """A number as the float that its text reads back to: sympy's exp(-1e4) is 1e-4343, which no float is."""
    value = float(number)
    return sympy.Float(value) if abs(value) != float("inf") else sympy.oo * (1 if value > 0 else -1)


def floor_div(a: sympy.Expr, c: sympy.Expr) -> sympy.Expr:
    """Integer ``a // c``, rounding towards minus infinity as Python does; nested constant divisions are joined."""
    quotient = a / c
    share, inner = quotient.as_coeff_Mul()
    if isinstance(inner, sympy.floor) and share.is_Rational and share.p == 1 and share.q > 1:
        # floor(floor(n / d) / c) == floor(n / (d * c)) for integers n and d, c > 0
        numerator, denominator = inner.args[0].as_numer_denom()
        if denominator.is_Integer and numerator.is_integer:
            return floor_div(numerator, denominator * share.q)
    return sympy.floor(quotient)


def mod(a: sympy.Expr, c: sympy.Expr) -> sympy.Expr:
    """Integer ``a % c`` with the sign of ``c``, as Python does."""
    return Mod(a, c)


def regrouped(expr: sympy.Add) -> sympy.Expr:
    """``1e9*where(m, 1, 0) - 1e9`` -> ``1e9*(where(m, 1, 0) - 1)``: a number that sympy has multiplied in, taken out again.

    The form for float arithmetic: terms that cancel exactly in the small do not when each has been rounded in the large. Gives back
    ``expr`` itself where there is nothing to take out.
    """
    groups: dict[sympy.Expr, list[tuple[sympy.Expr, sympy.Expr]]] = {}
    for term in expr.args:
        coefficient, rest = (term, sympy.Integer(1)) if term.is_Number else term.as_coeff_Mul()
        if coefficient.is_finite and coefficient not in (1, -1):
            groups.setdefault(abs(coefficient), []).append((term, rest if coefficient > 0 else -rest))
    terms = list(expr.args)
    for factor, parts in groups.items():
        if len(parts) > 1 and not all(term.is_integer for term, _ in parts):
            taken = [term for term, _ in parts]
            whole = sympy.Add(*(rest for _, rest in parts))
            terms = [t for t in terms if t not in taken] + [sympy.Mul(factor, whole, evaluate=False)]
    return sympy.Add(*terms, evaluate=False) if len(terms) < len(expr.args) else expr
