"""What surrounds a call: somebody's tracing, torch.func's transforms, autocast. A call looks here before it does anything."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.torch_private import autocast_anywhere, has_no_values, in_graph_mode, is_wrapped, transforms_active

__all__ = ["autocast_inputs", "in_context_parallel", "is_transformed", "is_watched", "plain_math"]

_HALF = (torch.float16, torch.bfloat16)


def is_watched(*tensors: Any) -> bool:
    """Whether a call outside of ``torch.compile`` becomes part of a graph, or has no values to look at, instead of being computed now.

    True under ``make_fx``, for fake and functional tensors, and where every tensor is on the meta device.
    """
    if in_graph_mode():
        return True
    for t in tensors:
        if type(t) is not torch.Tensor or t.is_meta:
            break
    else:
        return False  # as nearly every call
    known = [t for t in tensors if isinstance(t, torch.Tensor)]
    return any(map(has_no_values, known)) or (bool(known) and all(t.is_meta for t in known))


def in_context_parallel() -> bool:
    """Whether torch's ``context_parallel()`` shards tokens now."""
    return "context_parallel" in getattr(functional.scaled_dot_product_attention, "__module__", "")


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether ``torch.vmap``, ``torch.func.grad`` or another transform of ``torch.func`` watches one of the tensors."""
    return transforms_active() and any(map(is_wrapped, tensors))


def plain_math(device: str) -> AbstractContextManager[Any]:
    """Without gradients and without autocast. Only what is on is turned off: turning something costs a dozen calls."""
    if autocast_anywhere():
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        return stack
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def autocast_inputs(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """``q, k, v`` in the type they are computed in under ``torch.autocast``; as they are where it is off.

    As for torch's ``scaled_dot_product_attention``: float32 and mixed inputs are cast to autocast's type, float64 is left alone.
    Inputs that share one half-precision type keep it.
    """
    if not autocast_anywhere() or not all(isinstance(t, torch.Tensor) for t in (q, k, v)):
        return q, k, v  # what is no tensor is refused later, with a message
    device = q.device.type
    if not torch.amp.autocast_mode.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return q, k, v
    if q.dtype == k.dtype == v.dtype and q.dtype in _HALF:
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.dtype in (*_HALF, torch.float32) else t

    return cast(q), cast(k), cast(v)
