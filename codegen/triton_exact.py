"""Exact operations (:mod:`sparsedsl.lang.strict`) in Triton: those whose result IEEE arithmetic fixes to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import sympy

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang import strict
from sparsedsl.lang.printing import ATOM, COMPARE
from sparsedsl.lang.symbols import SCORE
from sparsedsl.lang.tables import TableRead

__all__ = ["exact_text", "has_text", "needs_exact"]

_NAN = "propagate_nan=tl.PropagateNan.ALL"
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}
_COMPARISONS = {"lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_TEMPLATES = {
    "abs": "tl.abs({0})",
    "cast": "{0}",
    "ceil": "tl.ceil({0})",
    "floor": "tl.floor({0})",
    "maximum": f"tl.maximum({{0}}, {{1}}, {_NAN})",
    "minimum": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "neg": "(-{0})",
    "relu": f"tl.maximum({{0}}, 0.0, {_NAN})",
    "round": "tl.where(tl.abs({0}) < {half}, {0} + {sum} - {sum}, {0})",
    "shl": "({0} << {1})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0)).to({type})",
    "to_int32": "{0}.to(tl.int32)",
    "to_int64": "{0}.to(tl.int64)",
    "trunc": "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    "where": "tl.where({0}, {1}, {2}).to({type})",
}
# Adding a number this large leaves no bits below 1, rounded to even, as torch.round does; there is nothing to round beyond half of it.
_ROUNDING = {
    False: {"half": "4194304.0", "sum": "12582912.0"},
    True: {"half": "2251799813685248.0", "sum": "6755399441055744.0"},
}
_TRITON = {"f16": "tl.float16", "bf16": "tl.bfloat16", "f32": "tl.float32", "f64": "tl.float64", "i64": "tl.int64"}


class _Prints(Protocol):
    """What is asked of the printer: an operand, and a table's entry as it is stored."""

    def text(self, expr: sympy.Basic, level: int = 0) -> str: ...

    def read(self, expr: TableRead) -> str: ...


def has_text(expr: strict.StrictFunction) -> bool:
    """Whether :func:`exact_text` can print the operation itself. A shift only where it is ``1 << n`` within 64 bits."""
    return expr.operation in _PRINTED and (expr.operation != "shl" or bool(expr.is_positive))


def exact_text(printer: _Prints, expr: strict.StrictFunction) -> tuple[str, int]:
    """Text and precedence of an exact operation; of a condition, the boolean."""
    operation, prefix = expr.operation, expr.prefix
    if not has_text(expr):
        raise UnsupportedError(
            f"generated Triton kernels cannot do {type(expr).__name__}(...) exactly as torch rounds it; here it depends on more than "
            "q_idx, kv_idx or their difference alone, for which torch would prepare a table. Use backend='flex' or backend='tiled', "
            "or write it with integers"
        )
    kind = _TRITON[prefix]
    double = prefix == "f64"
    plain = strict.OPERATIONS[operation].plain
    # Half precision is computed in float32 and rounded, as torch does it: exact for one operation.
    wide = "tl.float32" if prefix in ("f16", "bf16") else kind
    operands = [_operand(printer, a, "" if i in plain else kind, wide) for i, a in enumerate(expr.args)]
    if operation in _COMPARISONS:
        return f"{operands[0]} {_COMPARISONS[operation]} {operands[1]}", COMPARE
    if operation in _SYMBOLS:
        text = f"({operands[0]} {_SYMBOLS[operation]} {operands[1]})"
    elif operation == "div" or operation == "reciprocal":
        over, under = operands if operation == "div" else (_number(1.0, wide), operands[0])
        text = f"({over} / {under})" if double else f"tl.div_rn({over}, {under})"
    elif operation == "sqrt":
        text = f"tl.sqrt{'' if double else '_rn'}({operands[0]})"
    else:
        if _TEMPLATES[operation].count("{0}") > 1 and strict.number(expr.args[0]) is None:
            printer.text(expr.args[0])  # asked for twice, so that it gets a name
        text = _TEMPLATES[operation].format(*operands, type=wide, **_ROUNDING[double])
    return (f"{text}.to({kind})" if wide != kind and strict.OPERATIONS[operation].result == "same" else text), ATOM


_PRINTED = frozenset({*_SYMBOLS, *_COMPARISONS, *_TEMPLATES, "div", "reciprocal", "sqrt", "wrap"})


def _operand(printer: _Prints, expr: sympy.Basic, kind: str, wide: str) -> str:
    """An operand: rounded to the type of the operation, then in the type it is computed in."""
    number = strict.number(expr)
    if number is not None and not isinstance(number, bool):
        return _number(number, wide) if kind else repr(number)
    text = printer.read(expr) if isinstance(expr, TableRead) else printer.text(expr, ATOM if kind else 0)
    if not kind or (_has_type(expr, kind) and wide == kind):
        return text
    return f"{text}.to({kind})" + (f".to({wide})" if wide != kind else "")


def _has_type(expr: sympy.Basic, kind: str) -> bool:
    if expr == SCORE:
        return kind == "tl.float32"
    if not isinstance(expr, strict.StrictFunction) or strict.OPERATIONS[expr.operation].result != "same":
        return False
    return _TRITON[expr.prefix] == kind


def _number(value: float, kind: str) -> str:
    text = f'float("{value}")' if value in (float("inf"), float("-inf")) else repr(value)
    return f"tl.full([], {text}, {kind})"


def needs_exact(expr: sympy.Basic) -> bool:
    """Whether ``expr`` would change if a product were added without being rounded: then its kernel is compiled without fusion.

    So it is where an exact operation adds up a product, and where a mask does, which analysis has computed without fusion.
    """
    adding = [node for node in _nodes(expr) if _adds(node, in_mask=not isinstance(expr, sympy.Expr))]
    return any(_multiplies(part) for node in adding for operand in node.args for part in _real_parts(operand))


def _nodes(expr: sympy.Basic) -> Iterator[sympy.Basic]:
    """Every operation in ``expr``; the fraction of an integer division is none."""
    yield expr
    whole = isinstance(expr, sympy.floor) and expr.args[0].is_rational
    for part in expr.args[0].as_numer_denom() if whole else expr.args:
        yield from _nodes(part)


def _adds(node: sympy.Basic, in_mask: bool) -> bool:
    if isinstance(node, strict.StrictFunction):
        return node.prefix != "i64" and node.operation in ("add", "sub", "round")
    return in_mask and isinstance(node, sympy.Add) and not node.is_integer


def _multiplies(node: sympy.Basic) -> bool:
    if isinstance(node, strict.StrictFunction):
        return node.operation == "mul"
    return isinstance(node, (sympy.Mul, sympy.Pow))


def _real_parts(expr: sympy.Basic) -> Iterator[sympy.Basic]:
    """``expr`` and what it is made of, as far as these are real numbers: integers are rounded already."""
    if isinstance(expr, sympy.Expr) and not expr.is_integer and not isinstance(expr, TableRead):
        yield expr
        for argument in expr.args:
            yield from _real_parts(argument)
