"""``sd.analyse``: numbers against brute force, verdicts with witnesses, warnings, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.testing import AttentionCase, masks, tables_for
from sparsedsl.testing.list_checks import allowed_pairs

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)


@given(data=st.data())
@settings(max_examples=80)
def test_numbers_against_brute_force(data):
    mask = data.draw(masks(depth=2))
    batch, heads = data.draw(st.sampled_from(((1, 1), (2, 3))))
    rows, kv_len, offset = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60), st.sampled_from((0, 9))))
    case = AttentionCase(batch=batch, heads=heads, kv_heads=heads, q_len=rows, kv_len=kv_len, q_offset=offset)
    tables = data.draw(tables_for(mask, case))
    found = sd.analyse(
        mask,
        rows,
        kv_len,
        (8, 16),
        q_offset=offset,
        batch=batch,
        heads=heads,
        head_dim=8,
        head_dim_v=4,
        dtype="float32",
        **tables,
    )
    allowed = allowed_pairs(mask, case, **tables)
    assert found.density_exact
    assert found.density == pytest.approx(allowed.float().mean().item(), abs=1e-6)
    empty = ~allowed.any(dim=-1)
    assert found.empty_rows == int(empty.sum())
    if found.empty_row is not None:
        b, head, q = found.empty_row
        assert bool(empty[b, head, q - offset])
    later = allowed & (torch.arange(kv_len) > torch.arange(offset, offset + rows)[:, None])
    assert (found.causal == sd.REFUTED) == bool(later.any())
    if found.causal == sd.REFUTED:
        b, head, q, kv = found.causal.witness.indices
        assert bool(later[b, head, q - offset, kv])
    groups = found.lists.shape[0] * found.lists.shape[1]
    pairs = sum(
        8 * 16 if i < rows // 8 and j < kv_len // 16 else min(8, rows - i * 8) * min(16, kv_len - j * 16)
        for _, _, i, j in found.lists.classes().nonzero().tolist()
    )
    assert found.flops == 2 * (8 + 4) * pairs * batch * heads // groups
    assert found.flops_backward == 2 * (3 * 8 + 2 * 4) * pairs * batch * heads // groups
    assert found.flops_dense == 2 * (8 + 4) * rows * kv_len * batch * heads


def test_a_million_tokens():
    length = 1 << 20
    found = sd.analyse(causal & (q_idx - kv_idx < 1024), length)
    assert found.density == pytest.approx((1024 * length - 1023 * 1024 / 2) / length**2)
    assert found.causal == sd.PROVED and found.empty_rows == 0 and not found.warnings
    assert "PROVED" in str(found) and "<pre" in found._repr_html_()


@pytest.mark.parametrize("far", [(q_idx - kv_idx) % 127 == 0, kv_idx % 64 == 63], ids=str)
def test_a_window_with_a_stride_is_counted_exactly_at_any_length(far):
    """Along diagonals, or from what repeats: no rows are sampled, and no points of tiles looked at."""
    length = 1 << 16
    found = sd.analyse(causal & ((q_idx - kv_idx < 512) | far), length)
    q = torch.arange(length)
    behind = (q - 511).clamp(min=0)  # keys before the window
    if "q_idx" in str(far):
        seen = q // 127 - torch.minimum(q, torch.tensor(511)) // 127
    else:
        seen = behind // 64
    assert found.density_exact and found.totals.rows.allowed == int((q - behind + 1 + seen).sum())


def test_sampled_density_says_about(options):
    mask = causal & ((q_idx * kv_idx) % 3 == 0) & (q_idx - kv_idx < 300)
    exact = sd.analyse(mask, 4096)
    assert exact.density_exact
    options(EFFORT, counted_points=0, sampled_rows=16)
    sampled = sd.analyse(mask, 4096)
    assert not sampled.density_exact and "about" in str(sampled)
    assert sampled.density == pytest.approx(exact.density, rel=0.2)


WARNINGS = {
    "reads h with one head": (causal & (kv_idx % 4 == h), 64, {}, "depends on `h` but heads=1"),
    "allows nothing": (causal & (q_idx < kv_idx), 64, {}, "allows no pair"),
    "allows everything": (causal | (q_idx < kv_idx), 64, {}, "allows every pair"),
    "empty rows": (causal & (q_idx - kv_idx > 3), 64, {}, "4 rows may attend to nothing"),
    "not causal": (abs(q_idx - kv_idx) < 3, 64, {}, "a query sees a later position: b=0, h=0"),
    "wide window": (causal & (q_idx - kv_idx < 512), 64, {}, "the window is not smaller than the sequence"),
    "beyond 32 bits": (causal & (q_idx * q_idx * 3 > kv_idx - 5), 40_000, {}, "beyond 32 bits"),
    "masking by score": (sd.attend(causal, score=sd.where(kv_idx < 4, sd.score, float("-inf"))), 64, {}, "say it in the mask"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(name):
    pattern, length, tables, text = WARNINGS[name]
    assert any(text in warning for warning in sd.analyse(pattern, length, **tables).warnings)


def test_causal_at_these_lengths_only():
    far = causal | (kv_idx >= 1000)
    found = sd.analyse(far, 512)
    assert found.causal == sd.PROVED and "at these lengths and tables only" in str(found.causal)
    assert sd.analyse(far, 2048).causal == sd.REFUTED


def test_tables_must_reach():
    bias = sd.table("bias", learned=True)
    score = sd.score + bias[q_idx - kv_idx]
    windowed = causal & (q_idx - kv_idx < 16)
    sd.analyse(sd.attend(windowed, score=score), 64, bias=torch.zeros(16))
    with pytest.raises(sd.TableError, match=r"table .bias. is too short: it has shape \(15,\).*0\.\.15"):
        sd.analyse(sd.attend(windowed, score=score), 64, bias=torch.zeros(15))
    with pytest.raises(sd.TableError, match="The index goes below zero"):
        sd.analyse(sd.attend(abs(q_idx - kv_idx) < 16, score=score), 64, bias=torch.zeros(64))
    guarded = sd.where(q_idx - kv_idx < 8, score, sd.score)
    sd.analyse(sd.attend(windowed, score=guarded), 64, bias=torch.zeros(8))
    sd.analyse(sd.attend(True, score=sd.score + bias[sd.clamp(q_idx - kv_idx, 0, 3)]), 64, bias=torch.zeros(4))
    with pytest.raises(sd.TableError, match=r"table .doc. is too short.*kv_idx = 0\.\.63"):
        sd.analyse(causal & (doc[q_idx] == doc[kv_idx]), 64, doc=torch.zeros(63, dtype=torch.int64))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"q_len": 0}, "q_len must be a whole number of at least 1; got 0"),
        ({"q_len": 8, "kv_len": -1}, "kv_len must be"),
        ({"q_len": 8, "q_offset": -1}, "q_offset must be"),
        ({"q_len": 8, "heads": 0}, "heads must be"),
        ({"q_len": 8, "head_dim": 0}, "head_dim must be"),
        ({"q_len": 8, "dtype": "int8"}, "dtype must be one of float64"),
        ({"q_len": 8, "block_size": 0}, "block_size must be a positive"),
        ({"q_len": 8, "block_size": (1, 2, 3)}, "block_size must be a positive"),
        ({"q_len": 8, "doc": torch.zeros(8)}, "unexpected argument doc: the pattern reads no table"),
    ],
    ids=str,
)
def test_errors(words, text):
    with pytest.raises(sd.SparseDSLError, match=text):
        sd.analyse(causal, **words)


def test_missing_table():
    with pytest.raises(sd.TableError, match="missing table doc: pass doc=tensor"):
        sd.analyse(causal & (doc[q_idx] == doc[kv_idx]), 64)
