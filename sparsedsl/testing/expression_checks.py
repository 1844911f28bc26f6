"""Assertions on expressions: text that reads back, and two ways to write one thing that must agree on every index."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsedsl.errors import PatternError, TableError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.exact import evaluate_any
from sparsedsl.lang.expressions import Score
from sparsedsl.lang.text import parse
from sparsedsl.lang.wrapped import Expression
from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.counterexamples import Counterexample, arguments_code, expression_code

__all__ = ["assert_same_values", "assert_text_round_trip"]

_CASE = AttentionCase(batch=2, heads=2, q_len=7, kv_len=11, q_offset=3)


def assert_text_round_trip(expression: Expression) -> None:
    """The text of ``expression`` reads back to the same expression, with the same key.

    >>> import sparsedsl as sd
    >>> assert_text_round_trip((sd.q_idx - sd.kv_idx) % 3 == 0)
    """
    if not isinstance(expression, Expression):
        raise PatternError(f"assert_text_round_trip(): expression must be an index, a mask or a score; got {shown(expression)}")
    read = parse(expression.text)
    # A score that holds nothing but whole numbers is read as the index it is.
    if read.expr != expression.expr or (type(read) is type(expression) and read.key != expression.key):
        raise Counterexample(
            f"the text of an expression reads back as another one: {expression} became {read}",
            f"sd.testing.assert_text_round_trip({expression_code(expression)})",
        )


def assert_same_values(left: Any, right: Any, case: AttentionCase = _CASE, **tables: Any) -> None:
    """``left`` and ``right`` have the same value for every ``b, h, q_idx, kv_idx`` of ``case``.

    Args:
        left: an expression, or a Python function as FlexAttention takes it: ``f(b, h, q_idx, kv_idx)`` or
            ``f(score, b, h, q_idx, kv_idx)``.
        right: likewise. Functions are called point by point with tensors without dimensions.
        case: which indices, and the lengths. Logits for ``score`` are random.
        tables: values of the tables that the expressions read and that are not bound to them.

    Indices and masks must be equal; scores, computed in float64, up to its rounding.

    >>> import sparsedsl as sd
    >>> assert_same_values(sd.kv_idx <= sd.q_idx, lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    """
    shape = case.positions.shape
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = [_values(side, case, logits, tables).expand(shape) for side in (left, right)]
    unequal = _unequal(*values)
    if not unequal.any():
        return
    place = tuple(unequal.nonzero()[0].tolist())
    point = dict(zip(("b", "h", "q_idx", "kv_idx"), (*place[:2], place[2] + case.q_offset, place[3]), strict=True))
    got = [value[place].item() for value in values]
    raise Counterexample(
        f"values differ at {int(unequal.sum())} of {unequal.numel()} points; at {point}"
        + (f" with score={logits[place].item()!r}" if any(isinstance(x, Score) for x in (left, right)) else "")
        + f": {_name(left)} is {got[0]}, {_name(right)} is {got[1]}",
        *_function_lines(left, right),
        f"left = {_code(left)}",
        f"right = {_code(right)}",
        f"sd.testing.assert_same_values({arguments_code('left', 'right', case, **tables)})",
    )


def _values(side: Any, case: AttentionCase, logits: torch.Tensor, tables: Mapping[str, Any]) -> torch.Tensor:
    if isinstance(side, Expression):
        known = side.bound | dict(tables)
        missing = sorted(set(side.tables) - set(known))
        if missing:
            raise TableError(
                f"values of the tables {', '.join(missing)} are needed: assert_same_values(..., {missing[0]}=tensor)"
            )
        return evaluate_any(side.expr, {**case.env, "score": logits, **known})
    if not callable(side):
        raise PatternError(f"assert_same_values compares expressions and Python functions; got {side!r} ({type(side).__name__})")
    positions = [case.env[name].reshape(-1) for name in ("b", "h", "q_idx", "kv_idx")]
    flat = logits.reshape(-1)
    takes_score = len(inspect.signature(side).parameters) == 5
    found = [
        torch.as_tensor(side(*((flat[i], *point) if takes_score else point)))
        for i, point in enumerate(itertools.product(*positions))
    ]
    return torch.stack(found).reshape(case.positions.shape)


def _unequal(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if not (left.is_floating_point() or right.is_floating_point()):
        return left != right
    left, right = left.double(), right.double()
    # Two orders of the same few dozen operations; the size of a sum is bounded by that of its largest term, unknown here.
    rounding = 2**12 * torch.finfo(torch.float64).eps * (1 + torch.maximum(left.abs(), right.abs()))
    near = torch.isfinite(left) & torch.isfinite(right) & ((left - right).abs() <= rounding)
    return ~((left == right) | near)


def _name(side: Any) -> str:
    return str(side) if isinstance(side, Expression) else getattr(side, "__name__", repr(side))


def _code(side: Any) -> str:
    return expression_code(side) if isinstance(side, Expression) else _name(side).replace("<lambda>", "...")


def _function_lines(*sides: Callable[..., Any] | Expression) -> list[str]:
    names = [_name(side) for side in sides if not isinstance(side, Expression)]
    return [f"# import or paste {' and '.join(names)} here"] if names else []
