"""What an indexer learns from: how far its scores are from what a donor's attention pays to each key.

Input: a converted module whose layer has an index, hidden states that go into it. Output: one number with gradients to the index alone.
Rows of queries are looked at some at a time, so that no more than a few of them times all keys are held at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsedsl.lang.evaluation import evaluate
from sparsedsl.models.converted import CONVERTED, LAYER
from sparsedsl.models.donor import Donor, project
from sparsedsl.models.grouped_rows import token_groups
from sparsedsl.models.layer import by_tokens
from sparsedsl.models.mask_arguments import MaskRequest, unmasked_request

__all__ = ["divergence", "index_loss", "paid"]

Tensor = torch.Tensor
_ROWS = 128  # queries at once


def index_loss(module: Any, x: Tensor, position_embeddings: Any, request: MaskRequest | None, chosen: bool) -> Tensor:
    """The mean over real tokens of :func:`divergence`. ``chosen``: over the keys that each picks, as shares of these."""
    layer, donor = getattr(module, LAYER), getattr(module, CONVERTED).donor
    with torch.no_grad():
        _, rope = project(module, x, position_embeddings)
    found, axes = layer.index(x, rope.rotate), by_tokens(layer.program)
    total, count = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)), 0
    for group in token_groups(unmasked_request(x.shape[1]) if request is None else request, x.shape[0], x.device):
        index = {name: group.take(rows, axes[name]) for name, rows in found.items()}
        q, k = (group.take(rows, 2) for rows in (rope.q, rope.k))
        tokens = k.shape[2]
        for start in range(0, tokens, _ROWS):
            rows = slice(start, min(start + _ROWS, tokens))
            attention = paid(donor, q[:, :, rows], k, start, getattr(module, "sinks", None))
            part = checkpoint(_of_rows, layer, index, rows, attention, chosen, use_reentrant=False)
            total, count = total + part, count + attention.shape[0] * attention.shape[1]
    return total / max(count, 1)


def _of_rows(layer: Any, index: dict[str, Tensor], rows: slice, attention: Tensor, chosen: bool) -> Tensor:
    some = index | {"index_q": index["index_q"][:, :, rows], "index_weights": index["index_weights"][:, :, rows]}
    scores = layer.index_scores(some)
    place = torch.arange(scores.shape[2], device=scores.device)
    seen = place <= place[rows, None]
    if chosen:
        best = scores.masked_fill(~seen, float("-inf")).topk(min(layer.top_k, scores.shape[2]), dim=2).indices
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, best, True) & seen
    return divergence(attention, scores, seen).sum()


def divergence(attention: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
    """``KL(p || softmax(scores))`` of each query, both over the keys that are ``seen``; 0 where nothing was paid to these.

    ``attention``: ``(.., queries, keys)``, at least 0, and shares of its sum over these keys are ``p``.

    >>> import torch
    >>> even = torch.full((1, 2), 0.5)
    >>> divergence(even, torch.zeros(1, 2), even > 0), divergence(even, torch.tensor([[0.0, -1e4]]), torch.tensor([[True, False]]))
    (tensor([0.]), tensor([0.]))
    """
    paid_here = attention.masked_fill(~seen, 0.0)
    whole = paid_here.sum(-1, keepdim=True)
    p = paid_here / whole.clamp(min=torch.finfo(whole.dtype).tiny)
    said = scores.masked_fill(~seen, float("-inf")).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(p, p) - p * said).sum(-1)


@torch.no_grad()
def paid(donor: Donor, q: Tensor, k: Tensor, start: int, sinks: Tensor | None) -> Tensor:
    """What the donor's own attention pays to each key, the mean over heads: ``(B, queries, keys)``. ``start``: the first query's number."""
    kind = torch.promote_types(q.dtype, torch.float32)
    native, (batch, heads, rows, _), keys = donor.native, q.shape, k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    logits = q.to(kind) @ k.to(kind).transpose(2, 3) * donor.scale
    entry, head, key = (torch.arange(count, device=q.device) for count in (batch, heads, keys))
    env: dict[str, Any] = {
        "b": entry[:, None, None, None], "h": head[:, None, None], "q_idx": key[start : start + rows, None], "kv_idx": key, "q_len": keys,
        "kv_len": keys, "left_padding": torch.zeros_like(entry), **native.bound,
    }  # fmt: skip
    if sinks is not None:
        env["sinks"] = sinks
    if native.has_score:
        logits = evaluate(native.score.expr, {**env, "score": logits}, dtype=kind).to(kind)
    logits = logits.masked_fill(~evaluate(native.mask.expr, env).expand_as(logits), float("-inf"))
    if native.sink is not None:
        sink = evaluate(native.sink.expr, env, dtype=kind).to(kind).expand(batch, heads, rows, 1)
        logits = torch.cat([logits, sink], dim=-1)
    found: Tensor = functional.softmax(logits, dim=-1)[..., :keys].mean(1)
    return found
