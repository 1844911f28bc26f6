"""Linear attention with a constant decay per query head in C++, forward and backward."""

from __future__ import annotations

import struct
from typing import Any

import torch

from sparsedsl.backends.cpp.attention import rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import KINDS, place_of, whole_vectors
from sparsedsl.backends.cpp.libraries import fixed_library, fixed_width, parallel
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.backends.tiled import scan_linear as tiled
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.call import wants_grad
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_calls import LinearCall, check_linear
from sparsedsl.runtime.torch_modes import is_transformed

__all__ = ["linear_scan"]

Tensor = torch.Tensor
CHUNK = 64


def linear_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, q_offset: int = 0, state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results and state: see :func:`sparsedsl.backends.tiled.scan_linear.linear_scan`, which gives the same."""
    call = check_linear(q, k, v, log_decay, scale=scale, q_offset=q_offset, state=state, documents=documents)
    words = {"scale": scale, "q_offset": q_offset, "state": state, "documents": documents}
    known = [q, k, v, *([] if state is None else [state])]
    real = accumulated(q.dtype)
    batch, heads, _, width = q.shape
    chunks = -(-k.shape[2] // CHUNK)
    grad = wants_grad(*known)
    states = chunks * batch * heads * width * v.shape[3] * real.itemsize
    if is_transformed(*known) or not k.shape[2] or not q.numel() or (grad and states > LIMITS.now.states_bytes):
        return tiled.linear_scan(q, k, v, log_decay, **words)  # type: ignore[arg-type]
    first = torch.zeros(batch, heads, width, v.shape[3], dtype=real) if state is None else state
    out, after, finite = _Linear.apply(call, log_decay.to(real).contiguous(), q, k, v, first)
    if not finite:  # what is not seen may hold anything: torch's products leave it out
        return tiled.linear_scan(q, k, v, log_decay, **words)  # type: ignore[arg-type]
    return out, after


class _Linear(torch.autograd.Function):
    """Inputs: the checked call, the logarithms of the decays, q, k, v and the state."""

    @staticmethod
    def forward(ctx: Any, call: LinearCall, decay: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Any:
        real, (batch, heads, rows, width) = decay.dtype, q.shape
        out = q.new_empty((batch, heads, rows, v.shape[3]))
        after = torch.empty(batch, heads, width, v.shape[3], dtype=real)
        states = None
        if any(ctx.needs_input_grad):
            states = torch.empty(batch * heads * -(-k.shape[2] // CHUNK) * width * _whole(v.shape[3], real), dtype=real)
        finite = _run("linear_forward", call, decay, (q, k, v, out, None), state, after, states, [0] * 5)
        ctx.call = call
        ctx.save_for_backward(decay, q, k, v, state, states)
        ctx.set_materialize_grads(False)
        return out, after, bool(finite)

    @staticmethod
    @only_first_derivatives
    def backward(ctx: Any, grad_out: Tensor | None, grad_after: Tensor | None, _: None) -> Any:
        decay, q, k, v, state, states = ctx.saved_tensors
        real = decay.dtype
        if grad_out is None and grad_after is None:
            return (None,) * 6
        grad_out = torch.zeros((), dtype=q.dtype).expand((*q.shape[:3], v.shape[3])) if grad_out is None else grad_out
        grads = [t.new_zeros((*t.shape[:3], _whole(t.shape[3], real)), dtype=real) for t in (q, k, v)]
        grad_state = torch.empty(state.shape, dtype=real)
        last = None if grad_after is None else grad_after.to(real).contiguous()
        rest = [*(g.data_ptr() for g in grads), grad_state.data_ptr(), 0 if last is None else last.data_ptr()]
        _run("linear_backward", ctx.call, decay, (q, k, v, None, grad_out), state, grad_state, states, rest)
        found = [g[..., : t.shape[3]].to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True)]
        return None, None, *found, grad_state.to(state.dtype)


def _run(
    name: str, call: LinearCall, decay: Tensor, tensors: Any, state: Tensor, after: Tensor, states: Tensor | None, rest: list[int]
) -> int:
    given = [None if t is None else rows_without_gaps(t.detach()) for t in tensors]
    q, k, v = tensors[:3]
    real = decay.dtype
    begins = None if call.begins is None else call.begins.to(torch.uint8).contiguous()
    first = state.detach().to(real).contiguous()
    places = [field for t in given for field in ((0, 0, 0, 0) if t is None else place_of(t))]
    block = struct.pack(
        "=8qd34q", *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], call.q_offset, call.scale,
        KINDS[q.dtype], torch.get_num_threads(), parallel(), *places, decay.data_ptr(), 0 if begins is None else begins.data_ptr(),
        0 if begins is None or begins.shape[0] == 1 else 1, first.data_ptr(), after.data_ptr(),
        0 if states is None else states.data_ptr(), *rest,
    )  # fmt: skip
    done: int = getattr(fixed_library("scan_linear", real == torch.float64), name)(block)
    if done < 0:
        raise MemoryError("a scan found no memory for its states")
    return done


def _whole(n: int, real: torch.dtype) -> int:
    """``n`` entries in whole vectors of the processor."""
    width = fixed_width("scan_linear", real == torch.float64)
    return whole_vectors(n, width)
