"""Reads of tensors: ``table[i]``, ``table[b, i]``, ``table[b][i]``, ``table[:, i]``, ``embedding(i, table)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsedsl.tracing import trace_advice
from sparsedsl.tracing.proxy import Proxy, Tracer
from sparsedsl.tracing.trace_graph import Partial, TraceNode, constant, fail

__all__ = ["getitem", "index_dimensions"]


def getitem(tracer: Tracer, target: torch.Tensor, index: Any, real: Callable[[], Any]) -> Any:
    """``target[index]``; ``real`` does it when nothing traced is involved."""
    items = [tracer.lift(item) for item in (index if isinstance(index, tuple) else (index,))]
    if isinstance(target, Proxy) and target.partial is None:
        fail(f"indexing of a traced value ({target!r})", "Indices and scores are single values here; only tables can be indexed")
    traced = isinstance(target, Proxy) or any(isinstance(item, Proxy) for item in items)
    if not traced:
        result = real()
        if all(map(_is_plain, items)) and target.ndim and not _is_made_here(tracer, target):
            tracer.note(result, source=_given(tracer, target, items))
        else:
            tracer.note(result, origin=target)
        return result
    part = _given(tracer, target, items)
    return Proxy(part if part.free else part.read(), tracer)


def index_dimensions(tracer: Tracer, target: Any, indices: list[Any]) -> Any:
    """The read with one entry of ``indices`` a dimension, None for those left free."""
    return getitem(tracer, target, tuple(slice(None) if i is None else i for i in indices), lambda: None)


def _is_plain(item: Any) -> bool:
    return item is Ellipsis or type(item) is int or (isinstance(item, slice) and item == slice(None))


def _is_made_here(tracer: Tracer, tensor: torch.Tensor) -> bool:
    fresh = tracer.fresh.get(id(tensor))
    return fresh is not None and fresh.source is None


def _given(tracer: Tracer, target: Any, items: list[Any]) -> Partial:
    """``target`` with ``items`` given for its first free dimensions."""
    part: Partial = target.partial if isinstance(target, Proxy) else tracer.partial(target)  # type: ignore[assignment]
    name, indices, free = part.captured.name, list(part.indices), part.free
    if Ellipsis in [item for item in items if not isinstance(item, torch.Tensor)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        items = [*items[:at], *[slice(None)] * (len(free) - len(items) + 1), *items[at + 1 :]]
    if len(items) > len(free):
        fail(
            f"the read {name}[...] with {len(items)} indices",
            f"{name} has shape {part.shape} here, so {len(free)} indices can be given",
        )
    for dimension, item in zip(free, items, strict=False):
        if not (isinstance(item, slice) and item == slice(None)):
            indices[dimension] = _index(tracer, item, name, dimension, part.captured.tensor.shape[dimension])
    return Partial(part.captured, tuple(indices))


def _index(tracer: Tracer, item: Any, name: str, dimension: int, size: int) -> TraceNode:
    """One index as a node; constants are checked and made non-negative."""
    if item is None or isinstance(item, (slice, list)) or item is Ellipsis:
        shown = "None" if item is None else f"the slice {item}" if isinstance(item, slice) else repr(item)
        fail(f"{shown} as an index of {name}", f"A table is read one element at a time: {name}[q_idx], {name}[b, q_idx]")
    if isinstance(item, torch.Tensor) and item.ndim:
        trace_advice.refuse_shape(f"the index of {name}", tuple(item.shape))
    node = tracer.node(item)
    if node.dtype in (torch.bool, torch.uint8):
        fail(f"{node.dtype} as an index of {name}", "torch reads it as a selection of elements; write index.to(torch.int64)")
    if node.dtype.is_floating_point:
        fail(f"{node.dtype} as an index of {name}", "Indices are whole numbers; write index.to(torch.int64) or use //")
    if node.is_const:
        value = int(node.args[0])
        if not -size <= value < size:
            fail(f"{name}[{value}]", f"Dimension {dimension} of {name} has {size} entries")
        return constant(value % size)
    return node
