"""Programs composed at random: every backend agrees with the dense meaning, choices included, or refuses and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.program_text import read_program


def problems(**words: Any) -> st.SearchStrategy[kit.AttentionCase]:
    """Queries that stand among the keys."""
    return kit.shapes(max_len=32, max_heads=4, **words).filter(lambda case: case.q_offset + case.q_len <= case.kv_len)


@given(data=st.data())
@settings(max_examples=40)
def test_backends_give_what_the_nodes_mean(data: st.DataObject) -> None:
    case = data.draw(problems(square=data.draw(st.booleans())))
    program = data.draw(kit.programs(heads=case.heads))
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float64))
    named = data.draw(kit.program_inputs(program, case))
    for backend in ("tiled", "auto"):
        attn = sd.compile(program, backend=backend, allow=[LATER_QUERIES])
        try:
            done = kit.assert_matches_reference(attn, q, k, v, q_offset=case.q_offset, **named)
        except sd.UnsupportedError as refusal:
            assert "Use" in str(refusal) or "must be a multiple" in str(refusal), refusal
            continue
        assert {"out", "dq", "dk", "dv"} <= set(done)


@given(data=st.data())
@settings(max_examples=12)
def test_low_precision_with_the_same_choices(data: st.DataObject) -> None:
    case = data.draw(problems(square=data.draw(st.booleans())))
    program = data.draw(kit.programs(heads=case.heads).filter(lambda p: "compact" not in p.text))
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float32))
    named = data.draw(kit.program_inputs(program, case, dtype=torch.float32))
    try:
        kit.assert_matches_reference(
            sd.compile(program, backend="tiled", allow=[LATER_QUERIES]), q, k, v, q_offset=case.q_offset, **named
        )
    except sd.UnsupportedError as refusal:
        assert "Use" in str(refusal) or "must be a multiple" in str(refusal), refusal


@given(data=st.data())
@settings(max_examples=10)
def test_causal_programs(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=20, max_heads=2, square=True))
    program = data.draw(kit.programs(heads=case.heads, causal=True))
    assert LATER_QUERIES not in reasons(program)
    attn = sd.compile(program, backend="tiled")
    try:
        kit.assert_causal(attn, case, seed=data.draw(st.integers(0, 99)))
    except sd.UnsupportedError:
        assume(False)


@given(data=st.data())
@settings(max_examples=6)
def test_causal_programs_cut_into_calls(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=14, max_heads=2, square=True))
    program = data.draw(
        kit.programs(heads=case.heads, causal=True).filter(lambda p: "q_len" not in p.text and "ids" not in p.inputs)
    )
    try:
        done = kit.assert_prefill_equals_decode(sd.compile(program, backend="tiled"), case, chunks=(5,))
    except sd.UnsupportedError:
        assume(False)
    assert done[:3] == ("one call", "chunks of 5", "token by token")


@given(program=kit.programs())
@settings(max_examples=60)
def test_text_is_read_back(program: sd.Program) -> None:
    again = read_program(program.text)
    assert again == program and again.key == program.key and again.text == program.text
    assert again.root is program.root


def test_a_failure_names_the_choice_and_reproduces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsedsl.execute import selection_rules

    program = sd.Program(sd.patterns.moba(4, 2))
    case = kit.AttentionCase(heads=2, kv_heads=1, q_len=17, kv_len=17)
    q, k, v = (
        kit.tensor(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate((case.q_shape, case.k_shape, case.v_shape))
    )
    attn = sd.compile(program, backend="tiled")
    kit.assert_matches_reference(attn, q, k, v)
    right = selection_rules.top_k
    monkeypatch.setattr(selection_rules, "top_k", lambda source, k, *rest, **words: right(source, k + 1, *rest, **words))
    with pytest.raises(kit.Counterexample, match="backend 'tiled' chooses otherwise: top_k") as failure:
        kit.assert_matches_reference(attn, q, k, v)
    with pytest.raises(kit.Counterexample) as again:
        exec(failure.value.snippet, {})
    assert again.value.what == failure.value.what
