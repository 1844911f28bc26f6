"""Assertions on expressions: what they accept, what they notice, and what they print."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.testing import expression_checks as module
from sparsedsl.testing.counterexamples import expression_code, pattern_code


@given(st.one_of(kit.indices(), kit.masks(), kit.scores()))
@settings(max_examples=150)
def test_text_of_random_expressions(expression: Any) -> None:
    kit.assert_text_round_trip(expression)


def test_text_that_reads_back_differently_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "parse", lambda text: sd.kv_idx < sd.q_idx)
    with pytest.raises(kit.Counterexample, match="kv_idx <= q_idx became kv_idx < q_idx") as failure:
        kit.assert_text_round_trip(sd.kv_idx <= sd.q_idx)
    assert "sd.testing.assert_text_round_trip(sd.parse('q_idx >= kv_idx'))" in failure.value.snippet


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < 4)


def test_a_function_and_an_expression_with_the_same_values() -> None:
    kit.assert_same_values((sd.kv_idx <= sd.q_idx) & (sd.q_idx < sd.kv_idx + 4), window)
    kit.assert_same_values(sd.score * 2, lambda score, b, h, q_idx, kv_idx: score + score)
    kit.assert_same_values(sd.q_idx // 2 * 2 + sd.q_idx % 2, sd.q_idx)


def test_functions_may_use_python_control_flow() -> None:
    kit.assert_same_values(sd.where(sd.kv_idx < 3, sd.h, sd.b), lambda b, h, q_idx, kv_idx: h if kv_idx < 3 and q_idx >= 0 else b)


def test_different_values_are_shown_with_the_place() -> None:
    with pytest.raises(kit.Counterexample) as failure:
        kit.assert_same_values((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5), window)
    assert "values differ at 24 of 308 points; at {'b': 0, 'h': 0, 'q_idx': 4, 'kv_idx': 0}" in failure.value.what
    assert failure.value.what.endswith("is True, window is False")
    assert "# import or paste window here" in failure.value.snippet


def test_scores_may_differ_by_rounding_only() -> None:
    third = sd.score / 3
    kit.assert_same_values(third + third + third, sd.score)
    with pytest.raises(kit.Counterexample, match="values differ"):
        kit.assert_same_values(third + third + third, sd.score * (1 + 1e-10))


def test_minus_infinity_equals_itself_only() -> None:
    dropped = sd.where(sd.kv_idx < 3, sd.score, float("-inf"))
    kit.assert_same_values(dropped, sd.where(sd.kv_idx >= 3, float("-inf"), sd.score))
    with pytest.raises(kit.Counterexample, match="is -inf"):
        kit.assert_same_values(dropped, sd.score)


def test_tables_are_wanted_by_name() -> None:
    doc = sd.table("doc")
    with pytest.raises(sd.TableError, match=r"values of the tables doc are needed: assert_same_values\(\.\.\., doc=tensor\)"):
        kit.assert_same_values(doc[sd.q_idx], sd.q_idx)
    kit.assert_same_values(doc[sd.q_idx], sd.q_idx, doc=torch.arange(20))
    kit.assert_same_values(doc[sd.q_idx].bind(doc=torch.arange(20)), sd.q_idx)


def test_only_expressions_and_functions_have_values() -> None:
    with pytest.raises(sd.PatternError, match=r"compares expressions and Python functions; got 3 \(int\)"):
        kit.assert_same_values(sd.q_idx, 3)


def test_a_snippet_of_two_expressions_fails_again() -> None:
    doc = sd.table("doc", monotone=True)
    with pytest.raises(kit.Counterexample) as failure:
        kit.assert_same_values(doc[sd.q_idx] == doc[sd.kv_idx], sd.q_idx == sd.kv_idx, doc=torch.tensor([0, 0, 1]))
    with pytest.raises(kit.Counterexample) as again:
        exec(failure.value.snippet, {})
    assert str(again.value) == str(failure.value)


@given(pattern=kit.patterns())
@settings(max_examples=60)
def test_patterns_print_as_code(pattern: sd.Pattern) -> None:
    assert eval(pattern_code(pattern), {"sd": sd, "torch": torch}) == pattern


def test_bound_tables_print_as_code() -> None:
    doc = sd.table("doc")
    mask = (doc[sd.q_idx] == 1).bind(doc=torch.tensor([0, 1], dtype=torch.int32))
    code = expression_code(mask)
    again = eval(code, {"sd": sd, "torch": torch})
    assert code.endswith(".bind(doc=torch.tensor([0, 1], dtype=torch.int32))")
    assert again.same_as(mask)
    assert torch.equal(again.bound["doc"], mask.bound["doc"])


def test_infinities_print_as_code() -> None:
    import math

    from sparsedsl.testing.call_shapes import tensor_code

    values = torch.tensor([float("-inf"), float("inf"), 0.1, float("nan")])
    again = eval(tensor_code(values), {"torch": torch, "math": math})
    assert torch.equal(again, values) or torch.equal(again.nan_to_num(7.0), values.nan_to_num(7.0))


def test_counterexamples_are_assertion_errors_and_travel_between_processes() -> None:
    import pickle

    failure = kit.Counterexample("it is wrong", "do_it()")
    assert isinstance(failure, AssertionError)
    assert "it is wrong" in str(pickle.loads(pickle.dumps(failure)))
