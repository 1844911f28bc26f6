"""Probes, pooled blocks, orders, subsets and weights against plain ones; the reference tests of the specs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.selection.chunking import PIECES
from sparsedsl.selection.counts import tail_count
from sparsedsl.selection.permutations import inverse, keep_tokens, segment_sort
from sparsedsl.selection.proxies import bounds, pooled, probe, smooth
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.scores import DotScores
from sparsedsl.selection.weights import weights_of
from sparsedsl.testing import tensor

DOUBLE = torch.float64
INF = float("inf")


def near(got, wanted, tolerance=1e-10):
    assert got.shape == wanted.shape
    assert torch.equal(got.isinf(), wanted.isinf())
    return float((got - wanted).detach().nan_to_num(0.0, 0.0, 0.0).abs().amax()) <= tolerance if got.numel() else True


# ---- probes ------------------------------------------------------------------------------------------------


@given(
    heads=st.sampled_from(((1, 1), (4, 2))), q_len=st.integers(1, 6), keys=st.integers(0, 13), rows=st.integers(1, 8), causal=st.booleans(),
    offset=st.integers(0, 9), summed=st.booleans(), piece=st.sampled_from((1, 500, 10**6)), data=st.data(),
)  # fmt: skip
@settings(max_examples=80)
def test_a_probe_is_softmax_over_all_keys(heads, q_len, keys, rows, causal, offset, summed, piece, data):
    q, k = tensor(2, heads[0], q_len, 5, seed=0, dtype=DOUBLE), tensor(2, heads[1], keys, 5, seed=1, dtype=DOUBLE)
    normalised = data.draw(st.integers(0, keys))
    kept = data.draw(st.integers(0, normalised))
    with PIECES.using(bytes=piece):
        got = probe(
            q, k, rows=rows, causal=causal, scale=0.8, keys_normalised=normalised, keys_kept=kept, q_offset=offset,
            reduce="sum" if summed else "mean",
        )  # fmt: skip
    logits = 0.8 * torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(heads[0] // heads[1], 1))[..., :normalised]
    if causal:
        logits = logits.masked_fill(torch.arange(normalised) > offset + torch.arange(q_len)[:, None], -INF)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)[:, :, -rows:, :kept]
    assert near(got, weights.sum(2) if summed else weights.mean(2))


def test_probes_of_the_two_systems():
    """PBS: no causal mask, the complete segments alone; TSA: causal, all keys, without the last window's columns."""
    q, k = tensor(1, 2, 23, 8, seed=0), tensor(1, 2, 23, 8, seed=1)
    pbs = probe(q, k, rows=4, causal=False, scale=0.35, keys_normalised=16)
    assert pbs.shape == (1, 2, 16) and near(pbs.sum(-1), torch.ones(1, 2), 1e-6)
    tsa = probe(q, k, rows=4, causal=True, scale=0.35, keys_kept=19)
    assert tsa.shape == (1, 2, 19) and bool((tsa.sum(-1) < 1).all())
    half = probe(q.bfloat16(), k.bfloat16(), rows=4, causal=True, scale=0.35, keys_kept=19)
    wide = probe(q.bfloat16().double(), k.bfloat16().double(), rows=4, causal=True, scale=0.35, keys_kept=19)
    assert half.dtype == torch.float32 and near(half.double(), wide, 1e-6)
    with pytest.raises(ShapeError, match="keys_kept 20, keys_normalised 16 of 23 keys; wanted"):
        probe(q, k, rows=4, causal=True, scale=1.0, keys_normalised=16, keys_kept=20)


def test_TSA_T11_a_lone_sink_keeps_a_seventh():
    score = torch.zeros(2, 3, 50)
    score[..., 0] = 0.7
    assert near(smooth(score, 7)[..., 0], torch.full((2, 3), 0.1), 1e-7)
    assert near(smooth(torch.ones(1, 1, 20), 7)[0, 0, :4], torch.tensor([4, 5, 6, 7]) / 7, 1e-6)
    assert torch.equal(smooth(score, 1), score)
    with pytest.raises(PatternError, match="pool is 4; wanted an odd number"):
        smooth(score, 4)


