"""The public functions on expressions: ``where``, ``minimum``, ``tanh``, ... They take expressions and Python numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from sparsedsl.errors import PatternError
from sparsedsl.lang import functions as fn
from sparsedsl.lang.expressions import Index, Score, as_index, as_mask, as_score
from sparsedsl.lang.wrapped import merge_carried

__all__ = [
    "clamp", "cos", "erf", "exp", "log", "maximum", "minimum", "relu", "sigmoid", "sin", "softplus", "sqrt", "tanh", "where",
]  # fmt: skip


def _widest(*values: object, of: str) -> tuple[Any, ...]:
    """All values as indices if they are whole numbers, else all as scores; ``of``: the function they are arguments of."""
    if any(isinstance(v, (Score, float)) for v in values):
        return tuple(as_score(v, where=f"argument of {of}()") for v in values)
    return tuple(as_index(v, where=f"argument of {of}()") for v in values)


@overload
def where(condition: Any, a: Index | int, b: Index | int) -> Index: ...
@overload
def where(condition: Any, a: Any, b: Any) -> Score: ...
def where(condition: Any, a: Any, b: Any) -> Index | Score:
    """``a`` where the mask ``condition`` holds, else ``b``: an index if both are, else a score.

    >>> import sparsedsl as sd
    >>> print(sd.where(sd.kv_idx < 4, sd.score, float("-inf")))
    where(kv_idx < 4, score, -inf)
    """
    condition = as_mask(condition, where="condition of where()")
    a, b = _widest(a, b, of="where")
    return type(a)(fn.Where(condition.expr, a.expr, b.expr), merge_carried(condition, a, b))


@overload
def minimum(a: Index | int, *others: Index | int) -> Index: ...
@overload
def minimum(a: Any, *others: Any) -> Score: ...
def minimum(a: Any, *others: Any) -> Index | Score:
    """The smallest of some expressions or numbers.

    >>> import sparsedsl as sd
    >>> print(sd.minimum(sd.q_idx, sd.kv_idx, 3))
    minimum(3, kv_idx, q_idx)
    """
    values = _widest(a, *others, of="minimum")
    return type(values[0])(fn.Min(*(v.expr for v in values)), merge_carried(*values))


@overload
def maximum(a: Index | int, *others: Index | int) -> Index: ...
@overload
def maximum(a: Any, *others: Any) -> Score: ...
def maximum(a: Any, *others: Any) -> Index | Score:
    """The largest of some expressions or numbers.

    >>> import sparsedsl as sd
    >>> print(sd.maximum(sd.q_idx - sd.kv_idx, 0))
    maximum(0, q_idx - kv_idx)
    """
    values = _widest(a, *others, of="maximum")
    return type(values[0])(fn.Max(*(v.expr for v in values)), merge_carried(*values))


@overload
def clamp(x: Index | int, low: Index | int | None = None, high: Index | int | None = None) -> Index: ...
@overload
def clamp(x: Any, low: Any = None, high: Any = None) -> Score: ...
def clamp(x: Any, low: Any = None, high: Any = None) -> Index | Score:
    """``x`` limited to ``low <= x <= high`` (inclusive); either bound may be left out. As in torch, ``high`` wins if they cross.

    >>> import sparsedsl as sd
    >>> print(sd.clamp(sd.q_idx - sd.kv_idx, 0, 7))
    minimum(7, maximum(0, q_idx - kv_idx))
    """
    if low is None and high is None:
        raise PatternError("clamp(x, low, high) wants at least one bound")
    x = x if low is None else maximum(x, low)
    return x if high is None else minimum(x, high)


def _real(name: str) -> Callable[[Any], Score]:
    function = fn.REAL_FUNCTIONS[name]

    def apply(x: Any) -> Score:
        x = as_score(x, where=f"argument of {name}()")
        return Score(function(x.expr), merge_carried(x))

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = f"""``{name}`` of a score, an index or a number; a score.

    >>> import sparsedsl as sd
    >>> print(sd.{name}(sd.score))
    {name}(score)
    """
    return apply


tanh, exp, log, sqrt, sin, cos = (_real(name) for name in ("tanh", "exp", "log", "sqrt", "sin", "cos"))
sigmoid, softplus, erf = (_real(name) for name in ("sigmoid", "softplus", "erf"))
_relu = _real("relu")


def relu(x: Any) -> Any:
    """``max(x, 0)``. Of the scores of a program, ``x.relu()``: scores, which a choice can be made by.

    >>> import sparsedsl as sd
    >>> print(sd.relu(sd.score))
    relu(score)
    """
    return x.relu() if getattr(x, "gives", None) == "scores" else _relu(x)
