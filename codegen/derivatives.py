"""The derivative of a score expression, as an expression again, with torch's conventions where a function has a corner.

Results name the subexpressions of what they were made from (``tanh(x)`` stands in its own derivative), so that a printer that shares
what is used twice computes these once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import sympy
from sympy.core.relational import Relational

from sparsedsl.codegen.rolling import UNIT, Rolled
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.symbols import SCORE
from sparsedsl.lang.tables import TableRead

__all__ = ["derivative"]

ZERO, SOFTMAX1 = sympy.S.Zero, sympy.S.One
Rule = Callable[["_Derivative", sympy.Expr], sympy.Expr]


def derivative(expr: sympy.Expr, by: sympy.Expr = SCORE) -> sympy.Expr:
    """The derivative of ``expr`` by ``by``, the symbol ``score`` or one read of a learned table.

    Ties of minimum and maximum give half of the gradient to each side; ``abs`` and ``relu`` have slope 0 at 0; conditions, rounding
    and indices have none. The arm of a ``where`` that is not taken has no part in the value, however infinite it is.

    Raises:
        UnsupportedError: an exact float operation without a rule depends on ``by``.

    >>> import sparsedsl as sd
    >>> from sparsedsl.lang.printing import expression_text
    >>> print(expression_text(derivative((sd.tanh(sd.score / 30) * 30).expr)))
    -tanh(score / 30)**2 + 1
    """
    return _Derivative(by).of(expr)


class _Derivative:
    """One differentiation; what comes up twice is done once."""

    def __init__(self, by: sympy.Expr) -> None:
        self.by = by
        self.known: dict[sympy.Basic, sympy.Expr] = {by: SOFTMAX1}

    def of(self, expr: sympy.Expr) -> sympy.Expr:
        if expr not in self.known:
            self.known[expr] = self._compute(expr) if expr.has(self.by) else ZERO
        return self.known[expr]

    def _compute(self, expr: sympy.Expr) -> sympy.Expr:
        if isinstance(expr, strict.StrictFunction):
            return self._exact(expr)
        for kind in type(expr).__mro__:
            if kind in _RULES:
                return _RULES[kind](self, expr)
        raise UnsupportedError(f"no rule for the derivative of {type(expr).__name__} in {expr}")

    def _exact(self, expr: strict.StrictFunction) -> sympy.Expr:
        rule = _EXACT.get(expr.operation)
        if rule is None:
            raise UnsupportedError(
                f"generated Triton kernels have no derivative of {type(expr).__name__}(...), which depends on {self.by}; "
                "use backend='flex' or backend='tiled'"
            )
        return rule(self, expr)


def _times(factor: sympy.Expr, slope: sympy.Expr) -> sympy.Expr:
    """The product; an arm that is not taken stays out of it, so that 0 times infinity does not come up."""
    if slope == 0 or factor == 1:
        return slope
    if isinstance(slope, fn.Where):
        condition, a, b = slope.args
        return fn.Where(condition, _times(factor, a), _times(factor, b))
    return factor * slope


def _add(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    return sympy.Add(*(self.of(term) for term in expr.args))


def _mul(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    terms = []
    for i, factor in enumerate(expr.args):
        others = sympy.Mul(*expr.args[:i], *expr.args[i + 1 :])
        terms.append(_times(others, self.of(factor)))
    return sympy.Add(*terms)


def _pow(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    base, power = expr.args
    if power == sympy.Rational(1, 2):
        return _times(1 / (2 * expr), self.of(base))
    by_base = _times(power * base ** (power - 1), self.of(base))
    if self.of(power) == 0:
        return by_base
    log = sympy.Float(math.log(base)) if base.is_Number else sympy.log(base)
    by_power = _times(expr * log, self.of(power))
    # torch: 0**y has slope 0 for y >= 0, where the logarithm has none
    return by_base + (by_power if base.is_Number else fn.Where(sympy.Eq(expr, 0, evaluate=False), ZERO, by_power))


def _smaller(self: _Derivative, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return _chosen(sympy.Lt(a, b, evaluate=False), a, b, self.of(a), self.of(b))


def _larger(self: _Derivative, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return _chosen(sympy.Gt(a, b, evaluate=False), a, b, self.of(a), self.of(b))


def _chosen(first: sympy.Basic, a: sympy.Expr, b: sympy.Expr, slope_a: sympy.Expr, slope_b: sympy.Expr) -> sympy.Expr:
    tie = sympy.Eq(a, b, evaluate=False)
    half = sympy.Rational(1, 2)
    return fn.Where(first, slope_a, fn.Where(tie, _times(half, slope_a) + _times(half, slope_b), slope_b))


def _reduced(pair: Callable[[_Derivative, sympy.Expr, sympy.Expr], sympy.Expr]) -> Rule:
    """Of three and more, as ``evaluate`` takes them: the first two, then the result and the third."""

    def rule(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
        def step(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
            both = expr.func(a, b)
            if both not in self.known:
                self.known[both] = pair(self, a, b)
            return both

        return self.of(functools.reduce(step, expr.args))

    return rule


def _abs(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    (x,) = expr.args
    slope = self.of(x)
    below = fn.Where(sympy.Lt(x, 0, evaluate=False), -slope, ZERO)
    return fn.Where(sympy.Gt(x, 0, evaluate=False), slope, below)


def _relu(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    return fn.Where(sympy.Gt(expr.args[0], 0, evaluate=False), self.of(expr.args[0]), ZERO)


def _where(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    condition, a, b = expr.args
    return fn.Where(condition, self.of(a), self.of(b))


def _chain(slope: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Rule:
    """A function of one number: ``slope(x, f(x))`` times the slope of its argument."""
    return lambda self, expr: _times(slope(expr.args[0], expr), self.of(expr.args[0]))


def _rolled(self: _Derivative, expr: Rolled) -> sympy.Expr:
    """By what all units read: the sum of their slopes. By what each reads one entry of: the slope of the unit at hand."""
    slope = self.of(expr.term)
    return slope if UNIT in self.by.free_symbols or slope == 0 else Rolled(slope, *expr.args[1:])


def _flat(self: _Derivative, expr: sympy.Expr) -> sympy.Expr:
    return ZERO


_RULES: dict[type, Rule] = {
    sympy.Add: _add,
    sympy.Mul: _mul,
    sympy.Pow: _pow,
    sympy.Min: _reduced(_smaller),
    sympy.Max: _reduced(_larger),
    sympy.floor: _flat,
    sympy.ceiling: _flat,
    sympy.tanh: _chain(lambda x, y: 1 - y**2),
    sympy.exp: _chain(lambda x, y: y),
    sympy.log: _chain(lambda x, y: 1 / x),
    sympy.sin: _chain(lambda x, y: sympy.cos(x)),
    sympy.cos: _chain(lambda x, y: -sympy.sin(x)),
    fn.Abs: _abs,
    fn.Sigmoid: _chain(lambda x, y: y * (1 - y)),
    fn.Softplus: _chain(lambda x, y: fn.Sigmoid(x)),
    fn.Relu: _relu,
    fn.Erf: _chain(lambda x, y: sympy.Float(2 / math.sqrt(math.pi)) * sympy.exp(-(x**2))),
    fn.Where: _where,
    Rolled: _rolled,
    TableRead: _flat,
    Relational: _flat,
}

# Exact operations: the slope is an ordinary real expression of the exact operands.
_EXACT: dict[str, Rule] = {
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "sign", "lt", "le", "eq", "ne", "to_int64", "to_int32"), _flat),
    "cast": lambda self, expr: self.of(expr.args[0]),
    "neg": lambda self, expr: -self.of(expr.args[0]),
    "add": _add,
    "sub": lambda self, expr: self.of(expr.args[0]) - self.of(expr.args[1]),
    "mul": _mul,
    "div": lambda self, expr: self.of(expr.args[0] / expr.args[1]),
    "reciprocal": _chain(lambda x, y: -(y**2)),
    "sqrt": _chain(lambda x, y: 1 / (2 * y)),
    "abs": _abs,
    "relu": _relu,
    "where": _where,
    "minimum": lambda self, expr: _smaller(self, *expr.args),
    "maximum": lambda self, expr: _larger(self, *expr.args),
}
