"""The slow, obvious evaluator: an expression and the values of its symbols and tables -> a torch tensor. The oracle of the project.

Every other use of an expression (generated code, intervals, proofs) must agree with this one, point by point.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from sparsedsl.errors import TableError, UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.tables import TableRead

__all__ = ["Evaluator", "evaluate", "read_table"]

Value = Any  # a torch tensor, or a Python number where nothing depends on a tensor


def evaluate(expr: sympy.Basic, env: Mapping[str, Any], *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The value of ``expr``, broadcast over the tensors in ``env``.

    Args:
        expr: a sympy expression of the language.
        env: symbol name -> int64 tensor or int, ``"score"`` -> float tensor, table name -> tensor.
        dtype: type of float arithmetic. Integers are computed in int64: a call sees to it that none leaves that; else
            :func:`~sparsedsl.lang.exact.evaluate_any`.

    Table reads outside the table are clamped to it here; that no allowed pair is affected is checked where tables are bound.
    """
    device = next((v.device for v in env.values() if isinstance(v, torch.Tensor)), None)
    value = Evaluator(env, dtype).value(expr)
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device=device)


def read_table(table: torch.Tensor, indices: list[Value], name: str) -> torch.Tensor:
    """``table[i, j, ...]`` with broadcast indices, clamped into range."""
    if table.ndim != len(indices):
        raise TableError(f"table {name!r} is read with {len(indices)} indices but has shape {tuple(table.shape)}")
    if 0 in table.shape:
        raise TableError(f"table {name!r} is empty (shape {tuple(table.shape)}) but the pattern reads it")
    clamped = []
    for index, size in zip(indices, table.shape, strict=True):
        index = torch.as_tensor(index, device=table.device)
        clamped.append(index.clamp(0, size - 1))
    return table[tuple(clamped)]


class Evaluator:
    """One evaluation; shared subexpressions are computed once."""

    def __init__(self, env: Mapping[str, Any], dtype: torch.dtype):
        self.env, self.dtype = env, dtype
        self.known: dict[sympy.Basic, Value] = {}

    def value(self, expr: sympy.Basic) -> Value:
        """The value of one node."""
        if expr not in self.known:
            self.known[expr] = self.compute(expr)
        return self.known[expr]

    def real(self, expr: sympy.Basic) -> torch.Tensor:
        """The value as a float tensor."""
        value = self.value(expr)
        if not isinstance(value, torch.Tensor):
            return torch.tensor(value, dtype=self.dtype)
        return value.to(self.dtype)

    def read(self, expr: TableRead) -> torch.Tensor:
        """The entries of a table as they are stored."""
        return read_table(self.env[expr.spec.name], [self.value(i) for i in expr.args], expr.spec.name)

    def compute(self, expr: sympy.Basic) -> Value:
        """The value of a node that is not known yet."""
        if isinstance(expr, sympy.Symbol):
            return self.env[expr.name]
        if isinstance(expr, TableRead):
            return self.read(expr).to(self.dtype if expr.spec.dtype == "float" else torch.int64)
        for kind in type(expr).__mro__:
            if kind in _RULES:
                return _RULES[kind](self, expr)
        raise UnsupportedError(f"no evaluation rule for {type(expr).__name__} in {expr}")


def _tensors(*values: Value) -> list[torch.Tensor]:
    device = next((v.device for v in values if isinstance(v, torch.Tensor)), None)
    return [v if isinstance(v, torch.Tensor) else torch.tensor(v, device=device) for v in values]


def _pairwise(op: Callable[..., Value], plain: Callable[..., Value]) -> Callable[[Value, Value], Value]:
    """``op`` on tensors, ``plain`` on Python numbers: keeps constants exact and off the device."""

    def apply(a: Value, c: Value) -> Value:
        if isinstance(a, torch.Tensor) or isinstance(c, torch.Tensor):
            return op(*_tensors(a, c))
        return plain(a, c)

    return apply


minimum = _pairwise(torch.minimum, min)
maximum = _pairwise(torch.maximum, max)
bit_and = _pairwise(torch.bitwise_and, operator.and_)


def _constant(self: Evaluator, expr: sympy.Number) -> Value:
    # A tensor without dimensions, since a Python float would turn int64 tensors into float32 whatever `dtype` says.
    return torch.tensor(float(expr), dtype=self.dtype)


def _floor(self: Evaluator, expr: sympy.floor) -> Value:
    argument = expr.args[0]
    if argument.is_rational:
        numerator, denominator = argument.as_numer_denom()
        return self.value(numerator) // self.value(denominator)
    return torch.floor(self.real(argument)).to(torch.int64)


