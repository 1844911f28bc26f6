"""Linear attention whose decays come with the data in C++, forward and backward."""

from __future__ import annotations

import struct
from typing import Any

import torch

from sparsedsl.backends.cpp.attention import rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import KINDS, first_of, place_of, whole_vectors
from sparsedsl.backends.cpp.libraries import fixed_library, fixed_width, parallel
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.backends.tiled import scan_gated as tiled
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.call import wants_grad
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_calls import GatedCall, check_gated
from sparsedsl.runtime.torch_modes import is_transformed

__all__ = ["MOST_SHARING", "WIDEST", "gated_scan"]

Tensor = torch.Tensor
CHUNK = 64
# Channels of a head at most, and query heads that share a state.
WIDEST, MOST_SHARING = 512, 32


def gated_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None = None, erase: Tensor | None = None, *, scale: float,
    q_offset: int = 0, state: Tensor | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results and state: see :func:`sparsedsl.backends.tiled.scan_gated.gated_scan`, which gives the same. Heads wider than
    ``WIDEST`` are refused before anybody comes here."""
    words: dict[str, Any] = {"scale": scale, "q_offset": q_offset, "state": state, "documents": documents}
    call = check_gated(q, k, v, log_decay, beta, erase, scale=scale, q_offset=q_offset, state=state, documents=documents)
    known = [t for t in (q, k, v, log_decay, beta, erase, state) if t is not None]
    real, grad = accumulated(q.dtype), wants_grad(*known)
    lines, width = q.shape[0] * call.states, q.shape[3]
    kept = (-(-k.shape[2] // CHUNK) + 1) * lines * width * v.shape[3] * real.itemsize
    if is_transformed(*known) or not k.shape[2] or not q.numel() or (grad and kept > LIMITS.now.states_bytes):
        return tiled.gated_scan(q, k, v, log_decay, beta, erase, **words)
    first = torch.zeros(q.shape[0], call.states, width, v.shape[3], dtype=real) if state is None else state
    kind = q.dtype if q.dtype == k.dtype == v.dtype else real
    erase = None if erase is None else erase.to(kind).expand(q.shape[0], -1, -1, -1)
    given = (
        q.to(kind), k.to(kind), v.to(kind), log_decay.to(real), None if beta is None else beta.to(real), erase, first.to(real)
    )  # fmt: skip
    if not grad and k.shape[2] <= LIMITS.now.scan_steps:
        out, after = _steps(call, *given)
        return out.to(q.dtype), after
    out, after, finite = _Gated.apply(call, *given)
    if not finite:  # what is not seen may hold anything: token by token it stays where it is
        return tiled.gated_scan(q, k, v, log_decay, beta, erase, **words)
    return out.to(q.dtype), after


def _steps(
    call: GatedCall, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Any, erase: Any, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token."""
    out = q.new_empty((q.shape[0], max(q.shape[1], call.states), q.shape[2], v.shape[3]))
    after = torch.empty(state.shape, dtype=state.dtype)
    _run("gated_steps", call, (q, k, v, erase, out, None), g, beta, state, after, None, [None] * 8)
    return out, after


