"""Calls in which nothing attends to anything: no batch entries, no queries, or no keys. The same for every lowering."""

from __future__ import annotations

import torch

from sparsedsl.lang.evaluate import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated

__all__ = ["attend_empty"]


def attend_empty(pattern: Pattern, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of a call with a batch size or length of 0: out 0; lse -inf, or the sink's logit. Gradients are zero."""
    q, v = call.q, call.v
    shape, kind = q.shape[:3], accumulated(q.dtype)
    out, lse = q.new_zeros((*shape, v.shape[3])), q.new_full(shape, float("-inf"), dtype=kind)
    if pattern.sink is not None and lse.numel():
        batch = torch.arange(shape[0], device=q.device)[:, None, None]
        heads = torch.arange(shape[1], device=q.device)[:, None]
        lse = evaluate(pattern.sink.expr, {"b": batch, "h": heads, **call.tables}, dtype=kind).to(kind).expand(shape).clone()
    if not call.needs_grad:
        return out, lse
    # A sum of no elements is 0 whatever the tensor holds, and autograd gives it a gradient of the right shape.
    nothing = sum(t[:0].sum().to(kind) for t in (q, call.k, v, *call.tables.values()) if t.is_floating_point())
    return out + nothing, lse + nothing
