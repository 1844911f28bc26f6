"""ATen operations -> nodes: operands put in order, aliases and simple compositions resolved, result types asked of torch itself.

The type of every result is that of the same operation run on ones, so torch's promotion rules need no second copy here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsedsl.lang.strict import OPERATIONS
from sparsedsl.torch_private import tree_map
from sparsedsl.tracing import trace_advice
from sparsedsl.tracing.indexing import index_dimensions
from sparsedsl.tracing.proxy import Proxy, Tracer
from sparsedsl.tracing.short_vectors import REDUCTIONS, elementwise, has_vector, reduced, viewed
from sparsedsl.tracing.trace_graph import TraceNode, constant

__all__ = ["record"]

COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
LOGICAL = frozenset({"logical_and", "logical_or", "logical_xor", "logical_not"})
BITWISE = frozenset({"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "shl", "shr"})
PREDICATES = frozenset({"isnan", "isinf", "isposinf", "isneginf", "signbit"})
KNOWN = frozenset(OPERATIONS) | COMPARISONS | LOGICAL | BITWISE

_ALIASES = {
    "__lshift__": "shl", "bitwise_left_shift": "shl", "__rshift__": "shr", "bitwise_right_shift": "shr", "sgn": "sign",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "negative": "neg", "_softplus": "softplus",
}  # fmt: skip
_SAME = frozenset(
    {"alias", "clone", "detach", "lift", "lift_fresh", "lift_fresh_copy", "positive", "_conj", "_reshape_alias", "view_as"}
)
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "expand", "squeeze", "permute", "transpose", "t"})
_VIEWS = _RESHAPES | {"unsqueeze", "flip", "slice"}
_CONSTANTS = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})


def record(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record one ATen operation; returns proxies, or real tensors where the result is a constant."""
    name, schema = func._schema.name.removeprefix("aten::"), func._schema
    shown = tracer.current[-1] if tracer.current else f"torch.{name}"
    if name == "_local_scalar_dense":
        trace_advice.refuse("item")
    if schema.is_mutable:
        trace_advice.refuse("write", shown)
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    read = _read(tracer, name, given)
    if read is not None:
        return read
    alias = _ALIASES.get(name, name)
    if has_vector(args, kwargs):
        if name in REDUCTIONS:
            return reduced(tracer, record, name, given)
        if name in _VIEWS:
            return viewed(tracer, func, args, kwargs)
        if alias in KNOWN or alias in _SPECIAL:
            return elementwise(tracer, record, func, args, kwargs)
    if name in _CONSTANTS:
        return func(*_examples(args), **{**_examples(kwargs), "device": torch.device("cpu")})
    if name in _SAME or (name in _RESHAPES and func(*_examples(args), **_examples(kwargs)).ndim == 0):
        return Proxy(tracer.node(given["self"]), tracer)
    call = _TorchCall(tracer, func, args, kwargs, given)
    name = alias
    if name in _SPECIAL:
        result = _SPECIAL[name](call)
    elif name in KNOWN:
        result = call.make(name, *(call.operand(a.name) for a in schema.arguments if given.get(a.name) is not None))
    else:
        trace_advice.refuse_operation(name, shown)
    if isinstance(result, tuple):
        return tuple(Proxy(r, tracer) for r in result)
    return Proxy(result, tracer)


def _examples(value: object) -> Any:
    """``value`` with every stand-in replaced by a one of its type."""

    def example(x: Any) -> Any:
        if isinstance(x, Proxy):
            return torch.ones((), dtype=x.dtype, device="cpu")
        return x.detach().cpu() if isinstance(x, torch.Tensor) else x

    return tree_map(example, value)


def _read(tracer: Tracer, name: str, given: dict[str, Any]) -> Any:
    """The operations that read tables; None for all others."""
    match name:
        case "embedding":
            return index_dimensions(tracer, given["weight"], [given["indices"], *[None] * (given["weight"].ndim - 1)])
        case "index":
            return index_dimensions(tracer, given["self"], given["indices"])
        case "take" if given["self"].ndim == 1:
            return index_dimensions(tracer, given["self"], [given["index"]])
        case "select":
            dimension = given["dim"] % given["self"].ndim
            return index_dimensions(tracer, given["self"], [*[None] * dimension, given["index"]])
    return None


class _TorchCall:
    """One operation with its arguments by name."""

    def __init__(self, tracer: Tracer, func: Any, args: Any, kwargs: Any, given: dict[str, Any]):
        self.tracer, self.func, self.args, self.kwargs, self.given = tracer, func, args, kwargs, given

    def operand(self, name: str) -> TraceNode:
        """The node of a scalar argument."""
        return self.tracer.node(self.given[name])

    def result_type(self) -> torch.dtype:
        """The type torch gives the result; raises what torch raises for operands it refuses."""
        result = self.func(*_examples(self.args), **_examples(self.kwargs))
        return (result[0] if isinstance(result, (tuple, list)) else result).dtype

    def promoted(self) -> torch.dtype:
        """The type in which a comparison compares."""
        values = [_examples(self.given[a.name]) for a in self.func._schema.arguments if a.name in self.given]
        values = [v for v in values if isinstance(v, (torch.Tensor, int, float))]
        return torch.result_type(values[0], values[1]) if len(values) > 1 else values[0].dtype

    def make(self, op: str, *operands: TraceNode) -> TraceNode:
        """A node of the call's result type."""
        dtype = self.result_type()
        common = self.promoted() if op in COMPARISONS | PREDICATES else dtype
        return TraceNode(op, tuple(_fitted(x, common) for x in operands), dtype, common)


