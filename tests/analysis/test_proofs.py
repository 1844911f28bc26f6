"""Proofs by z3: right verdicts on known pairs, witnesses that hold, and no contradiction with brute force on random masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.proofs import causality
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, masks, tables_for

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
order = sd.table("order", bijective=True)
width = sd.table("width", values_in=(1, 9))
chosen = sd.table("chosen", dtype=bool)
free = sd.table("free")

PROVABLE = {
    "window in causal": (causal & (q_idx - kv_idx < 8), causal),
    "same chunk": (q_idx // 64 == kv_idx // 64, abs(q_idx // 64 - kv_idx // 64) < 1),
    "monotone order": (doc[q_idx] < doc[kv_idx], q_idx < kv_idx),
    "permutation": (order[q_idx] == order[kv_idx], q_idx == kv_idx),
    "values in": (causal & (q_idx - kv_idx < width[h]), q_idx - kv_idx < 9),
    "remainders": ((q_idx - kv_idx) % 8 == 0, (q_idx - kv_idx) % 4 == 0),
    "block table": (chosen[q_idx // 4, kv_idx // 4] & causal, causal),
    "negative divisor": ((q_idx // -2) > 0, q_idx < 0),
    "kv within its length": (causal, kv_idx < sd.kv_len),
}
REFUTABLE = {
    "window": (causal, q_idx - kv_idx < 8),
    "order is not kept": (order[q_idx] <= order[kv_idx], q_idx <= kv_idx),
    "one too many": (doc[q_idx] < doc[kv_idx], q_idx + 1 < kv_idx),
    "values in": (causal & (q_idx - kv_idx < width[h]), q_idx - kv_idx < 8),
    "any table": (free[q_idx] <= free[kv_idx], q_idx <= kv_idx),
    "bits": ((q_idx & 5) == (kv_idx & 5), (q_idx - kv_idx) % 8 == 0),
    "nested": (free[doc[q_idx]] == free[doc[kv_idx]], doc[q_idx] == doc[kv_idx]),
}


@pytest.mark.parametrize("name", PROVABLE)
def test_proved(name):
    assert sd.implies(*PROVABLE[name]) == sd.PROVED


@pytest.mark.parametrize("name", REFUTABLE)
def test_refuted_with_a_witness_that_holds(name):
    first, second = REFUTABLE[name]
    verdict = sd.implies(first, second)
    assert verdict == sd.REFUTED
    witness = verdict.witness
    env = dict(zip(("b", "h", "q_idx", "kv_idx"), witness.indices, strict=True)) | witness.tables
    assert bool(evaluate(first.expr, env)) and not bool(evaluate(second.expr, env))


def test_equivalent():
    assert sd.equivalent(causal & (doc[q_idx] == doc[kv_idx]), causal & (doc[q_idx] <= doc[kv_idx])) == sd.PROVED
    assert sd.equivalent(causal, q_idx - kv_idx < 100) == sd.REFUTED
    assert sd.equivalent((q_idx // 4) % 8 == 0, (q_idx % 32) // 4 == 0) == sd.PROVED


def test_causality():
    assert causality(causal & chosen[q_idx, kv_idx]) == sd.PROVED
    verdict = causality((q_idx - kv_idx < 5) & (kv_idx - q_idx < 3))
    assert verdict == sd.REFUTED and verdict.witness.kv_idx > verdict.witness.q_idx


def test_unknown_is_said():
    verdict = sd.implies(sd.tanh(q_idx / 3) < 0.999999, q_idx < 30)
    assert verdict == sd.UNKNOWN and verdict.reason


def test_verdicts_have_no_truth_value():
    with pytest.raises(sd.PatternError, match="three values"):
        bool(sd.implies(causal, causal))


def test_implies_wants_masks():
    with pytest.raises(sd.PatternError, match="argument must be a mask"):
        sd.implies(causal, q_idx)


@given(data=st.data())
@settings(max_examples=60)
def test_random_masks_agree_with_brute_force(data, little_patience):
    first, second = data.draw(masks(depth=1)), data.draw(masks(depth=1))
    verdict = sd.implies(first, second)
    case = AttentionCase(batch=2, heads=2, kv_heads=2, q_len=20, kv_len=20)
    both = first & ~second
    tables = data.draw(tables_for(both, case))
    counter = evaluate(both.expr, {**case.env, **tables}).any()
    if verdict == sd.PROVED:
        assert not bool(counter), (first, second)
    if verdict == sd.REFUTED:
        witness = verdict.witness
        env = dict(zip(("b", "h", "q_idx", "kv_idx"), witness.indices, strict=True)) | witness.tables
        env |= {"q_len": witness.q_len or witness.q_idx + 1, "kv_len": witness.kv_len or witness.kv_idx + 1}
        assert bool(torch.as_tensor(evaluate(both.expr, env))), (first, second, witness)


@pytest.fixture(scope="module")
def little_patience():
    """Random masks need no patience."""
    with EFFORT.using(proof_ms=200):
        yield
