"""Derivatives of score expressions: what torch's autograd finds, corners included, and nothing from arms that are not taken."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl import testing as kit
from sparsedsl.codegen.derivatives import derivative
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.symbols import SCORE
from sparsedsl.lang.tables import table_reads

SCORES = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)


def autograd(expr, env, by):
    """The derivative at every point, found by torch."""
    leaf = env[by].detach().clone().requires_grad_()
    value = evaluate(expr, {**env, by: leaf}).double()
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value.expand(leaf.shape).sum(), leaf)[0]


def found(expr, env, by=SCORE):
    return evaluate(derivative(expr, by), env).double()


@given(st.data(), kit.scores(depth=3), kit.shapes(max_len=8))
@settings(max_examples=250)
def test_by_the_score_as_autograd(data, expression, case):
    tables = data.draw(kit.tables_for(expression, case))
    # multiples of 1/8, so that ties and corners are met
    logits = torch.randint(-24, 24, case.positions.shape, generator=torch.Generator().manual_seed(1)).double() / 8
    env = {**case.env, **tables, "score": logits}
    wanted = autograd(expression.expr, env, "score")
    torch.testing.assert_close(found(expression.expr, env).expand(wanted.shape), wanted, rtol=1e-9, atol=1e-9)


@given(st.data(), kit.scores(depth=3), kit.shapes(max_len=8))
@settings(max_examples=150)
def test_by_a_table_read_as_autograd(data, expression, case):
    reads = sorted((r for r in table_reads(expression.expr) if r.spec.dtype == "float"), key=sympy.default_sort_key)
    if not reads:
        return
    tables = data.draw(kit.tables_for(expression, case))
    read = data.draw(st.sampled_from(reads))
    env = {**case.env, **tables, "score": torch.randn(case.positions.shape, dtype=torch.float64)}
    # The read stands for a variable of its own: that is what the rule differentiates by.
    variable = sympy.Symbol("variable", real=True)
    replaced = expression.expr.xreplace({read: variable})
    env["variable"] = evaluate(read, env).double().expand(case.positions.shape)
    wanted = autograd(replaced, env, "variable")
    torch.testing.assert_close(found(expression.expr, env, read).expand(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (score, "1"),
        (score * 2.0 + kv_idx, "2.0"),
        (sd.tanh(score / 30) * 30, "-tanh(score / 30)**2 + 1"),
        (sd.where(kv_idx < 4, score, float("-inf")), "where(kv_idx <= 3, 1, 0)"),
        (sd.relu(score), "where(score > 0, 1, 0)"),
        (sd.sqrt(sd.where(kv_idx < 4, score, 0.0)), "where(kv_idx <= 3, where(kv_idx <= 3, score, 0.0)**(-1 / 2) / 2, 0)"),
        (sd.table("depth", dtype=float)[h] * score, "depth[h]"),
    ],
    ids=str,
)
def test_text(expression, text):
    assert expression_text(derivative(expression.expr)) == text


@pytest.mark.parametrize(
    "expression",
    [
        sd.minimum(score, 0.5), sd.maximum(score, 0.5), sd.minimum(score, -score, 0.5), sd.clamp(score, -1.0, 1.0), sd.relu(score),
        abs(score), abs(score) * score, sd.where(score > 0, score * score, 1.0), sd.exp(score) / (1 + score * score),
        sd.softplus(score), sd.sigmoid(score), sd.erf(score), sd.sin(score) * sd.cos(score), sd.log(4 + score), sd.sqrt(4 + score),
        2.0**score, (4 + score) ** 0.3, (4 + score) ** score, score**3, (4 + score) ** -2,
        sd.parse("f32_round(f32_mul(score, 4)) / 4"), sd.parse("f64_mul(f64_add(score, 1), f64_sqrt(f64_add(score, 4)))"),
        sd.parse("f64_div(score, f64_sub(f64_neg(score), 7))"), sd.parse("f64_maximum(f64_abs(score), f64_relu(f64_cast(score)))"),
    ],
    ids=str,
)  # fmt: skip
def test_corners_and_functions_as_autograd(expression):
    expr = sd.lang.expressions.as_score(expression).expr
    env = {"score": SCORES}
    torch.testing.assert_close(found(expr, env).expand(SCORES.shape), autograd(expr, env, "score"), rtol=1e-12, atol=1e-12)


def test_nothing_leaks_from_the_arm_that_is_not_taken():
    expr = sd.where(score > 0, sd.log(score) + sd.sqrt(score), score).expr
    slopes = found(expr, {"score": SCORES})
    assert torch.isfinite(slopes).all() and slopes[0] == 1
    inside = sd.sqrt(sd.where(kv_idx < 1, score, 0.0)).expr  # autograd has 0 * inf here
    assert found(inside, {"score": torch.ones(()), "kv_idx": torch.arange(2)}).tolist() == [0.5, 0.0]


def test_what_has_no_derivative_is_refused_with_the_way_out():
    with pytest.raises(sd.UnsupportedError, match=r"no derivative of f32_log\(...\), which depends on score; use backend='flex'"):
        derivative(sd.parse("f32_log(score)").expr)
    assert derivative(sd.parse("score + f32_log(kv_idx + 1)").expr) == 1
    with pytest.raises(sd.UnsupportedError, match="no rule for the derivative of gamma"):
        derivative(sympy.gamma(SCORE))


def test_results_share_what_they_are_made_of():
    capped = (sd.tanh((score + q_idx) / 30) * 30).expr
    assert sympy.tanh((SCORE + q_idx.expr) / 30) in derivative(capped).atoms(sympy.tanh)
