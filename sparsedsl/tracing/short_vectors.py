"""Short vectors in traced functions: rows of tables, ``p[q_idx]`` of a table ``(S, 3)``, element by element until a reduction ends them.

What is done to a vector is done to each element, as torch broadcasts; ``sum``, ``any``, ``all``, ``amax``, ``dot``, a norm and their like
join elements again. So the expression grows with the length of the vector: up to :data:`LONGEST` elements.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.torch_private import tree_leaves, tree_map
from sparsedsl.tracing.proxy import Proxy, Tracer
from sparsedsl.tracing.trace_graph import Partial, TraceNode, Vector, constant, fail

__all__ = ["LONGEST", "REDUCTIONS", "elementwise", "has_vector", "reduced", "viewed"]

LONGEST = 32
REDUCTIONS = frozenset(
    {"sum", "mean", "any", "all", "amax", "amin", "max", "min", "dot", "linalg_vector_norm", "isin", "bucketize", "searchsorted"}
)
Record = Callable[..., Any]


def has_vector(args: Any, kwargs: Any) -> bool:
    """Whether some tensor of a call has elements, few enough to be taken one by one."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return any(shapes) and all(math.prod(shape) <= LONGEST for shape in shapes)


def _vector(tracer: Tracer, tensor: torch.Tensor) -> Vector:
    """The elements of a tensor: of what was traced, or reads of a table that it becomes."""
    if isinstance(tensor, Proxy):
        if tensor.vector is not None:
            return tensor.vector
        if tensor.node is not None:
            return Vector((tensor.node,), ())
        part: Partial = tensor.partial  # type: ignore[assignment]
    elif tensor.ndim == 0:
        return Vector((tracer.node(tensor),), ())
    else:
        part = tracer.partial(tensor)
    nodes = []
    for place in itertools.product(*map(range, part.shape)):
        indices = list(part.indices)
        for dimension, number in zip(part.free, place, strict=True):
            indices[dimension] = constant(number)
        nodes.append(replace(part, indices=tuple(indices)).read())
    return Vector(tuple(nodes), part.shape)


def _made(tracer: Tracer, nodes: Iterable[TraceNode], shape: tuple[int, ...]) -> Proxy:
    nodes = tuple(nodes)
    return Proxy(Vector(nodes, shape) if shape else nodes[0], tracer)


