"""Calls in which nothing attends to anything: no batch entries, no queries, or no keys. The same for every lowering."""

from __future__ import annotations

import torch

from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["attend_empty", "nothing_attended", "sink_lse"]

Tensor = torch.Tensor


def attend_empty(pattern: Pattern, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a call with a batch size or length of 0: out 0; lse -inf, or the sink's logit. Gradients are zero."""
    return nothing_attended(call, sink_lse(pattern, call), (call.q, call.k, call.v, *call.tables.values()))


def nothing_attended(call: Call | ProgramCall, lse: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """An output of 0, and this LSE, ``(B, Hq, Sq)``; both with a gradient of zero for ``leaves``."""
    out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]))
    if not call.needs_grad:
        return out, lse
    # A sum of no elements is 0 whatever the tensor holds, and autograd gives it a gradient of the right shape.
    nothing = sum(t[:0].sum().to(lse.dtype) for t in leaves if t.is_floating_point())
    return out + nothing, lse + nothing


def sink_lse(pattern: Pattern, call: Call | ProgramCall) -> Tensor:
    """The LSE of rows that see no key, ``(B, Hq, Sq)``: the logit of the sink, or -inf."""
    q = call.q
    shape, kind = q.shape[:3], accumulated(q.dtype)
    lse = q.new_full(shape, float("-inf"), dtype=kind)
    if pattern.sink is None or not lse.numel():
        return lse
    batch = torch.arange(shape[0], device=q.device)[:, None, None]
    heads = torch.arange(shape[1], device=q.device)[:, None]
    return evaluate(pattern.sink.expr, {"b": batch, "h": heads, **call.tables}, dtype=kind).to(kind).expand(shape).clone()
