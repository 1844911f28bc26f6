"""Scores as ramps: found where a score is one, and equal to the score for every pair that attends."""

from __future__ import annotations

import pytest
import sympy

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl import patterns as P
from sparsedsl.codegen.score_ramp import ramp_of
from sparsedsl.lang.pattern import as_pattern
from sparsedsl.lang.symbols import HEAD, KV_IDX, Q_IDX, SCORE

causal = kv_idx <= q_idx
RAMPS = {
    "ALiBi": sd.attend(causal, score=P.alibi(8)),
    "ALiBi in a window": P.alibi_window(8, 64),
    "ALiBi over documents": sd.attend(P.packed(), score=P.alibi(8)),
    "in two windows": sd.attend(causal & ((q_idx - kv_idx < 9) | (kv_idx < 4)), score=score - abs(q_idx - kv_idx) / 4),
    "no distance": sd.attend(q_idx >= 0, score=3 * score + q_idx / 8 - h * kv_idx + 2),
    "rising": sd.attend(q_idx >= 0, score=score + 0.5 * (kv_idx - q_idx)),
}
NO_RAMPS = {
    "both sides": sd.attend(abs(q_idx - kv_idx) < 9, score=P.alibi(8)),
    "a clause that looks ahead": sd.attend(causal | (kv_idx < 4), score=P.alibi(8)),
    "soft cap": sd.attend(causal, score=P.softcap(50)),
    "a square": sd.attend(causal, score=score - (q_idx - kv_idx) ** 2),
    "a product": sd.attend(causal, score=score * (q_idx - kv_idx)),
    "steps": sd.attend(causal, score=score - (q_idx - kv_idx) // 4),
    "learned slopes": sd.attend(causal, score=score - sd.table("slopes", learned=True)[h] * (q_idx - kv_idx)),
    "a table of keys": sd.attend(causal, score=score + sd.table("bias", dtype=float)[kv_idx] + q_idx),
    "of the query alone": sd.attend(causal, score=score + q_idx),
    "plain": sd.attend(causal),
}


@pytest.mark.parametrize("name", RAMPS)
def test_ramps_are_their_scores(name):
    pattern = as_pattern(RAMPS[name])
    ramp = ramp_of(pattern)
    assert ramp is not None
    line = ramp.gain * SCORE + ramp.by_query * Q_IDX + ramp.by_key * KV_IDX + ramp.fixed
    for q, k, head, product in ((70, 3, 0, 1.5), (9, 9, 5, -2.0), (1000, 999, 7, 0.0), (12, 0, 2, 0.25)):
        values = {Q_IDX: q, KV_IDX: k, HEAD: head, SCORE: sympy.Float(product)}
        wanted, got = (float(expr.subs(values)) for expr in (pattern.score.expr, line))
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-12), values


@pytest.mark.parametrize("name", NO_RAMPS)
def test_others_are_none(name):
    assert ramp_of(as_pattern(NO_RAMPS[name])) is None
