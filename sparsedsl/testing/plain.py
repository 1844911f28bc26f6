"""The value of language text by Python's own operators on numpy numbers: an oracle that shares no code with the language.

No symbols, no simplification, no torch: ``where`` is ``numpy.where``, ``//`` is Python's, a table is an array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsedsl.testing.grammar import DECLARATIONS

__all__ = ["PositionTables", "plain_value"]

_FUNCTIONS: dict[str, Any] = {
    "where": np.where,
    "minimum": lambda *values: functools.reduce(np.minimum, values),
    "maximum": lambda *values: functools.reduce(np.maximum, values),
    "clamp": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "abs": np.abs,
    "tanh": np.tanh,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "sigmoid": lambda x: 1 / (1 + np.exp(-np.asarray(x, dtype=float))),
    "softplus": lambda x: np.logaddexp(0.0, x),
    "relu": lambda x: np.maximum(x, 0),
    "erf": np.vectorize(math.erf, otypes=[float]),
    "inf": math.inf,
}


class _Array:
    """A table whose reads outside it give the nearest element, as everywhere in this project."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def __getitem__(self, indices: Any) -> Any:
        indices = indices if isinstance(indices, tuple) else (indices,)
        places = (np.asarray(np.clip(i, 0, size - 1)) for i, size in zip(indices, self.values.shape, strict=True))
        return self.values[tuple(place.astype(np.int64) for place in places)]


class _AnyTable:
    """A table without values: one and rising with its indices. For tables that a simplified expression has lost."""

    def __init__(self, boolean: bool):
        self.boolean = boolean

    def __getitem__(self, indices: Any) -> Any:
        total = sum(indices) if isinstance(indices, tuple) else indices
        return np.maximum(total, 0) % 3 == 1 if self.boolean else 1 + np.clip(total, 0, 20) // 3


class PositionTables(dict[str, Any]):
    """The values of ``b, h, q_idx, kv_idx, q_len, kv_len`` on a whole grid, one axis each, as numpy int64 arrays; with ``exact`` as
    arrays of Python's integers, which never wrap around (tables then want ``dtype=object`` too).

    >>> PositionTables(batch=1, heads=2, q_len=3, kv_len=5, q_offset=2)["q_idx"].ravel().tolist()
    [2, 3, 4]
    """

    def __init__(self, *, batch: int = 1, heads: int = 1, q_len: int, kv_len: int, q_offset: int = 0, exact: bool = False):
        sizes = (batch, heads, q_len, kv_len)
        axes = [np.arange(size).astype(object if exact else np.int64) for size in sizes]
        axes[2] = axes[2] + q_offset
        grid = np.ix_(*axes)
        super().__init__(zip(("b", "h", "q_idx", "kv_idx"), grid, strict=True))
        whole = int if exact else np.int64
        self["q_len"], self["kv_len"] = whole(q_offset + q_len), whole(kv_len)
        self.shape = tuple(axis.size for axis in axes)


def plain_value(text: str, values: Mapping[str, Any], tables: Mapping[str, Any] | None = None) -> np.ndarray:
    """The value of ``text`` where each symbol has the value given for it; ``tables``: name -> anything ``numpy.asarray`` takes.

    A table of the grammar that is not given has some values: it should not matter which.

    ``text`` is evaluated as Python: give it only text you trust, such as that of :mod:`sparsedsl.testing.grammar`.

    >>> plain_value("(q_idx - 5) // 2 + seen[kv_idx]", {"q_idx": np.arange(3), "kv_idx": 1}, {"seen": [10, 20]}).tolist()
    [17, 18, 18]
    """
    arrays: dict[str, Any] = {name: _AnyTable("bool" in words) for name, words in DECLARATIONS.items()}
    arrays |= {name: _Array(np.asarray(table)) for name, table in (tables or {}).items()}
    with np.errstate(all="ignore"):
        return np.asarray(eval(text, {"__builtins__": {}, **_FUNCTIONS, **values, **arrays}))
