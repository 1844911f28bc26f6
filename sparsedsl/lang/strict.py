"""Arithmetic kept exactly as torch does it: ``f32_log(x)`` is ``torch.log(x.to(torch.float32))``, rounding included.

A mask that decides with floats (T5's logarithmic buckets, ``sqrt(dx**2 + dy**2) < r``) depends on the last bit, so real
algebra must not touch it. Here every operation is an opaque function, one class an operation and type, that sympy neither
evaluates nor rewrites. Results are floats, integers (``f32_to_int64``) or 0 and 1 (``f32_lt``); a mask on the latter is
``Ne(f32_lt(x, y), 0)``.

``torch_source`` is the one meaning of them all: the evaluator runs it and printers of torch code print it.
"""

from __future__ import annotations

import copyreg
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
from sympy.logic.boolalg import BooleanAtom

from sparsedsl.errors import PatternError

__all__ = ["StrictFunction", "compute", "is_condition", "number", "strict_class", "torch_source"]

TYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64", "i64": "int64"}


@dataclass(frozen=True)
class Operation:
    """How torch writes one operation. ``{0}``, ``{1}``... stand for operands cast to the type, ``{dtype}`` for the type.

    ``result``: ``"same"`` type as the operands, ``"int"``, or ``"bool"`` (0 or 1). ``plain``: operands that keep their own type
    (a condition, a parameter). ``tensors``: torch takes no Python numbers here, so constants become tensors.
    """

    template: str
    arity: int
    result: str = "same"
    plain: frozenset[int] = frozenset()
    tensors: bool = False


def _operations() -> dict[str, Operation]:
    unary = (
        "neg abs reciprocal exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh "
        "atanh sigmoid erf erfc erfinv floor ceil round trunc frac sign relu sinc deg2rad rad2deg"
    )
    table = {name: Operation(f"torch.{name}({{0}})", 1) for name in unary.split()}
    table |= {name: Operation(f"torch.{name}({{0}}, {{1}})", 2) for name in ("add", "sub", "mul", "div", "pow")}
    table |= {name: Operation(f"torch.{name}({{0}}, {{1}})", 2) for name in ("fmod", "remainder", "floor_divide")}
    for name in ("atan2", "hypot", "minimum", "maximum", "fmin", "fmax", "copysign", "logaddexp", "logaddexp2", "heaviside"):
        table[name] = Operation(f"torch.{name}({{0}}, {{1}})", 2, tensors=True)
    for name in ("gcd", "lcm"):
        table[name] = Operation(f"torch.{name}({{0}}, {{1}})", 2, tensors=True)
    table |= {name: Operation(f"torch.{name}({{0}}, {{1}})", 2, "bool") for name in ("lt", "le", "eq", "ne")}
    table |= {
        name: Operation(f"torch.{name}({{0}})", 1, "bool") for name in ("isnan", "isinf", "isposinf", "isneginf", "signbit")
    }
    for width in ("int64", "int32", "int16", "int8", "uint8"):
        table[f"to_{width}"] = Operation(f"{{0}}.to(torch.{width})", 1, "int")
    one, rest = frozenset({1}), frozenset({1, 2, 3})
    return table | {
        "cast": Operation("{0}", 1),
        "add_scaled": Operation("torch.add({0}, {1}, alpha={2})", 3, plain=frozenset({2})),
        "sub_scaled": Operation("torch.sub({0}, {1}, alpha={2})", 3, plain=frozenset({2})),
        "div_floor": Operation("torch.div({0}, {1}, rounding_mode='floor')", 2),
        "div_trunc": Operation("torch.div({0}, {1}, rounding_mode='trunc')", 2),
        "round_to": Operation("torch.round({0}, decimals={1})", 2, plain=one),
        "where": Operation("torch.where({0}, {1}, {2}).to({dtype})", 3, plain=frozenset({0})),
        "lerp": Operation("torch.lerp({0}, {1}, {2})", 3, tensors=True),
        "addcmul": Operation("torch.addcmul({0}, {1}, {2}, value={3})", 4, plain=frozenset({3}), tensors=True),
        "addcdiv": Operation("torch.addcdiv({0}, {1}, {2}, value={3})", 4, plain=frozenset({3}), tensors=True),
        "silu": Operation("torch.nn.functional.silu({0})", 1),
        "mish": Operation("torch.nn.functional.mish({0})", 1),
        "hardsigmoid": Operation("torch.nn.functional.hardsigmoid({0})", 1),
        "hardswish": Operation("torch.nn.functional.hardswish({0})", 1),
        "log_sigmoid": Operation("torch.nn.functional.logsigmoid({0})", 1),
        "gelu": Operation("torch.nn.functional.gelu({0})", 1),
        "gelu_tanh": Operation("torch.nn.functional.gelu({0}, approximate='tanh')", 1),
        "softplus": Operation("torch.nn.functional.softplus({0}, {1}, {2})", 3, plain=rest),
        "leaky_relu": Operation("torch.nn.functional.leaky_relu({0}, {1})", 2, plain=rest),
        "elu": Operation("torch.ops.aten.elu({0}, {1}, {2}, {3})", 4, plain=rest),
        "threshold": Operation("torch.nn.functional.threshold({0}, {1}, {2})", 3, plain=rest),
        "shl": Operation("torch.bitwise_left_shift({0}, {1})", 2),
        "shr": Operation("torch.bitwise_right_shift({0}, {1})", 2),
        # an index that counts from the end of a table of {1} entries when it is negative, as in torch
        "wrap": Operation("({0} + ({0} < 0) * {1})", 2),
    }


