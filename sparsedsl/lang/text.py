"""Read the text form of expressions back: :func:`parse`. Never executes Python: it walks the syntax tree.

The other direction is :mod:`sparsedsl.lang.printing`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy

from sparsedsl.errors import PatternError, SparseDSLError
from sparsedsl.lang import numeric, strict
from sparsedsl.lang.advice import answering
from sparsedsl.lang.expressions import Index, Mask, Score, as_index, as_mask, as_score, joined
from sparsedsl.lang.known_facts import DEEPEST, LARGEST
from sparsedsl.lang.symbols import INDEX_SYMBOLS, SCORE
from sparsedsl.lang.table_reads import table
from sparsedsl.lang.wrapped import Expression, merge_carried

__all__ = ["Reader", "parse", "reading"]

# Characters of a text, levels of brackets and operators in it, bits of a number that is worked out while reading.
LONGEST, LEVELS, BITS = 20 * LARGEST, 2 * DEEPEST, 1024
_JOINS = {ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"}
_KINDS = {"int": int, "float": float, "bool": bool}

_FUNCTIONS: Mapping[str, Any] = {
    **{name: answering(getattr(numeric, name)) for name in numeric.__all__}, "abs": abs, "table": answering(table),
}  # fmt: skip
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

    def apply(*values: object) -> Index | Score:
        if len(values) != rule.arity:
            raise PatternError(f"{name}() wants {rule.arity} operands; got {len(values)}")
        function = strict.strict_class(prefix, operation)
        bound = merge_carried(*values)
        if rule.result == "same" and prefix != "i64":
            return Score(function(*(operand(v) for v in values)), bound)
        return Index(function(*(operand(v) for v in values)), bound)

    def operand(value: object) -> sympy.Basic:
        if isinstance(value, Mask):
            return value.expr
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        return (as_index(value) if isinstance(value, int) else as_score(value)).expr

    return apply


def _short(text: str, most: int = 80) -> str:
    """``text``, or its two ends where it is long."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


