"""Expressions as torch code: the same values as the evaluator's, text that reads well, an error for what has no rule."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl import testing as kit
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.flex.attention import kernel_values
from sparsedsl.codegen.expression import Names, write_expression
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.to_flex import flex_functions, flex_kernel
from sparsedsl.lang.evaluation import evaluate

SYMBOLS = {name: name for name in ("b", "h", "kv_idx", "q_len", "kv_len", "score")} | {"q_idx": "q_pos"}
doc, start = sd.table("doc", monotone=True), sd.table("start")
bias, chosen = sd.table("bias", dtype=float), sd.table("chosen", dtype=bool)


def printed(expression, *, real="", clamp=False):
    """What ``write_expression`` writes and returns, as one text."""
    source = Source()
    names = Names(SYMBOLS, {name: name for name in expression.tables}, clamp)
    result = write_expression(source, expression.expr, names, real=real)
    return (source.text + result).strip()


def run(text, case, tables, values=None):
    """mask and score of a generated module on every point of ``case``; logits that are multiples of 1/8."""
    namespace = {}
    exec(text, namespace)
    if values is None:
        numbers = (case.q_offset, case.q_offset + case.q_len, case.kv_len)
        values = (*numbers, *(tables[name] for name in sorted(tables)))
    mask_mod, score_mod = namespace["mods"](*values)
    env = case.env
    index = (env["b"], env["h"], env["q_idx"] - case.q_offset, env["kv_idx"])
    mask = mask_mod(*index)
    return mask, None if score_mod is None else score_mod(logits(case), *index)


def logits(case):
    return torch.randint(-24, 24, case.positions.shape, generator=torch.Generator().manual_seed(1)) / 8


@given(st.data(), kit.patterns(depth=4), kit.shapes(max_len=40))
@settings(max_examples=300)
def test_generated_functions_have_the_values_of_the_evaluator(data, pattern, case):
    tables = pattern.bound | data.draw(kit.tables_for(pattern, case))
    env = {**case.env, **tables}
    shape = case.positions.shape
    wanted = evaluate(pattern.mask.expr, env).expand(shape)
    clamped = flex_functions(pattern)
    unclamped = flex_kernel(pattern)
    domain = Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, tables)
    prepared = kernel_values(unclamped, domain, torch.device("cpu"), keys=case.kv_len)
    for text, values in ((clamped.text, None), (unclamped.text, prepared)):
        mask, scores = run(text, case, tables, values)
        assert torch.equal(mask.expand(shape), wanted), text
        if scores is not None:
            exact = (
                evaluate(pattern.score.expr, {**env, "score": logits(case)}, dtype=torch.float32).to(torch.float32).expand(shape)
            )
            torch.testing.assert_close(scores.expand(shape).to(torch.float32), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ((kv_idx <= q_idx) & (q_idx - kv_idx < 512), "(q_pos >= kv_idx) & (q_pos - kv_idx <= 511)"),
        (doc[q_idx] == doc[kv_idx], "doc[q_pos] == doc[kv_idx]"),
        (start[doc[q_idx]] <= kv_idx, "start[doc[q_pos].clamp(0, start.shape[0] - 1)] <= kv_idx"),
        (~chosen[q_idx // 64, 3], "~chosen[(q_pos // 64).clamp(0, chosen.shape[0] - 1), 3]"),
        (abs(q_idx - kv_idx) % 3 == 1, "torch.abs(kv_idx - q_pos) % 3 == 1"),
        (sd.tanh(score / 30) * 30, "30*torch.tanh(score / 30)"),
        (sd.where(kv_idx < 4, score, float("-inf")), "torch.where(kv_idx <= 3, score, -inf)"),
        (score + sd.sigmoid(2.0) * h, "score + h*0.8807970779778823"),
        (sd.clamp(q_idx - kv_idx, 0, 63) + b, "b + (q_pos - kv_idx).clamp(min=0).clamp(max=63)"),
        (2 ** (-1.0 * h) * score, "score*torch.pow(2.0, -1.0*h)"),
        (sd.relu(kv_idx) + score, "score + torch.relu(kv_idx.to(torch.float32))"),
    ],
    ids=str,
)  # fmt: skip
def test_text(expression, text):
    assert printed(expression) == text


def test_what_is_used_twice_gets_a_name():
    distance = q_idx - kv_idx
    assert printed((distance % 4 == 0) & (distance // 4 < bias[h, distance])) == (
        "t = q_pos - kv_idx\n"
        "(t % 4 == 0) & (t // 4 < bias[h, t.clamp(0, bias.shape[1] - 1)])"
    )  # fmt: skip


def test_a_difference_of_large_positions_is_taken_before_it_is_scaled():
    assert printed(score - 0.1 * (q_idx - kv_idx)) == "score + 0.1*(kv_idx - q_pos)"
    assert printed((q_idx - kv_idx) / 3 < b + 0.5, real="torch.float64") == (
        "(q_pos - kv_idx).to(torch.float64) / 3 < b.to(torch.float64) + 0.5"
    )


def test_masks_compute_in_float64_so_that_far_positions_are_exact():
    far = 1 << 25  # not every integer there has a float32
    pattern = sd.attend(kv_idx * 0.5 > q_idx * 0.5)
    case = kit.AttentionCase(q_len=3, kv_len=1, q_offset=far)
    namespace = {}
    exec(flex_functions(pattern).text, namespace)
    mask_mod, _ = namespace["mods"](case.q_offset, None, None)
    assert mask_mod(0, 0, torch.tensor(0), torch.tensor([far, far + 1, far + 2])).tolist() == [False, True, True]


def test_every_index_is_clamped_where_nobody_checks_lengths():
    assert printed(doc[q_idx] == doc[5], clamp=True) == "doc[q_pos.clamp(0, doc.shape[0] - 1)] == doc[min(5, doc.shape[0] - 1)]"


def test_booleans_count_as_numbers():
    case = kit.AttentionCase(q_len=4, kv_len=4)
    pattern = sd.attend(sd.where(chosen[q_idx, kv_idx], 1, 0) + sd.where(chosen[kv_idx, q_idx], 1, 0) == 1)
    table = torch.rand(4, 4) > 0.5
    mask, _ = run(flex_functions(pattern).text, case, {"chosen": table})
    assert torch.equal(mask[0, 0], table ^ table.T)


def test_an_unknown_node_raises():
    with pytest.raises(sd.UnsupportedError, match="no rule for the function gamma"):
        write_expression(Source(), sympy.gamma(q_idx.expr), Names(SYMBOLS, {}))
    with pytest.raises(sd.UnsupportedError, match="has no rule for the function Piecewise"):
        write_expression(Source(), sympy.Piecewise((q_idx.expr, kv_idx.expr > 2), (0, True)), Names(SYMBOLS, {}))


def test_one_printing_of_a_deep_expression_is_quick():
    deep = q_idx
    for step in range(8):
        deep = sd.minimum(deep + kv_idx * step, deep // 2)
    assert len(printed(deep)) < 2_000
