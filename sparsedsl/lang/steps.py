"""Fast evaluation: an expression becomes a list of steps once, and every later evaluation runs down the list.

:mod:`lang.evaluate` walks the expression each time, which costs some hundred Python calls; it stays the oracle, and the reference uses it.
What both compute is the same, point by point and bit by bit.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.evaluation import bit_and, maximum, minimum, read_table
from sparsedsl.lang.tables import TableRead

__all__ = ["evaluate", "prepared", "prepared_value"]

Value = Any  # a torch tensor, or a Python number where nothing depends on a tensor
Step = tuple[Callable[..., Value], tuple[int, ...]]
"""A function, and where the values it takes stand among those known so far; its result is appended to them."""


def evaluate(expr: sympy.Basic, env: Mapping[str, Any], *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The value of ``expr``, broadcast over the tensors in ``env``: see :func:`sparsedsl.lang.evaluation.evaluate`.

    >>> import sparsedsl as sd
    >>> evaluate((sd.kv_idx <= 1).expr, {"kv_idx": torch.arange(3)})
    tensor([ True,  True, False])
    """
    return prepared(expr, dtype=dtype)(env)


def prepared(expr: sympy.Basic, *, dtype: torch.dtype = torch.float64) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    """:func:`evaluate` of one expression, for many environments."""
    return functools.partial(_run, _steps(expr, dtype))


def prepared_value(expr: sympy.Basic, *, dtype: torch.dtype = torch.float64) -> Callable[[Mapping[str, Any]], Value]:
    """The same; a Python number where the environment holds numbers alone."""
    return functools.partial(_value, _steps(expr, dtype))


def _run(found: _Steps, env: Mapping[str, Any]) -> torch.Tensor:
    value = _value(found, env)
    if isinstance(value, torch.Tensor):
        return value
    for given in env.values():
        if isinstance(given, torch.Tensor):
            return torch.as_tensor(value, device=given.device)
    return torch.as_tensor(value)


def _value(found: _Steps, env: Mapping[str, Any]) -> Value:
    values = [env[name] for name in found.names]
    values += found.constants
    known = values.__getitem__
    for op, places in found.steps:
        values.append(op(*map(known, places)))
    return values[found.result]


@dataclass(frozen=True, eq=False)
class _Steps:
    """``names`` are looked up in the environment, ``constants`` follow them, then the results of ``steps``, one each."""

    names: tuple[str, ...]
    constants: tuple[Value, ...]
    steps: tuple[Step, ...]
    result: int


@functools.lru_cache(maxsize=4096)
def _steps(expr: sympy.Basic, dtype: torch.dtype) -> _Steps:
    return _StepWriter(dtype).written(expr)


# ---- operations --------------------------------------------------------------------------------------------------------------


def _to(dtype: torch.dtype) -> Callable[[Value], torch.Tensor]:
    def real(value: Value) -> torch.Tensor:
        return value.to(dtype) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)

    return real


def _where(condition: Value, a: Value, b: Value) -> Value:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    a, b = (v if isinstance(v, torch.Tensor) else torch.tensor(v, device=condition.device) for v in (a, b))
    return torch.where(condition, a.to(condition.device), b.to(condition.device))


def _not(value: Value) -> Value:
    return ~value if isinstance(value, torch.Tensor) else not value


# Kinds of which all operands are put together by one function of two.
_FOLDED: dict[type, Callable[[Value, Value], Value]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Mod: operator.mod,
    sympy.Min: minimum,
    sympy.Max: maximum,
    sympy.And: operator.and_,
    sympy.Or: operator.or_,
    sympy.Xor: operator.xor,
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    fn.BitAnd: bit_and,
}
# Functions of one float.
_REAL: dict[type, Callable[[torch.Tensor], torch.Tensor]] = {
    sympy.tanh: torch.tanh,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.sin: torch.sin,
    sympy.cos: torch.cos,
    fn.Sigmoid: torch.sigmoid,
    fn.Softplus: torch.nn.functional.softplus,
    fn.Relu: torch.relu,
    fn.Erf: torch.erf,
}
_PLAIN: dict[type, Callable[..., Value]] = {fn.Abs: abs, fn.Where: _where, sympy.Not: _not}


# ---- from an expression to steps ----------------------------------------------------------------------------------------------