OPERATIONS = _operations()
INTEGER = frozenset({"add", "sub", "mul", "pow", "gcd", "lcm", "shl", "shr", "fmod", "wrap"})


class _ExactFunction(type(sympy.Function)):  # type: ignore[misc]
    """Metaclass of exact operations: pickles a class made at run time as the operation it stands for."""


class StrictFunction(sympy.Function, metaclass=_ExactFunction):
    """Base of all exact operations; ``operation`` and ``prefix`` (a key of ``TYPES``) say which."""

    in_language = True
    operation: ClassVar[str]
    prefix: ClassVar[str]

    @classmethod
    def eval(cls, *operands: sympy.Basic) -> None:
        """Never simplifies: that is the point."""
        return None

    def _eval_is_positive(self) -> bool | None:
        # 1 << n, with n kept within what int64 holds
        if (self.prefix, self.operation) != ("i64", "shl") or self.args[0] != 1 or not self.args[1].is_nonnegative:
            return None
        bits = self.args[1].args if isinstance(self.args[1], sympy.Min) else self.args[1:]
        return any(n.is_Integer and n <= 62 for n in bits) or None


@functools.cache
def strict_class(prefix: str, operation: str) -> type[StrictFunction]:
    """The one function class for an operation in a type; sympy compares function classes by identity.

    >>> import sympy
    >>> strict_class("f32", "log")(sympy.Integer(1))
    f32_log(1)
    """
    rule = OPERATIONS.get(operation)
    if rule is None or prefix not in TYPES or (prefix == "i64" and operation not in INTEGER):
        raise PatternError(f"there is no exact operation {prefix}_{operation}")
    facts: dict[str, Any] = {"prefix": prefix, "operation": operation, "nargs": rule.arity}
    if rule.result == "bool":
        facts |= {"is_integer": True, "is_nonnegative": True}
    elif rule.result == "int" or prefix == "i64":
        facts |= {"is_integer": True}
    else:
        facts |= {"is_extended_real": True}
    return _ExactFunction(f"{prefix}_{operation}", (StrictFunction,), facts)


def _reduce_class(cls: Any) -> Any:
    made = "operation" in cls.__dict__
    return (strict_class, (cls.prefix, cls.operation)) if made else cls.__qualname__


copyreg.pickle(_ExactFunction, _reduce_class)


def is_condition(expr: sympy.Basic) -> bool:
    """Whether ``expr`` is an exact operation that is 0 or 1; ``torch_source`` of it is a boolean tensor."""
    return isinstance(expr, StrictFunction) and OPERATIONS[expr.operation].result == "bool"


def torch_source(function: type[StrictFunction], operands: Sequence[str], numbers: Sequence[bool]) -> str:
    """The call as torch code. ``numbers[i]`` says whether ``operands[i]`` is a Python number rather than a tensor.

    >>> torch_source(strict_class("f32", "lt"), ["x", "0.5"], [False, True])
    'torch.lt(x.to(torch.float32), 0.5)'
    """
    rule, dtype = OPERATIONS[function.operation], f"torch.{TYPES[function.prefix]}"
    cast = [text if i in rule.plain or numbers[i] else f"{_bracketed(text)}.to({dtype})" for i, text in enumerate(operands)]
    tensors = [i for i in range(len(cast)) if i not in rule.plain and not numbers[i]]
    for i in range(len(cast)):
        must_be_tensor = rule.tensors or not tensors or (i == 0 and function.operation != "pow")
        if numbers[i] and i not in rule.plain and must_be_tensor and function.operation != "where":
            cast[i] = f"torch.full_like({cast[tensors[0]]}, {cast[i]})" if tensors else f"torch.tensor({cast[i]}, dtype={dtype})"
    return rule.template.format(*cast, dtype=dtype)


def _bracketed(text: str) -> str:
    return text if re.fullmatch(r"[\w.]+", text) and not text[0].isdigit() else f"({text})"


@functools.cache
def _compiled(function: type[StrictFunction], numbers: tuple[bool, ...]) -> Callable[..., Any]:
    names = [f"x{i}" for i in range(len(numbers))]
    return eval(f"lambda torch, {', '.join(names)}: {torch_source(function, names, numbers)}", {})


def compute(function: type[StrictFunction], operands: Sequence[Any]) -> Any:
    """The value as a torch tensor; 0 or 1 in int64 for conditions. ``operands`` are tensors or Python numbers."""
    import torch

    tensors = [isinstance(x, torch.Tensor) for x in operands]
    if function.operation == "where" and not tensors[0]:
        operands, tensors = [torch.tensor(operands[0]), *operands[1:]], [True, *tensors[1:]]
    value = _compiled(function, tuple(not t for t in tensors))(torch, *operands)
    return value if value.dtype.is_floating_point else value.to(torch.int64)


def number(expr: sympy.Basic) -> Any:
    """The Python number or bool that ``expr`` is, or None if it is not constant."""
    if isinstance(expr, BooleanAtom):
        return bool(expr)
    if isinstance(expr, sympy.Integer):
        return int(expr)
    return float(expr) if isinstance(expr, sympy.Number) else None
