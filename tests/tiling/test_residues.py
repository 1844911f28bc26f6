"""Lanes of a mask: no pair is in two of them, every allowed pair is in one, and remainders become steps."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, masks, shapes, tables_for
from sparsedsl.tiling.residues import MAX_RESIDUES, ResidueClass, residue_classes, union

causal = kv_idx <= q_idx


def pairs_of(residue: ResidueClass, case: AttentionCase, tables: dict[str, Any]) -> torch.Tensor:
    """The pairs a residue allows, ``(batch, heads, q_len, kv_len)``: its mask at the coordinates of every position it contains."""
    env = case.env
    q, kv = env["q_idx"] - residue.q_start, env["kv_idx"] - residue.kv_start
    inside = (q % residue.q_step == 0) & (kv % residue.kv_step == 0) & (q >= 0) & (kv >= 0)
    coordinates = {"q_idx": torch.where(inside, q // residue.q_step, 0), "kv_idx": torch.where(inside, kv // residue.kv_step, 0)}
    return (evaluate(residue.mask, {**env, **tables, **coordinates}) & inside).expand(case.positions.shape)


def assert_lanes_are_the_mask(mask: sd.Mask, case: AttentionCase, tables: dict[str, Any]) -> None:
    seen = torch.zeros(case.positions.shape, dtype=torch.int32)
    for residue in residue_classes(mask.expr):
        seen += pairs_of(residue, case, tables)
    wanted = evaluate(mask.expr, {**case.env, **tables}).expand(seen.shape)
    assert int(seen.max()) <= 1, "a pair is in two residue classes"
    assert torch.equal(seen == 1, wanted)


@st.composite
def remainders(draw: st.DrawFn) -> sd.Mask:
    """``(a * q_idx + c * kv_idx + shift) % modulus == remainder``, within a window or beyond it."""
    a, c = draw(st.sampled_from(((1, -1), (-1, 1), (1, 1), (0, 1), (0, -1), (-1, -1), (1, 0), (2, 1))))
    modulus = draw(st.integers(2, 9))
    found = (a * q_idx + c * kv_idx + draw(st.integers(-9, 9))) % modulus == draw(st.integers(0, modulus - 1))
    near = q_idx - kv_idx < draw(st.integers(0, 20))
    return draw(st.sampled_from((found, found & causal, found & near, found & ~near, found & near & causal, ~found & causal)))


@st.composite
def joined(draw: st.DrawFn) -> sd.Mask:
    """Up to three masks with remainders or without, joined."""
    mask = draw(remainders())
    for _ in range(draw(st.integers(0, 2))):
        part, sign = draw(remainders() | masks(depth=1)), draw(st.sampled_from("|&^"))
        mask = mask | part if sign == "|" else mask & part if sign == "&" else mask ^ part
    return mask


@given(mask=masks() | joined(), case=shapes(max_len=30, max_heads=3), data=st.data())
@settings(max_examples=200)
def test_lanes_are_the_mask(mask, case, data):
    assert_lanes_are_the_mask(mask, case, data.draw(tables_for(mask, case)))


@given(mask=masks() | joined())
@settings(max_examples=100)
def test_what_is_not_scattered_is_solved_by_intervals(mask):
    found = residue_classes(mask.expr)
    assert sum(residue.scattered for residue in found) <= 1
    for residue in found:
        assert residue.plain or not residue.scattered
        assert residue.scattered or not any(clause.rest for clause in clauses(residue.mask))


@pytest.mark.parametrize(
    ("mask", "count", "steps"),
    [
        (causal & ((q_idx - kv_idx) % 8 == 0), 8, (8, 8)),
        (causal & ((kv_idx - q_idx) % 8 == 3), 8, (8, 8)),
        (causal & ((q_idx + kv_idx + 5) % 4 == 1), 4, (4, 4)),
        (causal & (kv_idx % 8 == 7), 1, (1, 8)),
        (causal & ((3 - kv_idx) % 8 == 7), 1, (1, 8)),
    ],
    ids=["difference", "negative difference", "sum", "keys", "negative keys"],
)
def test_a_remainder_becomes_steps(mask, count, steps):
    found = residue_classes(mask.expr)
    assert len(found) == count and not any(residue.scattered for residue in found)
    assert {(residue.q_step, residue.kv_step) for residue in found} == {steps}
    assert_lanes_are_the_mask(mask, AttentionCase(q_len=50, kv_len=50), {})


def test_too_many_residues_are_no_lanes():
    (residue,) = residue_classes((causal & ((q_idx - kv_idx) % (MAX_RESIDUES + 1) == 0)).expr)
    assert residue.scattered and residue.plain
    assert len(residue_classes((causal & ((q_idx - kv_idx) % MAX_RESIDUES == 0)).expr)) == MAX_RESIDUES


def test_a_window_with_a_stride_beyond_it_is_a_window_and_lanes():
    first, *others = residue_classes(sd.patterns.strided(8, local=20).expr)
    assert first.plain and not first.scattered and len(others) == 8
    assert [(residue.q_start, residue.kv_start) for residue in others] == [(n, n) for n in range(8)]


def test_what_a_lane_prints():
    assert [str(residue) for residue in residue_classes((causal & ((q_idx - kv_idx - 1) % 4 == 0)).expr)][:2] == [
        "queries 0, 4, 8, .., keys 3, 7, 11, ..",
        "queries 1, 5, 9, .., keys 0, 4, 8, ..",
    ]
    assert str(ResidueClass(sympy.true, kv_start=1, kv_step=2)) == "queries all, keys 1, 3, 5, .."
    assert str(residue_classes(causal.expr)[0]) == "every query, every key"


def test_an_expression_inside_a_lane_reads_coordinates():
    residue = ResidueClass(sympy.true, q_start=3, q_step=8, kv_start=1, kv_step=4)
    expr = (q_idx * 2 - kv_idx).expr
    assert residue.inside(expr) == (16 * q_idx - 4 * kv_idx + 5).expr
    assert ResidueClass(sympy.true).inside(expr) is expr


def test_the_mask_that_allows_nothing_has_no_lane():
    assert residue_classes(sympy.false) == () and union([]) == sympy.false
