"""A decode step: one query a head, over the few keys that it sees, gathered or as slices.

There is no schedule, which would be a new one at every length, and no cutting into tiles. Called where nothing wants gradients.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from sparsedsl.analysis.key_intervals import keys_of_one_query
from sparsedsl.backends.tiled.head_groups import HeadGroups
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.score_rules import LN2, ScoreRule, clamped, rule_of, score_rule
from sparsedsl.backends.tiled.tile_jobs import picked
from sparsedsl.lang.normalisers import POINTWISE
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.sinks import sink_logit
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["decode", "decode_selected"]

Tensor = torch.Tensor
INF = float("inf")


def decode(pattern: Pattern, call: Call) -> tuple[Tensor, Tensor] | None:
    """``out (B, Hq, 1, Dv)`` and ``lse (B, Hq, 1)`` over a static mask; None where its keys are no slices, or too many."""
    ranges = keys_of_one_query(pattern.mask.expr, call.domain)
    if (
        not ranges
        or sum(map(len, ranges)) * call.k.shape[0] * call.k.shape[1] * (call.k.shape[3] + call.v.shape[3])
        > LIMITS.now.decode_numbers
    ):
        return None
    rule, dtype, domain = rule_of(pattern), accumulated(call.q.dtype), call.domain
    k, v = _slices(call.k, ranges).to(dtype).flatten(0, 1), _slices(call.v, ranges).to(dtype).flatten(0, 1)
    q = call.q.to(dtype).mul(rule.factor(call.scale)).reshape(k.shape[0], -1, k.shape[2])
    env: dict[str, Any] = {}
    if rule.bias is not None or rule.arbitrary:
        device, lead = q.device, (k.shape[0], -1, 1)
        heads = torch.arange(domain.batch * domain.heads, device=device).view(lead)
        keys = torch.cat([torch.arange(part.start, part.stop, device=device) for part in ranges])
        position = torch.tensor(domain.q_offset, device=device)
        env = {
            "b": heads[:, :1] // domain.heads, "h": heads % domain.heads, "q_idx": position, "kv_idx": keys, **domain.lengths,
            **call.tables,
        }  # fmt: skip
    logits = _logits(q, k, rule, env)
    if pattern.has_lse:
        out, lse = _softmax(logits, v)
    else:
        weights = logits if pattern.normaliser == POINTWISE else _softpick(logits)
        out, lse = torch.bmm(weights, v), logits.new_zeros(logits.shape[:2])
    out, lse = out.view(*call.q.shape[:3], v.shape[2]), lse.view(call.q.shape[:3])
    if pattern.sink is not None:
        logit = sink_logit(pattern, call, call.tables, dtype)
        out = out * torch.sigmoid(lse - logit).masked_fill_(lse == -INF, 0.0)[..., None]
        lse = torch.logaddexp(lse, logit)
    return out.to(call.q.dtype), lse


def decode_selected(job: SelectedCall, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The same along lists of selected blocks: see :func:`~sparsedsl.backends.tiled.selected.selected_attention`."""
    blocks, dtype = job.blocks, accumulated(q.dtype)
    indices = blocks.indices[..., : blocks.blocks]
    groups, slots, tokens = HeadGroups.of(q, k.shape[1], indices.shape[1]), indices.shape[3], blocks.kv_block
    numbers = groups.queries * slots * tokens * (k.shape[3] + v.shape[3])
    if not 0 < numbers <= LIMITS.now.decode_numbers:
        return None
    device, rule, domain = q.device, score_rule(job.score), job.domain
    own = torch.arange(groups.count, device=device)
    # One list for each head group, (B * groups, slots); then the keys of its blocks, (B * groups, slots * tokens).
    lists = indices[:, own * groups.list_heads // groups.count, 0].expand(groups.batch, -1, -1).reshape(-1, slots).long()
    keys = (lists[..., None] * tokens + torch.arange(tokens, device=device)).flatten(1)
    allowed = ((lists >= 0)[..., None].expand(-1, -1, tokens).flatten(1) & (keys < k.shape[2]))[:, None]
    lines = (torch.arange(groups.batch, device=device)[:, None] * groups.kv_heads + own * groups.kv_heads // groups.count).view(
        -1, 1
    )
    place = keys.clamp(0, k.shape[2] - 1) + lines * k.shape[2]
    gathered_k, gathered_v = (x.flatten(0, 2).index_select(0, place.view(-1)).to(dtype).view(*place.shape, -1) for x in (k, v))
    scaled = q.to(dtype).mul(rule.factor(job.scale)).reshape(len(lists), -1, q.shape[3])
    env: dict[str, Any] = {}
    if job.mask != sympy.true or rule.bias is not None or rule.arbitrary:
        heads = torch.arange(groups.batch * q.shape[1], device=device).view(len(lists), -1, 1)
        env = {
            "b": heads[:, :1] // q.shape[1], "h": heads % q.shape[1], "kv_idx": keys[:, None],
            "q_idx": torch.tensor(domain.q_offset, device=device), **domain.lengths, **job.tables,
        }  # fmt: skip
        if job.members is not None:
            bits = (
                job.members[:, own * groups.list_heads // groups.count, 0, :slots]
                .expand(groups.batch, -1, -1)
                .reshape(-1, slots, 1)
            )
            bits = bits.expand(-1, -1, tokens).flatten(1)[:, None]
            env |= {name: (bits >> number & 1).bool() for number, name in enumerate(job.choices)}
    if job.mask != sympy.true:
        allowed = allowed & torch.as_tensor(evaluate(job.mask, env), device=device)
    logits = torch.where(allowed, _logits(scaled, gathered_k, rule, env), -INF)
    if weights is None:
        out, lse = _softmax(logits, gathered_v, softmax1=job.softmax1)
    else:
        own_weights = weights[..., 0, :slots].repeat_interleave(q.shape[1] // weights.shape[1], 1).reshape(len(lists), -1, slots)
        shares = own_weights.to(dtype).masked_fill((lists < 0)[:, None], 0.0)
        out, lse = _softmax_a_chunk(logits.unflatten(2, (slots, tokens)), gathered_v, shares, softmax1=job.softmax1)
    return out.view(*q.shape[:3], v.shape[3]).to(q.dtype), lse.view(q.shape[:3])


def _slices(x: Tensor, ranges: list[range]) -> Tensor:
    parts = [x[:, :, part.start : part.stop] for part in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _logits(q: Tensor, k: Tensor, rule: ScoreRule, env: dict[str, Any]) -> Tensor:
    """In units of log2, ``(X, heads, keys)``."""
    s = torch.bmm(q, k.mT)
    if rule.tanh:
        s = s.tanh_()
    if rule.bias is not None:
        return s + clamped(evaluate(rule.bias, env, dtype=s.dtype).to(device=s.device, dtype=s.dtype))
    return rule.logits(s, env) if rule.changes else s


def _softmax(logits: Tensor, v: Tensor, *, softmax1: bool = False) -> tuple[Tensor, Tensor]:
    """``(X, heads, Dv)`` and ``(X, heads)``, natural logarithms; 0 and -inf where no logit is above -inf."""
    largest = logits.amax(2, keepdim=True).clamp(min=0.0 if softmax1 else torch.finfo(logits.dtype).min)
    weights = (logits - largest).exp2_()
    total = weights.sum(2, keepdim=True)
    if softmax1:
        total += (-largest).exp2_()
    out = torch.bmm(weights, v).div_(total).masked_fill_(total == 0, 0.0)
    return out, (largest + total.log2()).mul_(LN2)[..., 0]


def _softpick(logits: Tensor) -> Tensor:
    weights = picked(logits, logits.amax(2, keepdim=True).clamp_(min=0.0))
    total = weights.abs().sum(2, keepdim=True)
    return weights.relu_().div_(total).masked_fill_(total == 0, 0.0)


def _softmax_a_chunk(logits: Tensor, v: Tensor, shares: Tensor, *, softmax1: bool) -> tuple[Tensor, Tensor]:
    """The same with a softmax for each chunk, ``logits (X, heads, slots, tokens)``, whose results are added with ``shares``."""
    largest = logits.amax(3, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - largest).exp2_()
    total = weights.sum(3, keepdim=True)
    if softmax1:
        total += (-largest).exp2_()
    weights = weights * (shares[..., None] / total).masked_fill_(total == 0, 0.0)
    return torch.bmm(weights.flatten(2), v), shares.sum(2).log()
