"""Permuted block-sparse attention as a compiled program: the reference tests P1 to P13 of its specification."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

Tensor = torch.Tensor
B, HQ, H, N, D, BLOCK, SEGMENT = 2, 4, 2, 100, 8, 8, 16
LATER = ["selection reads later queries"]


@pytest.fixture(scope="module")
def problem(draw: Any) -> Any:
    """q, k, v; queries and keys tell tokens apart, so that little is chosen."""

    def make(length: int = N, *, heads: int = HQ, kv_heads: int = H) -> dict[str, Tensor]:
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
        found = {name: draw(B, n, length, D, seed=i) for i, (name, n) in enumerate(sizes.items())}
        return found | {"q": 3 * found["q"]}

    return make


def chosen(attn: Any, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The order of the keys, and which blocks were picked, as booleans."""
    found = attn.choices(**t)
    (order,) = (value for label, value in found.items() if label.startswith("segment_sort"))
    (selected,) = (value for label, value in found.items() if label.startswith("top_p"))
    return order, selected if isinstance(selected, Tensor) else selected.table()


def by_loops(t: dict[str, Tensor], mass: float, block: int = BLOCK, segment: int = SEGMENT) -> tuple[Tensor, Tensor, Tensor]:
    """The order, the blocks picked, and the output, as the published code works them out, one head after the other."""
    (batch, heads, length, _), group = t["q"].shape, t["q"].shape[1] // t["k"].shape[1]
    blocks, whole = -(-length // block), length // segment * segment
    orders = torch.arange(length).repeat(batch, heads, 1)
    selected = torch.zeros(batch, heads, blocks, blocks, dtype=torch.bool)
    out = torch.zeros_like(t["q"])
    for b, h in itertools.product(range(batch), range(heads)):
        q, k, v = t["q"][b, h], t["k"][b, h // group], t["v"][b, h // group]
        seen = (q[-block:] @ k[:whole].T / D**0.5).softmax(1).mean(0)
        for start in range(0, whole, segment):
            orders[b, h, start : start + segment] = start + (-seen[start : start + segment]).argsort(stable=True)
        order = orders[b, h]
        k, v = k[order], v[order]
        pool = [torch.nn.functional.pad(x, (0, 0, 0, -length % block)).unflatten(0, (-1, block)).mean(1) for x in (q, k)]
        logits = pool[0] @ pool[1].T / D**0.5
        for i in range(blocks):
            earlier = i * block // segment * segment // block
            p, total = logits[i, :earlier].softmax(0), 0.0
            for j in (-p).argsort(stable=True).tolist():
                selected[b, h, i, j] = True
                total += float(p[j])
                if total >= mass:
                    break
        first = int((order == 0).nonzero()[0]) // block
        row = torch.arange(length)
        tiles = selected[b, h].clone()
        tiles[:, first] = True
        allowed = tiles[row // block][:, row // block] & (row // segment < row[:, None] // segment)
        allowed |= (row // segment == row[:, None] // segment) & (order <= row[:, None])
        out[b, h] = (q @ k.T / D**0.5).masked_fill(~allowed, -torch.inf).softmax(1) @ v
    return orders, selected, out


@pytest.mark.parametrize("mass", [0.3, 0.9])
@pytest.mark.parametrize("length", [96, 100, 33])
def test_the_published_algorithm(problem: Any, backend: str, assert_close: Any, mass: float, length: int) -> None:
    t = problem(length)
    attn = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, mass), backend=backend)
    wanted = by_loops(t, mass)
    order, selected = chosen(attn, t)
    assert torch.equal(order, wanted[0]) and torch.equal(selected, wanted[1])
    assert_close(attn(**t), wanted[2])


@pytest.mark.parametrize(("length", "block", "segment"), [(513, 64, 256), (1111, 64, 256), (77, 8, 32), (128, 16, 32)])
def test_P1_P7_all_blocks_are_causal_attention(
    problem: Any, backend: str, assert_close: Any, length: int, block: int, segment: int
) -> None:
    t = problem(length, heads=2, kv_heads=1)
    attn = sd.compile(sd.patterns.pbs(block, segment, 1.0), backend=backend)
    wanted = sd.compile(sd.kv_idx <= sd.q_idx, backend="tiled")(**t, return_lse=True)
    assert_close(attn(**t, return_lse=True), wanted)


def test_P7_in_float32_too(problem: Any, backend: str, assert_close: Any) -> None:
    t = {name: x.float() for name, x in problem(256).items()}
    attn = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 1.0), backend=backend)
    assert_close(attn(**t), sd.compile(sd.kv_idx <= sd.q_idx, backend="reference")(**t), 1e-5)


