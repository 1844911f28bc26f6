"""A sympy expression as users hold it: frozen, hashable, without a truth value, with the tensors that were captured on the way."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Mapping
from typing import Any, NoReturn, Self

import sympy

from sparsedsl.errors import PatternError, TableError
from sparsedsl.lang import functions as fn
from sparsedsl.lang.advice import meant
from sparsedsl.lang.known_facts import check_extent
from sparsedsl.lang.printing import expression_text, reading_text, to_text
from sparsedsl.lang.refusals import Unvalued
from sparsedsl.lang.tables import TableSpec, by_kept_name, table_specs

__all__ = ["Carried", "Expression", "merge_carried"]


class Carried(dict[str, Any]):
    """What an expression carries beside its formula: tensors by table name, and ``heads``, how many heads it is written for, or None."""

    def __init__(self, tables: Mapping[str, Any] | None = None, heads: int | None = None):
        super().__init__(tables or {})
        self.heads: int | None = getattr(tables, "heads", None) if heads is None else heads

    def __reduce__(self) -> Any:
        return Carried, (dict(self), self.heads)


def merge_carried(*parts: Any) -> Carried:
    """Join what operands carry; one name must mean one tensor, or one node of a program, and all be written for as many heads."""
    joined = Carried()
    for part in parts:
        carried = part._bound if isinstance(part, Expression) else Carried()
        if carried.heads is not None and joined.heads not in (None, carried.heads):
            raise PatternError(
                f"one part is written for {joined.heads} heads, another for {carried.heads}: both must be for the same number"
            )
        joined.heads = joined.heads or carried.heads
        for name, value in carried.items():
            if joined.setdefault(name, value) is not value:
                raise TableError(
                    f"two different tensors are captured under the table name {name!r}; rename one of them, "
                    "or declare one table and bind it once"
                )
    return joined


class Expression(Unvalued):
    """A sympy expression plus the tensors captured under its table names. Frozen and hashable."""

    __slots__ = ("_bound", "_expr", "_key")
    _expr: sympy.Basic
    _bound: Carried
    _key: str | None

    def __init__(self, expr: sympy.Basic, bound: Mapping[str, Any] | None = None):
        expr = fn.in_language(expr)
        check_extent(expr)
        object.__setattr__(self, "_expr", expr)
        object.__setattr__(self, "_bound", Carried(bound))
        object.__setattr__(self, "_key", None)

    @property
    def exprs(self) -> tuple[sympy.Basic, ...]:
        """The sympy expressions it consists of: one; a pattern has several."""
        return (self._expr,)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen; build a new expression instead of setting {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen; {name!r} cannot be deleted")

    @property
    def expr(self) -> sympy.Basic:
        """The sympy expression."""
        return self._expr

    @property
    def bound(self) -> dict[str, Any]:
        """Table name -> tensor for tables bound at declaration or captured by tracing (a copy)."""
        return Carried(self._bound)

    @property
    def has_bound(self) -> bool:
        """Whether :attr:`bound` holds anything, without the copy."""
        return bool(self._bound)

    @property
    def tables(self) -> dict[str, TableSpec]:
        """Table name -> declaration, for every table the expression reads."""
        return table_specs(self._expr)

    @property
    def text(self) -> str:
        """The expression and its table declarations as Python code that :func:`sparsedsl.parse` reads back."""
        return to_text(self._expr)

    @property
    def key(self) -> str:
        """A hash of the text form (32 hex digits), the same in every process and on every machine."""
        if self._key is None:
            kind = type(self).__name__
            object.__setattr__(self, "_key", hashlib.sha256(f"{kind}\n{self.text}".encode()).hexdigest()[:32])
        return self._key  # type: ignore[return-value]

    def bind(self, /, **tables: Any) -> Self:
        """The same expression with tensors bound to tables, so that calls need not pass them."""
        known = self.tables
        tables = dict(by_kept_name(tables, known))
        for name in tables:
            if name not in known:
                raise TableError(
                    f"cannot bind table {name!r}: the expression reads {', '.join(known) or 'no table'}{meant(name, known)}"
                )
        return type(self)(self._expr, Carried({**self._bound, **tables}, self._bound.heads))

    @property
    def heads(self) -> int | None:
        """How many query heads it is written for, or None where any number will do; see :meth:`for_heads`."""
        return self._bound.heads

    def for_heads(self, heads: int) -> Self:
        """The same expression, which declares that it is written for so many query heads: a call with another number raises.

        >>> import sparsedsl as sd
        >>> slopes = (2.0 ** (-sd.h - 1)).for_heads(8)
        >>> (sd.score - slopes * abs(sd.q_idx - sd.kv_idx)).heads
        8
        """
        if isinstance(heads, bool) or not isinstance(heads, numbers.Integral) or heads < 1:
            raise PatternError(f"heads must be a whole number of at least 1; got {heads!r}")
        declared = merge_carried(self, Expression(sympy.S.Zero, Carried(heads=int(heads))))
        return type(self)(self._expr, declared)

    def same_as(self, other: Any) -> bool:
        """Structural equality of the canonical forms. For equality of meaning ask :func:`sparsedsl.equivalent`."""
        return type(self) is type(other) and self._expr == other._expr

    def __hash__(self) -> int:
        return hash((type(self).__name__, self._expr))

    def __str__(self) -> str:
        return reading_text(self._expr)

    def _plain_(self) -> str:
        return expression_text(self._expr)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __reduce__(self) -> Any:
        return type(self), (self._expr, self._bound)

    def __bool__(self) -> NoReturn:
        raise PatternError(
            f"{self!r} has no truth value while it is being declared. `and`, `or`, `not`, `if`, `in` and chained comparisons "
            "(`0 <= x < 5`) ask for one and would drop a side. Write `a & b`, `a | b`, `~a`, `(0 <= x) & (x < 5)`, "
            "sd.where(condition, a, b) for `if`, and sd.minimum(a, b), sd.maximum(a, b) for Python's min and max"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name.startswith("_repr") or name.startswith("_ipython"):
            raise AttributeError(name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}. To use a function written for tensors, trace it: "
            "sd.trace_mask(mask_mod) or sd.trace_score(score_mod)"
        )
