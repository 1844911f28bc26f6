"""Nodes -> the language, for whole numbers and booleans. Floats are in :mod:`sparsedsl.tracing.floats`.

torch's rules that differ from mathematics are kept: ``+`` and ``*`` of booleans are ``|`` and ``&``, integers narrower than
32 bits wrap around, negative indices count from the end. 32- and 64-bit integers that would wrap around are refused.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from sparsedsl.lang import functions as fn
from sparsedsl.lang import numeric, strict
from sparsedsl.lang.expressions import Index, Mask, as_index
from sparsedsl.lang.reach import Reach
from sparsedsl.lang.symbols import INDEX_SYMBOLS
from sparsedsl.lang.table_reads import Table
from sparsedsl.lang.tables import TableRead, TableSpec
from sparsedsl.tracing import capture
from sparsedsl.tracing.bits import Bits
from sparsedsl.tracing.floats import Floats
from sparsedsl.tracing.operations import COMPARISONS
from sparsedsl.tracing.trace_graph import Captured, TraceNode, fail

__all__ = ["Converter"]

_WIDTHS = {torch.uint8: (0, 256), torch.int8: (-128, 256), torch.int16: (-(1 << 15), 1 << 16)}
_WIDE = (torch.int32, torch.int64)
_LEAVING = frozenset(
    {"add", "sub", "mul", "add_scaled", "sub_scaled", "addcmul", "neg", "abs", "pow", "shl", "cast", "short_sum"}
)
_POSITIONS = 1 << 24  # positions are taken to be smaller: what more of them do is seen to by every call
_UNBOUNDED = (1 << 31) - 1
_SWAPPED = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge", "eq": "eq", "ne": "ne"}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


class Converter(Floats, Bits):
    """Turns nodes into :class:`Index`, :class:`Mask` and :class:`Score`, each once.

    ``claims``: table -> lower bound declared for its values. A read as an index or divisor that would be simpler if its
    tables were known to be at least 0 or 1 puts them in ``wanted`` when their values are; the caller then converts again with
    these claims.
    """

    def __init__(self, claims: dict[Captured, int], learned: bool):
        super().__init__()
        self.claims, self.wanted, self.learned = claims, dict(claims), learned
        self._indices: dict[TraceNode, Index] = {}
        self._reads: dict[TraceNode, list[Captured]] = {}
        self._masks: dict[TraceNode, Mask] = {}

    def index(self, node: TraceNode) -> Index:
        """A node of integer or boolean type as an integer expression."""
        if node not in self._indices:
            self._indices[node] = self._wrapped(node, self.located(self._index, node))
        return self._indices[node]

    def mask(self, node: TraceNode) -> Mask:
        """A node of any type as a boolean: not zero."""
        if node not in self._masks:
            self._masks[node] = self.located(self._mask, node)
        return self._masks[node]

    # -- tables ------------------------------------------------------------------------------------------------------------------

    def read(self, node: TraceNode) -> Any:
        """A table read: an index, a mask or a score by the table's type."""
        captured, *indices = node.args
        return Table(self.spec(captured))[tuple(self.position(i, captured, d) for d, i in enumerate(indices))]

    def spec(self, captured: Captured) -> TableSpec:
        """The declaration of a captured tensor, with the facts claimed about it."""
        tensor, low = captured.tensor, self.claims.get(captured)
        whole = not tensor.dtype.is_floating_point and tensor.dtype != torch.bool
        return TableSpec.declare(
            captured.name,
            dtype="int" if whole else "bool" if tensor.dtype == torch.bool else "float",
            monotone=whole and capture.is_monotone(tensor),
            learned=self.learned and tensor.requires_grad,
            values_in=None if low is None else (low, max(_UNBOUNDED, int(tensor.long().max()))),
        )

    def position(self, node: TraceNode, captured: Captured, dimension: int) -> Index:
        """An index of a table; one that may be negative counts from the end, as in torch."""
        index = self.index(node)
        if index.expr.is_nonnegative:
            return index
        self.want(node, 0)
        size = sympy.Integer(captured.tensor.shape[dimension])
        return Index(strict.strict_class("i64", "wrap")(index.expr, size))

    def want(self, node: TraceNode, low: int) -> None:
        """Ask for a claim about the integer tables that ``node`` is made of, where their values allow it."""
        if node.op == "read":
            captured = node.args[0]
            if not node.dtype.is_floating_point and node.dtype != torch.bool and self.wanted.get(captured, -1) < low:
                lowest = capture.lowest(captured.tensor)
                if lowest is not None and lowest >= low:
                    self.wanted[captured] = low
            return
        for part in node.inputs:
            self.want(part, low)

    # -- integers ----------------------------------------------------------------------------------------------------------------

    def _index(self, node: TraceNode) -> Index:
        if node.dtype == torch.bool:
            return as_index(self.mask(node))
        args = node.args
        match node.op:
            case "symbol":
                return Index(INDEX_SYMBOLS[args[0]])
            case "const":
                return Index(sympy.Integer(int(args[0])))
            case "read":
                return self.read(node)
            case "cast":
                return self.index(args[0]) if not args[0].dtype.is_floating_point else self._truncated(node)
            case "where":
                return numeric.where(self.mask(args[0]), self.index(args[1]), self.index(args[2]))
            case "bitwise_and" | "bitwise_or" | "bitwise_xor" | "shl" | "shr":
                return self.bitwise(node)
            case "short_sum":
                return functools.reduce(operator.add, map(self.index, args))
            case "add" | "sub" | "mul" | "minimum" | "maximum" | "fmin" | "fmax":
                return _INTEGER[node.op](*map(self.index, args))
            case "add_scaled" | "sub_scaled":
                return _INTEGER[node.op[:3]](self.index(args[0]), self.index(args[1]) * int(args[2].args[0]))
            case "neg" | "abs" | "bitwise_not" | "sign" | "relu" | "floor" | "ceil" | "trunc" | "round":
                return _INTEGER[node.op](self.index(args[0]))
            case "floor_divide" | "div_floor":
                return self.index(args[0]) // self.divisor(args[1])
            case "remainder":
                return self.index(args[0]) % self.divisor(args[1])
            case "div_trunc":
                return _truncating(self.index(args[0]), self.divisor(args[1]))
            case "fmod":
                divisor = self.divisor(args[1])
                return self.index(args[0]) - divisor * _truncating(self.index(args[0]), divisor)
            case "pow" if args[1].is_const and args[1].args[0] >= 0:
                return self.index(args[0]) ** int(args[1].args[0])
            case "addcmul":
                return self.index(args[0]) + self.index(args[1]) * self.index(args[2]) * self.index(args[3])
        if node.op not in strict.INTEGER:
            fail(
                f"{node.op} of {node.dtype}",
                "Use + - * // % comparisons, torch.where, minimum, maximum or bit operations",
                node.where,
            )
        return self.opaque(node)

    def opaque(self, node: TraceNode) -> Index:
        """An integer operation that the language has no word for, as an exact operation."""
        return Index(strict.strict_class("i64", node.op)(*(self.index(a).expr for a in node.args)))

    def divisor(self, node: TraceNode) -> Index:
        """A divisor, which must be known not to be zero."""
        power = self._power_of_two(node)
        divisor = self.index(node) if power is None else power
        if not divisor.expr.is_positive and not divisor.expr.is_negative:
            self.want(node, 1)
        return divisor

    def _power_of_two(self, node: TraceNode) -> Index | None:
        """``1 << n`` or ``2 ** n`` with an ``n`` that is never negative, as the language has it; None for anything else."""
        if node.op not in ("shl", "pow") or node.args[1].is_const or not node.args[0].is_const:
            return None
        bits = self.index(node.args[1])
        if node.args[0].args[0] != (1 if node.op == "shl" else 2):
            return None
        self.want(node.args[1], 0)
        return as_index(1) << bits if bits.expr.is_nonnegative else None

    def _wrapped(self, node: TraceNode, index: Index) -> Index:
        """Integers narrower than 32 bits wrap around wherever a result may leave their range; wider ones must stay inside."""
        if node.dtype in _WIDE and node.op in _LEAVING:
            self._check_inside(node, index)
        if node.dtype not in _WIDTHS or node.op in ("read", "const", "minimum", "maximum", "where", "remainder", "bitwise_and"):
            return index
        low, size = _WIDTHS[node.dtype]
        return (index - low) % size + low

    def _check_inside(self, node: TraceNode, index: Index) -> None:
        tables = self.reads(node)
        if not tables or _comes_of_floats(index.expr):  # every call checks how far positions reach; of floats nobody knows
            return
        symbols = dict.fromkeys(INDEX_SYMBOLS, (0, _POSITIONS))
        values = {one.name: capture.extremes(one.tensor) for one in tables if not one.tensor.dtype.is_floating_point}
        low, high = Reach(symbols, values, tight=True).range(index.expr)
        limits = torch.iinfo(node.dtype)
        if low < limits.min or high > limits.max:
            held = ", ".join(f"{name} ({least} to {most})" for name, (least, most) in values.items())
            fail(
                f"{node.op} of {node.dtype}, which may wrap around: with the values of {held} it gives {low} to {high}",
                "Here integers are exact. Compare values instead of their difference (a == b, a < b), or make the table smaller or wider",
                node.where,
            )

    def reads(self, node: TraceNode) -> list[Captured]:
        """The tables that a node is computed from."""
        if node not in self._reads:
            found = [node.args[0]] if node.op == "read" else []
            self._reads[node] = list(dict.fromkeys([*found, *(table for part in node.inputs for table in self.reads(part))]))
        return self._reads[node]

    # -- booleans ----------------------------------------------------------------------------------------------------------------

    def _mask(self, node: TraceNode) -> Mask:
        if node.dtype.is_floating_point:
            return self.float_compare("ne", node, TraceNode("const", (0,), node.dtype, node.dtype), node.dtype)
        if node.dtype != torch.bool:
            return self.integer_compare("ne", self.index(node), as_index(0))
        args = node.args
        match node.op:
            case "const":
                return Mask(sympy.true if args[0] else sympy.false)
            case "read":
                return self.read(node)
            case "cast" | "logical_and" | "logical_or" | "logical_xor" | "logical_not":
                return _BOOLEAN[node.op](*map(self.mask, args))
            case "isnan" | "isinf" | "isposinf" | "isneginf" | "signbit":
                return self.predicate(node)
            case "where":
                condition, a, b = map(self.mask, args)
                return (condition & a) | (~condition & b)
        if node.op in COMPARISONS and node.common.is_floating_point:
            return self.float_compare(node.op, args[0], args[1], node.common)
        if node.op in COMPARISONS and node.common != torch.bool:
            return self.integer_compare(node.op, self.index(args[0]), self.index(args[1]))
        if node.op in _BOOLEAN:
            return _BOOLEAN[node.op](*map(self.mask, args))
        fail(f"{node.op} of booleans", "Use & | ^ ~ and torch.where", node.where)

    def integer_compare(self, op: str, left: Index, right: Index) -> Mask:
        """A comparison of integers; one of a mask taken as a number with a constant becomes the mask again."""
        if isinstance(right.expr, fn.Where) and left.expr.is_Integer:
            op, left, right = _SWAPPED[op], right, left
        if (
            isinstance(left.expr, fn.Where)
            and right.expr.is_Integer
            and left.expr.args[1].is_Integer
            and left.expr.args[2].is_Integer
        ):
            condition, yes, no = left.expr.args
            on, off = (bool(_COMPARE[op](int(value), int(right.expr))) for value in (yes, no))
            mask = Mask(condition)
            return (mask if on else ~mask) if on != off else Mask(sympy.true if on else sympy.false)
        return _COMPARE[op](left, right)


