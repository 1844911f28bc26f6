"""One text, three readings, the same values: parsed, built with Python's operators on symbols, and computed on plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import grammar
from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.plain import plain_value
from sparsedsl.testing.strategies import table_tensors

NAMES = ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len", "score", "where", "minimum", "maximum", "clamp", "abs", "tanh", "exp")
NAMES += ("log", "sqrt", "sin", "cos", "sigmoid", "softplus", "relu", "erf", "table")
SYMBOLS: dict[str, Any] = {name: abs if name == "abs" else getattr(sd, name) for name in NAMES} | {"inf": float("inf")}

small_cases = st.builds(
    AttentionCase,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    q_len=st.integers(1, 12),
    kv_len=st.integers(1, 12),
    q_offset=st.integers(0, 9),
)


def built(text: str) -> Any:
    """``text`` run as Python on the language's symbols: what a user's source file does."""
    names = dict(SYMBOLS)
    exec(grammar.declarations_of(text), names)
    return eval(text, names)


def tables_of(data: st.DataObject, expression: Any, case: AttentionCase) -> dict[str, torch.Tensor]:
    tables = data.draw(table_tensors((expression.expr,), case, {}), label="tables")
    if data.draw(st.booleans(), label="cut short"):  # reads outside a table give its nearest element
        tables = {name: t[tuple(slice(-(-size // 2)) for size in t.shape)] for name, t in tables.items()}
    return tables


def assert_values(text: str, expression: Any, case: AttentionCase, tables: dict[str, torch.Tensor]) -> None:
    """``expression`` has the value of ``text`` on every index of ``case``."""
    shape = case.positions.shape
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    got = evaluate(expression.expr, {**case.env, "score": logits, **tables})
    wanted = plain_value(text, {**case.positions, "score": logits.numpy()}, {n: t.numpy() for n, t in tables.items()})
    wanted = np.broadcast_to(wanted, shape)
    got = np.broadcast_to(got.numpy(), shape)
    if isinstance(expression, sd.Score):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9, err_msg=f"{text}  ->  {expression}")
    else:
        np.testing.assert_array_equal(got, wanted, err_msg=f"{text}  ->  {expression}")


@pytest.mark.parametrize("kind", ["index", "mask", "score"])
@given(data=st.data())
@settings(max_examples=250)
def test_parsed_and_built_expressions_have_the_values_of_plain_python(kind: str, data: st.DataObject) -> None:
    text = data.draw(grammar.TEXTS[kind](), label="text")
    case = data.draw(small_cases, label="case")
    parsed = sd.parse(grammar.declarations_of(text) + text)
    assert isinstance(parsed, {"index": sd.Index, "mask": sd.Mask, "score": sd.Score}[kind])
    assert parsed.same_as(built(text))
    assert_values(text, parsed, case, tables_of(data, parsed, case))


@pytest.mark.parametrize("kind", ["index", "mask"])
@given(data=st.data())
@settings(max_examples=150)
def test_deep_expressions_without_tables(kind: str, data: st.DataObject) -> None:
    text = data.draw(grammar.TEXTS[kind](4, tables=False), label="text")
    case = data.draw(small_cases, label="case")
    assert_values(text, built(text), case, {})
