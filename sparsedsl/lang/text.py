"""Read the text form of expressions back: :func:`parse`. Never executes Python: it walks the syntax tree.

The other direction is :mod:`sparsedsl.lang.printing`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang import numeric, strict
from sparsedsl.lang.expressions import Expression, Index, Mask, Score, _merge, as_index, as_mask, as_score, table
from sparsedsl.lang.symbols import INDEX_SYMBOLS, SCORE

__all__ = ["Reader", "parse"]

_FUNCTIONS: Mapping[str, Any] = {name: getattr(numeric, name) for name in numeric.__all__} | {"abs": abs, "table": table}
_OPERATORS: Mapping[type, str] = {
    ast.Add: "__add__", ast.Sub: "__sub__", ast.Mult: "__mul__", ast.Div: "__truediv__", ast.FloorDiv: "__floordiv__",
    ast.Mod: "__mod__", ast.Pow: "__pow__", ast.BitAnd: "__and__", ast.BitOr: "__or__", ast.BitXor: "__xor__",
    ast.LShift: "__lshift__", ast.RShift: "__rshift__", ast.Lt: "__lt__", ast.LtE: "__le__", ast.Gt: "__gt__",
    ast.GtE: "__ge__", ast.Eq: "__eq__", ast.NotEq: "__ne__",
}  # fmt: skip


def _exact(name: str) -> Callable[..., Any] | None:
    """The function that builds ``name``, e.g. ``f32_log``, from expressions and numbers; None if it is no exact operation."""
    prefix, _, operation = name.partition("_")
    rule = strict.OPERATIONS.get(operation)
    if rule is None or prefix not in strict.TYPES:
        return None

    def apply(*values: Any) -> Index | Score:
        if len(values) != rule.arity:
            raise PatternError(f"{name}() wants {rule.arity} operands; got {len(values)}")
        function = strict.strict_class(prefix, operation)
        bound = _merge(*values)
        if rule.result == "same" and prefix != "i64":
            return Score(function(*(operand(v) for v in values)), bound)
        return Index(function(*(operand(v) for v in values)), bound)

    def operand(value: Any) -> sympy.Basic:
        if isinstance(value, Mask):
            return value.expr
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        return (as_index(value) if isinstance(value, int) else as_score(value)).expr

    return apply


class Reader:
    """Evaluates the text form by walking Python's syntax tree: only the language's own names and operators exist in it."""

    functions: Mapping[str, Any] = _FUNCTIONS

    def __init__(self, source: str):
        self.source = source
        self.names: dict[str, Any] = {name: Index(symbol) for name, symbol in INDEX_SYMBOLS.items()}
        self.names |= {"score": Score(SCORE), "inf": float("inf")}

    def fail(self, node: ast.AST, why: str) -> PatternError:
        """The error for ``node``."""
        return PatternError(f"cannot read {ast.get_source_segment(self.source, node) or self.source!r}: {why}")

    def program(self) -> list[Any]:
        """Run declarations, and return the values of the expression lines."""
        try:
            tree = ast.parse(self.source)
        except SyntaxError as error:
            raise PatternError(f"cannot read {self.source!r}: {error.msg} at line {error.lineno}") from None
        values = []
        for statement in tree.body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=made)) as value) if (
                    name not in self.names and self.declares(made)
                ):
                    self.names[name] = self.value(value)
                case ast.Expr(value=value):
                    values.append(self.value(value))
                case _:
                    raise self.fail(statement, "only `name = table(...)` lines and expressions may stand here")
        return values

    def declares(self, function: str) -> bool:
        """Whether ``name = function(...)`` may stand on a line."""
        return function == "table"

    def value(self, node: ast.AST) -> Any:
        """The value of one syntax node."""
        try:
            return self._value(node)
        except (ArithmeticError, TypeError) as error:  # 1 // 0, where(x), "a" * q_idx
            raise self.fail(node, str(error)) from None

    def _value(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=value) if isinstance(value, (bool, int, float, str)):
                return value
            case ast.Name(id=name):
                if name in self.names:
                    return self.names[name]
                if name in ("int", "float", "bool"):
                    return {"int": int, "float": float, "bool": bool}[name]
                raise self.fail(node, f"unknown name {name!r}; declare it above: {name} = table({name!r})")
            case ast.Tuple(elts=elements):
                return tuple(self.value(element) for element in elements)
            case ast.UnaryOp(op=op, operand=operand):
                return self.unary(node, op, self.value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(node, op, self.value(left), self.value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.binary(node, op, self.value(left), self.value(right))
            case ast.Compare():
                raise self.fail(node, "chained comparisons drop a side; write (a < b) & (b < c)")
            case ast.BoolOp():
                raise self.fail(node, "write & and | instead of `and` and `or`")
            case ast.Subscript(value=target, slice=index):
                return self.value(target)[self.value(index)]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in self.functions:
                named = {str(k.arg): self.value(k.value) for k in keywords}
                return self.functions[name](*(self.value(a) for a in arguments), **named)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (exact := _exact(name)) is not None:
                return exact(*(self.value(a) for a in arguments))
        raise self.fail(node, f"{type(node).__name__} is not part of the language")

    def unary(self, node: ast.AST, op: ast.unaryop, x: Any) -> Any:
        """``-x``, ``+x``, ``~x``."""
        match op:
            case ast.USub():
                return -x
            case ast.UAdd():
                return x
            case ast.Invert():
                return (not x) if isinstance(x, bool) else ~x
        raise self.fail(node, "write ~a instead of `not a`")

    def binary(self, node: ast.AST, op: ast.AST, left: Any, right: Any) -> Any:
        """An arithmetic, logical or comparison operator."""
        method = _OPERATORS.get(type(op))
        if method is None:
            raise self.fail(node, f"the operator {type(op).__name__} is not part of the language")
        if not isinstance(left, Expression) and isinstance(right, Expression):
            left = (as_mask if isinstance(left, bool) else as_index if isinstance(left, int) else as_score)(left)
        if method == "__truediv__" and isinstance(left, int) and isinstance(right, int):
            return as_score(left) / right
        result = getattr(left, method)(right)
        if result is NotImplemented:
            raise self.fail(node, f"the operator does not join {type(left).__name__} and {type(right).__name__}")
        return result


def parse(text: str) -> Any:
    """Read the text form back: an :class:`Index`, :class:`Mask` or :class:`Score`. Never executes Python.

    Raises :class:`~sparsedsl.PatternError` for anything that is not part of the language.

    >>> import sparsedsl as sd
    >>> mask = sd.parse("doc = table('doc', monotone=True)\\n(kv_idx <= q_idx) & (doc[q_idx] == doc[kv_idx])")
    >>> mask.same_as(sd.parse(mask.text))
    True
    """
    if not isinstance(text, str):
        raise PatternError(f"parse() reads text; got {text!r} ({type(text).__name__})")
    values = Reader(text).program()
    if len(values) != 1:
        raise PatternError(f"the text form holds one expression after its tables; got {len(values)} in {text!r}")
    value = values[0]
    if isinstance(value, Expression):
        return value
    if isinstance(value, bool):
        return as_mask(value)
    return as_index(value) if isinstance(value, int) else as_score(value)
