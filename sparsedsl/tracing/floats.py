"""Nodes -> the language, for floats: ordinary real expressions in scores, exact ones wherever a decision hangs on the last bit.

A float that is compared, or turned into a whole number, decides which pairs attend or which table entry is read; it becomes a
chain of exact operations (:mod:`sparsedsl.lang.strict`). Everything else a score is made of is real arithmetic, free to be
simplified. Comparisons of the logit itself are real: the logit has no exact value.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from sparsedsl.lang import numeric, strict
from sparsedsl.lang.expressions import Index, Mask, Score, as_score
from sparsedsl.lang.functions import NotReal
from sparsedsl.lang.symbols import SCORE
from sparsedsl.tracing.conversion import Conversion
from sparsedsl.tracing.operations import COMPARISONS
from sparsedsl.tracing.trace_graph import TraceNode, fail

__all__ = ["Floats"]

# type -> (prefix of exact operations, bits of its significand)
_TYPES = {torch.float16: ("f16", 11), torch.bfloat16: ("bf16", 8), torch.float32: ("f32", 24), torch.float64: ("f64", 53)}


class Floats(Conversion):
    """The part of :class:`~sparsedsl.tracing.convert.Converter` for float nodes."""

    def __init__(self) -> None:
        super().__init__()
        self._scores: dict[TraceNode, Score] = {}
        self._exact: dict[TraceNode, sympy.Basic] = {}
        self._of_score: dict[TraceNode, bool] = {}

    # -- real arithmetic ---------------------------------------------------------------------------------------------------------

    def score(self, node: TraceNode) -> Score:
        """A node of any type as a real expression."""
        if node not in self._scores:
            self._scores[node] = self.located(self._score, node)
        return self._scores[node]

    def _score(self, node: TraceNode) -> Score:
        if not node.dtype.is_floating_point:
            return as_score(self.index(node))
        match node.op:
            case "symbol":
                return Score(SCORE)
            case "const":
                return as_score(self._number(node), where="constant")
            case "read":
                return self.read(node)
            case "where":
                return as_score(numeric.where(self.mask(node.args[0]), self.score(node.args[1]), self.score(node.args[2])))
            case "short_sum":
                return functools.reduce(operator.add, map(self.score, node.args))
            case op if op in _REAL and (op not in _JUMPS or self.uses_score(node)):
                parts = [self.score(part) for part in node.args]
                with contextlib.suppress(NotReal):  # no real number, such as log(-1), is one that torch has
                    return as_score(_REAL[op](*parts))
        return Score(self.exact(node))

    def _number(self, node: TraceNode) -> float | int:
        value = node.args[0]
        if isinstance(value, complex) or value != value:
            fail(f"the constant {value}", "Drop a pair with float('-inf'), or in the mask", node.where)
        return value

    # -- exact arithmetic --------------------------------------------------------------------------------------------------------

    def exact(self, node: TraceNode) -> sympy.Basic:
        """A node of any type as an operand of exact operations."""
        if node not in self._exact:
            self._exact[node] = self.located(self._exactly, node)
        return self._exact[node]

    def _exactly(self, node: TraceNode) -> sympy.Basic:
        if not node.dtype.is_floating_point:
            return self.index(node).expr
        match node.op:
            case "symbol":
                return SCORE
            case "const":
                value = self._number(node)
                return sympy.Integer(value) if isinstance(value, int) else as_score(value).expr
            case "read":
                return self.read(node).expr
            case "where":
                return self._apply("where", node.dtype, self.mask(node.args[0]).expr, *map(self.exact, node.args[1:]))
            case "cast":
                return self._apply("cast", node.dtype, self.exact(node.args[0]))
            case "short_sum":
                return self._exact_sum(node)
            case op if op not in strict.OPERATIONS:
                fail(
                    f"{op} of floats where it decides something",
                    "Compare before, or write it with + - * / and torch.log",
                    node.where,
                )
        return self._apply(node.op, node.common, *map(self.exact, node.args))

    def _exact_sum(self, node: TraceNode) -> sympy.Basic:
        """Of one or two floats: the last digit of more depends on the order in which torch adds them."""
        parts = [self.exact(part) for part in node.args]
        if len(parts) > 2:
            fail(
                f"a sum of {len(parts)} floats that decides which pairs attend or which entry is read",
                "Its last digit depends on the order in which torch adds. Write the sum out, x[0] + x[1] + x[2], or compare whole numbers",
                node.where,
            )
        return parts[0] if len(parts) == 1 else self._apply("add", node.common, *parts)

    def _apply(self, op: str, dtype: torch.dtype, *operands: sympy.Basic) -> sympy.Basic:
        """An exact operation; operands that are only cast to its own type go in as they are, since it casts them itself."""
        prefix, _ = _TYPES[dtype]
        function, plain = strict.strict_class(prefix, op), strict.OPERATIONS[op].plain
        cast = strict.strict_class(prefix, "cast")
        bare = [x.args[0] if isinstance(x, cast) and i not in plain else x for i, x in enumerate(operands)]
        return function(*(bare if op != "cast" or not isinstance(operands[0], cast) else [operands[0].args[0]]))

    def _truncated(self, node: TraceNode) -> Index:
        """A float cast to an integer type."""
        source = node.args[0]
        return Index(self._apply(f"to_{str(node.dtype).removeprefix('torch.')}", source.dtype, self.exact(source)))

    # -- decisions ---------------------------------------------------------------------------------------------------------------

    def predicate(self, node: TraceNode) -> Mask:
        """``isnan`` and its kin."""
        if not node.common.is_floating_point:
            return Mask(sympy.false) if node.op != "signbit" else self.index(node.args[0]) < 0
        return Index(self._apply(node.op, node.common, self.exact(node.args[0]))) != 0

    def float_compare(self, op: str, left: TraceNode, right: TraceNode, common: torch.dtype) -> Mask:
        """A comparison of floats of type ``common``."""
        if self.uses_score(left) or self.uses_score(right):
            return _RELATIONS[op](self.score(left), self.score(right))
        for x, c, relation in ((left, right, op), (right, left, _SWAPPED[op])):
            whole = self._whole_against(x, c, common)
            if whole is not None:
                return self._compare_whole(relation, whole, float(torch.tensor(c.args[0], dtype=common)))
        if op in ("gt", "ge"):
            op, left, right = _SWAPPED[op], right, left
        return Index(self._apply(op, common, self.exact(left), self.exact(right))) != 0

    def _whole_against(self, x: TraceNode, c: TraceNode, common: torch.dtype) -> Index | None:
        """``x`` if it is a whole number and ``c`` so small a constant that casting ``x`` to ``common`` cannot change the outcome.

        Casting is monotone and exact up to ``2**bits``, so a constant below that bound divides the cast values as it divides
        ``x``.
        """
        if not c.is_const or not abs(c.args[0]) < 2 ** _TYPES[common][1]:
            return None
        if x.op == "cast" and x.dtype == common:
            x = x.args[0]
        return None if x.dtype.is_floating_point else self.index(x)

    def _compare_whole(self, op: str, x: Index, c: float) -> Mask:
        if op in ("eq", "ne"):
            return (
                self.integer_compare(op, x, Index(sympy.Integer(int(c))))
                if c.is_integer()
                else Mask(sympy.true if op == "ne" else sympy.false)
            )
        bound = math.ceil(c) if op in ("lt", "ge") else math.floor(c)
        return self.integer_compare(op, x, Index(sympy.Integer(bound)))

    def uses_score(self, node: TraceNode) -> bool:
        """Whether the value depends on the logit itself."""
        if node not in self._of_score:
            self._of_score[node] = (node.op == "symbol" and node.dtype.is_floating_point) or any(
                map(self.uses_score, node.inputs)
            )
        return self._of_score[node]


_SWAPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}
_RELATIONS: dict[str, Callable[[Score, Score], Any]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip
assert set(_RELATIONS) == COMPARISONS


def _elu(x: Score, alpha: Score, scale: Score, input_scale: Score) -> Score:
    # the exponential is kept from overflowing where it is not taken: its gradient there would be 0 * inf
    return numeric.where(x > 0, scale * x, scale * alpha * (numeric.exp(numeric.minimum(x, 0.0) * input_scale) - 1))


def _softplus(x: Score, beta: Score, threshold: Score) -> Score:
    """Linear above the threshold, as the language's own is above 20."""
    bent = numeric.softplus(x * beta) / beta
    if threshold.expr == 20:
        return bent
    if threshold.expr > 20:
        bent = (numeric.relu(x * beta) + numeric.log(1 + numeric.exp(-abs(x * beta)))) / beta
    return numeric.where(x * beta > threshold, x, bent)


