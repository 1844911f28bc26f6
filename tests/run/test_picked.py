"""Attention over picked chunks against dense masks in float64: values, LSE, all gradients, and the reference tests of HSA that concern it.

Reference tests carry the numbers of the HSA notes: T01 .. T12. Picks and weights are given here; how they are chosen is tested elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.run.picked import blocks, inverted
from sparsedsl.run.picked.attention import picked_attention
from sparsedsl.run.picked.picks import Picks

Tensor = torch.Tensor
INF = float("inf")


# ---- the oracle -----------------------------------------------------------------------------------------------------


def dense(
    q: Tensor, k: Tensor, v: Tensor, picks: Picks, *, scale: float, q_offset: int = 0, inside: Any = None,
    weights: Tensor | None = None, one: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with masks as large as the logits, in the dtype of q."""
    heads, kv_len = q.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    table = picks.table().repeat_interleave(heads // picks.indices.shape[1], dim=1).expand(q.shape[0], -1, -1, -1)
    allowed = table.repeat_interleave(picks.kv_unit, dim=3)[..., :kv_len]
    if inside is not None:
        q_pos, kv_pos = torch.arange(q.shape[2]) + q_offset, torch.arange(kv_len).expand(q.shape[2], -1)
        ask = [inside(slice(b, b + 1), torch.arange(heads), q_pos, kv_pos).expand(heads, -1, -1) for b in range(q.shape[0])]
        allowed = allowed & torch.stack(ask)
    logits = logits.masked_fill(~allowed, -INF)
    if weights is None:
        probabilities, lse = _softmax(logits, one)
        return probabilities @ v, lse
    slots = picks.indices.shape[3]
    by_head = weights.repeat_interleave(heads // weights.shape[1], dim=1)
    listed = picks.indices.repeat_interleave(heads // picks.indices.shape[1], dim=1).expand(q.shape[0], -1, -1, -1)
    out, total = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    for chunk in range(picks.units):
        tokens = slice(chunk * picks.kv_unit, (chunk + 1) * picks.kv_unit)
        probabilities, _ = _softmax(logits[..., tokens], one)
        for slot in range(slots):
            weight = torch.where(listed[..., slot] == chunk, by_head[..., slot], 0.0)
            out = out + weight[..., None] * (probabilities @ v[:, :, tokens])
            total = total + weight
    return out, torch.where(total > 0, torch.where(total > 0, total, 1.0).log(), -INF)


def _softmax(logits: Tensor, one: bool) -> tuple[Tensor, Tensor]:
    columns = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1) if one else logits
    if not columns.shape[-1]:
        return logits, logits.new_full(logits.shape[:-1], -INF)
    empty = (columns == -INF).all(dim=-1, keepdim=True)
    lse = columns.masked_fill(empty, 0.0).logsumexp(dim=-1, keepdim=True)
    return (logits - lse).exp().masked_fill(empty, 0.0), lse.masked_fill(empty, -INF)[..., 0]


def gradients(attend: Any, q: Tensor, k: Tensor, v: Tensor, picks: Picks, weights: Tensor | None, **options: Any) -> list[Tensor]:
    """``out, lse``, then the gradients of q, k, v (and weights) for fixed gradients of both, that of lse only where it is finite."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *([] if weights is None else [weights]))]
    out, lse = attend(*leaves[:3], picks, weights=leaves[3] if len(leaves) > 3 else None, **options)
    generator = torch.Generator().manual_seed(3)
    by_out = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    by_lse = torch.randn(lse.shape, dtype=torch.float64, generator=generator).to(lse.dtype)
    total = (out * by_out).sum() + (lse * by_lse).masked_fill(lse == -INF, 0.0).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return [out.detach(), lse.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def random_picks(batch: int, heads: int, rows: int, slots: int, kv_len: int, unit: int, seed: int) -> Picks:
    """Ascending lists without duplicates, of random lengths, some empty."""
    units = -(-kv_len // unit)
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(0, min(slots, units) + 1, (batch, heads, rows, 1), generator=generator)
    order = torch.rand(batch, heads, rows, units, generator=generator).argsort(-1)[..., :slots]
    order = order.masked_fill(torch.arange(order.shape[-1]) >= length, units).sort(-1).values
    lists = torch.full((batch, heads, rows, slots), -1, dtype=torch.int32)
    lists[..., : order.shape[-1]] = order.masked_fill(order == units, -1).int()
    return Picks(lists, length[..., 0].int(), q_unit=1, kv_unit=unit, units=units)


def assert_same(found: list[Tensor], wanted: list[Tensor], atol: float = 1e-10) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=atol)


def causal(batch: slice, heads: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    return kv_pos <= q_pos[:, None]


def uneven(batch: slice, heads: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    return (heads[:, None, None] + batch.start + kv_pos + q_pos[:, None]) % 3 != 0


# ---- random calls ---------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 8, 16]))
    rows, kv_len, unit = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    slots, dim, dim_v = draw(st.integers(0, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    heads, seed = kv_heads * group, draw(st.integers(0, 999))
    own = [1, kv_heads, heads]
    picks = random_picks(draw(st.sampled_from([1, batch])), draw(st.sampled_from(own)), rows, slots, kv_len, unit, seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim_v)]
    if draw(st.booleans()):  # as a projection leaves them
        tensors = [torch.randn(b, s, h, d, dtype=torch.float64, generator=generator).transpose(1, 2) for b, h, s, d in shapes]
    else:
        tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    weights = None
    if draw(st.booleans()):
        weights = torch.rand(batch, draw(st.sampled_from(own)), rows, slots, dtype=torch.float64, generator=generator) + 0.1
    options = {
        "scale": draw(st.sampled_from([0.3, 1.0])),
        "q_offset": draw(st.integers(0, 30)),
        "inside": draw(st.sampled_from([None, causal, uneven])),
        "one": draw(st.booleans()),
    }
    return [*tensors, picks, weights], options


@settings(max_examples=80, deadline=None)
@given(calls(), st.sampled_from([1, 2000, 1 << 25]), st.sampled_from([1, 3000, 1 << 18]), st.sampled_from([1, 40_000]))
def test_values_lse_and_gradients_are_those_of_dense_masks(call: Any, block: int, piece: int, single: int) -> None:
    arguments, options = call
    wanted = gradients(dense, *arguments, **options)
    with (
        mock.patch.object(blocks, "BLOCK_BYTES", block),
        mock.patch.object(blocks, "PIECE_NUMBERS_CPU", piece),
        mock.patch.object(inverted, "SINGLE", single),
    ):
        assert_same(gradients(picked_attention, *arguments, **options), wanted)