def _pow(self: Evaluator, expr: sympy.Pow) -> Value:
    base, power = expr.args
    if power.is_Integer and int(power) >= 0:
        return self.value(base) ** int(power)
    if power.is_Integer:
        # torch.pow of a tensor by a 0-d tensor is off by a unit in the last place, generated code divides.
        return 1 / self.real(base) ** -int(power)
    if power == sympy.Rational(1, 2):
        return torch.sqrt(self.real(base))
    return torch.pow(self.real(base), self.real(power))


def _reduce(op: Callable[[Value, Value], Value]) -> Callable[[Evaluator, sympy.Basic], Value]:
    return lambda self, expr: functools.reduce(op, (self.value(a) for a in expr.args))


def _add(self: Evaluator, expr: sympy.Add) -> Value:
    grouped = fn.regrouped(expr)
    if isinstance(grouped, sympy.Add):
        return functools.reduce(operator.add, (self.value(a) for a in grouped.args))
    return self.value(grouped)


def _relation(op: Callable[[Value, Value], Value]) -> Callable[[Evaluator, sympy.Basic], Value]:
    return lambda self, expr: op(self.value(expr.args[0]), self.value(expr.args[1]))


def _real(op: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Evaluator, sympy.Basic], Value]:
    return lambda self, expr: op(self.real(expr.args[0]))


def _where(self: Evaluator, expr: fn.Where) -> Value:
    condition, a, b = (self.value(x) for x in expr.args)
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    a, b = _tensors(a, b)
    return torch.where(condition, a.to(condition.device), b.to(condition.device))


def _not(self: Evaluator, expr: sympy.Not) -> Value:
    value = self.value(expr.args[0])
    return ~value if isinstance(value, torch.Tensor) else not value


def _strict(self: Evaluator, expr: strict.StrictFunction) -> Value:
    operands = []
    for argument in expr.args:
        constant = strict.number(argument)
        if isinstance(argument, TableRead):  # in its own type: the operation casts it itself
            operands.append(self.read(argument))
        else:
            operands.append(self.value(argument) if constant is None else constant)
    return strict.compute(type(expr), operands)


def _mod(self: Evaluator, expr: sympy.Mod) -> Value:
    return self.value(expr.args[0]) % self.value(expr.args[1])


_RULES: dict[type, Callable[[Evaluator, Any], Value]] = {
    sympy.Integer: lambda self, expr: int(expr),
    sympy.Rational: _constant,
    sympy.Float: _constant,
    sympy.NumberSymbol: _constant,
    sympy.core.numbers.Infinity: lambda self, expr: float("inf"),
    sympy.core.numbers.NegativeInfinity: lambda self, expr: float("-inf"),
    sympy.logic.boolalg.BooleanTrue: lambda self, expr: True,
    sympy.logic.boolalg.BooleanFalse: lambda self, expr: False,
    sympy.Add: _add,
    sympy.Mul: _reduce(operator.mul),
    sympy.Pow: _pow,
    sympy.floor: _floor,
    sympy.ceiling: lambda self, expr: -self.value(sympy.floor(-expr.args[0])),
    sympy.Mod: _mod,
    sympy.Min: _reduce(minimum),
    sympy.Max: _reduce(maximum),
    fn.Abs: lambda self, expr: abs(self.value(expr.args[0])),
    sympy.And: _reduce(operator.and_),
    sympy.Or: _reduce(operator.or_),
    sympy.Xor: _reduce(operator.xor),
    sympy.Not: _not,
    sympy.Le: _relation(operator.le),
    sympy.Lt: _relation(operator.lt),
    sympy.Ge: _relation(operator.ge),
    sympy.Gt: _relation(operator.gt),
    sympy.Eq: _relation(operator.eq),
    sympy.Ne: _relation(operator.ne),
    sympy.tanh: _real(torch.tanh),
    sympy.exp: _real(torch.exp),
    sympy.log: _real(torch.log),
    sympy.sin: _real(torch.sin),
    sympy.cos: _real(torch.cos),
    fn.Where: _where,
    strict.StrictFunction: _strict,
    fn.BitAnd: _reduce(bit_and),
    fn.Sigmoid: _real(torch.sigmoid),
    fn.Softplus: _real(torch.nn.functional.softplus),
    fn.Relu: _real(torch.relu),
    fn.Erf: _real(torch.erf),
}