def elementwise(tracer: Tracer, record: Record, func: Any, args: Any, kwargs: Any) -> Proxy:
    """An operation on single values, on every element of its operands as torch broadcasts them."""
    vectors = {id(x): _vector(tracer, x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    shape = torch.broadcast_shapes(*(v.shape for v in vectors.values()))
    if math.prod(shape) > LONGEST:
        fail(
            f"a vector of shape {tuple(shape)}", f"Rows of up to {LONGEST} numbers are taken apart; reduce what is longer outside"
        )
    places = {key: torch.arange(len(v.nodes)).view(v.shape).expand(shape).flatten().tolist() for key, v in vectors.items()}
    found = []
    for number in range(math.prod(shape)):

        def element(x: Any, number: int = number) -> Any:
            return Proxy(vectors[id(x)].nodes[places[id(x)][number]], tracer) if isinstance(x, torch.Tensor) else x

        found.append(tracer.node(record(tracer, func, tree_map(element, args), tree_map(element, kwargs))))
    return _made(tracer, found, tuple(shape))


def viewed(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Proxy:
    """The same elements in another shape or order."""
    vector = _vector(tracer, args[0])
    numbers = func(torch.arange(len(vector.nodes)).view(vector.shape), *args[1:], **kwargs)
    return _made(tracer, (vector.nodes[number] for number in numbers.flatten().tolist()), tuple(numbers.shape))


def reduced(tracer: Tracer, record: Record, name: str, given: dict[str, Any]) -> Proxy:
    """A reduction of a short vector."""
    aten = torch.ops.aten
    if name in ("bucketize", "searchsorted", "isin"):
        return _counted(tracer, record, name, given)
    if name == "dot":
        products = elementwise(tracer, record, aten.mul.Tensor, (given["self"], given["tensor"]), {})
        return _joined(tracer, "sum", {"self": products})
    if name == "linalg_vector_norm":
        if given.get("ord", 2) != 2:
            fail(f"a norm of order {given['ord']}", "Norms of order 2 are known here; write others as sums")
        squares = elementwise(tracer, record, aten.mul.Tensor, (given["self"], given["self"]), {})
        return elementwise(tracer, record, aten.sqrt.default, (_joined(tracer, "sum", given | {"self": squares}),), {})
    return _joined(tracer, name, given)


def _joined(tracer: Tracer, name: str, given: dict[str, Any]) -> Proxy:
    vector = _vector(tracer, given["self"])
    if given.get("dtype") is not None:
        fail(f"{name}(dtype=...)", "Cast the vector before: x.to(dtype).sum(-1)")
    dims = given.get("dim")
    if name in ("max", "min") and dims is not None:
        fail(f"{name}(dim=...), which also gives places", f"Write x.a{name}(dim)")
    rank = len(vector.shape)
    over = range(rank) if dims in (None, []) else {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    groups: dict[tuple[int, ...], list[TraceNode]] = {}
    for place, node in zip(itertools.product(*map(range, vector.shape)), vector.nodes, strict=True):
        kept = tuple(0 if d in over else place[d] for d in range(rank))
        groups.setdefault(kept, []).append(node)
    shape = tuple(1 if d in over else size for d, size in enumerate(vector.shape) if given.get("keepdim") or d not in over)
    if not groups:
        fail(f"{name} of no elements", "A vector must have an element at least")
    return _made(tracer, (_JOINS[name](nodes) for nodes in groups.values()), shape)


def _counted(tracer: Tracer, record: Record, name: str, given: dict[str, Any]) -> Proxy:
    """``bucketize`` and ``searchsorted`` count the boundaries below a value; ``isin`` asks whether it equals some number."""
    aten = torch.ops.aten
    values, others = {
        "bucketize": ("self", "boundaries"), "searchsorted": ("self", "sorted_sequence"), "isin": ("elements", "test_elements"),
    }[name]  # fmt: skip
    value, other = given[values], given[others]
    if getattr(value, "ndim", 0):
        fail(f"{name}() of a vector", f"Ask for one value at a time: torch.{name}(q_idx, ...)")
    if name == "isin":
        if not isinstance(other, torch.Tensor):
            value, other = other, value
        equal = elementwise(tracer, record, aten.eq.Tensor, (value, other), {})
        found = _joined(tracer, "any", {"self": equal})
        return elementwise(tracer, record, aten.logical_not.default, (found,), {}) if given.get("invert") else found
    below = aten.le.Tensor if given.get("right") or given.get("side") == "right" else aten.lt.Tensor
    return _joined(tracer, "sum", {"self": elementwise(tracer, record, below, (other, value), {})})


def _sum(nodes: list[TraceNode]) -> TraceNode:
    dtype = nodes[0].dtype if nodes[0].dtype.is_floating_point else torch.int64
    return TraceNode("short_sum", tuple(nodes), dtype, dtype)


def _mean(nodes: list[TraceNode]) -> TraceNode:
    if not nodes[0].dtype.is_floating_point:
        fail(f"mean of {nodes[0].dtype}", "Write x.float().mean(-1)")
    return TraceNode("div", (_sum(nodes), constant(len(nodes))), nodes[0].dtype, nodes[0].dtype)


def _folded(op: str, result: torch.dtype | None = None) -> Callable[[list[TraceNode]], TraceNode]:
    def join(nodes: list[TraceNode]) -> TraceNode:
        def two(a: TraceNode, b: TraceNode) -> TraceNode:
            dtype = result or a.dtype
            return TraceNode(op, (a, b), dtype, dtype)

        # One element alone: torch's any() and all() make a boolean of it.
        return functools.reduce(two, nodes) if len(nodes) > 1 or result is None else two(nodes[0], nodes[0])

    return join


_JOINS: dict[str, Callable[[list[TraceNode]], TraceNode]] = {
    "sum": _sum, "mean": _mean, "any": _folded("logical_or", torch.bool), "all": _folded("logical_and", torch.bool),
    **dict.fromkeys(("amax", "max"), _folded("maximum")), **dict.fromkeys(("amin", "min"), _folded("minimum")),
}  # fmt: skip
