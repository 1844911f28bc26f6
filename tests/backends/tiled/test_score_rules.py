"""Score rules: which rule a score gets, and that its logits and gradients are those of the expression, taken pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.backends.tiled.score_rules import LN2, LOG2E, clamped, score_rule
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, scores, tables_for, tensor

table = sd.table("table", learned=True)
CASE = AttentionCase(batch=2, heads=3, q_len=5, kv_len=7, q_offset=2)
SCALE = 0.3


def kind(expr: sd.Score) -> str:
    return type(score_rule(expr.expr)).__name__.strip("_")


@pytest.mark.parametrize(
    ("expr", "rule"),
    [
        (score, "ScoreRule"),
        (score + 0, "ScoreRule"),
        (score - 0.5 * (q_idx - kv_idx), "Biased"),
        (score + table[h, kv_idx], "Biased"),
        (score + sd.where(kv_idx < 3, 0.0, -math.inf), "Biased"),
        (sd.tanh(score), "Capped"),
        (sd.tanh(score / 30) * 30, "Capped"),
        (30 * sd.tanh(2 * score / 7), "Capped"),
        (0.125 * sd.tanh(score * 0.1), "Capped"),
        (-30 * sd.tanh(score / 30), "General"),
        (30 * sd.tanh(-score / 30), "General"),
        (30 * sd.tanh(score / 30 + 1), "General"),
        (30 * sd.tanh(score / 30) + kv_idx, "General"),
        (h * sd.tanh(score), "General"),
        (sd.tanh(score * kv_idx), "General"),
        (table[h] * sd.tanh(score), "General"),
        (2 * score, "General"),
        (score * score, "General"),
        (sd.where(kv_idx < 3, score, -math.inf), "General"),
        (0 * score + kv_idx * 0.5, "General"),
    ],
    ids=str,
)  # fmt: skip
def test_which_rule_a_score_gets(expr, rule):
    assert kind(expr) == rule
    assert_rule_is_the_expression(expr.expr, {"table": tensor(3, 7, seed=4) if "[h, " in str(expr) else tensor(3, seed=4)})


def assert_rule_is_the_expression(expr, tables):
    """Forward and backward, as a pass uses a rule: products with the factor in them, positions ``(X, m, 1, n)`` on ``(X, m, G, n)``."""
    rule = score_rule(expr)
    env = {name: value.double() if value.is_floating_point() else value for name, value in (CASE.env | tables).items()}
    raw = tensor(2, 3, 5, 7, seed=1, dtype=torch.float64) * 4
    leaves = {name: t.clone().requires_grad_() for name, t in env.items() if name in tables and t.is_floating_point()}
    product = raw.clone().requires_grad_()
    wanted = evaluate(expr, {**env, **leaves, "score": product * SCALE}, dtype=torch.float64).double().expand(raw.shape)
    grad = tensor(*raw.shape, seed=2, dtype=torch.float64)

    # heads as the first dimension of the block's, one group: (batch x heads, m, 1, n)
    def tiles(t):
        return t.expand(2, 3, 5, 7).reshape(6, 5, 1, 7)

    places = {name: tiles(env[name]) for name in ("b", "h", "q_idx", "kv_idx")}
    here = {**env, **places}

    def run(s, with_leaves):
        s = torch.tanh(s) if rule.tanh else s
        if rule.bias is not None:
            bias = evaluate(rule.bias, {**here, **with_leaves}, dtype=torch.float64)
            return s + bias.double() * LOG2E, None
        return rule.logits_kept(s, here, with_leaves) if with_leaves is not here else (rule.logits(s, here), None)

    factor = rule.factor(SCALE)
    forward, _ = run(tiles(raw) * factor, here)
    torch.testing.assert_close(forward, tiles(wanted.detach()) * LOG2E, rtol=1e-10, atol=1e-10)
    if rule.bias is not None:
        return
    kept_logits, kept = run(tiles(raw) * factor, leaves)
    torch.testing.assert_close(kept_logits, forward, rtol=1e-12, atol=1e-12)
    theirs = torch.autograd.grad(wanted, [product, *leaves.values()], grad, allow_unused=True) if wanted.requires_grad else [None]
    mine, tables_found = rule.gradients(tiles(grad).clone(), kept, leaves)
    # `gradients` gives those by the scaled product
    expected = torch.zeros_like(raw) if theirs[0] is None else theirs[0]
    torch.testing.assert_close(mine * SCALE, tiles(expected), rtol=1e-9, atol=1e-9)
    for name, found in zip(leaves, theirs[1:], strict=False):
        if found is not None:
            torch.testing.assert_close(tables_found[name], found, rtol=1e-9, atol=1e-9)


@given(expr=scores(), data=st.data())
@settings(max_examples=150)
def test_rules_are_the_expression(expr, data):
    assert_rule_is_the_expression(expr.expr, data.draw(tables_for(expr, CASE)))


def test_the_constants():
    assert LOG2E == pytest.approx(1 / math.log(2)) and pytest.approx(1) == LOG2E * LN2


def test_only_what_no_rule_knows_may_be_anything_where_masked():
    assert not any(score_rule(expr.expr).arbitrary for expr in (score, sd.tanh(score / 30) * 30))
    assert score_rule(sd.log(score).expr).arbitrary


def test_logits_stay_within_the_range_of_floats():
    most = torch.finfo(torch.float32).max
    found = clamped(torch.tensor([-math.inf, -most, -1.0, 0.0, 2.0, most, math.inf]))
    assert found[0] == -math.inf and bool(found[1:].isfinite().all())
    assert found[2:5].tolist() == pytest.approx([-LOG2E, 0.0, 2 * LOG2E])


def test_scores_that_do_not_read_the_product_or_any_table_have_no_gradient():
    rule = score_rule((0 * score + kv_idx * 0.5).expr)
    s = tensor(1, 2, 1, 3, seed=0)
    logits, kept = rule.logits_kept(s, {"kv_idx": torch.arange(3)}, {})
    assert torch.allclose(logits, (torch.arange(3) * 0.5 * LOG2E).expand(logits.shape))
    grad, found = rule.gradients(torch.ones(1, 2, 1, 3), kept, {})
    assert not bool(grad.any()) and not any(t is not None and bool(t.any()) for t in found.values())
