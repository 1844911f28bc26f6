"""What kernels cannot compute exactly, taken out into prepared tables: same values everywhere, and learned tables stay where they are."""

from __future__ import annotations

import math

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.analysis.domain import Domain
from sparsedsl.codegen.hoisting import hoist
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.runtime.hoisted_tables import fill

CASES = [
    kit.AttentionCase(q_len=9, kv_len=70, q_offset=61),
    kit.AttentionCase(q_len=40, kv_len=7),
    kit.AttentionCase(heads=2, batch=2),
]


def assert_same(pattern, wanted, **tables):
    """Hoisting leaves every value of mask and score as it was; ``wanted``: axis and kind of the prepared tables."""
    hoisted = hoist(pattern)
    assert [(p.axis, p.dtype) for p in hoisted.prepared] == wanted
    for case in CASES:
        domain = Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, tables)
        prepared = {p.name: fill(p, domain) for p in hoisted.prepared}
        shape = case.positions.shape
        env = {**case.env, "score": torch.randn(shape, generator=torch.Generator().manual_seed(0)), **tables}
        for part, dtype in (("mask", torch.float64), ("score", torch.float32)):
            before, after = (evaluate(getattr(p, part).expr, env | prepared, dtype=dtype) for p in (pattern, hoisted.pattern))
            assert torch.equal(before.expand(shape), after.expand(shape)), part
    return hoisted


def t5_mod(bias, both_ways):
    """T5's buckets as its model computes them, in float32."""

    def score_mod(score, b, h, q_idx, kv_idx):
        distance = kv_idx - q_idx
        buckets = 8 if both_ways else 16
        first = (distance > 0).to(torch.long) * buckets if both_ways else torch.zeros_like(distance)
        distance = torch.abs(distance) if both_ways else -torch.min(distance, torch.zeros_like(distance))
        exact = buckets // 2
        large = exact + (torch.log(distance.float() / exact) / math.log(40 / exact) * (buckets - exact)).to(torch.long)
        large = torch.min(large, torch.full_like(large, buckets - 1))
        return score + bias[first + torch.where(distance < exact, distance, large), h]

    return score_mod


@pytest.mark.parametrize("both_ways", [True, False])
def test_t5_buckets_go_through_a_table_of_differences_and_the_learned_table_stays(both_ways):
    bias = torch.nn.Parameter(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    traced = sd.attend(True, score=sd.trace_score(t5_mod(bias, both_ways)))
    hoisted = assert_same(traced, [("difference", "int")], bias=bias.detach())
    assert hoisted.pattern.tables["bias"].learned
    assert str(hoisted.pattern.score) == "score + bias[exact_difference[q_idx + kv_len - kv_idx - 1], h]"


def log_of(text):
    return f"f32_mul(f32_log(f32_add({text}, 1)), 3)"


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (f"f32_lt({log_of('abs(q_idx - kv_idx)')}, 7.5) != 0", [("difference", "bool")]),
        (f"(q_idx >= kv_idx) & (f32_lt({log_of('abs(q_idx - kv_idx)')}, 7.5) == 0)", [("difference", "bool")]),
        (f"f32_to_int64({log_of('q_idx')}) < kv_idx", [("query", "int")]),
        (f"f32_lt({log_of('q_idx')}, {log_of('kv_idx * 2')}) != 0", [("query", "float"), ("key", "float")]),
        ("f64_lt(f64_exp(q_idx * 0.01), f64_add(kv_idx, f64_log(kv_len))) != 0", [("query", "float"), ("key", "float")]),
        ("f64_lt(q_idx * kv_idx, f64_mul(f64_log(kv_len), 9)) != 0", [("call", "float")]),
        ("f32_lt(f32_mul(q_idx - kv_idx, 0.1), 2) != 0", []),
        (f"(f32_to_int64({log_of('q_idx')}) + kv_idx < 9) | (f32_to_int64({log_of('q_idx')}) == h)", [("query", "int")]),
        (f"keep[f32_to_int64({log_of('kv_idx')})]", [("key", "bool")]),
        (f"f32_lt({log_of('doc[q_idx]')}, h) != 0", [("query", "float")]),
    ],
    ids=str,
)  # fmt: skip
def test_masks(mask, wanted):
    tables = {"doc": torch.arange(90) // 4, "keep": torch.arange(20) % 3 > 0}
    declared = "doc = table('doc')\nkeep = table('keep', dtype=bool)\n"
    used = {name: tables[name] for name in tables if name in mask}
    pattern = sd.attend(sd.parse("".join(line + "\n" for line in declared.splitlines() if line.split()[0] in mask) + mask))
    hoisted = assert_same(pattern, wanted, **used)
    assert {name for p in hoisted.prepared for name in p.reads} <= set(used)


def test_scores_are_computed_in_float32_and_masks_in_float64():
    expression = sd.parse("score + f32_log(f32_add(q_idx, 1)) + where(f64_lt(f64_exp(f64_mul(kv_idx, 0.1)), 9) != 0, 2, 0)")
    hoisted = assert_same(sd.attend(True, score=expression), [("key", "int"), ("query", "float")])
    assert not any(p.double for p in hoisted.prepared)
    (prepared,) = hoist(sd.attend(sd.parse("f64_lt(f64_exp(q_idx * 0.1), kv_idx * q_idx) != 0"))).prepared
    assert torch.equal(
        fill(prepared, Domain(rows=9, kv_len=3)), torch.exp(torch.arange(9) * torch.tensor(0.1).double().fill_(0.1))
    )


def test_learned_tables_are_never_taken_out():
    text = "bias = table('bias', learned=True)\nscore + f32_add(f32_log(bias[q_idx]), f32_log(f32_add(q_idx, 1)))"
    hoisted = assert_same(sd.attend(True, score=sd.parse(text)), [("query", "float")], bias=torch.rand(70))
    assert str(hoisted.pattern.score) == "score + f32_add(f32_log(bias[q_idx]), exact_query[q_idx])"


def test_what_has_no_axis_stays():
    pattern = sd.attend(sd.parse("(f32_lt(f32_log(f32_add(q_idx * kv_idx, 1)), 3) != 0) & (f32_lt(f32_log(h + 1), 1) != 0)"))
    assert hoist(pattern).pattern is pattern and not hoist(pattern).prepared


def test_names_are_free_and_integers_as_narrow_as_they_fit():
    table = sd.table("exact_query", dtype=float)
    pattern = sd.attend((table[sd.kv_idx] < 1) & sd.parse("f32_to_int64(f32_exp(q_idx)) != kv_idx"))
    (prepared,) = hoist(pattern).prepared
    assert prepared.name == "exact_query_1"
    assert fill(prepared, Domain(rows=20, kv_len=3)).dtype == torch.int32
    assert fill(prepared, Domain(rows=30, kv_len=3)).dtype == torch.int64
