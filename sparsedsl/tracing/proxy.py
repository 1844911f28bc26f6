"""The stand-ins a callable is run with, scalar tensors that record what torch does with them, and the record of one run.

A :class:`Proxy` is a tensor without data; ``__torch_dispatch__`` hands every operation, already in ATen's words and with Python's
numbers still numbers, to :mod:`sparsedsl.tracing.operations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.torch_private import no_torch_function, stand_in, tree_leaves
from sparsedsl.tracing import capture, trace_advice
from sparsedsl.tracing.trace_graph import Captured, Partial, TraceNode, Vector, constant, fail

__all__ = ["Proxy", "Tracer"]


@dataclass
class Fresh:
    """A real tensor made while tracing; ``source`` says which part of a captured tensor it is, ``origin`` what it was made of."""

    tensor: torch.Tensor
    source: Partial | None
    origin: torch.Tensor | None


class Proxy(torch.Tensor):
    """A tensor of no data whose operations are recorded.

    ``known``: its value, if only captured scalars enter it: Python may branch on that, as it may in FlexAttention.
    """

    known: torch.Tensor | None = None
    node: TraceNode | None
    partial: Partial | None
    vector: Vector | None
    tracer: Tracer

    @staticmethod
    def __new__(cls, value: TraceNode | Partial | Vector, tracer: Tracer) -> Proxy:
        shape: tuple[int, ...] = () if isinstance(value, TraceNode) else value.shape
        match value:
            case Partial():
                dtype = value.captured.tensor.dtype
            case Vector():
                dtype = value.nodes[0].dtype
            case _:
                dtype = value.dtype
        self = stand_in(cls, shape, dtype=dtype, device=torch.device("cpu"))
        self.node = value if isinstance(value, TraceNode) else None
        self.partial = value if isinstance(value, Partial) else None
        self.vector, self.tracer = value if isinstance(value, Vector) else None, tracer
        return self

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        tracer = next(leaf.tracer for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Proxy))
        return tracer.record(tracer, func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<traced {self.dtype} value>" if self.node else f"<traced table part, shape {tuple(self.shape)}>"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __len__(self) -> int:
        trace_advice.refuse("len")

    def __iter__(self) -> Any:
        trace_advice.refuse("iter")

    def __bool__(self) -> bool:
        return bool(self.known) if self.known is not None else trace_advice.refuse_truth()

    def __int__(self) -> int:
        return int(self.known) if self.known is not None else trace_advice.refuse("__int__")

    def __float__(self) -> float:
        return float(self.known) if self.known is not None else trace_advice.refuse("__float__")

    def __index__(self) -> int:
        return int(self.known) if self.known is not None else trace_advice.refuse("__index__")

    def __complex__(self) -> complex:
        trace_advice.refuse("__complex__")

    def __contains__(self, item: Any) -> bool:
        trace_advice.refuse("in")

    def tolist(self) -> Any:
        return self.known.tolist() if self.known is not None else trace_advice.refuse("item")

    def item(self) -> Any:
        return self.tolist()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        trace_advice.refuse("numpy")


class Tracer:
    """One run of one callable: the tensors it reads and makes. ``record`` turns an ATen call into proxies."""

    def __init__(self, record: Callable[[Tracer, Any, Any, Any], Any]) -> None:
        self.record = record
        self.captured: dict[int, tuple[torch.Tensor, Captured]] = {}
        self.fresh: dict[int, Fresh] = {}
        self.seen: dict[int, torch.Tensor] = {}
        self.current: list[str] = []

    def note(self, value: object, source: Partial | None = None, origin: torch.Tensor | None = None) -> None:
        """Remember that real tensors in ``value`` were made here and now."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Proxy) and id(tensor) not in self.seen:
                self.fresh.setdefault(id(tensor), Fresh(tensor, source, origin))

    def is_captured(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` came from outside the callable, or is one element of such a tensor."""
        if isinstance(tensor, Proxy) or id(tensor) not in self.seen:
            return False
        fresh = self.fresh.get(id(tensor))
        return fresh is None or fresh.source is not None

    def partial(self, tensor: torch.Tensor) -> Partial:
        """``tensor`` as a table of which some indices are given."""
        fresh = self.fresh.get(id(tensor))
        if fresh is not None and fresh.source is not None:
            return fresh.source
        captured = self.capture(tensor)
        given = (constant(0),) if tensor.ndim == 0 else (None,) * tensor.ndim
        return Partial(captured, given)

    def capture(self, tensor: torch.Tensor) -> Captured:
        """The table that ``tensor`` becomes; a tensor without dimensions becomes a table of one entry."""
        if id(tensor) in self.captured:
            return self.captured[id(tensor)][1]
        trace_advice.check_table(tensor)
        fresh, table = self.fresh.get(id(tensor)), tensor
        name = capture.find_name(fresh.origin if fresh and fresh.origin is not None else tensor) or "table"
        if tensor.ndim == 0:
            with torch.enable_grad():
                table = capture.intern(tensor.reshape(1), name, live=True)
        elif fresh is not None:
            live = tensor._is_view() and tensor._base is not None and id(tensor._base) not in self.fresh
            if tensor.requires_grad and not tensor.is_leaf and not live:
                fail(
                    f"a learned table that is computed before it is read ({self.current[-1] if self.current else name})",
                    f"Read first, then compute, so that each call does it anew: torch.exp({name}[h]), not torch.exp({name})[h]",
                )
            name = capture.content_name(capture.sanitise(name), tensor, live)
            table = capture.intern(tensor, name, live)
        found = Captured(table, self._unique(capture.sanitise(name)))
        self.captured[id(tensor)] = (tensor, found)
        return found

    def _unique(self, name: str) -> str:
        taken = {captured.name for _, captured in self.captured.values()}
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)

    def lift(self, tensor: Any) -> Any:
        """A captured scalar tensor as a :class:`Proxy`; anything else as it is."""
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 0 and self.is_captured(tensor):
            proxy = Proxy(self.partial(tensor).read(), self)
            proxy.known = tensor.detach()
            return proxy
        return tensor

    def node(self, value: object) -> TraceNode:
        """The node of a scalar operand: a proxy, a number, or a real tensor of one element."""
        if isinstance(value, Proxy):
            if value.vector is not None:
                fail(f"a vector of shape {tuple(value.shape)} where one value is wanted", "Join its elements before: x.sum(-1)")
            if value.node is None:
                trace_advice.refuse_shape(value.partial.captured.name, tuple(value.shape))  # type: ignore[union-attr]
            return value.node
        if isinstance(value, torch.Tensor):
            if value.ndim:
                trace_advice.refuse_shape(self.capture(value).name, tuple(value.shape))
            return constant(value.item(), value.dtype)
        return constant(value)