@given(
    tokens=st.integers(0, 14), block=st.integers(1, 6), how=st.sampled_from(("mean", "sum", "max", "min", "first", "last")),
    pad=st.sampled_from(("valid", "zero")), piece=st.sampled_from((1, 10**6)), half=st.booleans(),
)  # fmt: skip
@settings(max_examples=80)
def test_pooled_units(tokens, block, how, pad, piece, half):
    x = tensor(2, 2, tokens, 3, seed=0, dtype=torch.bfloat16 if half else DOUBLE)
    with PIECES.using(bytes=piece):
        got = pooled(x, block, how, pad)
    assert got.dtype == (torch.float32 if half else DOUBLE) and got.shape == (2, 2, -(-tokens // block), 3)
    for n in range(got.shape[2]):
        part = x[:, :, n * block : (n + 1) * block].double()
        if pad == "zero":
            part = torch.cat([part, part.new_zeros(2, 2, block - part.shape[2], 3)], 2)
        wanted = {
            "mean": part.mean(2), "sum": part.sum(2), "max": part.amax(2), "min": part.amin(2),
            "first": part[:, :, 0], "last": part[:, :, -1],
        }[how]  # fmt: skip
        assert near(got[:, :, n].double(), wanted, 1e-6 if half else 1e-12)


def test_pooled_units_have_gradients():
    for how in ("mean", "sum", "max", "min", "first", "last"):
        for pad in ("valid", "zero"):
            x = tensor(1, 2, 7, 2, seed=3, dtype=DOUBLE).requires_grad_()
            assert torch.autograd.gradcheck(lambda x, how=how, pad=pad: pooled(x, 3, how, pad), x)


def test_P13_zeros_beyond_the_end_weaken_the_last_block():
    q = tensor(1, 1, 11, 4, seed=0, dtype=DOUBLE)
    k = pooled(tensor(1, 1, 12, 4, seed=1, dtype=DOUBLE), 4)
    valid, zero = (DotScores(pooled(q, 4, "mean", pad), k).scores() for pad in ("valid", "zero"))
    assert near(zero[:, :, :2], valid[:, :, :2]) and near(zero[:, :, 2], valid[:, :, 2] * 3 / 4)


def test_bounds_are_those_of_the_keys():
    k = tensor(1, 1, 5, 2, seed=0)
    low, high = bounds(k, 3)
    assert torch.equal(low[0, 0, 1], k[0, 0, 3:].amin(0)) and torch.equal(high[0, 0, 0], k[0, 0, :3].amax(0))


# ---- segment sort ------------------------------------------------------------------------------------------


@given(
    tokens=st.integers(0, 30), segment=st.integers(1, 9), descending=st.booleans(), ties=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=60)
def test_P2_a_permutation_within_segments(tokens, segment, descending, ties, seed):
    whole = tokens // segment * segment
    score = tensor(2, 3, whole, seed=seed)
    score = score.round() if ties else score
    order = segment_sort(score, segment, tokens=tokens, descending=descending)
    assert order.shape == (2, 3, tokens) and order.dtype == torch.int64
    place = torch.arange(tokens)
    assert torch.equal(order.sort(-1).values, place.expand_as(order))
    assert bool((order // segment == place // segment).all())
    assert bool((order[..., whole:] == place[whole:]).all())
    taken = score.gather(-1, order[..., :whole]).unflatten(-1, (-1, segment)) if whole else score[..., None]
    numbers = order[..., :whole].unflatten(-1, (-1, segment)) if whole else taken
    step = taken.diff(dim=-1) * (-1 if descending else 1)
    assert bool((step >= 0).all())
    assert bool((numbers.diff(dim=-1)[step == 0] > 0).all()), "equal scores stay in their order"
    back = inverse(order)
    assert torch.equal(order.gather(-1, back), place.expand_as(order))
    assert torch.equal(
        segment_sort(torch.cat([score, score.new_ones(2, 3, tokens - whole)], -1), segment, descending=descending), order
    )


def test_P8_an_outstanding_key_comes_first_and_is_chosen():
    segment, block, tokens, planted = 16, 4, 64, 22
    q = torch.ones(1, 2, tokens, 8, dtype=DOUBLE) + 0.1 * tensor(1, 2, tokens, 8, seed=0, dtype=DOUBLE)
    k = 0.1 * tensor(1, 2, tokens, 8, seed=1, dtype=DOUBLE)
    k[:, :, planted] = 30.0
    score = probe(q, k, rows=block, causal=False, scale=8**-0.5)
    order = segment_sort(score, segment)
    first = planted // segment * segment
    assert bool((order[..., first] == planted).all())
    moved = k.gather(2, order[..., None].expand(-1, -1, -1, 8))
    selected = top_k(DotScores(pooled(q, block), pooled(moved, block)), 1)
    assert bool((selected.indices == first // block).all())


def test_P12_one_permutation_for_a_group():
    q, k = tensor(1, 4, 20, 8, seed=0), tensor(1, 2, 20, 8, seed=1)
    shared = segment_sort(probe(q.unflatten(1, (2, 2)).mean(2), k, rows=4, causal=False, scale=0.35), 5)
    own = segment_sort(probe(q, k, rows=4, causal=False, scale=0.35), 5)
    assert shared.shape == (1, 2, 20) and own.shape == (1, 4, 20)
    assert not torch.equal(own[:, 0], own[:, 1]), "by head they differ"


# ---- subsets -----------------------------------------------------------------------------------------------


@given(
    size=st.integers(0, 20), always=st.integers(0, 5), dropped=st.integers(0, 3), counts=st.tuples(st.integers(0, 22), st.integers(0, 22)),
    at_most=st.sampled_from((None, 4)), piece=st.sampled_from((1, 10**6)), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80)
def test_TSA_T3_tokens_are_kept_ascending_with_the_last(size, always, dropped, counts, at_most, piece, seed):
    score = (tensor(2, 3, size, seed=seed) * 2).round()
    total = size + dropped + always
    with PIECES.using(bytes=piece):
        indices, kept = keep_tokens(score, torch.tensor(counts), always=always, total=total, at_most=at_most)
    most = [min(n, size, size if at_most is None else at_most) for n in counts]
    assert kept.tolist() == [n + always for n in most]
    width = max(most) if at_most is None else min(at_most, size)
    assert indices.shape == (2, 3, width + always) and indices.dtype == torch.int64
    for b in range(2):
        for h in range(3):
            row = indices[b, h].tolist()
            ranked = sorted(range(size), key=lambda t, b=b, h=h: (-float(score[b, h, t]), t))
            wanted = sorted(ranked[: most[b]]) + list(range(total - always, total))
            assert row == wanted + [-1] * (width + always - len(wanted))


def test_the_whole_choice_of_token_sparse_attention():
    tokens, window, floor = 300, 16, 20
    q, k = 3 * tensor(2, 4, tokens, 16, seed=0), tensor(2, 2, tokens, 16, seed=1)
    score = smooth(probe(q, k, rows=window, causal=True, scale=0.25, keys_kept=tokens - window), 7)
    lengths = []
    for tail in (0.0, 0.005, 0.05, 0.2, 0.6, 0.99):
        indices, kept = keep_tokens(score, tail_count(score.mean(1), tail, floor), always=window, total=tokens)
        for b in range(2):
            lists = indices[b, :, : int(kept[b])]
            assert bool((lists.diff(dim=-1) > 0).all()) and bool(
                (lists[:, -window:] == torch.arange(tokens - window, tokens)).all()
            )
        lengths.append(kept)
    lengths = torch.stack(lengths)
    assert (
        bool((lengths[0] == tokens).all())
        and bool((lengths[-1] == floor + window).all())
        and bool((lengths.diff(dim=0) <= 0).all())
    )


def test_TSA_T8_of_equal_tokens_the_first_stay():
    indices, _ = keep_tokens(torch.ones(1, 2, 9), torch.tensor([4]), always=1, total=10)
    assert indices.tolist() == [[[0, 1, 2, 3, 9]] * 2]


def test_nothing_is_read_back_where_values_are_not_at_hand():
    q, k = torch.empty(2, 4, 64, 8, device="meta"), torch.empty(2, 2, 64, 8, device="meta")
    score = smooth(probe(q, k, rows=16, causal=True, scale=1.0, keys_kept=48), 7)
    indices, _ = keep_tokens(score, tail_count(score.mean(1), 0.1, 5), always=16, total=64, at_most=32)
    assert indices.shape == (2, 4, 48)
    assert segment_sort(score, 16, tokens=50).shape == (2, 4, 50)


# ---- weights -----------------------------------------------------------------------------------------------


def slots(seed=0, rows=5, width=6):
    """Scores with 0, 1, .. full slots, the others empty."""
    scores = tensor(2, 2, rows, width, seed=seed, dtype=DOUBLE)
    return scores.masked_fill(torch.arange(width) >= torch.arange(rows)[:, None], -INF)


@pytest.mark.parametrize("rule", ["softmax", "softmax1", "stick_breaking", "sigmoid", "raw"])
def test_T02_T09_weights_by_their_formulas(rule):
    scores = slots().abs() if rule == "raw" else slots()
    scores = scores.masked_fill(slots().isinf(), -INF)
    weights, total = weights_of(scores, rule)
    for b, h, r in [(b, h, r) for b in range(2) for h in range(2) for r in range(5)]:
        s = scores[b, h, r, :r]
        match rule:
            case "softmax":
                wanted, log_total = s.exp() / s.exp().sum(), s.exp().sum().log()
            case "softmax1":
                wanted, log_total = s.exp() / (1 + s.exp().sum()), (1 + s.exp().sum()).log()
            case "stick_breaking":
                taken = torch.sigmoid(s)
                wanted = torch.stack([taken[i] * (1 - taken[i + 1 :]).prod() for i in range(r)]) if r else s
                log_total = wanted.sum().log()
            case "sigmoid":
                wanted, log_total = torch.sigmoid(s), torch.sigmoid(s).sum().log()
            case _:
                wanted, log_total = s, s.sum().log()
        assert near(weights[b, h, r, :r], wanted) and bool((weights[b, h, r, r:] == 0).all())
        assert near(total[b, h, r], log_total if r or rule == "softmax1" else torch.tensor(-INF, dtype=DOUBLE))
    if rule == "softmax":
        assert near(weights.sum(-1)[:, :, 1:], torch.ones(2, 2, 4, dtype=DOUBLE))
    if rule in ("softmax1", "stick_breaking"):
        assert bool((weights.sum(-1) < 1).all())


@pytest.mark.parametrize("rule", ["softmax", "softmax1", "stick_breaking", "sigmoid", "raw"])
def test_weights_have_gradients_and_empty_slots_none(rule):
    scores = slots(seed=5).abs().masked_fill(slots().isinf(), -INF).requires_grad_()

    def both(scores):
        weights, total = weights_of(scores, rule)
        return (weights * tensor(*weights.shape, seed=1, dtype=DOUBLE)).sum() + (total.masked_fill(total.isinf(), 0.0) ** 2).sum()

    (grad,) = torch.autograd.grad(both(scores), scores)
    assert bool(grad.isfinite().all()) and bool((grad[scores.isinf()] == 0).all())
    step = 1e-6
    for place in [(0, 0, 1, 0), (1, 1, 4, 0), (1, 0, 4, 3), (0, 1, 2, 1)]:
        up, down = (scores.detach().clone() for _ in range(2))
        up[place] += step
        down[place] -= step
        assert abs(float((both(up) - both(down)) / (2 * step)) - float(grad[place])) < 1e-6


def test_T06_one_pick_has_no_gradient():
    scores = tensor(1, 1, 4, 1, seed=0, dtype=DOUBLE).requires_grad_()
    weights, _ = weights_of(scores)
    assert bool((weights == 1).all()) and float(torch.autograd.grad(weights.sum(), scores)[0].abs().max()) == 0


def test_equal_scores_weigh_the_same_and_great_ones_do_not_overflow():
    weights, total = weights_of(torch.full((1, 1, 1, 4), 7e4))
    assert weights.tolist() == [[[[0.25] * 4]]] and bool(total.isfinite().all())
    for rule in ("softmax1", "stick_breaking", "sigmoid"):
        for size in (-7e4, 7e4):
            weights, _ = weights_of(torch.full((1, 1, 1, 4), size), rule)
            assert bool(weights.isfinite().all()) and float(weights.sum()) <= 4
    with pytest.raises(PatternError, match="rule is 'hard'; wanted softmax"):
        weights_of(torch.zeros(1, 1, 1, 1), "hard")
