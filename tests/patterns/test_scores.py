"""Score functions against the published formulas, in fp64, and T5's buckets against its published fp32 code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.lang.evaluation import evaluate


def logits(q_len, kv_len):
    return torch.randn(q_len, kv_len, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30


@given(st.floats(0.5, 200) | st.integers(1, 200))
def test_softcap(values, cap):
    x = logits(9, 11)
    got = values(sd.patterns.softcap(cap), 9, 11, score=x)
    assert torch.allclose(got, cap * torch.tanh(x / cap), rtol=1e-14, atol=0)
    assert got.abs().max() <= cap


def published_slopes(heads):
    """The code of the ALiBi paper, as published."""

    def get_slopes_power_of_2(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return get_slopes_power_of_2(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return get_slopes_power_of_2(closest) + published_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads", [*range(1, 41), 48, 56, 64, 71, 96, 112, 128])
def test_alibi_slopes_are_the_published_ones(heads):
    got = evaluate(sd.patterns.alibi_slope(heads).expr, {"h": torch.arange(heads)})
    assert torch.allclose(got, torch.tensor(published_slopes(heads), dtype=torch.float64), rtol=1e-14, atol=0)


@given(st.integers(1, 12), st.data())
def test_alibi(values, heads, data):
    h = data.draw(st.integers(0, heads - 1))
    x, slope = logits(9, 12), published_slopes(heads)[h]
    wanted = torch.tensor([[x[q, kv] - slope * abs(q - kv) for kv in range(12)] for q in range(9)], dtype=torch.float64)
    assert torch.allclose(values(sd.patterns.alibi(heads), 9, 12, score=x, h=h), wanted, rtol=1e-13)
    table = torch.tensor(published_slopes(heads), dtype=torch.float64)
    assert torch.allclose(values(sd.patterns.alibi(), 9, 12, score=x, h=h, slopes=table), wanted, rtol=1e-13)


@given(st.integers(0, 12), st.booleans())
def test_relative_bias(values, far, both):
    x, h = logits(9, 12), 1
    bias = torch.randn(2 * far + 1 if both else far + 1, 2, dtype=torch.float64)
    got = values(sd.patterns.relative_bias(far, bidirectional=both), 9, 12, score=x, h=h, relative_bias=bias)
    for q in range(9):
        for kv in range(12):
            entry = max(-far, min(far, q - kv)) + far if both else max(0, min(far, q - kv))
            assert got[q, kv] == x[q, kv] + bias[entry, h]


def published_bucket(relative_position, bidirectional, num_buckets, max_distance, log=torch.log):
    """T5's bucket as published (``relative_position`` is key minus query), in torch and fp32."""
    relative_buckets = 0
    if bidirectional:
        num_buckets //= 2
        relative_buckets += (relative_position > 0).to(torch.long) * num_buckets
        relative_position = torch.abs(relative_position)
    else:
        relative_position = -torch.min(relative_position, torch.zeros_like(relative_position))
    max_exact = num_buckets // 2
    share = log(relative_position.float() / max_exact) / math.log(max_distance / max_exact)
    large = max_exact + (share * (num_buckets - max_exact)).to(torch.long)
    large = torch.min(large, torch.full_like(relative_position, num_buckets - 1))
    return relative_buckets + torch.where(relative_position < max_exact, relative_position, large)


def rounded_log(x):
    """The logarithm of fp32 numbers, rounded correctly: torch's own is one unit off in the last place now and then."""
    return x.double().log().float()


def assert_buckets_equal(bidirectional, buckets, max_distance, reach, log):
    bucket = sd.patterns.t5_bucket(buckets, max_distance, bidirectional=bidirectional)
    far, here = torch.arange(reach + 1), torch.zeros(1, dtype=torch.int64)
    for q, kv in ((far, here), (here, far)):
        got = evaluate(bucket.expr, {"q_idx": q, "kv_idx": kv})
        assert torch.equal(got, published_bucket(kv - q, bidirectional, buckets, max_distance, log))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (64, 128), (16, 64), (320, 800), (128, 8192)])