class _Gated(torch.autograd.Function):
    """Inputs: the checked call, q, k, v and what erases; log decays, beta and the state in that of sums."""

    @staticmethod
    def forward(
        ctx: Any, call: GatedCall, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Any, erase: Any, state: Tensor
    ) -> Any:
        out = q.new_empty((q.shape[0], max(q.shape[1], call.states), q.shape[2], v.shape[3]))
        after, entered = torch.empty(state.shape, dtype=state.dtype), None
        if any(ctx.needs_input_grad):
            chunks = -(-k.shape[2] // CHUNK) + 1
            entered = torch.empty(
                state.shape[0] * call.states * chunks * q.shape[3] * _whole(v.shape[3], state.dtype), dtype=state.dtype
            )
        finite = _run("gated_forward", call, (q, k, v, erase, out, None), g, beta, state, after, entered, [None] * 8)
        ctx.call = call
        ctx.save_for_backward(q, k, v, g, beta, erase, state, entered)
        ctx.set_materialize_grads(False)
        return out, after, bool(finite)

    @staticmethod
    @only_first_derivatives
    def backward(ctx: Any, grad_out: Tensor | None, grad_after: Tensor | None, _: None) -> Any:
        q, k, v, g, beta, erase, state, entered = ctx.saved_tensors
        if grad_out is None and grad_after is None:
            return (None,) * 8
        real, (batch, states) = state.dtype, state.shape[:2]
        heads = max(q.shape[1], states)
        if grad_out is None:
            grad_out = torch.zeros((), dtype=q.dtype).expand(batch, heads, q.shape[2], v.shape[3])
        width, width_v = (_whole(t.shape[3], real) for t in (q, v))
        by_q = torch.zeros(batch, heads, q.shape[2], width, dtype=real)
        by_k, by_v = (torch.empty(batch, states, k.shape[2], n, dtype=real) for n in (width, width_v))
        by_g = torch.empty(batch, states, k.shape[2], *([width] if g.ndim == 4 else []), dtype=real)
        by_beta = None if beta is None else torch.empty(batch, states, k.shape[2], dtype=real)
        by_erase = None if erase is None else torch.empty_like(by_k)
        by_state = torch.empty(state.shape, dtype=real)
        last = None if grad_after is None else grad_after.to(real).contiguous()
        rest = [by_q, by_k, by_v, by_g, by_beta, by_erase, by_state, last]
        _run("gated_backward", ctx.call, (q, k, v, erase, None, grad_out), g, beta, state, by_state, entered, rest)
        given = ((by_q, q), (by_k, k), (by_v, v), (by_g, g), (by_beta, beta), (by_erase, erase))
        found = [None if grad is None or t is None else _joined(grad, t) for grad, t in given]
        return None, *found, by_state


def _joined(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient of a tensor whose heads, and batch entries, serve several states."""
    grad = grad[..., : t.shape[3]] if t.ndim == 4 else grad
    if grad.shape[1] > t.shape[1]:
        grad = grad.unflatten(1, (t.shape[1], -1)).sum(2)
    return (grad.sum(0, keepdim=True) if grad.shape[0] > t.shape[0] else grad).to(t.dtype)


def _run(
    name: str, call: GatedCall, tensors: Any, g: Tensor, beta: Tensor | None, state: Tensor, after: Tensor, entered: Tensor | None,
    rest: list[Tensor | None],
) -> int:  # fmt: skip
    given = [None if t is None else rows_without_gaps(t.detach()) for t in tensors]
    q, k, v, erase = tensors[:4]
    g, beta = g.detach().contiguous(), None if beta is None else beta.detach().contiguous()
    begins = None if call.begins is None else call.begins.to(torch.uint8).contiguous()
    first = state.detach().contiguous()
    places = [field for t in given for field in ((0, 0, 0, 0) if t is None else place_of(t))]
    several = [int(t is not None and t.shape[0] > 1) for t in (g, beta, begins)]
    block = struct.pack(
        "=13qd45q", q.shape[0], call.states, q.shape[1], k.shape[1], v.shape[1], g.shape[1], 1 if beta is None else beta.shape[1],
        1 if erase is None else erase.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], call.q_offset, call.scale,
        KINDS[q.dtype], torch.get_num_threads(), parallel(),
        *places, g.data_ptr(), first_of(beta), *several[:2], int(g.ndim == 4), first_of(begins), several[2], first.data_ptr(),
        after.data_ptr(), first_of(entered), *map(first_of, rest),
    )  # fmt: skip
    done: int = getattr(fixed_library("scan_gated", state.dtype == torch.float64), name)(block)
    if done < 0:
        raise MemoryError("a scan found no memory for its states")
    return done


def _whole(n: int, real: torch.dtype) -> int:
    """``n`` entries in whole vectors of the processor."""
    return whole_vectors(n, fixed_width("scan_gated", real == torch.float64))