def _fitted(node: TraceNode, common: torch.dtype) -> TraceNode:
    """A constant as torch sees it in an operation of ``common``: integers narrower than 32 bits take its lowest bits."""
    if not node.is_const or common not in (torch.uint8, torch.int8, torch.int16) or not isinstance(node.args[0], int):
        return node
    return constant(torch.tensor(node.args[0]).to(common).item(), common)


def _compound(op: str, *operands: TraceNode) -> TraceNode:
    """A node of an operation that the call is made of, in the type of its last operand."""
    return TraceNode(op, operands, operands[-1].dtype, operands[-1].dtype)


def _scaled(swap: bool, op: str) -> Callable[[_TorchCall], TraceNode]:
    """``add``, ``sub`` and ``rsub`` with their factor ``alpha``."""

    def handle(call: _TorchCall) -> TraceNode:
        a, b = call.operand("self"), call.operand("other")
        if swap:
            a, b = b, a
        alpha = call.given.get("alpha", 1)
        return call.make(op, a, b) if alpha == 1 else call.make(f"{op}_scaled", a, b, constant(alpha))

    return handle


def _divide(call: _TorchCall) -> TraceNode:
    mode = call.given.get("rounding_mode")
    return call.make("div" if mode is None else f"div_{mode}", call.operand("self"), call.operand("other"))


def _clamp(low: str | None, high: str | None) -> Callable[[_TorchCall], TraceNode]:
    """``clamp`` and its kin as maximum, then minimum: the upper bound wins, as in torch."""

    def handle(call: _TorchCall) -> TraceNode:
        x = call.operand("self")
        for name, op in ((low, "maximum"), (high, "minimum")):
            if name is not None and call.given.get(name) is not None:
                x = call.make(op, x, call.operand(name))
        return x

    return handle


def _cast(call: _TorchCall) -> TraceNode:
    x, dtype = call.operand("self"), call.given.get("dtype") or call.operand("self").dtype
    return x if dtype == x.dtype else TraceNode("cast", (x,), dtype, x.dtype)


def _masked_fill(call: _TorchCall) -> TraceNode:
    x, value = call.operand("self"), call.operand("value")
    return call.make("where", call.operand("mask"), TraceNode("cast", (value,), x.dtype, value.dtype), x)


def _nan_to_num(call: _TorchCall) -> TraceNode:
    x = call.operand("self")
    if not x.dtype.is_floating_point:
        return x
    limits = torch.finfo(x.dtype)
    for name, test, default in (("nan", "isnan", 0.0), ("posinf", "isposinf", limits.max), ("neginf", "isneginf", limits.min)):
        value = call.given.get(name)
        condition = TraceNode(test, (x,), torch.bool, x.dtype)
        x = _compound("where", condition, constant(default if value is None else float(value), x.dtype), x)
    return x


def _round(call: _TorchCall) -> TraceNode:
    decimals = call.given.get("decimals", 0)
    return (
        call.make("round_to", call.operand("self"), constant(decimals)) if decimals else call.make("round", call.operand("self"))
    )


def _celu(call: _TorchCall) -> TraceNode:
    alpha = float(call.given["alpha"])
    return call.make("elu", call.operand("self"), constant(alpha), constant(1.0), constant(1.0 / alpha))


def _ldexp(call: _TorchCall) -> TraceNode:
    dtype = call.result_type()
    return call.make("mul", call.operand("self"), TraceNode("pow", (constant(2.0), call.operand("other")), dtype, dtype))


def _log_sigmoid(call: _TorchCall) -> tuple[TraceNode, TraceNode]:
    node = call.make("log_sigmoid", call.operand("self"))
    return node, node  # the second result is a buffer for the backward pass


_SPECIAL: dict[str, Callable[[_TorchCall], Any]] = {
    "add": _scaled(False, "add"),
    "sub": _scaled(False, "sub"),
    "rsub": _scaled(True, "sub"),
    "div": _divide,
    "clamp": _clamp("min", "max"),
    "clamp_min": _clamp("min", None),
    "clamp_max": _clamp(None, "max"),
    "hardtanh": _clamp("min_val", "max_val"),
    "_to_copy": _cast,
    "masked_fill": _masked_fill,
    "nan_to_num": _nan_to_num,
    "round": _round,
    "log_sigmoid_forward": _log_sigmoid,
    "celu": _celu,
    "_prelu_kernel": lambda call: call.make("leaky_relu", call.operand("self"), call.operand("weight")),
    "xlogy": lambda call: call.make("xlogy", call.operand("self"), call.operand("other")),
    "ldexp": _ldexp,
    "gelu": lambda call: call.make("gelu_tanh" if call.given.get("approximate") == "tanh" else "gelu", call.operand("self")),
}