class _StepWriter:
    """Writes the steps of one expression. A place is ``("name", i)``, ``("constant", i)`` or ``("step", i)`` until all are counted."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.names: dict[str, int] = {}
        self.constants: list[Value] = []
        self.steps: list[tuple[Callable[..., Value], tuple[tuple[str, int], ...]]] = []
        self.known: dict[Any, tuple[str, int]] = {}

    def written(self, expr: sympy.Basic) -> _Steps:
        result = self.place(expr)
        first = {"name": 0, "constant": len(self.names), "step": len(self.names) + len(self.constants)}

        def number(place: tuple[str, int]) -> int:
            return first[place[0]] + place[1]

        steps = tuple((op, tuple(map(number, places))) for op, places in self.steps)
        return _Steps(tuple(self.names), tuple(self.constants), steps, number(result))

    def place(self, expr: sympy.Basic) -> tuple[str, int]:
        """Where the value of an expression stands; equal parts stand once."""
        if expr not in self.known:
            self.known[expr] = self.write(expr)
        return self.known[expr]

    def real(self, expr: sympy.Basic) -> tuple[str, int]:
        """Where its value as a float tensor stands."""
        key = ("real", expr)
        if key not in self.known:
            self.known[key] = self.step(_to(self.dtype), self.place(expr))
        return self.known[key]

    def step(self, op: Callable[..., Value], *places: tuple[str, int]) -> tuple[str, int]:
        self.steps.append((op, places))
        return "step", len(self.steps) - 1

    def constant(self, value: Value) -> tuple[str, int]:
        self.constants.append(value)
        return "constant", len(self.constants) - 1

    def name(self, name: str) -> tuple[str, int]:
        return "name", self.names.setdefault(name, len(self.names))

    def folded(self, op: Callable[[Value, Value], Value], parts: Sequence[sympy.Basic]) -> tuple[str, int]:
        return functools.reduce(functools.partial(self.step, op), map(self.place, parts))

    def write(self, expr: sympy.Basic) -> tuple[str, int]:
        kind = next((k for k in type(expr).__mro__ if k in _FOLDED or k in _REAL or k in _PLAIN), None)
        if isinstance(expr, sympy.Symbol):
            return self.name(expr.name)
        if isinstance(expr, TableRead):
            wanted = self.dtype if expr.spec.dtype == "float" else torch.int64
            return self.step(operator.methodcaller("to", wanted), self.read(expr))
        if isinstance(expr, sympy.Integer):
            return self.constant(int(expr))
        if expr in (sympy.true, sympy.false):
            return self.constant(expr == sympy.true)
        if isinstance(expr, (sympy.core.numbers.Infinity, sympy.core.numbers.NegativeInfinity)):
            return self.constant(float(expr))
        if isinstance(expr, (sympy.Number, sympy.NumberSymbol)):
            # A tensor without dimensions, since a Python float would turn int64 tensors into float32 whatever `dtype` says.
            return self.constant(torch.tensor(float(expr), dtype=self.dtype))
        if isinstance(expr, sympy.Add):
            grouped = fn.regrouped(expr)
            return self.folded(operator.add, grouped.args) if isinstance(grouped, sympy.Add) else self.place(grouped)
        if isinstance(expr, strict.StrictFunction):
            return self.strict(expr)
        if isinstance(expr, sympy.Pow):
            return self.power(expr)
        if isinstance(expr, sympy.floor):
            return self.floor(expr)
        if isinstance(expr, sympy.ceiling):
            return self.step(operator.neg, self.place(sympy.floor(-expr.args[0])))
        if kind in _FOLDED:
            return self.folded(_FOLDED[kind], expr.args)
        if kind in _REAL:
            return self.step(_REAL[kind], self.real(expr.args[0]))
        if kind in _PLAIN:
            return self.step(_PLAIN[kind], *map(self.place, expr.args))
        raise UnsupportedError(f"no evaluation rule for {type(expr).__name__} in {expr}")

    def read(self, expr: TableRead) -> tuple[str, int]:
        """Where the entries of a table, as they are stored, stand."""
        key = ("read", expr)
        if key not in self.known:
            name = expr.spec.name

            def entries(table: torch.Tensor, *indices: Value) -> torch.Tensor:
                return read_table(table, list(indices), name)

            self.known[key] = self.step(entries, self.name(name), *map(self.place, expr.args))
        return self.known[key]

    def power(self, expr: sympy.Pow) -> tuple[str, int]:
        base, power = expr.args
        if power.is_Integer and int(power) >= 0:
            return self.step(operator.pow, self.place(base), self.constant(int(power)))
        if power.is_Integer:
            # torch.pow of a tensor by a 0-d tensor is off by a unit in the last place, generated code divides.
            raised = self.step(operator.pow, self.real(base), self.constant(-int(power)))
            return self.step(operator.truediv, self.constant(1), raised)
        if power == sympy.Rational(1, 2):
            return self.step(torch.sqrt, self.real(base))
        return self.step(torch.pow, self.real(base), self.real(power))

    def floor(self, expr: sympy.floor) -> tuple[str, int]:
        argument = expr.args[0]
        if argument.is_rational:
            numerator, denominator = argument.as_numer_denom()
            return self.step(operator.floordiv, self.place(numerator), self.place(denominator))
        rounded = self.step(torch.floor, self.real(argument))
        return self.step(operator.methodcaller("to", torch.int64), rounded)

    def strict(self, expr: strict.StrictFunction) -> tuple[str, int]:
        places = []
        for argument in expr.args:
            constant = strict.number(argument)
            if isinstance(argument, TableRead):  # in its own type: the operation casts it itself
                places.append(self.read(argument))
            else:
                places.append(self.place(argument) if constant is None else self.constant(constant))
        kind = type(expr)
        return self.step(lambda *operands: strict.compute(kind, list(operands)), *places)
