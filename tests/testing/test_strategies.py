"""The strategies keep their promises: tables honour their words, shapes are attention problems, text covers the language."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.runtime.call import check_call
from sparsedsl.testing import grammar


@given(kit.shapes(max_len=80, max_batch=3, max_heads=8))
def test_shapes_are_attention_problems(case: kit.AttentionCase) -> None:
    assert case.heads % case.kv_heads == 0
    assert 1 <= case.heads <= 8
    assert min(case.batch, case.q_len, case.kv_len, case.head_dim, case.head_dim_v) >= 1
    assert case.q_offset >= 0
    assert max(case.q_len, case.kv_len, case.q_offset) <= 80
    assert eval(f"kit.{case!r}") == case


@given(kit.shapes(square=True))
def test_square_shapes_are_whole_sequences(case: kit.AttentionCase) -> None:
    assert (case.q_len, case.q_offset) == (case.kv_len, 0)


@pytest.mark.parametrize(
    "wish",
    [
        lambda c: c.q_len == 1 < c.kv_len and c.q_offset == c.kv_len - 1,
        lambda c: c.kv_len < 16,
        lambda c: c.kv_len % 16 == 1 and c.kv_len > 16,
        lambda c: c.heads // c.kv_heads == 3,
        lambda c: c.q_len > c.kv_len,
        lambda c: c.head_dim != c.head_dim_v,
        lambda c: c.q_offset > c.kv_len,
    ],
    ids=["decode", "short", "ragged", "odd ratio", "more queries than keys", "Dv", "beyond the keys"],
)
def test_shapes_include(wish: Any) -> None:
    find(kit.shapes(), wish, settings=settings(max_examples=3000, database=None))


@given(data=st.data())
@settings(max_examples=60)
def test_inputs_fit_their_case(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=9))
    q, k, v = data.draw(kit.inputs(case))
    assert (tuple(q.shape), tuple(k.shape), tuple(v.shape)) == (case.q_shape, case.k_shape, case.v_shape)
    assert q.dtype == k.dtype == v.dtype
    for x in (q, k, v):
        again = eval(kit.shapes.__module__ and x.sparsedsl_code, {"sd": sd, "torch": torch})
        assert torch.equal(again, x)
        assert again.stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_layouts(layout: str) -> None:
    x = kit.tensor(3, 4, 5, 8, seed=1, layout=layout)
    assert x.shape == (3, 4, 5, 8)
    assert x.is_contiguous() == (layout == "contiguous")
    assert (x.stride(0) == 0) == (layout == "expanded")
    if layout != "expanded":
        assert torch.equal(x, kit.tensor(3, 4, 5, 8, seed=1))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of contiguous, transposed, expanded; got 'strided'"):
        kit.tensor(3, seed=0, layout="strided")


@given(data=st.data())
@settings(max_examples=150)
def test_tables_keep_their_declarations_and_are_long_enough(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns())
    case = data.draw(kit.shapes(max_len=30))
    tables = data.draw(kit.tables_for(pattern, case))
    assert set(tables) == set(pattern.tables)
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float32))
    check_call(pattern, q, k, v, tables, q_offset=case.q_offset)  # refuses what breaks a declaration, and short tables


def test_tables_read_in_a_circle_are_drawn_too() -> None:
    s, t = sd.table("s", values_in=(0, 5)), sd.table("t", values_in=(0, 5))
    mask = (s[t[sd.q_idx]] < 3) & (t[s[sd.kv_idx]] < 3)
    tables = find(kit.tables_for(mask, kit.AttentionCase(q_len=4, kv_len=4)), lambda found: True)
    assert set(tables) == {"s", "t"}


def test_bound_tables_are_left_alone() -> None:
    doc = sd.table("doc")
    mask = (doc[sd.q_idx] == doc[sd.kv_idx]).bind(doc=torch.arange(4))
    assert find(kit.tables_for(mask, kit.AttentionCase(q_len=4, kv_len=4)), lambda found: True) == {}


@given(data=st.data())
@settings(max_examples=60)
def test_causal_patterns_are_causal(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns(causal=True, scores=False))
    case = data.draw(kit.shapes(max_len=20))
    tables = data.draw(kit.tables_for(pattern, case))
    later = case.env["kv_idx"] > case.env["q_idx"]
    assert not (kit.allowed_pairs(pattern, case, **tables) & later).any()


@given(kit.masks(tables=False), kit.indices(tables=False), kit.scores(tables=False))
@settings(max_examples=50)
def test_without_tables(mask: sd.Mask, index: sd.Index, score: sd.Score) -> None:
    assert not mask.tables | index.tables | score.tables


WORDS = {
    "mask": [r"\(~", r" & ", r" \| ", r" \^ ", r" == ", r" != ", r"<=", r"\bkeep\[", r"\blisted\[", r"\bchosen\["]
    + [r"start\[doc\[", r"packed\[b,", r"width\[h\]", r"used\[b\]", r"order\[", r"q_len", r"kv_len", r" // ", r" % "],
    "index": [r"minimum", r"maximum", r"abs", r"clamp", r"where", r"<<", r">>", r"\*\*2", r" // -", r" % width", r"~"],
    "score": [
        "tanh",
        "exp",
        "log",
        "sqrt",
        "sigmoid",
        "softplus",
        "relu",
        "erf",
        "sin",
        "cos",
        r"slope\[h\]",
        r"bias\[h,",
        "-inf",
    ],
}


@pytest.mark.parametrize("kind", WORDS)
def test_random_text_says_what_the_language_can_say(kind: str) -> None:
    missing = set(WORDS[kind])

    @settings(max_examples=2500, database=None, derandomize=True, phases=[Phase.generate])
    @given(grammar.TEXTS[kind]())
    def see(text: str) -> None:
        missing.difference_update([word for word in missing if re.search(word, text)])

    see()
    assert not missing