def test_P2_a_permutation_within_segments(problem: Any, backend: str) -> None:
    t = problem()
    order, _ = chosen(sd.compile(sd.patterns.pbs(BLOCK, SEGMENT), backend=backend), t)
    place = torch.arange(N)
    assert torch.equal(order.sort(2).values, place.expand_as(order))
    assert (order // SEGMENT == place // SEGMENT).all()
    assert (order[:, :, 96:] == place[96:]).all()
    k = t["k"].repeat_interleave(HQ // H, 1)
    scores = (t["q"][:, :, -BLOCK:] @ k[:, :, :96].transpose(2, 3) / D**0.5).softmax(-1).mean(2)
    ranked = scores.gather(2, order[:, :, :96]).unflatten(2, (-1, SEGMENT))
    assert (ranked.diff(dim=3) <= 0).all()


def test_P3_only_earlier_segments_are_picked_and_the_own_one_is_seen(problem: Any, backend: str) -> None:
    t = problem()
    attn = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 0.5), backend=backend)
    _, selected = chosen(attn, t)
    block = torch.arange(selected.shape[2]) * BLOCK // SEGMENT
    assert not selected[..., block >= block[:, None]].any()
    assert not selected[:, :, block == 0].any()
    _, lse = attn(**t, return_lse=True)
    assert lse.isfinite().all()


def test_P4_P6_the_mass_is_reached_and_no_block_is_lost_for_more(problem: Any, backend: str) -> None:
    t = problem()
    before = None
    for mass in (0.3, 0.6, 0.9, 0.99):
        order, selected = chosen(sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, mass), backend=backend), t)
        k = t["k"].repeat_interleave(HQ // H, 1).gather(2, order[..., None].expand(-1, -1, -1, D))
        pool = [torch.nn.functional.pad(x, (0, 0, 0, -N % BLOCK)).unflatten(2, (-1, BLOCK)).mean(3) for x in (t["q"], k)]
        block = torch.arange(selected.shape[2]) * BLOCK // SEGMENT
        logits = (pool[0] @ pool[1].transpose(2, 3) / D**0.5).masked_fill(block >= block[:, None], -torch.inf)
        p = logits[:, :, 2:].softmax(-1)
        held, least = (p * selected[:, :, 2:]).sum(-1), torch.where(selected[:, :, 2:], p, torch.inf).amin(-1)
        assert (held >= mass - 1e-12).all() and (held - least < mass).all()
        assert before is None or (selected | ~before).all()
        before = selected


def test_P5_with_all_blocks_the_order_is_no_matter(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()

    def reversed_order(descending: bool) -> Any:
        order = sd.segment_sort(sd.probe(sd.q, sd.k, rows=BLOCK), SEGMENT, descending=descending)
        earlier = sd.kv_idx // SEGMENT < sd.q_idx // SEGMENT
        own = (sd.kv_idx // SEGMENT == sd.q_idx // SEGMENT) & (order.origin() <= sd.q_idx)
        return sd.compile(sd.attend(earlier | own, k=sd.take(sd.k, order), v=sd.take(sd.v, order)), backend=backend)

    assert_close(reversed_order(True)(**t), reversed_order(False)(**t))
    assert_close(reversed_order(True)(**t), sd.compile(sd.kv_idx <= sd.q_idx, backend="reference")(**t))


def test_P8_an_outstanding_key_is_seen_by_all_later_segments(problem: Any, backend: str) -> None:
    t, planted = problem(), 21
    t["q"][..., 0] = 5.0
    t["k"][:, :, planted] = 0.0
    t["k"][:, :, planted, 0] = 60.0
    order, selected = chosen(sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 0.5), backend=backend), t)
    assert (order[:, :, SEGMENT] == planted).all()
    assert selected[:, :, 2 * SEGMENT // BLOCK :, SEGMENT // BLOCK].all()


def test_P9_the_last_queries_change_earlier_rows(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    other = t | {"q": torch.cat([t["q"][:, :, :-BLOCK], t["q"][:, :, -BLOCK:].flip(3)], 2)}
    sparse, dense = (sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, mass), backend=backend) for mass in (0.3, 1.0))
    assert (sparse(**t) - sparse(**other))[:, :, : N // 2].abs().max() > 1e-3
    assert_close(dense(**t)[:, :, :-BLOCK], dense(**other)[:, :, :-BLOCK])
    case = kit.AttentionCase(batch=1, heads=2, kv_heads=1, q_len=64, kv_len=64)
    with pytest.raises(kit.Counterexample, match=r"choice top_p.* up to position \d+ change .*decided by the last 8 queries"):
        kit.assert_causal(sparse, case)


@pytest.mark.parametrize("length", [1, 5, SEGMENT])
def test_P10_one_segment_is_causal_attention(problem: Any, backend: str, assert_close: Any, length: int) -> None:
    t = problem(length)
    out = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 0.1), backend=backend)(**t)
    assert_close(out, sd.compile(sd.kv_idx <= sd.q_idx, backend="reference")(**t))


