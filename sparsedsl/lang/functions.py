"""Functions of the IR that sympy lacks, or whose sympy form rewrites more than integer code may bear."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from sparsedsl.lang.conditions import at_least

__all__ = [
    "REAL_FUNCTIONS",
    "Abs",
    "BitAnd",
    "Erf",
    "Max",
    "Min",
    "Mod",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Where",
    "floor_div",
    "mod",
    "regrouped",
]


class Where(sympy.Function):
    """``Where(condition, a, b)``; like Piecewise with two arms, but never reads its condition as a set of reals."""

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


def _certainly_nonnegative(difference: sympy.Expr) -> bool:
    """Whether the facts about symbols and tables say so; deep terms are not asked, since sympy may take very long over them."""
    return _shallow(difference, 5) and bool(difference.is_extended_nonnegative)


def _shallow(expr: sympy.Basic, depth: int) -> bool:
    return not expr.args or (depth > 0 and all(_shallow(argument, depth - 1) for argument in expr.args))


class _Extreme:
    """What :class:`Min` and :class:`Max` share: nested ones are joined, and a value that another one certainly beats is dropped.

    sympy's own rules factor all their arguments, and go further each time an expression is built again.
    """

    _sign: int  # +1 if the larger value wins

    def __new__(cls, *values: sympy.Expr, **assumptions: object) -> sympy.Expr:
        kept: list[sympy.Expr] = []
        for value in cls._joined(values):
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
                yield from value.args  # type: ignore[attr-defined]
            else:
                yield sympy.sympify(value)

    @classmethod
    def _beats(cls, a: sympy.Expr, b: sympy.Expr) -> bool:
        return a == b or _certainly_nonnegative(cls._sign * (a - b))


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