def _gelu_tanh(x: Score) -> Score:
    return x * 0.5 * (1 + numeric.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Real operations that jump, and so decide something: exact, unless it is the logit that jumps.
_JUMPS = frozenset({"sign", "threshold"})

# Operations with a real meaning in the language. Those that step (floor, round...) stay exact operations.
_REAL: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "add_scaled": lambda a, b, alpha: a + b * alpha,
    "sub_scaled": lambda a, b, alpha: a - b * alpha,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "abs": abs,
    "cast": lambda a: a,
    "reciprocal": lambda a: 1 / a,
    "minimum": numeric.minimum,
    "maximum": numeric.maximum,
    "fmin": numeric.minimum,
    "fmax": numeric.maximum,
    "exp": numeric.exp,
    "exp2": lambda a: as_score(2) ** a,
    "expm1": lambda a: numeric.exp(a) - 1,
    "log": numeric.log,
    "log2": lambda a: numeric.log(a) / math.log(2),
    "log10": lambda a: numeric.log(a) / math.log(10),
    "log1p": lambda a: numeric.log(a + 1),
    "sqrt": numeric.sqrt,
    "rsqrt": lambda a: 1 / numeric.sqrt(a),
    "sin": numeric.sin,
    "cos": numeric.cos,
    "tan": lambda a: numeric.sin(a) / numeric.cos(a),
    "sinh": lambda a: (numeric.exp(a) - numeric.exp(-a)) / 2,
    "cosh": lambda a: (numeric.exp(a) + numeric.exp(-a)) / 2,
    "tanh": numeric.tanh,
    "sigmoid": numeric.sigmoid,
    "log_sigmoid": lambda a: -numeric.softplus(-a),
    "erf": numeric.erf,
    "erfc": lambda a: 1 - numeric.erf(a),
    "relu": numeric.relu,
    "silu": lambda a: a * numeric.sigmoid(a),
    "mish": lambda a: a * numeric.tanh(numeric.softplus(a)),
    "gelu": lambda a: a * 0.5 * (1 + numeric.erf(a * math.sqrt(0.5))),
    "gelu_tanh": _gelu_tanh,
    "softplus": _softplus,
    "leaky_relu": lambda a, slope: numeric.where(a > 0, a, a * slope),
    "elu": _elu,
    "hardsigmoid": lambda a: numeric.clamp(a + 3, 0.0, 6.0) / 6,
    "hardswish": lambda a: a * numeric.clamp(a + 3, 0.0, 6.0) / 6,
    "threshold": lambda a, limit, value: numeric.where(a > limit, a, value),
    "sign": lambda a: numeric.where(a > 0, 1.0, numeric.where(a < 0, -1.0, 0.0)),
    "hypot": lambda a, b: numeric.sqrt(a**2 + b**2),
    "logaddexp": lambda a, b: a + numeric.softplus(b - a),
    "lerp": lambda a, b, w: a + w * (b - a),
    "addcmul": lambda a, b, c, value: a + value * b * c,
    "xlogy": lambda a, b: numeric.where(a == 0, 0.0, a * numeric.log(numeric.where(a == 0, 1.0, b))),
    "addcdiv": lambda a, b, c, value: a + value * b / c,
    "deg2rad": lambda a: a * (math.pi / 180),
    "rad2deg": lambda a: a * (180 / math.pi),
}