@contextmanager
def reading(text: str) -> Iterator[None]:
    """Whatever goes wrong with ``text`` inside is a PatternError, and a short one."""
    try:
        yield
    except PatternError as error:
        if len(str(error)) < 600:
            raise
        raise PatternError(_short(str(error), 500)) from None
    except (RecursionError, MemoryError):
        raise PatternError(f"cannot read {_short(text)!r}: it is nested too deeply, or too large") from None
    except (SparseDSLError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PatternError(f"cannot read {_short(text)!r}: {_short(str(error), 300)}") from None


class Reader:
    """Evaluates the text form by walking Python's syntax tree: only the language's own names and operators exist in it.

    What is called is a function, what is subscripted may be a table, and other names are symbols, numbers and nodes. So a table may
    have the name of a function or of a number: ``inf[q_idx]`` reads a table, and ``-inf`` is none.
    """

    functions: Mapping[str, Any] = _FUNCTIONS

    def __init__(self, source: str):
        self.source = source
        self.names: dict[str, Any] = {name: Index(symbol) for name, symbol in INDEX_SYMBOLS.items()}
        self.names |= {"score": Score(SCORE), "inf": float("inf")}
        # What has a meaning before anything is declared. A table may have such a name: it is read with indices, which these are not.
        self.own_names = frozenset(self.names)
        self.tables: dict[str, Any] = {}
        self.level = 0

    def fail(self, node: ast.AST, why: str) -> PatternError:
        """The error for ``node``."""
        shown = ast.get_source_segment(self.source, node) or self.source
        return PatternError(f"cannot read {_short(shown)!r}: {_short(why, 300)}")

    def check_extent(self, statement: ast.stmt) -> None:
        """Refuse what would be refused once it is made, before the time is spent: sums and unions are made operand by operand."""
        values = [getattr(statement, "value", statement)]
        while values:
            value = values.pop()
            if isinstance(value, ast.Call):  # a node of a program holds several expressions
                values += [*value.args, *(keyword.value for keyword in value.keywords)]
                continue
            nodes = [node for node in ast.walk(value) if isinstance(node, ast.expr)]
            # Names of functions and of tables are no nodes of their own, nor are the operators between three and more operands.
            written = len(nodes) - sum(isinstance(node, (ast.Call, ast.Subscript)) for node in nodes)
            if written > 1.5 * LARGEST:
                raise PatternError(
                    f"cannot read {_short(self.source)!r}: it has {written:,} names, numbers and operations, and the limit is about "
                    f"{LARGEST:,}: look repeated parts up in a table, t = table('t'), then t[kv_idx]"
                )

    def program(self) -> list[Any]:
        """Run declarations, and return the values of the expression lines."""
        if len(self.source) > LONGEST:
            raise PatternError(
                f"cannot read {_short(self.source)!r}: it has {len(self.source):,} characters, and the limit is {LONGEST:,}"
            )
        try:
            tree = ast.parse(self.source)
        except SyntaxError as error:
            raise PatternError(f"cannot read {_short(self.source)!r}: {error.msg} at line {error.lineno}") from None
        values = []
        for statement in tree.body:
            self.check_extent(statement)
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=made)) as value) if self.declares(
                    made
                ) and self.is_free(name, made):
                    (self.tables if made == "table" else self.names)[name] = self.value(value)
                case ast.Expr(value=value):
                    values.append(self.value(value))
                case _:
                    raise self.fail(statement, "only `name = table(...)` lines and expressions may stand here")
        return values

    def declares(self, function: str) -> bool:
        """Whether ``name = function(...)`` may stand on a line."""
        return function == "table"

    def is_free(self, name: str, function: str) -> bool:
        """Whether ``name`` may be declared, as what ``function`` makes."""
        return name not in self.tables and (name not in self.names or (function == "table" and name in self.own_names))

    def value(self, node: ast.AST) -> Any:
        """The value of one syntax node."""
        if self.level >= LEVELS:
            raise self.fail(node, f"it nests more than {LEVELS} levels deep")
        self.level += 1
        try:
            match node:
                case ast.Constant(value=value) if isinstance(value, (bool, int, float, str)):
                    return self.bounded(node, value)
                case ast.Name(id=name):
                    if name in self.names:
                        return self.names[name]
                    if name in self.tables:
                        return self.tables[name]
                    raise self.fail(node, f"unknown name {name!r}; declare it above: {name} = table({name!r})")
                case ast.Tuple(elts=elements):
                    return tuple([self.value(element) for element in elements])
                case ast.UnaryOp(op=op, operand=operand):
                    return self.unary(node, op, self.value(operand))
                case ast.BinOp():
                    return self.chain(node)
                case ast.Compare(left=left, ops=[op], comparators=[right]):
                    return self.binary(node, op, self.value(left), self.value(right))
                case ast.Compare():
                    raise self.fail(node, "chained comparisons drop a side; write (a < b) & (b < c)")
                case ast.BoolOp():
                    raise self.fail(node, "write & and | instead of `and` and `or`")
                case ast.Subscript(value=ast.Name(id=name), slice=index) if name in self.tables:
                    return self.tables[name][self.value(index)]
                case ast.Subscript(value=target, slice=index):
                    return self.value(target)[self.value(index)]
                case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in self.functions:
                    named = {str(k.arg): self.keyword(k) for k in keywords}
                    return self.functions[name](*[self.value(a) for a in arguments], **named)
                case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (exact := _exact(name)) is not None:
                    return exact(*[self.value(a) for a in arguments])
            raise self.fail(node, f"{type(node).__name__} is not part of the language")
        except (ArithmeticError, TypeError) as error:  # 1 // 0, where(x), "a" * q_idx
            raise self.fail(node, str(error)) from None
        finally:
            self.level -= 1

    def keyword(self, word: ast.keyword) -> Any:
        """The value of a keyword argument; ``dtype=`` names a Python type, whatever tables are called."""
        if word.arg == "dtype" and isinstance(word.value, ast.Name) and word.value.id in _KINDS:
            return _KINDS[word.value.id]
        return self.value(word.value)

    def bounded(self, node: ast.AST, value: object) -> Any:
        """A plain value, unless it is larger than anything the language has a use for."""
        if isinstance(value, int) and value.bit_length() > BITS:
            raise self.fail(node, f"the number has more than {BITS} bits")
        return value

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

    def chain(self, node: ast.BinOp) -> Any:
        """Operators that lean to the left, ``a + b + c``: however many, they are one level."""
        spine = [node]
        while isinstance(spine[-1].left, ast.BinOp):
            spine.append(spine[-1].left)
        parts = spine[::-1]
        values = [self.value(parts[0].left), *(self.value(part.right) for part in parts)]
        sign = _JOINS.get(type(node.op))
        if sign and all(isinstance(v, Mask) for v in values) and all(type(part.op) is type(node.op) for part in parts):
            return joined(sign, *values)
        value = values[0]
        for part, right in zip(parts, values[1:], strict=True):
            value = self.binary(part, part.op, value, right)
        return value

    def binary(self, node: ast.AST, op: ast.AST, left: Any, right: Any) -> Any:
        """An arithmetic, logical or comparison operator."""
        method = _OPERATORS.get(type(op))
        if method is None:
            raise self.fail(node, f"the operator {type(op).__name__} is not part of the language")
        if not isinstance(left, Expression) and isinstance(right, Expression):
            left = (as_mask if isinstance(left, bool) else as_index if isinstance(left, int) else as_score)(left)
        if not isinstance(left, Expression) and not isinstance(right, Expression):
            self.check_numbers(node, method, left, right)
        if method == "__truediv__" and isinstance(left, int) and isinstance(right, int):
            return as_score(left) / right
        result = getattr(left, method)(right)
        if result is NotImplemented and isinstance(left, int) and isinstance(right, float):
            result = getattr(float(left), method)(right)
        if result is NotImplemented:
            raise self.fail(node, f"the operator does not join {type(left).__name__} and {type(right).__name__}")
        return self.bounded(node, result)

    def check_numbers(self, node: ast.AST, method: str, left: Any, right: Any) -> None:
        """Refuse arithmetic without expressions that Python would spend hours or gigabytes on, or that joins texts."""
        if isinstance(left, (str, tuple, type)) or isinstance(right, (str, tuple, type)):
            raise self.fail(node, f"the operator does not join {type(left).__name__} and {type(right).__name__}")
        if method in ("__pow__", "__lshift__") and isinstance(left, int) and isinstance(right, int) and abs(right) > BITS:
            raise self.fail(node, f"the number has more than {BITS} bits")


def parse(text: str) -> Index | Mask | Score:
    """Read the text form back: an :class:`Index`, :class:`Mask` or :class:`Score`. Never executes Python.

    Raises :class:`~sparsedsl.PatternError` for anything that is not part of the language, and for what is too large: see
    :mod:`sparsedsl.lang.known_facts`.

    >>> import sparsedsl as sd
    >>> mask = sd.parse("doc = table('doc', monotone=True)\\n(kv_idx <= q_idx) & (doc[q_idx] == doc[kv_idx])")
    >>> mask.same_as(sd.parse(mask.text))
    True
    """
    if not isinstance(text, str):
        raise PatternError(f"parse() reads text; got {_short(repr(text))} ({type(text).__name__})")
    with reading(text):
        values = Reader(text).program()
        if len(values) != 1:
            raise PatternError(f"the text form holds one expression after its tables; got {len(values)} in {_short(text)!r}")
        value = values[0]
        if isinstance(value, (Index, Mask, Score)):
            return value
        if isinstance(value, bool):
            return as_mask(value)
        return as_index(value) if isinstance(value, int) else as_score(value)
