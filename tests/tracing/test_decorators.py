"""``@sd.mask`` and ``@sd.score``, and functions that are given where a pattern is wanted."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd

IDS = torch.tensor([0, 0, 1, 1, 1, 2])
CAUSAL = sd.kv_idx <= sd.q_idx


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def shifted(score, b, h, q_idx, kv_idx):
    return score - (q_idx - kv_idx) * 0.5


def test_a_mask_by_decorator():
    @sd.mask
    def packed(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (IDS[q_idx] == IDS[kv_idx])

    assert isinstance(packed, sd.Mask) and packed.bound["IDS"] is IDS
    assert packed.same_as(sd.trace_mask(lambda b, h, m, n: (m >= n) & (IDS[m] == IDS[n])))

    @sd.mask(rename={"IDS": "doc"})
    def renamed(b, h, q_idx, kv_idx):
        return IDS[q_idx] == IDS[kv_idx]

    assert list(renamed.tables) == ["doc"]


def test_the_score_is_a_symbol_and_a_decorator():
    slopes = torch.tensor([0.5, 0.25])

    @sd.score
    def alibi(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    @sd.score(rename={"slopes": "alibi"})
    def renamed(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    assert isinstance(alibi, sd.Score) and list(alibi.tables) == ["slopes"] and list(renamed.tables) == ["alibi"]
    assert (sd.score * 2).same_as(sd.score(lambda s, b, h, m, n: 2 * s))
    assert sd.score.same_as(sd.parse("score")), "it stays the symbol"


@pytest.mark.parametrize(
    "what", [lambda: sd.score(3), lambda: (sd.score * 2)(shifted), lambda: sd.score(CAUSAL), lambda: sd.score(shifted, shifted)]
)
def test_what_the_score_is_not_called_on(what):
    with pytest.raises(sd.PatternError, match="is an expression, not a function of"):
        what()


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (causal, CAUSAL),
        (shifted, sd.attend(True, score=sd.score - (sd.q_idx - sd.kv_idx) * 0.5)),
        (lambda batch, head, q, k, width=3: (q >= k) & (q - k < width), CAUSAL & (sd.q_idx - sd.kv_idx < 3)),
    ],
)
def test_functions_where_patterns_are_wanted(function, pattern):
    q = torch.randn(1, 2, 6, 4)
    wanted = sd.compile(pattern)(q, q, q)
    assert torch.equal(sd.compile(function)(q, q, q), wanted)
    assert torch.equal(sd.attention(q, q, q, function), wanted)
    assert torch.equal(sd.nn.Attention(function)(q, q, q), wanted)
    assert sd.testing.check(function, examples=1, seed=0).ok


@pytest.mark.parametrize(
    "function",
    [
        lambda *indices: True,
        lambda q_idx, kv_idx: q_idx >= kv_idx,
        lambda score, b, h, q_idx: score,
        lambda b, h, q_idx, kv_idx, doc: doc[q_idx] == doc[kv_idx],
    ],
)
def test_what_cannot_be_told_is_refused(function):
    with pytest.raises(
        sd.TraceError, match=r"compile\(\): <lambda> takes .*, which does not tell a mask from a score: a mask_mod takes"
    ):
        sd.compile(function)


def test_functions_of_ours_are_to_be_called():
    for function in (sd.patterns.causal, lambda: CAUSAL):
        with pytest.raises(sd.PatternError, match="is a function that makes one: call it"):
            sd.compile(function)
    with pytest.raises(sd.TraceError, match="`and`"):
        sd.compile(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx and kv_idx > 2)
