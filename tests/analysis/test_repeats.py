"""Counts without lists against counts from lists, and questions about lengths at which no list would fit."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis import lists
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.tiles import classify
from sparsedsl.analysis.totals import Totals, listed_totals, repeated_totals
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, masks, tables_for

causal = kv_idx <= q_idx
reach = q_idx - kv_idx
window = sd.table("window")
FAR = 2**40


def assert_same_totals(mask, domain, block):
    """The totals of a mask that repeats; returns whether it does."""
    found = repeated_totals(mask.expr, domain, block)
    if found is None:
        return False
    wanted = listed_totals(mask.expr, domain, classify(mask.expr, domain, block))
    example = found.example
    assert replace(found, example=None) == wanted
    assert (example is not None) == (wanted.rows.allowed > 0)
    return True


FAMILIES = {
    "causal": causal,
    "everything": kv_idx >= 0,
    "window": causal & (reach < 37),
    "window and sinks": causal & ((reach < 37) | (kv_idx < 5)),
    "two sides": abs(reach) < 21,
    "global rows": (causal & (reach < 9)) | (q_idx < 3) | (kv_idx < 3),
    "chunks": causal & (q_idx // 24 == kv_idx // 24),
    "chunks that do not fit": causal & (q_idx // 15 == kv_idx // 15),
    "chunk before too": causal & (q_idx // 16 - kv_idx // 16 <= 1),
    "dilated": causal & (reach % 3 == 0) & (reach < 60),
    "strided keys": causal & ((reach < 10) | (kv_idx % 8 == 7)),
    "strided queries": causal & ((q_idx % 4 == 1) | (kv_idx < 2)),
    "slopes": causal & (3 * kv_idx <= 2 * q_idx + 7),
    "falling": kv_idx + q_idx < 90,
    "bands": causal & ((reach < 12) | ((reach >= 40) & (reach < 52))),
    "prefix": causal | (kv_idx < 33),
    "not": ~(causal & (reach < 20)),
    "either": causal ^ (kv_idx < 30),
    "ends": causal & ((kv_idx >= sd.kv_len - 20) | (q_idx < sd.q_len // 2)),
    "nearest chunk": causal & (sd.maximum(q_idx // 16, 3) >= kv_idx // 8),
    "window of a head": causal & (reach < window[h]),
    "no row": reach > 10_000,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows, kv_len, offset, block", [(150, 150, 0, (16, 16)), (67, 131, 64, (8, 16)), (130, 45, 3, (32, 8))])
def test_families_count_as_their_lists(name, rows, kv_len, offset, block):
    tables = {"window": torch.tensor([3, 40, 3])} if "head" in name else {}
    assert assert_same_totals(FAMILIES[name], Domain(rows, kv_len, offset, 1, 3, tables), block)


@given(data=st.data())
@settings(max_examples=60)
def test_random_masks_count_as_their_lists(data):
    mask = data.draw(masks(depth=2))
    sizes = st.integers(1, 90)
    case = AttentionCase(2, 3, 3, data.draw(sizes), data.draw(sizes), q_offset=data.draw(st.sampled_from((0, 5, 64))))
    tables = data.draw(tables_for(mask, case))
    domain = Domain(case.q_len, case.kv_len, case.q_offset, 2, 3, tables)
    assume(assert_same_totals(mask, domain, data.draw(st.sampled_from(((4, 4), (8, 4), (2, 16))))))


def test_counts_at_any_length():
    """A number of pairs that arithmetic gives: triangles, bands, and what a period leaves of them."""
    n, w = FAR, 2**30 + 5
    assert pairs_of(causal, n) == n * (n + 1) // 2
    assert pairs_of(causal & (reach < w), n) == w * (w + 1) // 2 + (n - w) * w
    assert pairs_of(causal & (reach % 4 == 0), n) == sum((n // 4) * (n // 4 + 1) // 2 for _ in range(4))
    assert pairs_of(causal & (q_idx // 1536 == kv_idx // 1536), 1536 * 2**29) == 2**29 * 1536 * 1537 // 2
    assert pairs_of(causal & (2 * kv_idx <= q_idx), n) == (n // 2) * (n // 2 + 1)


def pairs_of(mask, n) -> int:
    found = repeated_totals(mask.expr, Domain(n, n), (128, 128))
    assert found is not None
    return found.rows.allowed


@pytest.fixture
def small_memory(monkeypatch):
    """A machine of 16 GiB, whatever it is that tests run on."""
    monkeypatch.setattr(lists, "memory", lambda device: 1 << 34)


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("name", ["window and sinks", "dilated", "two sides", "global rows"])
def test_a_report_at_any_length_takes_no_time(name):
    mask = FAMILIES[name]
    start = time.process_time()
    found = sd.analyse(mask, FAR)
    assert time.process_time() - start < 5
    assert found.density_exact and found.totals.nbytes > 2**36 and "not made" in str(found)
    assert (found.causal == sd.REFUTED) == (name in ("two sides", "global rows"))
    if found.causal == sd.REFUTED:
        witness = found.causal.witness
        assert witness.kv_idx > witness.q_idx and bool(evaluate(mask.expr, {"q_idx": witness.q_idx, "kv_idx": witness.kv_idx}))
    with pytest.raises(sd.UnsupportedError, match=r"would take at least \d+ GiB.*block_size=256"):
        assert found.lists
    explained = sd.compile(mask).explain(FAR)
    assert explained.plan is None or explained.analysis.totals.listed == found.totals.listed


def test_a_leak_far_from_the_first_tiles_is_found():
    late = causal | ((q_idx == 2**39) & (kv_idx == 2**39 + 2**20))
    found = sd.analyse(late, FAR)
    assert found.causal.witness.indices == (0, 0, 2**39, 2**39 + 2**20)
    nowhere = causal & (reach < 64) & (q_idx >= 2**35)
    assert sd.analyse(nowhere, FAR).empty_rows == 2**35 and sd.analyse(nowhere, FAR).empty_row == (0, 0, 0)
    assert sd.analyse(nowhere, 256, 2**41, q_offset=2**40).empty_rows == 0


def test_reports_agree_with_and_without_lists(options):
    listed = sd.analyse(FAMILIES["window and sinks"], 300, q_offset=40, block_size=(16, 32), heads=2)
    options(EFFORT, listed=0)
    counted = sd.analyse(FAMILIES["window and sinks"], 300, q_offset=40, block_size=(16, 32), heads=2)
    assert "lists" in vars(listed) and "lists" not in vars(counted)
    hidden = ("seconds", "_list", "lists", "totals", "causal")
    plain = [{k: v for k, v in vars(one).items() if k not in hidden} for one in (listed, counted)]
    assert plain[0] == plain[1]
    assert counted.lists.listed == listed.lists.listed == counted.totals.listed
    assert isinstance(counted.totals, Totals)


@pytest.mark.usefixtures("small_memory")
def test_lists_that_do_not_fit_are_refused_before_they_are_made():
    start = time.process_time()
    with pytest.raises(
        sd.UnsupportedError, match=r"of 134,217,728 x 134,217,728 pairs in tiles of 128 x 128 would take at least"
    ):
        classify(causal.expr, Domain(2**27, 2**27), 128)
    assert time.process_time() - start < 20