def _comes_of_floats(expr: sympy.Basic) -> bool:
    exact = any(one.prefix != "i64" for one in expr.atoms(strict.StrictFunction))
    return exact or any(read.spec.dtype == "float" for read in expr.atoms(TableRead))


def _truncating(a: Index, b: Index) -> Index:
    """Integer division that rounds towards zero."""
    if a.expr.is_nonnegative and b.expr.is_positive:
        return a // b
    quotient = abs(a) // abs(b)
    return numeric.where((a < 0) ^ (b < 0), -quotient, quotient)


_INTEGER: dict[str, Callable[..., Index]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "minimum": numeric.minimum,
    "maximum": numeric.maximum,
    "fmin": numeric.minimum,
    "fmax": numeric.maximum,
    "neg": lambda a: -a,
    "abs": abs,
    "bitwise_not": lambda a: ~a,
    "sign": lambda a: numeric.where(a > 0, 1, numeric.where(a < 0, -1, 0)),
    "relu": lambda a: numeric.maximum(a, 0),
    **dict.fromkeys(("floor", "ceil", "trunc", "round"), lambda a: a),
}

_BOOLEAN: dict[str, Callable[..., Mask]] = {
    **dict.fromkeys(("logical_and", "bitwise_and", "mul", "minimum"), lambda a, b: a & b),
    **dict.fromkeys(("logical_or", "bitwise_or", "add", "maximum"), lambda a, b: a | b),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "ne"), lambda a, b: a ^ b),
    **dict.fromkeys(("logical_not", "bitwise_not"), lambda a: ~a),
    "cast": lambda a: a,
    "eq": lambda a, b: ~(a ^ b),
    "lt": lambda a, b: ~a & b,
    "le": lambda a, b: ~a | b,
    "gt": lambda a, b: a & ~b,
    "ge": lambda a, b: a | ~b,
}