def test_P11_without_a_sort_and_with_the_own_segment_it_is_mean_pooling(problem: Any, backend: str) -> None:
    """Both differ by design: what the softmax is over makes other choices."""
    t = problem(96)
    pooled = sd.dot(sd.summary(sd.q, BLOCK), sd.summary(sd.k, BLOCK))
    causal, own = sd.kv_idx <= sd.q_idx, sd.q_idx // BLOCK == sd.kv_idx // BLOCK
    segments = sd.kv_idx // SEGMENT < sd.q_idx // SEGMENT
    tables = []
    for among in (causal, segments):
        attn = sd.compile(sd.attend(causal & (own | sd.top_p(pooled, 0.6, among=among, name="selected"))), backend=backend)
        selected = attn.choices(**t)["selected"]
        tables.append(selected if isinstance(selected, Tensor) else selected.table())
        block = torch.arange(12) * BLOCK
        allowed = block <= block[:, None] if among is causal else block // SEGMENT < block[:, None] // SEGMENT
        k = t["k"].repeat_interleave(HQ // H, 1)
        pool = [x.unflatten(2, (-1, BLOCK)).mean(3) for x in (t["q"], k)]
        p = (pool[0] @ pool[1].transpose(2, 3) / D**0.5).masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
        ranked, place = p.sort(-1, descending=True)
        taken = (ranked.cumsum(-1) - ranked < 0.6) & (ranked > 0)
        assert torch.equal(tables[-1], torch.zeros_like(taken).scatter(-1, place, taken))
    assert not torch.equal(*tables)


def test_P12_one_order_for_a_group(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    attn = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 0.5, share="group"), backend=backend)
    order, selected = chosen(attn, t)
    assert order.shape[1] == H and selected.shape[1] == HQ
    k = t["k"].repeat_interleave(HQ // H, 1)
    scores = (t["q"][:, :, -BLOCK:] @ k[:, :, :96].transpose(2, 3) / D**0.5).softmax(-1).mean(2).unflatten(1, (H, -1)).mean(2)
    wanted = (-scores.unflatten(2, (-1, SEGMENT))).argsort(dim=3, stable=True) + torch.arange(0, 96, SEGMENT)[:, None]
    assert torch.equal(order[:, :, :96], wanted.flatten(2))
    whole = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 1.0, share="group"), backend=backend)
    assert_close(whole(**t), sd.compile(sd.kv_idx <= sd.q_idx, backend="reference")(**t))


def test_P13_zeros_after_the_end_weaken_the_last_block_of_queries(problem: Any, backend: str) -> None:
    """Half a block: its mean is half as large with zeros, so more blocks are needed for the mass than with a mean over its rows."""
    t = problem(3 * SEGMENT + BLOCK // 2)
    order = sd.segment_sort(sd.probe(sd.q, sd.k, rows=BLOCK, complete=SEGMENT), SEGMENT)
    keys, values = sd.take(sd.k, order), sd.take(sd.v, order)
    earlier = sd.kv_idx // SEGMENT < sd.q_idx // SEGMENT
    pooled = sd.summary(keys, BLOCK, pad="zero")
    found = []
    for pad, scale in (("zero", None), ("valid", None), ("zero", 2 * D**-0.5)):
        selected = sd.top_p(sd.dot(sd.summary(sd.q, BLOCK, pad=pad), pooled, scale=scale), 0.7, among=earlier, name="selected")
        attn = sd.compile(sd.attend(earlier & selected, k=keys, v=values), backend=backend)
        table = attn.choices(**t)["selected"]
        found.append((table if isinstance(table, Tensor) else table.table())[:, :, -1])
    assert found[0].sum() > found[1].sum()
    assert torch.equal(found[1], found[2])  # logits are scaled by the rows it has over those of a block


def test_gradients_are_refused_and_given_where_they_are_meant(problem: Any) -> None:
    t = problem(44)
    program = sd.patterns.pbs(BLOCK, SEGMENT, 0.5)
    with pytest.raises(sd.UnsupportedError, match=r"learns from the future.*torch\.no_grad"):
        sd.compile(program, backend="tiled")(**{name: x.requires_grad_() for name, x in problem(44).items()})
    assert sd.compile(program).effects == {*LATER}
    done = kit.assert_matches_reference(sd.compile(program, backend="tiled", allow=LATER), **t)
    assert done == ("choices", "out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(problem: Any, dtype: torch.dtype) -> None:
    t = {name: x.to(dtype) for name, x in problem().items()}
    attn = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT, 0.6), backend="tiled", allow=LATER)
    assert "dv" in kit.assert_matches_reference(attn, **t)


def test_calls_cannot_be_cut(backend: str, problem: Any) -> None:
    attn = sd.compile(sd.patterns.pbs(BLOCK, SEGMENT), backend=backend)
    with pytest.raises(sd.PatternError, match="selection reads later queries"):
        kit.assert_prefill_equals_decode(attn)
