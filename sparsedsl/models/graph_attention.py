"""A layer's attention as one operator of a graph: ``sparsedsl::model_attention``.

What runs depends on data (padding, packed rows, what a cache has dropped), which a graph does not have while it is made. So the graph gets
this operator, and the operator makes the ordinary call when the graph runs: same results, same errors. It names what the layer runs by a
*handle*: a number, and all that another process needs to make the binding again, in JSON, with patterns as text. Tensors that are bound to
tables are arguments of the operator, so that an exported program holds them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.models.traced import TracedRequest
from sparsedsl.program.program_text import read_given
from sparsedsl.runtime.patience import until_built
from sparsedsl.torch_private import autograd_again

__all__ = ["attend_in_graph", "handle_of", "run_by"]

Tensor = torch.Tensor

_living: WeakValueDictionary[str, Any] = WeakValueDictionary()
_rebuilt: dict[tuple[Any, ...], Any] = {}
_makers: list[Callable[..., Any]] = []
_serial = iter(range(2**62))


def run_by(run: Callable[..., Tensor], make: Callable[..., Any]) -> None:
    """Name what runs a binding, ``run(binding, q, k, v, traced_request, arguments)``, and what makes one of the words of a handle."""
    _makers[:] = [run, make]


def handle_of(binding: Any, words: dict[str, Any]) -> str:
    """A new name for a binding, which lives as long as that does. ``words``: what another process makes it of."""
    handle = f"{next(_serial)} {json.dumps(words)}"
    _living[handle] = binding
    return handle


def attend_in_graph(
    binding: Any, query: Tensor, key: Tensor, value: Tensor, request: TracedRequest, arguments: dict[str, Any]
) -> Tensor:
    """(B, Sq, Hq, Dv): the operator in a graph that is being made."""
    given = [query, key, value, arguments.get("s_aux"), *binding.bound.values()]
    grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given)
    grad = grad and not torch.compiler.is_exporting()  # exported for inference, parameters still require gradients
    numbers = [request.q_length, request.kv_length, request.q_offset, request.kv_offset]
    out: Tensor = torch.ops.sparsedsl.model_attention(
        binding.handle, query, key, value, request.padding, request.positions, arguments.get("s_aux"), list(binding.bound.values()),
        numbers, arguments.get("scaling"), grad,
    )  # fmt: skip
    return out


def _binding(handle: str, tables: list[Tensor]) -> Any:
    found = _living.get(handle)
    if found is not None:
        return found
    key = (handle, *map(id, tables))
    if key not in _rebuilt:
        if not _makers:
            raise UnsupportedError("this graph runs patterns in a model: import sparsedsl.models before it is called")
        words = json.loads(handle.partition(" ")[2])
        bound = dict(zip(words["bound"], tables, strict=True))
        parts = {name: None if words[name] is None else read_given(words[name], bound) for name in ("pattern", "program")}
        _rebuilt[key] = _makers[1](words, **parts), tables  # (a tensor that lives keeps its id)
    return _rebuilt[key][0]


def _call(
    handle: str, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, positions: Tensor | None, sinks: Tensor | None,
    tables: list[Tensor], numbers: list[int], scale: float | None, grad: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The ordinary call, and the tensors that it reads tables from."""
    binding = _binding(handle, tables)
    q_length, kv_length, q_offset, kv_offset = numbers
    request = TracedRequest(q_length, kv_length, q_offset, kv_offset, padding, positions, binding.facts)
    with until_built(), autograd_again(), torch.set_grad_enabled(grad):
        out = _makers[0](binding, q, k, v, request, {"scaling": scale, "s_aux": sinks})
    return out, list(binding.bound.values())


@torch.library.custom_op("sparsedsl::model_attention", mutates_args=())
def _model_attention(
    handle: str, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, positions: Tensor | None, sinks: Tensor | None,
    tables: list[Tensor], numbers: list[int], scale: float | None, grad: bool,
) -> Tensor:  # fmt: skip
    """``grad``: a program without gradients refuses."""
    if grad:
        q = q.detach().requires_grad_()
    return _call(handle, q, k, v, padding, positions, sinks, tables, numbers, scale, grad)[0].detach().clone()


@_model_attention.register_fake
def _(
    handle: str, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, positions: Tensor | None, sinks: Tensor | None,
    tables: list[Tensor], numbers: list[int], scale: float | None, grad: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


@torch.library.custom_op("sparsedsl::model_attention_backward", mutates_args=())
def _model_attention_backward(
    grad_out: Tensor, handle: str, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, positions: Tensor | None,
    sinks: Tensor | None, tables: list[Tensor], numbers: list[int], scale: float | None, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of those of ``q, k, v, sinks, *tables`` that are wanted: the call made again under autograd."""
    q, k, v = (x.detach().requires_grad_(want) for x, want in zip((q, k, v), wanted, strict=False))
    sinks = None if sinks is None else sinks.detach().requires_grad_(wanted[3])
    with autograd_again(), torch.enable_grad():
        out, own = _call(handle, q, k, v, padding, positions, sinks, tables, numbers, scale, True)
        sources = [x for x, want in zip((q, k, v, sinks, *own), wanted, strict=True) if want and x is not None]
        grads = torch.autograd.grad(out, sources, grad_out, allow_unused=True, materialize_grads=True)
    return [grad.contiguous() for grad in grads]


@_model_attention_backward.register_fake
def _(
    grad_out: Tensor, handle: str, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, positions: Tensor | None,
    sinks: Tensor | None, tables: list[Tensor], numbers: list[int], scale: float | None, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, want in zip((q, k, v, sinks, *tables), wanted, strict=True)
        if want and x is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    handle, q, k, v, padding, positions, sinks, tables, numbers, scale, _ = inputs
    optional = [padding, positions, sinks]
    ctx.there = [x is not None for x in optional]
    ctx.save_for_backward(q, k, v, *[x for x in optional if x is not None], *tables)
    ctx.words = handle, numbers, scale


def _backward(ctx: Any, grad_out: Tensor) -> Any:
    q, k, v, *rest = ctx.saved_tensors
    saved = iter(rest)
    padding, positions, sinks = (next(saved) if there else None for there in ctx.there)
    tables, (handle, numbers, scale), needs = list(saved), ctx.words, ctx.needs_input_grad
    of_tables = list(needs[7]) if tables else []  # torch hands an empty list over as one leaf
    wanted = [needs[1], needs[2], needs[3], sinks is not None and needs[6], *of_tables]
    made = iter(
        torch.ops.sparsedsl.model_attention_backward(
            grad_out.contiguous(), handle, q, k, v, padding, positions, sinks, tables, numbers, scale, wanted
        )
        if any(wanted)
        else []
    )
    found = [next(made) if want else None for want in wanted]
    return None, *found[:3], None, None, found[3], found[4:], None, None, None


_model_attention.register_autograd(_backward, setup_context=_setup_context)
