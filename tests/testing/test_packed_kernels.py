"""The kit on packed sequences and on pages: right kernels hold, planted faults are found by the property that is about them."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.testing.kernels.packing import Part, cut_pages
from tests.testing.planted_packed import Paged, Varlen, single

CAUSAL, FULL = sd.kv_idx <= sd.q_idx, sd.kv_idx >= 0
WORDS = {"dtypes": "float32", "tiles": (4, 4)}


def varlen(fault: str = "", causal: bool = False, **claims: object) -> kit.Kernel:
    offset = {"offset": "last"} if causal else {}
    return kit.Kernel(Varlen(fault, causal), implements=CAUSAL if causal else FULL, lse=True, **offset, **WORDS, **claims)


def paged(fault: str = "", **claims: object) -> kit.Kernel:
    return kit.Kernel(Paged(fault), implements=CAUSAL, lse=True, offset="last", **{**WORDS, **claims})


@pytest.mark.parametrize(
    ("kernel", "own"),
    [
        (varlen(), "VARLEN"),
        (varlen(causal=True), "VARLEN"),
        (kit.Kernel(single, implements=CAUSAL, **WORDS), "VARLEN"),
        (paged(), "PAGE"),
        (paged(page_size=(1, 3)), "PAGE"),
    ],
    ids=["full", "causal", "one list", "pages", "small pages"],
)
def test_right_kernels_hold(kernel, own):
    report = kit.check(kernel, examples=6, seed=0)
    assert report.ok, str(report)
    status = {p.name: p.status for p in report.findings}
    assert status[own] == status["NUM"] == "holds"
    assert status["STRIDE"] == status["GUARD"] == "not applicable"


@pytest.mark.parametrize(
    ("kernel", "own", "words"),
    [
        (varlen("skips empty"), "VARLEN", "sequence"),
        (varlen("straddles"), "VARLEN", "in sequences of"),
        (varlen("no keys"), "VARLEN", "the sequence has no keys"),
        (paged("tail"), "PAGE", "in pages of"),
        (paged("row 0"), "PAGE", "in pages of"),
        (paged("page as position"), "PAGE", "in pages of"),
        (paged("whole row"), "PAGE", "raises IndexError"),
    ],
    ids=lambda x: x.fn.fault if isinstance(x, kit.Kernel) else "",
)
def test_planted_faults_are_found(kernel, own, words):
    report = kit.check(kernel, examples=10, seed=0, only=own)
    (failure,) = report.failures
    assert words in failure.detail, failure.detail
    assert failure.case.batch <= 4 and failure.case.q_len <= 8
    with pytest.raises(kit.Counterexample):
        kit.assert_kernel(kernel, failure.case, only=own)


def test_gradients_reach_packed_tensors():
    report = kit.check(varlen(causal=True, grad="qkv"), examples=5, seed=0, only=("NUM", "GRAD"))
    assert report.ok, str(report)
    assert [p.status for p in report.findings] == ["holds", "holds"]


def test_pages_hold_the_keys_and_nothing_else():
    parts = [Part(torch.zeros(1, 1, 2), torch.randn(2, n, 2), torch.randn(2, n, 3)) for n in (5, 3)]
    pages = cut_pages(parts, 2, seed=1)
    assert pages.lengths.tolist() == [5, 3] and pages.table.shape == (2, 4)
    for part, row, length in zip(parts, pages.table, (5, 3), strict=True):
        count = -(-length // 2)
        for cache, wanted in ((pages.k_cache, part.k), (pages.v_cache, part.v)):
            assert torch.equal(cache[row[:count].long()].flatten(0, 1)[:length].transpose(0, 1), wanted)
    assert int((pages.k_cache == 3000.0).all(dim=(2, 3)).sum()) == 7 * 2 - 8
    assert (pages.table[0, 3:] == -1).all() and (cut_pages(parts, 2, seed=2).table[1, 2:] == 1_000_000).all()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (lambda: paged(grad="qkv"), "no gradients reach pages"),
        (lambda: varlen(layout="bshd"), "packed tensors are"),
        (lambda: varlen(page_size=4), "page_size=4 is for kernels on pages"),
        (lambda: kit.Kernel(lambda q, k_cache, v_cache, block_table: q, implements=CAUSAL), "and no seq_lens"),
    ],
)
def test_claims_without_meaning(words, text):
    with pytest.raises(sd.ArgumentError, match=text):
        words()