def test_t5_buckets_are_exactly_the_published_ones_to_100k(bidirectional, buckets, max_distance):
    assert_buckets_equal(bidirectional, buckets, max_distance, 100_000, torch.log)


@pytest.mark.parametrize(("buckets", "max_distance"), [(9, 128), (9, 4096), (10, 160), (17, 27), (17, 343)])
def test_t5_buckets_where_fp32_and_fp64_differ(buckets, max_distance):
    """A boundary falls on a whole distance, and the rounding of fp32 decides on which side."""
    assert_buckets_equal(False, buckets, max_distance, 5000, rounded_log)
    assert_buckets_equal(True, 2 * buckets, max_distance, 5000, rounded_log)


@settings(max_examples=40)
@given(st.booleans(), st.integers(2, 40), st.integers(2, 3000))
def test_t5_buckets_of_any_shape(bidirectional, half, max_distance):
    exact = half // 2 if bidirectional else half
    assert_buckets_equal(bidirectional, 2 * half, max(max_distance, exact + 1), 3500, rounded_log)


def test_t5_bias_reads_the_models_weight(values):
    x, weight = logits(40, 50), torch.randn(32, 4, dtype=torch.float64)
    for both in (True, False):
        got = values(sd.patterns.t5_bias(bidirectional=both), 40, 50, score=x, h=3, t5_bias=weight)
        apart = torch.arange(50)[None] - torch.arange(40)[:, None]
        assert torch.equal(got, x + weight[published_bucket(apart, both, 32, 128), 3])


def test_scores_nest(values):
    x = logits(6, 7)
    apart = (torch.arange(6)[:, None] - torch.arange(7)[None]).abs()
    capped_after = values(sd.patterns.softcap(20, sd.patterns.alibi(8)), 6, 7, score=x, h=2)
    capped_before = values(sd.patterns.alibi(8, sd.patterns.softcap(20)), 6, 7, score=x, h=2)
    assert torch.allclose(capped_after, 20 * torch.tanh((x - 0.125 * apart) / 20), rtol=1e-12)
    assert torch.allclose(capped_before, 20 * torch.tanh(x / 20) - 0.125 * apart, rtol=1e-12)


@pytest.mark.parametrize("name", ["kerple", "kerple power", "fire", "ssmax", "fox"])
def test_learned_scores(values, name):
    """The published formulas, pair by pair, in Python's own arithmetic."""
    x, h, n = logits(9, 12), 1, 12
    r = torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    far = torch.rand(1, 2, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log().cumsum(-1)
    network = {"fire_c": r[0, :1], "fire_length": torch.tensor([4.0], dtype=torch.float64), "fire_hidden": r[0, 1:4],
               "fire_hidden_bias": -r[1, 1:4], "fire_out": r[:, 2:5], "fire_out_bias": r[:, 5]}  # fmt: skip

    def one(q, kv):
        apart, logit = abs(q - kv), float(x[q, kv])
        if name == "fox":
            return logit + float(far[0, h, q] - far[0, h, kv])
        if name == "ssmax":
            return logit * float(r[h, 0]) * math.log(q + 1)
        if name == "fire":
            part = math.log(r[0, 0] * apart + 1) / math.log(r[0, 0] * max(4, q) + 1)
            return (
                logit
                + float(r[h, 5])
                + sum(float(r[h, 2 + j]) * max(0.0, float(r[0, 1 + j]) * part - float(r[1, 1 + j])) for j in range(3))
            )
        r1, r2 = float(r[h, 0]), float(r[h, 1])
        return logit - r1 * (math.log(1 + r2 * apart) if name == "kerple" else apart**r2)

    tables = {"kerple_1": r[:, 0], "kerple_2": r[:, 1], "ssmax": r[:, 0], "forget": far} | network
    score = sd.patterns.kerple(kernel="power") if name == "kerple power" else getattr(sd.patterns, name)(*[3] * (name == "fire"))
    wanted = torch.tensor([[one(q, kv) for kv in range(n)] for q in range(9)], dtype=torch.float64)
    got = values(score, 9, n, score=x, h=h, **{key: tables[key] for key in score.tables})
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)
