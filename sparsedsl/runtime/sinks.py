"""The sink of a pattern: one more logit for every batch entry and head, whose value is zero. Its value, and the gradients of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.runtime.call import Call

__all__ = ["sink_gradients", "sink_logit"]

Tensor = torch.Tensor


def sink_logit(pattern: Pattern, call: Call, tables: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The sink, ``(B, Hq, Sq)``."""
    sink: Any = pattern.sink
    device, domain = call.q.device, call.domain
    env = {"b": torch.arange(domain.batch, device=device)[:, None, None], "h": torch.arange(domain.heads, device=device)[:, None]}
    value = evaluate(sink.expr, {**env, **domain.lengths, **tables}, dtype=dtype)
    return value.to(device=device, dtype=dtype).expand(domain.batch, domain.heads, domain.rows)


def sink_gradients(pattern: Pattern, call: Call, leaves: Mapping[str, Tensor], lse: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Gradients of the learned tables ``leaves`` (which require gradients) through the sink.

    ``lse``: with the sink in it. ``delta``: of each query the sum of ``out * grad_out`` less the gradient of the LSE.
    """
    if pattern.sink is None or not leaves:
        return {}
    with torch.enable_grad():
        logit = sink_logit(pattern, call, {**call.tables, **leaves}, lse.dtype)
    if not logit.requires_grad:
        return {}
    weight = torch.where(lse == float("-inf"), 0.0, torch.exp(logit.detach() - lse))
    found = torch.autograd.grad(logit, list(leaves.values()), -weight * delta, allow_unused=True)
    return {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
