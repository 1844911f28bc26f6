"""Exact operations (:mod:`sparsedsl.lang.strict`) in C++: those whose result IEEE arithmetic fixes to the last bit."""

from __future__ import annotations

from typing import Protocol

import sympy

from sparsedsl.codegen.triton_exact import has_text
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang import strict
from sparsedsl.lang.tables import TableRead

__all__ = ["exact_text"]

_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_TEMPLATES = {
    "abs": "abs_of({0})",
    "cast": "{0}",
    "ceil": "ceil_exact({0})",
    "floor": "floor_exact({0})",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "neg": "(-{0})",
    "reciprocal": "(({type})1 / {0})",
    "relu": "relu_of({0})",
    "round": "round_exact({0})",
    "shl": "({0} << {1})",
    "sign": "sign_exact({0})",
    "sqrt": "sqrt_of({0})",
    "to_int32": "(i64)(int){0}",
    "to_int64": "(i64){0}",
    "trunc": "trunc_exact({0})",
    "where": "({0} ? {1} : {2})",
}
# Half precision is computed in float and rounded, as torch does it: exact for one operation.
_TYPES = {"f16": "float", "bf16": "float", "f32": "float", "f64": "double", "i64": "i64"}
_ROUNDED = {"f16": "to_half", "bf16": "to_bfloat"}


class _Prints(Protocol):
    """What is asked of the printer: an operand, and a table's entry as it is stored."""

    def text(self, expr: sympy.Basic, level: int = 0) -> str: ...

    def read(self, expr: TableRead) -> str: ...


def exact_text(printer: _Prints, expr: strict.StrictFunction) -> str:
    """An exact operation, in brackets where it needs them; of a condition, the boolean.

    Raises:
        UnsupportedError: IEEE arithmetic does not say what torch's result is.
    """
    operation, prefix = expr.operation, expr.prefix
    if not has_text(expr):
        raise UnsupportedError(
            f"generated C++ cannot do {type(expr).__name__}(...) exactly as torch rounds it; here it depends on more than q_idx, kv_idx "
            "or their difference alone, for which torch would prepare a table. Use backend='tiled', or write it with integers"
        )
    kind = _TYPES[prefix]
    rule = strict.OPERATIONS[operation]
    operands = [_operand(printer, a, "" if i in rule.plain else prefix) for i, a in enumerate(expr.args)]
    if operation in _SYMBOLS:
        text = f"({operands[0]} {_SYMBOLS[operation]} {operands[1]})"
    else:
        text = _TEMPLATES[operation].format(*operands, type=kind)
    return f"{_ROUNDED[prefix]}({text})" if prefix in _ROUNDED and rule.result == "same" else f"({text})"


def _operand(printer: _Prints, expr: sympy.Basic, prefix: str) -> str:
    """An operand, rounded to the type of the operation and in the type it is computed in."""
    number = strict.number(expr)
    if number is not None and not isinstance(number, bool):
        if not prefix:
            return repr(number)
        kind = _TYPES[prefix]  # torch does not round a number to half precision first
        if number in (float("inf"), float("-inf")):
            return f"{'-' if number < 0 else ''}infinite<{kind}>()"
        return f"({kind}){number!r}"
    text = printer.read(expr) if isinstance(expr, TableRead) else f"({printer.text(expr)})"
    text = f"({_TYPES[prefix]}){text}" if prefix else text
    return f"{_ROUNDED[prefix]}({text})" if prefix in _ROUNDED else text
