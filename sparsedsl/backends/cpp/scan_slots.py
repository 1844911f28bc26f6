"""Gated slots in C++, forward and backward: key by key, as the recurrence is written."""

from __future__ import annotations

import struct
from typing import Any, Literal

import torch

from sparsedsl.backends.cpp.attention import rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import KINDS, first_of, place_of, whole_vectors
from sparsedsl.backends.cpp.libraries import fixed_library, fixed_width, parallel
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.backends.tiled import scan_slots as tiled
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.call import wants_grad
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_calls import SlotCall, SlotState, check_slots
from sparsedsl.runtime.torch_modes import is_transformed

__all__ = ["slot_scan"]

Tensor = torch.Tensor
CHUNK = 64


def slot_scan(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, delay: int, temperature: float, scale: float,
    empty: Literal["zero_sink", "masked"] = "zero_sink", q_offset: int = 0, state: SlotState | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, SlotState]:  # fmt: skip
    """Results, LSE and state: see :func:`sparsedsl.backends.tiled.scan_slots.slot_scan`, which gives the same."""
    words: dict[str, Any] = {
        "delay": delay, "temperature": temperature, "scale": scale, "empty": empty, "q_offset": q_offset, "state": state,
        "documents": documents,
    }  # fmt: skip
    call = check_slots(q, k, v, gate, **words)
    before, real = call.before, accumulated(q.dtype)
    known = [q, k, v, gate, before.keys, before.values]
    width = 64 // real.itemsize
    size = whole_vectors(q.shape[3], width) * whole_vectors(gate.shape[3], width) + gate.shape[3] * whole_vectors(
        v.shape[3], width
    )
    states = -(-k.shape[2] // CHUNK) * k.shape[0] * k.shape[1] * size * real.itemsize
    if is_transformed(*known) or not k.shape[2] or not q.numel() or (wants_grad(*known) and states > LIMITS.now.states_bytes):
        return tiled.slot_scan(q, k, v, gate, **words)
    write = -torch.expm1(torch.nn.functional.logsigmoid(gate.to(real)) / call.temperature)
    out, lse, keys, values, finite = _Slots.apply(call, q, k, v, write, before.keys, before.values)
    if not finite:
        return tiled.slot_scan(q, k, v, gate, **words)
    return out, lse, SlotState(keys, values, torch.ones_like(before.written))


class _Slots(torch.autograd.Function):
    """Inputs: the checked call, q, k, v, what slots take of each key, and the state."""

    @staticmethod
    def forward(ctx: Any, call: SlotCall, q: Tensor, k: Tensor, v: Tensor, write: Tensor, keys: Tensor, values: Tensor) -> Any:
        real = write.dtype
        out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=real)
        after = [torch.empty(t.shape, dtype=real) for t in (keys, values)]
        states = None
        if any(ctx.needs_input_grad):
            chunks, width = -(-k.shape[2] // CHUNK), fixed_width("scan_slots", real == torch.float64)
            size = whole_vectors(q.shape[3], width) * whole_vectors(write.shape[3], width) + write.shape[3] * whole_vectors(
                v.shape[3], width
            )
            states = torch.empty(k.shape[0] * k.shape[1] * chunks * size, dtype=real)
        finite = _run("slots_forward", call, (q, k, v, out, None), write, (keys, values), after, lse, states, [None] * 9)
        ctx.call = call
        ctx.save_for_backward(q, k, v, write, keys, values, states)
        ctx.set_materialize_grads(False)
        return out, lse, *after, bool(finite)

    @staticmethod
    @only_first_derivatives
    def backward(ctx: Any, grad_out: Any, grad_lse: Any, grad_keys: Any, grad_values: Any, _: None) -> Any:
        q, k, v, write, keys, values, states = ctx.saved_tensors
        real = write.dtype
        if grad_out is None and grad_lse is not None:
            grad_out = torch.zeros((), dtype=q.dtype).expand((*q.shape[:3], v.shape[3]))
        if grad_keys is not None or grad_values is not None:
            grad_keys, grad_values = (
                torch.zeros(t.shape, dtype=real) if g is None else g.to(real).contiguous()
                for g, t in ((grad_keys, keys), (grad_values, values))
            )
        width = fixed_width("scan_slots", real == torch.float64)
        grads = [t.new_zeros((*t.shape[:3], whole_vectors(t.shape[3], width)), dtype=real) for t in (q, k, v)]
        by_write, by_keys, by_values = (torch.zeros(t.shape, dtype=real) for t in (write, keys, values))
        grad_lse = None if grad_lse is None else grad_lse.to(real).contiguous()
        rest = [grad_lse, grad_keys, grad_values, *grads, by_write, by_keys, by_values]
        like = [torch.empty(t.shape, dtype=real) for t in (keys, values)]
        lse = torch.empty(0, dtype=real)
        _run("slots_backward", ctx.call, (q, k, v, None, grad_out), write, (keys, values), like, lse, states, rest)
        found = [g[..., : t.shape[3]].to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True)]
        return None, *found, by_write, by_keys.to(keys.dtype), by_values.to(values.dtype)


def _run(
    name: str, call: SlotCall, tensors: Any, write: Tensor, state: Any, after: list[Tensor], lse: Tensor, states: Tensor | None,
    rest: list[Tensor | None],
) -> int:  # fmt: skip
    given = [None if t is None else rows_without_gaps(t.detach()) for t in tensors]
    q, k, v = tensors[:3]
    real = write.dtype
    write = write.detach().contiguous()
    begins, seen = (None if t is None else t.to(torch.uint8).contiguous() for t in (call.begins, call.seen))
    before = [t.detach().to(real).contiguous() for t in state]
    places = [field for t in given for field in ((0, 0, 0, 0) if t is None else place_of(t))]
    seen_steps = (0, 0) if seen is None else (seen.shape[1] if seen.shape[0] > 1 else 0, 1 if seen.shape[1] > 1 else 0)
    block = struct.pack(
        "=8qd47q", *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], call.q_offset, call.scale,
        KINDS[q.dtype], torch.get_num_threads(), parallel(), *places, write.shape[3], call.delay, int(call.masked), write.data_ptr(),
        first_of(begins), first_of(seen), int(begins is not None and begins.shape[0] > 1), *seen_steps, *map(first_of, before),
        *map(first_of, after), lse.data_ptr(), first_of(states), *map(first_of, rest),
    )  # fmt: skip
    done: int = getattr(fixed_library("scan_slots", real == torch.float64), name)(block)
    if done < 0:
        raise MemoryError("a scan of slots found no memory for its states")
    return done
