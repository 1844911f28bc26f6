"""The reference: dense attention in plain torch. It defines what every pattern means; all else is compared with it.

Holds all ``q_len x kv_len`` logits. Any float dtype, any device, forward and backward through autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.exact import evaluate_exactly
from sparsedsl.lang.normalisers import POINTWISE, SOFTPICK, STICK_BREAKING
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.seen_products import seen_product

__all__ = ["attend_reference", "dense_mask", "logit_bytes"]


def logit_bytes(call: Call) -> int:
    """Bytes of one copy of the logits; a forward pass holds about three, a backward pass about five."""
    return (
        call.domain.batch
        * call.domain.heads
        * call.domain.rows
        * call.domain.kv_len
        * (8 if call.q.dtype == torch.float64 else 4)
    )


def _index_env(call: Call) -> dict[str, Any]:
    domain, device = call.domain, call.q.device
    return {
        "b": torch.arange(domain.batch, device=device)[:, None, None, None],
        "h": torch.arange(domain.heads, device=device)[:, None, None],
        "q_idx": torch.arange(domain.q_offset, domain.q_offset + domain.rows, device=device)[:, None],
        "kv_idx": torch.arange(domain.kv_len, device=device),
    } | domain.lengths | dict(call.given)  # fmt: skip


def _evaluator(call: Call) -> Callable[..., torch.Tensor]:
    """int64 does, unless a table holds values too far apart for it."""
    ordinary = all(call.given[name] is table for name, table in call.tables.items())
    return evaluate if ordinary else evaluate_exactly


def dense_mask(pattern: Pattern, call: Call) -> torch.Tensor:
    """The mask as booleans, broadcastable to ``(batch, heads, q_len, kv_len)``."""
    return _evaluator(call)(pattern.mask.expr, _index_env(call))


def attend_reference(pattern: Pattern, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)``: out ``(B, Hq, Sq, Dv)`` in the dtype of q, lse ``(B, Hq, Sq)`` in float32 (float64 for float64 inputs).

    A row that may attend to nothing gives out 0, lse -inf and zero gradients. Without a sum to divide by, lse is 0 and means nothing.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        return _attend(pattern, call)


def _as_they_are(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    return scores


def _broken_off(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Of what keys with a higher number left of a stick, each takes ``sigmoid(logit)``."""
    safe = torch.where(allowed, logits, 0.0)
    kept = torch.where(allowed, functional.logsigmoid(-safe), 0.0)
    # Without the key itself, and not as a difference: what a large logit leaves has no digits to spare.
    left = functional.pad(kept[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return torch.exp(functional.logsigmoid(safe) + left)


def _picked(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``exp(logit) - 1`` where it is positive, over the sum of its sizes; a logit of -inf has no part in it."""
    finite = allowed & (logits > float("-inf"))
    safe = torch.where(finite, logits, 0.0)
    peak = safe.detach().amax(-1, keepdim=True).clamp(min=0.0)
    more = torch.exp(safe - peak) - torch.exp(-peak)
    total = more.abs().sum(-1, keepdim=True)
    return more.relu() / torch.where(total == 0, 1.0, total)


_WEIGHTS = {POINTWISE: _as_they_are, SOFTPICK: _picked, STICK_BREAKING: _broken_off}


def _attend(pattern: Pattern, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulated(call.q.dtype)
    domain = call.domain
    # (batch, kv heads, group x length, dim): the heads of a group share keys without copies of them
    q = call.q.to(dtype).unflatten(1, (-1, call.group)).flatten(2, 3)
    k, v = call.k.to(dtype), call.v.to(dtype)
    shape = (domain.batch, domain.heads, domain.rows, domain.kv_len)
    logits = seen_product(q, k.transpose(-1, -2)).reshape(shape) * call.scale
    env, evaluate = _index_env(call), _evaluator(call)
    allowed = evaluate(pattern.mask.expr, env).expand(shape)
    if pattern.has_score:
        # Masked logits are set to 1, where every score function and its derivative are finite: 0 * inf would be NaN.
        safe = torch.where(allowed, logits, 1.0)
        logits = evaluate(pattern.score.expr, {**env, "score": safe}, dtype=dtype).to(dtype).expand(shape)
    if not pattern.has_lse:
        weights = torch.where(allowed, _WEIGHTS[pattern.normaliser](logits, allowed), 0.0)
        out = seen_product(weights.reshape(domain.batch, -1, call.group * domain.rows, domain.kv_len), v)
        return out.reshape(*shape[:3], -1).to(call.q.dtype), logits.new_zeros(shape[:3])
    logits = torch.where(allowed, logits, float("-inf"))
    peak = logits.detach().amax(dim=-1)
    sink = None
    if pattern.sink is not None:
        sink = evaluate(pattern.sink.expr, env, dtype=dtype).to(dtype).squeeze(-1).expand(shape[:3])
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == float("-inf"), 0.0, peak)
    # The gradient by the weight of a masked pair is a product with its value, and may be anything.
    weights = torch.where(allowed, torch.exp(logits - peak[..., None]), 0.0)
    total = weights.sum(dim=-1)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    empty = total == 0
    lse = torch.where(empty, float("-inf"), peak + torch.log(torch.where(empty, 1.0, total)))
    weights = torch.where(allowed, weights / torch.where(empty, 1.0, total)[..., None], 0.0)
    out = seen_product(weights.reshape(domain.batch, -1, call.group * domain.rows, domain.kv_len), v)
    return out.reshape(*shape[:3], -1).to(call.q.dtype), lse
