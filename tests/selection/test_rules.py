"""Rules that pick blocks: against plain loops over sorted rows, whatever they are cut into; the reference tests of the specs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.errors import PatternError
from sparsedsl.selection.candidates import Candidates
from sparsedsl.selection.chunking import PIECES
from sparsedsl.selection.composed_scores import GroupedScores
from sparsedsl.selection.counts import cover_count, tail_count
from sparsedsl.selection.mass import threshold, top_p
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.scores import DotScores, TensorScores
from sparsedsl.selection.stable_topk import best
from sparsedsl.testing import tensor

INF = float("inf")
DTYPES = st.sampled_from((torch.float32, torch.float64))


@pytest.fixture(params=["whole", "tiny"])
def cutting(request):
    """Once in large pieces, once cell by cell."""
    with tiny(1) if request.param == "tiny" else contextlib.nullcontext():
        yield request.param


def tiny(cells):
    """Tiles of about so many cells, and groups of three."""
    return PIECES.using(bytes=48 * cells, blocks=max(1, cells // 3), align=1, group=3)


def few_values(batch, heads, rows, blocks, seed, dtype=torch.float32):
    """Scores with many ties, zeros of both signs, and some that are -inf."""
    values = (tensor(batch, heads, rows, blocks, seed=seed) * 2).round().to(dtype)
    return values.masked_fill(tensor(batch, heads, rows, blocks, seed=seed + 1) > 1.3, -INF)


def ordered(scores, forced=frozenset(), allowed=None):
    """Blocks by descending score, equal ones by number, the forced ones first."""
    blocks = [u for u, s in enumerate(scores) if u in forced or ((allowed is None or u in allowed) and s > -INF)]
    return sorted(blocks, key=lambda u: (u not in forced, 0 if u in forced else -scores[u], u))


def listed(selected, b, h, r):
    """The blocks of a list, after a look at its form."""
    row = selected.indices[b, h, r].tolist()
    count = int(selected.counts[b, h, r])
    assert row[count:] == [-1] * (len(row) - count) and -1 not in row[:count]
    assert row[:count] == sorted(set(row[:count]))
    return row[:count]


def places(x):
    return [(b, h, r) for b in range(x.shape[0]) for h in range(x.shape[1]) for r in range(x.shape[2])]


# ---- the order ---------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 250),
    k=st.integers(1, 5),
    group=st.integers(1, 7),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_the_best_are_those_of_a_stable_sort(rows, size, k, group, dtype, seed):
    scores = few_values(1, 1, rows, size, seed, dtype)
    scores = torch.where(tensor(1, 1, rows, size, seed=seed + 7) > 1, -scores, scores)  # +inf and -0.0 too
    with PIECES.using(group=group):
        values, found = best(scores, k)
    wanted = torch.sort(scores, dim=-1, descending=True, stable=True)
    assert torch.equal(values, wanted.values[..., :k]) and torch.equal(found, wanted.indices[..., :k])


def test_equal_numbers_of_groups_stay_in_the_order_of_their_places(options):
    """The group of the greatest number comes later than one that holds an equal second."""
    options(PIECES, group=3)
    x = torch.zeros(60)
    x[[4, 40, 41]] = torch.tensor([7.0, 9.0, 7.0])
    assert best(x, 2)[1].tolist() == [40, 4]


def test_extreme_numbers_are_ordered():
    x = torch.tensor([1e-45, -1e-45, 3.4e38, -3.4e38, INF, -INF, 0.0, -0.0, 1.0, -1.0])
    assert best(x, 10)[1].tolist() == torch.sort(x, descending=True, stable=True).indices.tolist()


# ---- top-k -------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 7), blocks=st.integers(1, 24), k=st.integers(1, 26), cells=st.integers(1, 60), dtype=DTYPES,
    seed=st.integers(0, 99), force=st.sampled_from(("none", "inside", "extra")), limited=st.booleans(),
)  # fmt: skip
@settings(max_examples=120)
def test_top_k_is_that_of_sorted_rows(rows, blocks, k, cells, dtype, seed, force, limited):
    values = few_values(2, 2, rows, blocks, seed, dtype)
    begin, end = (torch.arange(rows) - 3).clamp(min=0), torch.arange(rows) * 4
    candidates = Candidates(begin, end, lambda r, u: (2 * r[:, None] + u) % 7 != 0) if limited else None
    forced = lambda r, u: (u == 1) | (u % 5 == r[:, None] % 5)  # noqa: E731
    extra = blocks if force == "extra" else None
    with tiny(cells):
        selected = top_k(
            TensorScores(values), k, candidates, forced=None if force == "none" else forced, forced_extra=extra, kv_block=8
        )
    assert (selected.kv_block, selected.blocks, selected.indices.dtype) == (8, blocks, torch.int32)
    assert selected.indices.shape == (2, 2, rows, min(k, blocks) + (blocks if extra else 0))
    for b, h, r in places(values):
        reach = [u for u in range(blocks) if not limited or int(begin[r]) <= u < int(end[r])]
        allowed = {u for u in reach if not limited or (2 * r + u) % 7}
        named = {u for u in reach if u == 1 or u % 5 == r % 5}
        scores = values[b, h, r].tolist()
        match force:
            case "none":
                wanted = ordered(scores, allowed=allowed)[:k]
            case "inside":
                wanted = ordered(scores, named, allowed)[:k]
            case _:
                wanted = ordered(scores, allowed=allowed - named)[:k] + list(named)
        assert listed(selected, b, h, r) == sorted(wanted)


@given(seed=st.integers(0, 99), heads=st.sampled_from(((4, 2), (2, 2), (4, 1))), how=st.sampled_from(("sum", "mean", "max")))
@settings(max_examples=20)
def test_S5_one_choice_for_a_group_with_first_and_last_chunks_forced(seed, heads, how):
    """Sharing in a KV group, one first and two last chunks forced, none later than the query: as in NSA; the own one: as in MoBA."""
    size, length = 4, 37
    chunks = -(-length // size)
    q, lm = (
        tensor(1, heads[0], length, 8, seed=seed, dtype=torch.float64),
        tensor(1, heads[1], chunks, 8, seed=seed + 1, dtype=torch.float64),
    )
    own = torch.arange(length) // size

    def forced(row, block):
        own = (row // size)[:, None]
        return (block == 0) | (block == own) | (block == own - 1)

    source = GroupedScores(DotScores(q, lm), heads[1], how)
    selected = top_k(source, 5, Candidates(end=own + 1), forced=forced)
    scores = torch.einsum("bhrd,bhud->bhru", q, lm.repeat_interleave(heads[0] // heads[1], 1)).unflatten(1, (heads[1], -1))
    scores = {"sum": scores.sum(2), "mean": scores.mean(2), "max": scores.amax(2)}[how]
    for b, h, r in places(selected.indices):
        last = int(own[r])
        named = {u for u in (0, last - 1, last) if u >= 0}
        found = listed(selected, b, h, r)
        assert named <= set(found) and found[-1] == last
        assert found == sorted(ordered(scores[b, h, r].tolist(), named, set(range(last + 1)))[:5])


# ---- HSA's choice ------------------------------------------------------------------------------------------


def chosen_chunks(length, size, k, cached=None, seed=0, noise=0.0, window=None, equal=False):
    """Complete chunks that ended before the query."""
    q = tensor(2, 2, length, 8, seed=seed, dtype=torch.float64)
    lm = tensor(2, 2, length // size, 8, seed=seed + 1, dtype=torch.float64)
    lm = torch.zeros_like(lm) if equal else lm
    position = torch.arange(length)
    end = position // size
    if window is not None:
        end = torch.minimum(end, ((position - window) // size + 1).clamp(min=0))
    return top_k(DotScores(q, lm), k, Candidates(end=end), kv_block=size), q, lm


@pytest.mark.parametrize("length", [7, 8, 9, 21, 48])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_T01_T10_only_complete_chunks_that_ended_before(length, k, cutting):
    size = 8
    selected, q, lm = chosen_chunks(length, size, k)
    assert selected.blocks == length // size
    scores = torch.einsum("bhrd,bhud->bhru", q, lm)
    for b, h, r in places(selected.indices):
        assert listed(selected, b, h, r) == sorted(ordered(scores[b, h, r].tolist(), allowed=set(range(r // size)))[:k])
    assert int(selected.counts[:, :, :size].sum()) == 0, (
        "nothing before the first chunk ended, and its last token does not see it"
    )
    if length > size:
        assert bool((selected.counts[:, :, size] == 1).all())


def test_all_chunks_where_k_is_no_less():
    selected, _, _ = chosen_chunks(48, 8, 6)
    assert selected.indices[0, 0, 47].tolist() == [0, 1, 2, 3, 4, -1] and selected.indices.shape[3] == 6
    assert chosen_chunks(48, 8, 100)[0].indices.shape[3] == 6


def test_chunks_within_a_window_can_be_left_out():
    selected, _, _ = chosen_chunks(48, 8, 6, window=16)
    for r in range(48):
        assert listed(selected, 0, 0, r) == [c for c in range(6) if (c + 1) * 8 <= r and c * 8 <= r - 16]


def test_equal_scores_give_the_lowest_chunks(cutting):
    selected, _, _ = chosen_chunks(48, 8, 3, equal=True)
    assert selected.indices[1, 1, 47].tolist() == [0, 1, 2] and selected.indices[0, 1, 15].tolist() == [0, -1, -1]


@pytest.mark.parametrize("t", [7, 8, 9, 23, 24, 47])
def test_T13_one_step_chooses_as_the_prefill(t):
    selected, q, lm = chosen_chunks(48, 8, 3)
    complete = t // 8
    step = top_k(DotScores(q[:, :, t : t + 1], lm[:, :, :complete]), 3, Candidates(end=torch.tensor([complete])))
    for b, h, _ in places(step.indices):
        assert listed(step, b, h, 0) == listed(selected, b, h, t)


# ---- top-p and thresholds ----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 5), blocks=st.integers(1, 12), p=st.sampled_from((0.0, 0.3117, 0.5153, 0.9071, 1.5)),
    measure=st.sampled_from(("softmax", "share")),
    inclusive=st.booleans(), unmet=st.sampled_from(("all", "none")), force=st.sampled_from(("none", "after", "first")),
    at_most=st.sampled_from((None, 1, 3)), cells=st.integers(1, 200), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=150)
def test_top_p_is_that_of_sorted_rows(rows, blocks, p, measure, inclusive, unmet, force, at_most, cells, seed):
    values = few_values(1, 2, rows, blocks, seed, torch.float64)
    if measure == "share":
        values = torch.where(values > -INF, values.abs(), values)
    end = torch.arange(rows) * 3
    candidates = Candidates(end=end, allowed=lambda r, u: (r[:, None] + u) % 4 != 0)
    forced = lambda r, u: u == r[:, None] % 3  # noqa: E731
    with tiny(cells):
        selected = top_p(
            TensorScores(values), p, candidates, measure=measure, inclusive=inclusive, unmet=unmet, at_most=at_most,
            forced=None if force == "none" else forced, forced_in_mass=force == "first",
        )  # fmt: skip
    for b, h, r in places(values):
        allowed = {u for u in range(min(blocks, int(end[r]))) if (r + u) % 4}
        named = {r % 3} & set(range(min(blocks, int(end[r])))) if force != "none" else set()
        scores = values[b, h, r]
        live = [u for u in sorted(allowed) if scores[u] > -INF]
        mass = torch.zeros(blocks, dtype=torch.float64)
        mass[live] = (
            torch.softmax(scores[live], 0) if measure == "softmax" else scores[live] / max(1e-300, float(scores[live].sum()))
        )
        order = ordered(scores.tolist(), named if force == "first" else set(), allowed)
        sums = torch.cumsum(mass[order], 0).tolist() if order else []
        crossing = next((i for i, total in enumerate(sums) if total >= p), None)
        if crossing is None:
            kept = set(live) if unmet == "all" else set()
        else:
            kept = set(order[: crossing + inclusive])
        wanted = kept | named
        if at_most is not None:
            wanted = set(ordered(scores.tolist(), named, wanted)[:at_most])
        assert listed(selected, b, h, r) == sorted(wanted), (order, sums)


@given(
    rows=st.integers(1, 5), blocks=st.integers(1, 12), least=st.sampled_from((-1.0, 0.0, 0.2117, 2.0)), cells=st.integers(1, 200),
    measure=st.sampled_from(("softmax", "share", "score")), forced=st.booleans(),
    at_most=st.sampled_from((None, 2)), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80)
def test_threshold(rows, blocks, least, cells, measure, forced, at_most, seed):
    values = few_values(2, 1, rows, blocks, seed, torch.float64)
    values = torch.where(values > -INF, values.abs(), values) if measure == "share" else values
    end = torch.arange(rows) * 2
    with tiny(cells):
        selected = threshold(
            TensorScores(values), least, Candidates(end=end), measure=measure, at_most=at_most,
            forced=(lambda r, u: u == 1) if forced else None,
        )  # fmt: skip
    for b, h, r in places(values):
        scores = values[b, h, r]
        live = [u for u in range(min(blocks, int(end[r]))) if scores[u] > -INF]
        mass = scores.clone()
        if measure != "score":
            mass[live] = (
                torch.softmax(scores[live], 0) if measure == "softmax" else scores[live] / max(1e-300, float(scores[live].sum()))
            )
        named = {1} & set(range(min(blocks, int(end[r])))) if forced else set()
        wanted = {u for u in live if mass[u] >= least} | named
        if at_most is not None:
            wanted = set(ordered(scores.tolist(), named, wanted)[:at_most])
        assert listed(selected, b, h, r) == sorted(wanted)


def pbs_scores(blocks=8, segment=2, heads=2, seed=0):
    """Logits of blocks; candidates are the blocks of earlier segments, own segments are forced."""
    logits = tensor(1, heads, blocks, blocks, seed=seed, dtype=torch.float64)
    own = torch.arange(blocks) // segment
    candidates = Candidates(end=(own + 1) * segment, allowed=lambda r, u: u // segment < (r // segment)[:, None])
    return logits, own, candidates, lambda r, u: u // segment == (r // segment)[:, None]


@given(p=st.sampled_from((0.2, 0.5, 0.9, 0.99)), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_P3_P4_the_mass_is_reached_and_not_without_the_last(p, seed):
    logits, own, candidates, forced = pbs_scores(seed=seed)
    bare = top_p(TensorScores(logits), p, candidates, measure="softmax", unmet="none").table()
    with_own = top_p(TensorScores(logits), p, candidates, measure="softmax", unmet="none", forced=forced).table()
    earlier = own[None, :] < own[:, None]
    assert not bool((bare & ~earlier).any()) and not bool(bare[:, :, own == 0].any())
    assert torch.equal(with_own, bare | (own[None, :] == own[:, None]))
    mass = torch.softmax(logits.masked_fill(~earlier, -INF), -1).nan_to_num(0.0)
    taken = (mass * bare).sum(-1)[:, :, own > 0]
    least = mass.masked_fill(~bare, INF).amin(-1)[:, :, own > 0]
    assert bool((taken >= p - 1e-12).all()) and bool((taken - least < p).all())


@given(seed=st.integers(0, 99), low=st.floats(0.01, 1.0), high=st.floats(0.01, 1.0))
@settings(max_examples=30)
def test_P6_a_greater_mass_never_loses_a_block(seed, low, high):
    logits, _, candidates, _ = pbs_scores(seed=seed)
    few, many = (top_p(TensorScores(logits), p, candidates, measure="softmax").table() for p in sorted((low, high)))
    assert not bool((few & ~many).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_P7_a_mass_of_one_takes_every_block(dtype):
    """Sums of float32 stop short of 1.0 in many rows, and reach it early in others: neither matters."""
    logits = tensor(1, 8, 64, 64, seed=3, dtype=dtype)
    every = Candidates(end=torch.arange(64) + 1)
    wanted = torch.ones(64, 64, dtype=torch.bool).tril().expand(1, 8, -1, -1)
    sums = torch.softmax(logits.masked_fill(~wanted, -INF), -1).sort(-1, descending=True).values.cumsum(-1)
    if dtype == torch.float32:
        assert int((sums[..., -1] < 1.0).sum()) > 50 and int((sums[..., -2] >= 1.0).sum()) > 50
    for inclusive, unmet in ((True, "all"), (True, "none"), (False, "all"), (False, "none")):
        selected = top_p(TensorScores(logits), 1.0, every, measure="softmax", inclusive=inclusive, unmet=unmet)
        assert torch.equal(selected.table(), wanted)
    nothing = top_p(TensorScores(logits), 1.0 + 1e-3, every, measure="softmax", unmet="none")
    assert not nothing.counts.any()


def test_P11_pooled_blocks_and_earlier_segments_choose_differently():
    """MeanPooling shares its mass with the own block, PBS does not: the same scores, another choice."""
    logits, own, candidates, forced = pbs_scores(seed=4)
    blocks = logits.shape[3]
    mean = top_p(
        TensorScores(logits), 0.9, Candidates(end=torch.arange(blocks) + 1), measure="softmax",
        forced=lambda r, u: (u == 0) | (u == r[:, None]),
    ).table()  # fmt: skip
    pbs = top_p(TensorScores(logits), 0.9, candidates, measure="softmax", forced=forced).table()
    earlier = own[None, :] < own[:, None]
    assert not torch.equal(mean & earlier, pbs & earlier)
    assert bool(mean.diagonal(dim1=2, dim2=3).all()) and bool(mean[..., 0].all()) and not bool(mean.triu(1).any())


def test_S2_forced_blocks_count_first():
    """XAttention: column 0 and the diagonal are counted first, others follow only until the mass is reached."""
    mass = torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.45, 0.02, 0.03, 0.5]]).view(1, 1, 2, 4)
    forced = lambda r, u: (u == 0) | (u == 3)  # noqa: E731
    inside = top_p(TensorScores(mass), 0.9, measure="share", forced=forced, forced_in_mass=True)
    assert inside.indices.tolist() == [[[[0, 1, 2, 3], [0, 3, -1, -1]]]]
    assert top_p(TensorScores(mass), 0.8, measure="share", forced=forced, forced_in_mass=True).counts.tolist() == [[[3, 2]]]
    after = top_p(TensorScores(mass), 0.6, measure="share", forced=forced)
    assert after.indices.tolist() == [[[[0, 2, 3], [0, 3, -1]]]]


# ---- counts ------------------------------------------------------------------------------------------------


def test_S1_how_many_cover_a_mass():
    score = torch.tensor([0.15, 0.5, 0.05, 0.3])
    assert [int(cover_count(score, mass)) for mass in (0.4, 0.5, 0.8, 0.95, 1.0)] == [1, 2, 3, 3, 4]
    assert int(cover_count(score * 8, 0.4)) == 1, "a share of the sum"
    assert int(cover_count(score, 0.4, least=2)) == 2 and int(cover_count(score, 0.95, most=2)) == 2
    assert cover_count(torch.zeros(2, 3, 4), 0.5).tolist() == [[4, 4, 4], [4, 4, 4]]


@given(size=st.integers(1, 40), tail=st.floats(0.001, 1.1), floor=st.integers(0, 45), seed=st.integers(0, 99))
@settings(max_examples=80)
def test_TSA_T6_the_tail_that_goes(size, tail, floor, seed):
    score = torch.softmax(2 * tensor(3, size, seed=seed, dtype=torch.float64), -1)
    kept = tail_count(score, tail, floor)
    for row, stay in zip(score, kept.tolist(), strict=True):
        sums = (row / (row.sum() + 1e-8)).sort().values.cumsum(0)
        below = int((sums < tail).sum())
        dropped = 0 if below == 0 else below + 1
        assert stay == min(size, max(floor, size - dropped))
        if stay > floor and dropped:
            assert float(sums[dropped - 2]) < tail <= float(sums[dropped - 1])


def test_TSA_T4_T5_fewer_stay_of_a_greater_tail():
    score = torch.softmax(tensor(1, 500, seed=1), -1)
    kept = [int(tail_count(score, tail, 40)) for tail in (0.0, 1e-9, 0.005, 0.05, 0.2, 0.6, 0.99, 1.0, 2.0)]
    assert kept[:2] == [500, 500] and kept[-1] == 40
    assert kept == sorted(kept, reverse=True) and len(set(kept)) > 5
    assert int(tail_count(score, 0.99, 600)) == 500


def test_TSA_T8_uniform_scores():
    score = torch.full((1, 64), 1.0 / 64, dtype=torch.float64)
    for tail in (0.1, 0.3, 0.77):
        assert int(tail_count(score, tail, 0)) == 64 - -(-int(tail * 64 * 1000) // 1000)


def test_wrong_arguments_are_refused():
    source = TensorScores(torch.zeros(1, 1, 2, 3))
    with pytest.raises(PatternError, match="top_k: k is 0; wanted 1 or more blocks"):
        top_k(source, 0)
    with pytest.raises(PatternError, match="forced_extra is 2 with forced None"):
        top_k(source, 1, forced_extra=2)
    with pytest.raises(PatternError, match="measure is 'score'; wanted one of 'softmax', 'share'"):
        top_p(source, 0.5, measure="score")
    with pytest.raises(PatternError, match="unmet is 'some'; wanted 'all' or 'none'"):
        top_p(source, 0.5, measure="share", unmet="some")
    with pytest.raises(PatternError, match="at_most is 0"):
        threshold(source, 0.5, at_most=0)
    with pytest.raises(PatternError, match="floor is -1"):
        tail_count(torch.ones(1, 2), 0.5, -1)


# ---- what a GPU needs, and empty problems ------------------------------------------------------------------


def test_nothing_is_read_back_where_values_are_not_at_hand():
    """Tensors without values, as a stand-in for a GPU: reading one, or a shape that depends on one, raises."""
    a, b = (
        torch.empty(1, 4, 64, 8, device="meta", requires_grad=True),
        torch.empty(1, 2, 32, 8, device="meta", requires_grad=True),
    )
    source = DotScores(a, b)
    end = torch.empty(64, dtype=torch.int64, device="meta")
    candidates = Candidates(end=end, reach=lambda rows: (0, (rows.stop + 1) // 2))
    forced = lambda r, u: u == r[:, None] // 2  # noqa: E731
    assert top_k(source, 3, candidates, forced=forced).indices.shape == (1, 4, 64, 3)
    assert top_k(source, 3, candidates, forced=forced, forced_extra=1).indices.shape == (1, 4, 64, 4)
    assert top_p(source, 0.5, candidates, measure="softmax", forced=forced, at_most=7).indices.shape == (1, 4, 64, 7)
    assert threshold(source, 0.5, candidates).indices.shape == (1, 4, 64, 32)


@pytest.mark.parametrize("shape", [(1, 2, 0, 5), (1, 2, 5, 0), (0, 2, 3, 4)])
def test_empty_problems(shape):
    source = TensorScores(torch.zeros(shape))
    for selected in (top_k(source, 2), top_p(source, 0.5, measure="softmax"), threshold(source, 0.0)):
        assert selected.indices.shape[:3] == selected.counts.shape == shape[:3]
        assert selected.indices.shape[3] <= shape[3] and int(selected.counts.sum()) == int((selected.indices >= 0).sum())


def test_what_is_computed_beyond_the_reach_is_not_looked_at():
    """Products are made a little wider than the reach, so that few shapes occur."""
    values = torch.arange(1000.0).view(1, 1, 1, 1000)
    within = Candidates(reach=lambda rows: (0, 901))
    assert top_k(TensorScores(values), 2, within).indices.tolist() == [[[[899, 900]]]]
    assert threshold(TensorScores(values), 899.0, within).indices.tolist() == [[[[899, 900]]]]


def test_units_out_of_reach_are_never_scored():
    class Watched(TensorScores):
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def narrowed(self, rows, blocks):
            self.seen.append((blocks.start, blocks.stop))
            return super().narrowed(rows, blocks)

    source = Watched(torch.zeros(1, 1, 3, 100))
    top_k(source, 2, Candidates(torch.tensor([5, 7, 9]), torch.tensor([10, 20, 29])))
    top_p(source, 0.5, Candidates(torch.tensor([5, 7, 9]), torch.tensor([10, 20, 29])), measure="share")
    assert source.seen and all(5 <= start <= stop <= 29 for start, stop in source.seen)
