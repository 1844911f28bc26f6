"""Expressions of the language as functions of a grid of pairs, in plain torch: what a mask or a score in a text form is read as."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["FUNCTIONS", "INDICES", "Grid", "Value", "lifted"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Grid:
    """Pairs of queries at ``rows`` and keys (or rows of keys) at ``columns``; ``call``: what nodes are read in."""

    call: Any
    rows: Tensor
    columns: Tensor
    score: Tensor | None = None

    @property
    def names(self) -> dict[str, Tensor]:
        """Of every index and length."""
        batch, heads = self.call.q.shape[:2]
        return {
            "b": torch.arange(batch)[:, None, None, None],
            "h": torch.arange(heads)[:, None, None],
            "q_idx": self.rows[:, None],
            "kv_idx": self.columns,
            "q_len": torch.tensor(self.call.offset + self.call.q.shape[2]),
            "kv_len": torch.tensor(len(self.columns)),
        }

    def filled(self, x: Tensor) -> Tensor:
        """``(batch, heads, rows, columns)``."""
        return x.expand(*self.call.q.shape[:2], len(self.rows), len(self.columns))


class Value:
    """What an expression is, pair by pair."""

    def __init__(self, of: Callable[[Grid], Tensor]):
        self.of = of

    def __invert__(self) -> Value:
        return Value(lambda grid: ~self.of(grid))

    def __neg__(self) -> Value:
        return Value(lambda grid: -self.of(grid))

    def __abs__(self) -> Value:
        return Value(lambda grid: self.of(grid).abs())

    def __hash__(self) -> int:
        return id(self)


def lifted(x: Any) -> Value:
    """A number, or what stands for pairs already."""
    if isinstance(x, Value):
        return x
    number = torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
    return Value(lambda grid: number)


def _divided(x: Tensor, y: Tensor) -> Tensor:
    return x.double() / y.double()


def applied(function: Callable[..., Tensor]) -> Callable[..., Value]:
    """A function of tensors as one of values."""

    def apply(*values: Any) -> Value:
        parts = [lifted(x) for x in values]
        return Value(lambda grid: function(*(part.of(grid) for part in parts)))

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow", "and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne", "truediv"):
    _operation = _divided if _name == "truediv" else getattr(operator, f"{_name}_" if _name in ("and", "or") else _name)
    _made = applied(_operation)
    setattr(Value, f"__{_name}__", _made)
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__r{_name}__", lambda x, y, made=_made: made(y, x))


def _float(function: Callable[[Tensor], Tensor]) -> Callable[..., Value]:
    return applied(lambda x: function(x.double()))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "where": applied(torch.where),
    "maximum": applied(lambda *parts: functools.reduce(torch.maximum, parts)),
    "minimum": applied(lambda *parts: functools.reduce(torch.minimum, parts)),
    "relu": applied(torch.relu),
    "abs": abs,
    "inf": float("inf"),
    **{name: _float(getattr(torch, name)) for name in ("exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos")},
    "softplus": _float(torch.nn.functional.softplus),
}
INDICES = {name: Value(lambda grid, name=name: grid.names[name]) for name in ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")}
INDICES["score"] = Value(lambda grid: grid.score)  # type: ignore[arg-type, return-value]
