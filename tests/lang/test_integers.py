"""Integer operations with every small constant: each form of text against plain Python, on a range of indices with both signs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import sparsedsl as sd
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing.plain import PositionTables, plain_value

CONSTANTS = [-6, -4, -3, -2, -1, 1, 2, 3, 4, 6]
POSITIONS = PositionTables(q_len=14, kv_len=14)

# Forms with two constants; the indices stand for numbers of both signs through q_idx - kv_idx.
FORMS = [
    "(q_idx - kv_idx) // {c} // {d}",
    "(q_idx - kv_idx) % {c} % {d}",
    "(q_idx - kv_idx) // {c} % {d}",
    "(q_idx - kv_idx) % {c} // {d}",
    "({c} * q_idx + {d}) % 4",
    "({c} * q_idx - 3 * kv_idx + {d}) % 6",
    "({c} * (q_idx % 6)) % {d}",
    "({c} * q_idx + {d}) // 4",
    "({c} * q_idx + 6 * kv_idx) // {d}",
    "{c} * q_idx // {d} * {d} + {c} * q_idx % {d}",
    "(q_idx - kv_idx) & {c} & {d}",
    "((q_idx - kv_idx) | {c}) ^ {d}",
    "~(q_idx ^ {c}) & {d}",
    "minimum(maximum(q_idx - kv_idx, {c}), {d})",
    "maximum(minimum({c} * q_idx, {d} * kv_idx), {c}, {d})",
    "abs({c} * q_idx - {d} * kv_idx)",
    "abs(q_idx - kv_idx + {c}) // {d}",
    "where(q_idx % 3 == 1, {c}, {d}) * kv_idx",
    "clamp(q_idx - kv_idx, {c}, {d})",
]
COMPARED = [
    "{c} * q_idx {op} {d}",
    "{c} * q_idx + {d} * kv_idx {op} 5",
    "4 * q_idx {op} {c} * kv_idx + {d}",
    "q_idx // 3 * {c} {op} {d}",
    "(q_idx - kv_idx) % 4 {op} {c} + {d}",
    "abs(q_idx - kv_idx) * {c} {op} {d}",
    "{c} {op} q_idx - kv_idx + {d}",
]
RELATIONS = ["<", "<=", ">", ">=", "==", "!="]


def assert_right(text: str) -> None:
    expression = sd.parse(text)
    shape = POSITIONS.shape
    got = np.broadcast_to(evaluate(expression.expr, {n: torch.as_tensor(v) for n, v in POSITIONS.items()}).numpy(), shape)
    wanted = np.broadcast_to(plain_value(text, POSITIONS), shape)
    np.testing.assert_array_equal(got, wanted, err_msg=f"{text}  ->  {expression}")
    assert sd.parse(expression.text).same_as(expression), expression.text


@pytest.mark.parametrize("form", FORMS)
def test_values_for_all_small_constants(form: str) -> None:
    for c, d in itertools.product(CONSTANTS, CONSTANTS):
        assert_right(form.format(c=c, d=d))


@pytest.mark.parametrize("form", COMPARED)
def test_comparisons_for_all_small_constants(form: str) -> None:
    for c, d, op in itertools.product(CONSTANTS[::2] + [0, 6], CONSTANTS[1::2] + [0], RELATIONS):
        assert_right(form.format(c=c, d=d, op=op))


ONES = ["q_idx // 1", "q_idx % 1", "q_idx // -1", "q_idx % -1", "0 * q_idx", "q_idx**0", "q_idx**1", "q_idx << 0", "q_idx >> 0"]


@pytest.mark.parametrize("text", ONES)
def test_zero_and_one(text: str) -> None:
    assert_right(f"({text}) + kv_idx")


SIGNS: dict[str, tuple[Callable[[], sd.Index], bool]] = {
    "a square and one": (lambda: sd.q_idx * sd.q_idx + 1, True),
    "a remainder and one": (lambda: sd.kv_idx % 5 + 1, True),
    "the larger of one and anything": (lambda: sd.maximum(sd.q_idx - sd.kv_idx, 1), True),
    "a distance and one": (lambda: abs(sd.q_idx - sd.kv_idx) + 1, True),
    "a choice of positive numbers": (lambda: sd.where(sd.h < 2, 3, sd.q_idx + 1), True),
    "a width": (lambda: sd.table("width", values_in=(1, 9))[sd.h], True),
    "a difference": (lambda: sd.q_idx - sd.kv_idx, False),
    "a remainder": (lambda: sd.kv_idx % 5, False),
    "a table that may hold zero": (lambda: sd.table("width", values_in=(0, 9))[sd.h], False),
    "the smaller of one and anything": (lambda: sd.minimum(sd.q_idx, 1), False),
}


@pytest.mark.parametrize("name", SIGNS)
def test_what_may_stand_under_a_division(name: str) -> None:
    build, fine = SIGNS[name]
    if fine:
        assert isinstance(sd.q_idx // build(), sd.Index)
        assert isinstance(sd.q_idx % build(), sd.Index)
    else:
        with pytest.raises(sd.PatternError, match="must be known not to be zero"):
            sd.q_idx // build()
