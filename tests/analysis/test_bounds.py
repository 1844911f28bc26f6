"""Reads under conditions: what an allowed pair reads lies inside its table, and what is inside is not refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.bounds import allowed_range, check_reads, index_ranges, value_ranges
from sparsedsl.analysis.domain import Domain
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, indices, masks, tables_for
from sparsedsl.testing.list_checks import allowed_pairs, assert_lists_sound

LENGTH = 16
pos, size = sd.table("pos"), sd.table("size", values_in=(0, 9))
bias, near = sd.table("bias", dtype=float), sd.table("near", dtype=bool)
apart = pos[q_idx] - pos[kv_idx]
far = abs(q_idx - kv_idx)
ever = kv_idx >= 0

# Mask, score or mask alone, entries that suffice: one fewer is refused.
READS = {
    "difference of a table": ((apart >= 0) & (apart < 5), bias[apart], 5),
    "twice it": ((apart >= 0) & (apart < 5), bias[2 * apart + 1], 10),
    "a part of it": ((apart >= 0) & (apart < 7), bias[apart // 2], 4),
    "distance": (far < 4, bias[far], 4),
    "remainder": ((q_idx - kv_idx) % 4 < 2, bias[(q_idx - kv_idx) % 4], 2),
    "value of a table": ((pos[kv_idx] >= 0) & (pos[kv_idx] < 4), bias[pos[kv_idx]], 4),
    "nearest of two": (sd.minimum(apart, 3) == apart, bias[sd.maximum(apart, 0)], 4),
    "arm": (ever, bias[sd.where(kv_idx < 10, kv_idx, 0)], 10),
    "other arm": (ever, bias[sd.where(kv_idx >= 10, 0, kv_idx)], 10),
    "nested arms": (ever, bias[sd.where(kv_idx < 10, sd.where(kv_idx >= 2, kv_idx - 2, 0), 0)], 8),
    "arm of two conditions": (ever, bias[sd.where((apart >= 0) & (apart <= 2), apart, 0)], 3),
    "arm of an alternative": (ever, bias[sd.where((kv_idx < 3) | (kv_idx == 6), kv_idx, 0)], 7),
    "read in an arm": (ever, sd.where(kv_idx < 10, bias[kv_idx], 0.0), 10),
    "mask and arm": (kv_idx >= 3, bias[sd.where(kv_idx < 10, kv_idx - 3, 0)], 7),
    "in the mask": (near[sd.where(kv_idx < 10, kv_idx, 0)], None, 10),
    "guarded in the mask": ((pos[q_idx] >= 0) & (pos[q_idx] < 6) & near[sd.maximum(pos[q_idx], -5)], None, 6),
}


@pytest.mark.parametrize("name", READS)
def test_conditions_limit_reads(name):
    mask, score, entries = READS[name]
    pattern = sd.attend(mask, score=sd.score if score is None else sd.score + score)
    table, dtype = ("near", torch.bool) if score is None else ("bias", torch.float32)
    positions = {"pos": torch.arange(LENGTH) * 3 - 12}

    def given(count):
        named = {table: torch.ones(count, dtype=dtype)} | positions
        return Domain(LENGTH, LENGTH, 0, 1, 2, {name: named[name] for name in pattern.tables})

    check_reads(pattern, given(entries))
    with pytest.raises(sd.TableError, match=f"table '{table}' is too short"):
        check_reads(pattern, given(entries - 1))


@given(data=st.data())
@settings(max_examples=80)
def test_ranges_of_choices_hold_every_value(data):
    """Random choices, alone and under random masks, against all pairs."""
    condition, mask = data.draw(masks(depth=1)), data.draw(masks(depth=2))
    index = sd.where(condition, data.draw(indices()), data.draw(indices()))
    case = AttentionCase(batch=1, heads=2, kv_heads=2, q_len=12, kv_len=9, q_offset=data.draw(st.sampled_from((0, 3))))
    tables = data.draw(tables_for(sd.attend(mask, score=sd.score + index), case))
    domain = Domain(case.q_len, case.kv_len, case.q_offset, 1, 2, tables)
    intervals = index_ranges(domain, value_ranges(domain))
    env = {"b": torch.zeros((), dtype=torch.int64), "h": torch.arange(2)[:, None, None], **domain.lengths, **tables}
    env |= {"q_idx": torch.arange(12)[:, None] + case.q_offset, "kv_idx": torch.arange(9)}
    values = evaluate(index.expr, env).expand(2, 12, 9)
    low, high = intervals.range(index.expr)
    assert low <= int(values.min()) and int(values.max()) <= high
    allowed = allowed_pairs(mask, case, **{n: t for n, t in tables.items() if n in sd.attend(mask).tables}).expand(1, 2, 12, 9)[0]
    low, high = allowed_range(index.expr, mask.expr, intervals)
    if bool(allowed.any()):
        assert low <= int(values[allowed].min()) and int(values[allowed].max()) <= high


DIVISORS = {
    "choice": sd.where(kv_idx > 0, kv_idx, 1),
    "its other arm": sd.where(kv_idx <= 0, 1, kv_idx),
    "value of a table": sd.where(size[h] == 0, 1, size[h]),
    "two conditions": sd.where((q_idx - kv_idx >= 3) & (kv_idx > 2), q_idx - kv_idx - 2, 5),
    "nested": sd.where(q_idx > 4, sd.where(kv_idx > q_idx, q_idx - 4, 2), 1),
}


@pytest.mark.parametrize("name", DIVISORS)
def test_divisors_that_a_condition_keeps_from_zero(name):
    divisor = DIVISORS[name]
    q, kv = torch.arange(12)[:, None], torch.arange(9)
    env = {"q_idx": q, "kv_idx": kv, "h": 1, "size": torch.tensor([3, 0])}
    by = evaluate(divisor.expr, env)
    assert int(by.min()) >= 1
    assert torch.equal(evaluate((q_idx % divisor).expr, env), (q % by).expand_as(evaluate((q_idx % divisor).expr, env)))
    assert torch.equal(evaluate((q_idx // divisor).expr, env), (q // by).expand_as(evaluate((q_idx // divisor).expr, env)))
    mask = q_idx % divisor <= 1
    assert sd.parse(mask.text).expr == mask.expr
    tables = {name: table for name, table in env.items() if name in sd.attend(mask).tables}
    mod = sd.compile(mask).mask_mod(**tables)  # generated code
    assert torch.equal(mod(torch.tensor(0), torch.tensor(1), q, kv).expand(12, 9), evaluate(mask.expr, env).expand(12, 9))


@pytest.mark.parametrize(
    "divisor", [sd.where(kv_idx > 0, kv_idx, 0), sd.where(kv_idx >= 0, kv_idx, 1), sd.where(q_idx > 0, kv_idx, 1)]
)
def test_divisors_that_may_be_zero_are_refused(divisor):
    with pytest.raises(sd.PatternError, match="must be known not to be zero"):
        q_idx % divisor


SHIFTS = {
    "1 << h": q_idx // (1 << h) == kv_idx // (1 << h),
    "2 ** h": q_idx // (2**h) == kv_idx // 2**h,
    "shifts": (q_idx >> h) == (kv_idx >> h),
    "remainder": (q_idx - kv_idx) % (1 << h) == 0,
    "in an index": (q_idx - kv_idx) % (1 << sd.minimum(size[h], 3)) <= 1,
}


@pytest.mark.parametrize("name", SHIFTS)
def test_powers_of_two_divide(name):
    """A divisor that an index gives, on the dense meaning, in generated code, as text and as tile lists."""
    mask, heads = SHIFTS[name], 70
    pattern = sd.attend(mask)
    q, kv, head = torch.arange(12)[:, None], torch.arange(9), torch.arange(heads)[:, None, None]
    tables = {"size": torch.arange(heads) % 10} if "size" in pattern.tables else {}
    by = 2 ** (tables["size"].clamp(max=3)[:, None, None] if tables else head).clamp(max=20)  # no position reaches 2**20
    wanted = {"remainder": (q - kv) % by == 0, "in an index": (q - kv) % by <= 1}.get(name, q // by == kv // by)
    env = {"q_idx": q, "kv_idx": kv, "h": head, **tables}
    assert torch.equal(evaluate(mask.expr, env), wanted)
    assert torch.equal(sd.compile(mask).mask_mod(**tables)(torch.tensor(0), head, q, kv), wanted)
    assert sd.parse(mask.text).expr == mask.expr
    assert_lists_sound(mask, 12, 9, (4, 4), batch=1, heads=heads, q_offset=0, **tables)
