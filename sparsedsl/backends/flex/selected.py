"""A softmax in every selected block on FlexAttention, which knows no lists of blocks: two passes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.tiles import classify
from sparsedsl.backends.flex.attention import FlexKernel
from sparsedsl.lang.expressions import Mask, Score, as_mask, b, h, kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import SCORE
from sparsedsl.lang.table_reads import table
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.heads import repeat_kv
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["selected_attention"]

Tensor = torch.Tensor


def selected_attention(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, None]:
    """``sum_c w_c softmax_c(logits) V`` as one softmax over all selected blocks with ``logit + log w_c - lse_c``; no LSE.

    The first pass makes ``lse_c`` of every block, the second is FlexAttention with a bias of queries x blocks: for short sequences.
    """
    blocks, offset = selected.blocks, selected.domain.q_offset
    assert selected.weights is not None
    plain = chunk_lses(q, k, selected)
    lses = torch.logaddexp(plain, torch.zeros_like(plain)) if selected.softmax1 else plain
    weight = repeat_kv(blocks.scattered(selected.weights), q.shape[1])
    row, column = q_idx - offset, kv_idx // blocks.kv_block
    chosen = table("chosen_units", dtype=bool)[b, h, row, column]
    bias = table("unit_bias", dtype=float, learned=True)[b, h, row, column]
    pattern = Pattern(as_mask(chosen) & Mask(selected.mask), Score(selected.score) + bias, None, selected.scale)
    usable = (weight > 0) & (lses > float("-inf"))
    values = torch.where(usable, torch.log(torch.where(usable, weight, 1.0)) - torch.where(usable, lses, 0.0), float("-inf"))
    given = {name: value for name, value in selected.tables.items() if name in pattern.tables}
    given |= {"chosen_units": usable, "unit_bias": values.to(q.dtype)}
    call = check_call(pattern, q, k, v, given, q_offset=offset)
    out, _ = FlexKernel(pattern, functools.partial(_lists, pattern)).attend(call, lse=False)
    shares = torch.where(usable, weight * torch.exp(torch.where(usable, plain - lses, 0.0)), 0.0)
    return out * shares.sum(-1, keepdim=True).to(out.dtype), None


def _lists(pattern: Pattern, domain: Domain, block: tuple[int, int]) -> BlockLists:
    with torch.no_grad():
        return classify(pattern.mask.expr, domain, block, minimal=False)


def chunk_lses(q: Tensor, k: Tensor, selected: SelectedCall) -> Tensor:
    """LSE of the logits in every chunk, ``(B, Hq, Sq, chunks)``, one chunk after the other."""
    batch, heads, rows, _ = q.shape
    dtype, block, offset = accumulated(q.dtype), selected.blocks.kv_block, selected.domain.q_offset
    env: dict[str, Any] = {**selected.domain.lengths, **selected.tables}
    env["b"] = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    env["h"] = torch.arange(heads, device=q.device).view(-1, 1, 1)
    env["q_idx"] = torch.arange(offset, offset + rows, device=q.device)[:, None]
    found = []
    for start in range(0, k.shape[2], block):
        keys = repeat_kv(k[:, :, start : start + block], heads).to(dtype)
        logits = q.to(dtype) @ keys.transpose(-1, -2) * selected.scale
        env["kv_idx"] = torch.arange(start, start + keys.shape[2], device=q.device)
        allowed = evaluate(selected.mask, env)
        if selected.score != SCORE:  # which may be anything where a pair is masked, and have any derivative
            env["score"] = torch.where(allowed, logits, 1.0)
            logits = evaluate(selected.score, env, dtype=dtype).to(dtype).expand(logits.shape)
        found.append(torch.where(allowed, logits, float("-inf")).logsumexp(-1))
    return torch.stack(found, dim=-1)
