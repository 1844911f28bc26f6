"""Attention over picked chunks against dense masks in float64: values, LSE, all gradients, and the reference tests of HSA that concern it.

Reference tests carry the numbers of the HSA notes: T01 .. T12. SelectedBlocks and weights are given here; how they are chosen
is tested elsewhere.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.selected import selected_attention
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.selected_call import SelectedCall
from sparsedsl.tiling.cutting import CUTTING

Tensor = torch.Tensor
INF = float("inf")


# ---- the oracle -----------------------------------------------------------------------------------------------------


def dense(
    q: Tensor, k: Tensor, v: Tensor, blocks: SelectedBlocks, *, scale: float, q_offset: int = 0, inside: Any = None,
    weights: Tensor | None = None, softmax1: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with masks as large as the logits, in the dtype of q."""
    heads, kv_len = q.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    table = blocks.table().repeat_interleave(heads // blocks.indices.shape[1], dim=1).expand(q.shape[0], -1, -1, -1)
    allowed = table.repeat_interleave(blocks.kv_block, dim=3)[..., :kv_len]
    if inside is not None:
        q_pos, kv_pos = torch.arange(q.shape[2]) + q_offset, torch.arange(kv_len).expand(q.shape[2], -1)
        ask = [inside(slice(b, b + 1), torch.arange(heads), q_pos, kv_pos).expand(heads, -1, -1) for b in range(q.shape[0])]
        allowed = allowed & torch.stack(ask)
    logits = logits.masked_fill(~allowed, -INF)
    if weights is None:
        probabilities, lse = _softmax(logits, softmax1)
        return probabilities @ v, lse
    slots = blocks.indices.shape[3]
    by_head = weights.repeat_interleave(heads // weights.shape[1], dim=1)
    listed = blocks.indices.repeat_interleave(heads // blocks.indices.shape[1], dim=1).expand(q.shape[0], -1, -1, -1)
    out, total = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    for chunk in range(blocks.blocks):
        tokens = slice(chunk * blocks.kv_block, (chunk + 1) * blocks.kv_block)
        probabilities, _ = _softmax(logits[..., tokens], softmax1)
        for slot in range(slots):
            weight = torch.where(listed[..., slot] == chunk, by_head[..., slot], 0.0)
            out = out + weight[..., None] * (probabilities @ v[:, :, tokens])
            total = total + weight
    return out, torch.where(total > 0, torch.where(total > 0, total, 1.0).log(), -INF)


def _softmax(logits: Tensor, softmax1: bool) -> tuple[Tensor, Tensor]:
    columns = torch.cat([logits, torch.zeros_like(logits[..., :1])], dim=-1) if softmax1 else logits
    if not columns.shape[-1]:
        return logits, logits.new_full(logits.shape[:-1], -INF)
    empty = (columns == -INF).all(dim=-1, keepdim=True)
    lse = columns.masked_fill(empty, 0.0).logsumexp(dim=-1, keepdim=True)
    return (logits - lse).exp().masked_fill(empty, 0.0), lse.masked_fill(empty, -INF)[..., 0]


def gradients(
    attend: Any, q: Tensor, k: Tensor, v: Tensor, blocks: SelectedBlocks, weights: Tensor | None, **options: Any
) -> list[Tensor]:
    """``out, lse``, then the gradients of q, k, v (and weights) for fixed gradients of both, that of lse only where it is finite."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *([] if weights is None else [weights]))]
    out, lse = attend(*leaves[:3], blocks, weights=leaves[3] if len(leaves) > 3 else None, **options)
    generator = torch.Generator().manual_seed(3)
    by_out = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    by_lse = torch.randn(lse.shape, dtype=torch.float64, generator=generator).to(lse.dtype)
    total = (out * by_out).sum() + (lse * by_lse).masked_fill(lse == -INF, 0.0).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return [out.detach(), lse.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def random_picks(batch: int, heads: int, rows: int, slots: int, kv_len: int, block: int, seed: int) -> SelectedBlocks:
    """Ascending lists without duplicates, of random lengths, some empty."""
    blocks = -(-kv_len // block)
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(0, min(slots, blocks) + 1, (batch, heads, rows, 1), generator=generator)
    order = torch.rand(batch, heads, rows, blocks, generator=generator).argsort(-1)[..., :slots]
    order = order.masked_fill(torch.arange(order.shape[-1]) >= length, blocks).sort(-1).values
    lists = torch.full((batch, heads, rows, slots), -1, dtype=torch.int32)
    lists[..., : order.shape[-1]] = order.masked_fill(order == blocks, -1).int()
    return SelectedBlocks(lists, length[..., 0].int(), q_block=1, kv_block=block, blocks=blocks)


def assert_same(found: list[Tensor], wanted: list[Tensor], atol: float = 1e-10) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=atol)


def causal(batch: slice, heads: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    return kv_pos <= q_pos[:, None]


def uneven(batch: slice, heads: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    return (heads[:, None, None] + batch.start + kv_pos + q_pos[:, None]) % 3 != 0


def nothing(batch: slice, heads: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    return (kv_pos < 0) & (q_pos[:, None] >= 0)


# The same masks as expressions.
MASKS = {
    causal: sd.kv_idx <= sd.q_idx,
    uneven: (sd.h + sd.b + sd.kv_idx + sd.q_idx) % 3 != 0,
    nothing: sd.kv_idx < sd.q_idx - 1000,
}


def along_lists(
    q: Tensor, k: Tensor, v: Tensor, blocks: SelectedBlocks, *, scale: float, q_offset: int = 0, inside: Any = None,
    weights: Tensor | None = None, softmax1: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention that is tested."""
    domain = Domain(max(q.shape[2], 1), max(k.shape[2], 1), q_offset, q.shape[0], q.shape[1])
    selected = SelectedCall(blocks, scale, domain, weights=weights, softmax1=softmax1)
    if inside is not None:
        selected = replace(selected, mask=MASKS[inside].expr)
    return selected_attention(q, k, v, selected)


# ---- random calls ---------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 8, 16]))
    rows, kv_len, block = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 9))
    slots, dim, dim_v = draw(st.integers(0, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    heads, seed = kv_heads * group, draw(st.integers(0, 999))
    own = [1, kv_heads, heads]
    blocks = random_picks(draw(st.sampled_from([1, batch])), draw(st.sampled_from(own)), rows, slots, kv_len, block, seed)
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
        "softmax1": draw(st.booleans()),
    }
    return [*tensors, blocks, weights], options


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Threads that share even the smallest call."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with LIMITS.using(few=0):
            yield
    finally:
        torch.set_num_threads(before)


@settings(max_examples=80, deadline=None)
@given(
    calls(),
    st.sampled_from([1, 2000, 1 << 25]),
    st.sampled_from([1, 3000, 1 << 18]),
    st.sampled_from([1, 40_000]),
    st.integers(1, 3),
)
def test_values_lse_and_gradients_are_those_of_dense_masks(call: Any, room: int, piece: int, single: int, threads: int) -> None:
    arguments, options = call
    wanted = gradients(dense, *arguments, **options)
    with (
        LIMITS.using(output_bytes=room, output_bytes_each=room, numbers_cpu=piece),
        CUTTING.using(single=single),
        on_threads(threads),
    ):
        assert_same(gradients(along_lists, *arguments, **options), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_low_precision_is_as_good_as_plain_attention_in_it(dtype: torch.dtype, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 8, 300, 32), (1, 2, 300, 32), (1, 2, 300, 16)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    blocks = random_picks(1, 2, 300, 6, 300, 16, seed=1)
    weights = torch.rand(1, 2, 300, 6, generator=generator) if weighted else None
    found = gradients(along_lists, q, k, v, blocks, weights, scale=0.2)
    exact = gradients(dense, q.double(), k.double(), v.double(), blocks, None if weights is None else weights.double(), scale=0.2)
    plain = gradients(dense, q.float(), k.float(), v.float(), blocks, weights, scale=0.2)
    for number, (got, want, low) in enumerate(zip(found, exact, plain, strict=True)):
        kept = torch.float32 if number in (1, 5) else dtype  # LSE and the gradient of weights are not rounded
        assert got.dtype == kept and got.isfinite().equal(want.isfinite())
        known = want.isfinite()
        error, allowed = (got.double() - want)[known].abs().max(), (low.double() - want)[known].abs().max()
        # In half precision the backward pass sees the rounded output: one rounding more of it in every delta.
        size = want[known].abs().max() * torch.finfo(kept).eps
        noise = 0.0 if dtype == torch.float32 or number < 2 else want[known].abs().max() * torch.finfo(dtype).eps
        assert error <= 2 * allowed + size + noise, (number, float(error), float(allowed))


def test_large_products_and_threads_give_the_same() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, h, 1500, 32, generator=generator) for h in (4, 1, 1))
    blocks = random_picks(1, 1, 1500, 8, 1500, 64, seed=2)
    weights = torch.rand(1, 4, 1500, 8, generator=generator)
    for chosen in (None, weights):
        with on_threads(2), LIMITS.using(output_bytes=1, output_bytes_each=1 << 20):
            found = [gradients(along_lists, q, k, v, blocks, chosen, scale=0.2, inside=causal) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # the same to the last bit, run after run
        wide = [x if x is None else x.double() for x in (q, k, v)]
        wanted = gradients(dense, *wide, blocks, None if chosen is None else chosen.double(), scale=0.2, inside=causal)
        assert_same([x.double() for x in found[0]], wanted, atol=2e-4)


# ---- HSA: the attention of given blocks and weights ------------------------------------------------------------------


def hsa(
    length: int, chunk: int = 8, slots: int = 3, group: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, SelectedBlocks, Tensor]:
    """q, k, v, the best complete chunks before each token by a random score, and the scores of the picked ones ``(B, H, L, K)``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, 48, 16, dtype=torch.float64, generator=generator) for h in (2 * group, 2, 2))
    scores = torch.randn(2, 2, 48, 48 // chunk, dtype=torch.float64, generator=generator)[:, :, :length, : length // chunk]
    complete = (torch.arange(length // chunk) + 1) * chunk <= torch.arange(length)[:, None]
    scores = scores.masked_fill(~complete, -INF)
    blocks = -(-length // chunk)
    best = scores.topk(min(slots, scores.shape[3]), dim=3)
    order = torch.where(best.values == -INF, blocks, best.indices).sort(-1).values
    chosen = scores.gather(3, order.clamp(max=length // chunk - 1)).masked_fill(order == blocks, -INF)
    lists = torch.where(order == blocks, -1, order).int()
    blocks = SelectedBlocks(lists, (lists >= 0).sum(-1, dtype=torch.int32), q_block=1, kv_block=chunk, blocks=blocks)
    return q[:, :, :length], k[:, :, :length], v[:, :, :length], blocks, chosen


def softmaxed(scores: Tensor) -> Tensor:
    """Over the picked, 0 for queries without selected blocks."""
    return scores.softmax(-1).nan_to_num(0.0)


def lse_of_slots(q: Tensor, k: Tensor, v: Tensor, blocks: SelectedBlocks, scale: float) -> Tensor:
    """The LSE of each picked chunk alone: ``(B, Hq, Sq, W)``."""
    slots = [blocks.indices[..., w : w + 1] for w in range(blocks.indices.shape[3])]
    alone = [SelectedBlocks(x, (x >= 0).sum(-1, dtype=torch.int32), 1, blocks.kv_block, blocks.blocks) for x in slots]
    return torch.stack([along_lists(q, k, v, one_each, scale=scale)[1] for one_each in alone], dim=-1)


@pytest.mark.parametrize("length", [8, 9, 21, 48])
def test_T01_rows_without_picks_are_zero_and_a_short_run_is_a_prefix(length: int) -> None:
    q, k, v, blocks, scores = hsa(48, slots=6)
    whole, _ = along_lists(q, k, v, blocks, scale=0.25, weights=softmaxed(scores))
    q, k, v, blocks, scores = hsa(length, slots=6)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, softmaxed(scores))]
    out, lse = along_lists(*leaves[:3], blocks, scale=0.25, weights=leaves[3])
    torch.testing.assert_close(out, whole[:, :, :length], atol=1e-12, rtol=0)
    assert torch.equal(out[:, :, :8], torch.zeros_like(out[:, :, :8])) and (lse[:, :, :8] == -INF).all()
    grads = torch.autograd.grad(out.square().sum() + lse.exp().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, :8].any() and not grads[3][:, :, :8].any()


def test_T02_weights_that_add_up_to_one_have_lse_zero() -> None:
    q, k, v, blocks, scores = hsa(48)
    _, lse = along_lists(q, k, v, blocks, scale=0.25, weights=softmaxed(scores))
    assert (lse[:, :, :8] == -INF).all() and lse[:, :, 8:].abs().max() < 1e-14


def test_T04_weights_from_the_mass_of_chunks_are_one_softmax() -> None:
    q, k, v, blocks, _ = hsa(48)

    def through_chunks(
        q: Tensor, k: Tensor, v: Tensor, blocks: SelectedBlocks, *, scale: float, weights: None
    ) -> tuple[Tensor, Tensor]:
        masses = lse_of_slots(q, k, v, blocks, scale)
        empty = (masses == -INF).all(-1)
        total = masses.masked_fill(empty[..., None], 0.0).logsumexp(-1)
        shares = (masses - total[..., None]).exp().masked_fill(empty[..., None], 0.0)
        return along_lists(q, k, v, blocks, scale=scale, weights=shares)[0], total.masked_fill(empty, -INF)

    # Gradients too: those through the LSE of each chunk make up for the deltas of its own.
    assert_same(
        gradients(through_chunks, q, k, v, blocks, None, scale=0.25), gradients(along_lists, q, k, v, blocks, None, scale=0.25)
    )


def test_T05_all_chunks_with_learned_weights_are_not_dense_attention() -> None:
    q, k, v, blocks, scores = hsa(48, slots=6)
    found, _ = along_lists(q, k, v, blocks, scale=0.25, weights=softmaxed(scores))
    over_chunks, _ = along_lists(q, k, v, blocks, scale=0.25)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert (found - over_chunks)[:, :, 8:].abs().max() > 0.5 and (found - full).abs().max() > 0.5
    exact, _ = along_lists(q, k, v, blocks, scale=0.25, weights=softmaxed(lse_of_slots(q, k, v, blocks, 0.25)))
    torch.testing.assert_close(exact, over_chunks, atol=1e-12, rtol=0)


def test_T06_a_single_chunk_is_plain_attention_in_it_and_moves_no_score() -> None:
    q, k, v, blocks, scores = hsa(48, slots=1)
    scores = scores.masked_fill(scores == -INF, 0.0).requires_grad_()
    out, _ = along_lists(q, k, v, blocks, scale=0.25, weights=scores.softmax(-1))
    alone, _ = along_lists(q, k, v, blocks, scale=0.25)
    torch.testing.assert_close(out, alone, atol=1e-13, rtol=0)
    assert not torch.autograd.grad(out.square().sum(), scores)[0].any()


def test_T08_the_order_of_chunks_and_of_tokens_within_them_does_not_matter() -> None:
    q, k, v, blocks, scores = hsa(48)
    weights = softmaxed(scores)
    wanted = along_lists(q, k, v, blocks, scale=0.25, weights=weights)
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(6, generator=generator)  # chunk order[c] comes to stand at c
    token = torch.stack([torch.randperm(8, generator=generator) for _ in range(6)])
    places = (order[:, None] * 8 + token).flatten()
    moved = torch.where(blocks.indices < 0, 6, order.argsort()[blocks.indices.long().clamp(min=0)])
    ascending = moved.sort(-1)
    lists = torch.where(ascending.values == 6, -1, ascending.values).int()
    found = along_lists(
        q,
        k[:, :, places],
        v[:, :, places],
        replace(blocks, indices=lists),
        scale=0.25,
        weights=weights.gather(3, ascending.indices),
    )
    assert_same(list(found), list(wanted), atol=1e-13)


@pytest.mark.parametrize("weighted", [True, False])
def test_T11_one_is_a_key_and_value_of_zeros(weighted: bool) -> None:
    q, k, v, blocks, scores = hsa(48)
    weights = softmaxed(scores) if weighted else None
    if weighted:  # at the end of every chunk
        longer = [torch.nn.functional.pad(x.unflatten(2, (6, 8)), (0, 0, 0, 1)).flatten(2, 3) for x in (k, v)]
        more = replace(blocks, kv_block=9)
    else:  # a chunk more, of which one key counts, picked by everyone
        longer = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v)]
        last = torch.full_like(blocks.indices[..., :1], 6)
        lists = torch.where(torch.cat([blocks.indices, last], -1) < 0, 7, torch.cat([blocks.indices, last], -1)).sort(-1).values
        more = SelectedBlocks(torch.where(lists == 7, -1, lists), blocks.counts + 1, q_block=1, kv_block=8, blocks=7)
    wanted = along_lists(q, *longer, more, scale=0.25, weights=weights)
    assert_same(list(along_lists(q, k, v, blocks, scale=0.25, weights=weights, softmax1=True)), list(wanted), atol=1e-13)


@pytest.mark.parametrize("weighted", [True, False])
def test_one_outweighs_logits_far_below_it(weighted: bool) -> None:
    q, k, v, blocks, scores = hsa(48)
    q, k = 2000 * q.abs(), -k.abs()  # logits below -1000, for which exp2 of the distance would overflow
    results = gradients(along_lists, q, k, v, blocks, softmaxed(scores) if weighted else None, scale=1.0, softmax1=True)
    assert not any(x.isnan().any() or (x == INF).any() for x in results)
    assert not results[0].any()


def test_T12_the_backward_pass_is_the_one_written_by_hand() -> None:
    q, k, v, blocks, scores = hsa(48)
    weights, grad_out = softmaxed(scores), torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, weights)]
    out, _ = along_lists(*leaves[:3], blocks, scale=0.25, weights=leaves[3])
    found = torch.autograd.grad(out, leaves, grad_out)

    def by_hand(own_delta: bool) -> list[Tensor]:
        dq, dk, dv, dw = (torch.zeros_like(x) for x in (q, k, v, weights))
        for b, h, t in itertools.product(range(2), range(8), range(48)):
            for slot, chunk in enumerate(blocks.indices[b, h // 4, t].tolist()):
                if chunk < 0:
                    continue
                tokens = slice(chunk * 8, chunk * 8 + 8)
                keys, values, row = k[b, h // 4, tokens], v[b, h // 4, tokens], grad_out[b, h, t]
                p = (keys @ q[b, h, t] * 0.25).softmax(0)
                delta = row @ (p @ values)
                dw[b, h // 4, t, slot] += delta
                w = weights[b, h // 4, t, slot]
                dz = w * p * (values @ row - (delta if own_delta else row @ out[b, h, t]))
                if own_delta:
                    assert abs(float(dz.sum())) < 1e-13
                dq[b, h, t] += 0.25 * dz @ keys
                dk[b, h // 4, tokens] += 0.25 * torch.outer(dz, q[b, h, t])
                dv[b, h // 4, tokens] += w * torch.outer(p, row)
        return [dq, dk, dv, dw]

    with torch.no_grad():
        assert_same(list(found), by_hand(own_delta=True), atol=1e-12)
        assert (by_hand(own_delta=False)[0] - found[0]).abs().max() > 0.1  # FlashAttention's delta is the trap
    chosen = blocks.table().any(2)  # chunks that nobody picked: the last one
    assert not chosen[:, :, 5].any() and not found[1][:, :, 40:].any() and not found[2][:, :, 40:].any()


# ---- what else it promises ------------------------------------------------------------------------------------------


def test_unpicked_keys_are_never_read() -> None:
    q, k, v, blocks, scores = hsa(48)
    wanted = gradients(along_lists, q, k, v, blocks, softmaxed(scores), scale=0.25)
    k[:, :, 40:], v[:, :, 40:] = float("nan"), INF
    assert_same(gradients(along_lists, q, k, v, blocks, softmaxed(scores), scale=0.25), wanted, atol=0.0)


def test_a_query_whose_chunk_is_all_forbidden_is_an_empty_row() -> None:
    q, k, v, blocks, scores = hsa(48)

    for weights in (None, softmaxed(scores)):
        out, lse, *grads = gradients(along_lists, q, k, v, blocks, weights, scale=0.25, inside=nothing)
        assert not out.any() and not any(g.any() for g in grads[:3])
        assert weights is not None or (lse == -INF).all()


@pytest.mark.parametrize(("rows", "kv_len"), [(0, 8), (3, 0)])
def test_calls_of_no_size_have_results(rows: int, kv_len: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (rows, kv_len, kv_len))
    lists = torch.full((1, 1, rows, 2), -1, dtype=torch.int32)
    blocks = SelectedBlocks(lists, lists[..., 0] + 1, q_block=1, kv_block=4, blocks=kv_len // 4)
    out, lse = along_lists(q, k, v, blocks, scale=1.0)
    assert out.shape == (1, 2, rows, 4) and not out.any() and (lse == -INF).all()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_autocast_and_second_derivatives() -> None:
    q, k, v, blocks, _ = (x.float().requires_grad_() if isinstance(x, Tensor) else x for x in hsa(48))
    wanted = gradients(along_lists, q, k, v, blocks, None, scale=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(along_lists, q, k, v, blocks, None, scale=0.25), wanted, atol=0.0)
    out, _ = along_lists(q, k, v, blocks, scale=0.25)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivatives"):
        grad.sum().backward()


def test_refusals_name_what_was_got_and_wanted() -> None:
    q, k, v, blocks, scores = hsa(48)
    with pytest.raises(UnsupportedError, match=r"q_block 1; got q_block 4.*backend='tiled'"):
        along_lists(q, k, v, replace(blocks, q_block=4), scale=1.0)
    with pytest.raises(
        ShapeError, match=r"selected.indices must be \(B or 1, Hs, Sq, W\).*got \(2, 2, 48, 3\) for q \(2, 8, 47, 16\)"
    ):
        along_lists(q[:, :, 1:], k, v, blocks, scale=1.0)
    with pytest.raises(ShapeError, match=r"40 keys are 5 chunks of 8; got selected blocks of 6 chunks"):
        along_lists(q, k[:, :, :40], v[:, :, :40], blocks, scale=1.0)
    with pytest.raises(ShapeError, match=r"weights must be \(B, Hw, Sq, W\) = \(2, Hw, 48, 3\).*got \(2, 3, 48, 3\)"):
        along_lists(q, k, v, blocks, scale=1.0, weights=scores[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ShapeError, match="weights must be floats"):
        along_lists(q, k, v, blocks, scale=1.0, weights=blocks.indices)


def of_all(mask: Any, score: Any, rows: int, keys: int, block: int = 8) -> SelectedCall:
    """A call of one batch entry and two heads whose queries list all blocks."""
    lists = torch.arange(-(-keys // block), dtype=torch.int32).expand(1, 1, rows, -1)
    blocks = SelectedBlocks(lists, torch.full((1, 1, rows), lists.shape[3]).int(), 1, block, lists.shape[3])
    return SelectedCall(blocks, 0.25, Domain(rows, keys, heads=2), mask=mask.expr, score=score.expr)


def test_logits_too_large_for_their_lse_weigh_alike() -> None:
    """At 1e9 float32 has no digits left for the logarithm of a number of keys."""
    q, v = (torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    q, k, v = (x.requires_grad_() for x in (q, q[:, :1].clone(), v[:, :1].clone()))
    out, lse = selected_attention(q, k, v, of_all(sd.kv_idx <= sd.q_idx, sd.score + 1e9, 20, 20))
    means = torch.tril(torch.ones(20, 20)) / torch.arange(1, 21)[:, None]
    torch.testing.assert_close(out, (means @ v).expand(-1, 2, -1, -1), atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(grad, 2 * means.sum(0)[None, None, :, None].expand(v.shape), atol=1e-5, rtol=1e-5)
    assert (lse == 1e9).all()


@pytest.mark.parametrize("score", [sd.score, sd.tanh(sd.score), sd.score - 0.1 * sd.kv_idx, sd.exp(sd.score)], ids=str)
def test_what_a_query_does_not_see_of_its_blocks_has_no_effect(score: Any) -> None:
    q, k, v = (torch.randn(1, 2, 10, 8), torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8))
    results = []
    for unseen in (0.0, float("nan")):
        k[:, :, 10:], v[:, :, 10:] = unseen, unseen
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = selected_attention(*leaves, of_all(sd.kv_idx <= sd.q_idx, score, 10, 16))
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    assert_same(results[1], results[0], atol=1e-6)


# ---- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
    import resource, torch
    from sparsedsl.analysis.domain import Domain
    from sparsedsl.backends.tiled.selected import selected_attention
    from sparsedsl.selection.selected_blocks import SelectedBlocks
    from sparsedsl.selection.selected_call import SelectedCall

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def picks_of(rows, slots, blocks):
        lists = torch.randint(0, blocks // slots, (1, 1, rows, slots)) + torch.arange(slots) * (blocks // slots)
        return SelectedBlocks(lists.int(), torch.full((1, 1, rows), slots, dtype=torch.int32), 1, 64, blocks)

    def along_lists(q, k, v, selected, scale):
        return selected_attention(q, k, v, SelectedCall(selected, scale, Domain(q.shape[2], k.shape[2], 0, 1, q.shape[1])))

    along_lists(*(torch.randn(1, 1, 64, 64) for _ in range(3)), picks_of(64, 1, 1), scale=1.0)
"""


def peak_of(script: str) -> float:
    """MiB that the last line of a script adds to the peak of a process of its own."""
    lines = textwrap.dedent(MEASURE) + "\n" + textwrap.dedent(script)
    head, last = lines.rstrip().rsplit("\n", 1)
    whole = f"{head}\nbefore = peak()\n{last}\nprint(peak() - before)"
    run = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def test_a_decode_step_copies_only_the_picked_chunks() -> None:
    """512 MiB each of keys and values, of which 16 chunks are read."""
    assert peak_of("""
        k, v = (torch.empty(1, 1, 1 << 22, 64, dtype=torch.bfloat16).fill_(0.5) for _ in range(2))
        q, selected = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16), picks_of(1, 16, 1 << 16)
        out, lse = along_lists(q, k, v, selected, scale=0.125)
    """) < 64  # fmt: skip


def test_a_long_call_takes_memory_for_its_blocks_only() -> None:
    """16384 queries with 16 chunks each: the outputs of all pairs would be 256 MiB, gathered keys 4 GiB."""
    added = peak_of("""
        q, k, v = (torch.randn(1, h, 16384, 64) for h in (4, 1, 1))
        selected = picks_of(16384, 16, 256)
        out, lse = along_lists(q, k, v, selected, scale=0.125)
    """)
    assert added < 64 + 16 + 64  # blocks, the output, and what allocators and oneDNN keep
