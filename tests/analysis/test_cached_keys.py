"""What a cache must hold: right numbers for known masks, no key let go of that a later query reads, and no number larger than needed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.past_bounds import share_of
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, masks, tables_for

causal = kv_idx <= q_idx
doc, win, used = sd.table("doc", monotone=True), sd.table("win"), sd.table("used")
keep = sd.table("keep", dtype=bool)


def window(w: Any) -> sd.Mask:
    return causal & (q_idx - kv_idx < w)


# Name -> mask, kind, first, recent, (every, residues).
KNOWN: dict[str, tuple[sd.Mask, str, int, int, tuple[int | None, tuple[int, ...]]]] = {
    "a window": (window(512), "ring", 0, 512, (None, ())),
    "a window of one": (window(1), "ring", 0, 1, (None, ())),
    "sinks and a window": (causal & ((kv_idx < 4) | window(64)), "first + ring", 4, 64, (None, ())),
    "chunks": (sd.patterns.chunked(256), "ring", 0, 256, (None, ())),
    "64 keys, 8 apart": (sd.patterns.dilated(64, step=8), "ring", 0, 505, (None, ())),
    "a residue of a window": (window(512) & ((q_idx - kv_idx) % 8 == 0), "ring", 0, 505, (None, ())),
    "two blocks back": (causal & (q_idx // 64 - kv_idx // 64 <= 2), "ring", 0, 192, (None, ())),
    "blocks that begin late": (causal & ((q_idx + 16) // 64 - (kv_idx + 16) // 64 <= 1), "ring", 0, 128, (None, ())),
    "a prefix and a window": ((kv_idx < 100) | window(32), "first + ring", 100, 32, (None, ())),
    "a prefix of queries": (causal & ((q_idx < 20) | (q_idx - kv_idx < 8)), "first + ring", 12, 8, (None, ())),
    "documents with a window": (window(128) & (doc[q_idx] == doc[kv_idx]), "ring", 0, 128, (None, ())),
    "every 128th": (causal & ((kv_idx % 128 == 0) | window(64)), "ring + strided", 0, 64, (128, (0,))),
    "the ends of blocks": (sd.patterns.strided_fixed(8, summary=2), "ring + strided", 0, 8, (8, (6, 7))),
    "every other block": (causal & (kv_idx // 4 % 2 == 0), "strided", 0, 0, (8, (0, 1, 2, 3))),
    "first ones alone": (causal & (kv_idx < 9), "first", 9, 0, (None, ())),
    "two-sided": (abs(q_idx - kv_idx) < 16, "ring", 0, 16, (None, ())),
    "later keys alone": (kv_idx > q_idx, "nothing", 0, 0, (None, ())),
    "no pair": (causal & (kv_idx > q_idx), "nothing", 0, 0, (None, ())),
    "a square": (causal & ((q_idx - kv_idx) * (q_idx - kv_idx) < 50), "ring", 0, 8, (None, ())),
    "twice as far": (causal & (2 * q_idx - kv_idx <= 30), "first", 31, 0, (None, ())),
}
GROWING = {
    "causal": causal,
    "everything": causal | ~causal,
    "documents": causal & (doc[q_idx] == doc[kv_idx]),
    "every 8th from the query": sd.patterns.strided(8),
    "columns of a table": causal & keep[kv_idx],
    "half of the past": causal & (2 * kv_idx >= q_idx),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_masks(name: str) -> None:
    mask, kind, first, recent, strided = KNOWN[name]
    found = sd.cache_bound(mask)
    assert (found.kind, found.first, found.recent, (found.every, found.residues)) == (kind, first, recent, strided)
    assert found.verdict == sd.PROVED and found.is_bounded and found.tight
    for part, witness in found.witnesses.items():
        at = {"q_idx": witness.q_idx, "kv_idx": witness.kv_idx, "b": witness.b, "h": witness.h, **witness.tables}
        assert bool(evaluate(mask.expr, at)), "the witness is a pair of the mask"
        if part == "recent":
            assert witness.q_idx - witness.kv_idx == recent - 1


@pytest.mark.parametrize("name", GROWING)
def test_masks_that_no_number_is_enough_for(name: str) -> None:
    found = sd.cache_bound(GROWING[name])
    assert found.kind == "grows" and not found.is_bounded and not found.tight
    assert found.most(7) == 7
    if name == "half of the past":
        assert found.keep(5).tolist() == [3, 4] and found.death(3) == 6
    else:
        assert found.keep(5).tolist() == [0, 1, 2, 3, 4] and found.death(3) is None
    assert found.verdict != sd.PROVED and found.verdict.reason


def test_what_grows_names_a_pair_far_apart() -> None:
    witness = sd.cache_bound(causal).witness
    assert witness is not None and witness.q_idx - witness.kv_idx >= 1 << 16


def test_windows_by_head_are_an_expression_and_sizes_come_from_the_table() -> None:
    found = sd.cache_bound(window(win[h]))
    assert str(found.recent) == "win[h]" and found.kind == "ring" and found.tight
    sizes = torch.tensor([4, 9, 2])
    assert found.keep(20, win=sizes).tolist() == list(range(12, 20))
    assert sd.cache_bound(window(win[h]).bind(win=sizes)).most(100) == 8
    with pytest.raises(sd.TableError, match=r"how many keys stay is win\[h\]: pass win=tensor"):
        found.keep(20)
    by_number = sd.cache_bound(window(2 + 3 * h))
    assert by_number.most(100, heads=4) == 10
    with pytest.raises(sd.ShapeError, match="pass heads=, the number of query heads"):
        by_number.keep(20)
    by_entry = sd.cache_bound(causal & ((kv_idx < used[b]) | window(3)))
    assert str(by_entry.first) == "used[b]"
    assert by_entry.keep(9, used=torch.tensor([2, 5])).tolist() == [0, 1, 2, 3, 4, 7, 8]


def test_a_key_dies_at_the_end_of_its_chunk() -> None:
    found = sd.cache_bound(sd.patterns.chunked(8))
    assert [found.death(key) for key in (0, 7, 8)] == [7, 7, 15]
    assert [found.keep(seen).tolist() for seen in (7, 8, 10)] == [list(range(7)), [], [8, 9]]


def test_when_keys_die() -> None:
    dilated = sd.cache_bound(sd.patterns.dilated(64, step=8))
    assert dilated.death(10) == 514
    mixed = sd.cache_bound(causal & ((kv_idx % 16 == 0) | (kv_idx < 3) | window(4)))
    assert [mixed.death(key) for key in (0, 2, 16, 17)] == [None, None, None, 20]
    assert sd.cache_bound(kv_idx > q_idx).death(5) == 4


def test_later_keys_are_said() -> None:
    assert "must come in the same call" in str(sd.cache_bound((kv_idx < 100) | window(32)))
    assert "same call" not in str(sd.cache_bound(window(32)))


def test_bytes_count_what_is_held_at_most() -> None:
    found = sd.cache_bound(causal & ((kv_idx < 4) | window(64)))
    assert found.bytes(10_000, 2, 16, "float32") == 2 * 32 * 4 * 67
    assert found.bytes(10, 2, 16, torch.float64, head_dim_v=8, batch=3) == 3 * 2 * 24 * 8 * 10
    strided = sd.cache_bound(causal & ((kv_idx % 128 == 0) | window(64)))
    assert strided.most(1000) == 8 + 63


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.keep(-1), "seen must be a whole number of at least 0; got -1"),
        (lambda f: f.death(2.5), "key must be a whole number"),
        (lambda f: f.bytes(8, 0, 4), "kv_heads must be a whole number of at least 1"),
        (lambda f: f.bytes(8, 1, 4, "int8"), "dtype must be one of"),
    ],
)
def test_bad_numbers_are_refused(call: Any, message: str) -> None:
    with pytest.raises(sd.SparseDSLError, match=message):
        call(sd.cache_bound(window(4)))


def test_copies_and_pickles_say_the_same() -> None:
    found = sd.cache_bound(causal & ((kv_idx < 4) | window(64)))
    assert copy.deepcopy(found) is found
    again = pickle.loads(pickle.dumps(found))
    assert str(again) == str(found) and again.keep(99).tolist() == found.keep(99).tolist()


# ---- against brute force -------------------------------------------------------------------------------------------------------


def needed(mask: sd.Mask, case: AttentionCase, tables: dict[str, torch.Tensor], seen: int) -> list[int]:
    """The keys before ``seen`` that some later query of the case reads."""
    allowed = evaluate(mask.expr, {**case.env, **tables}).expand(case.batch, case.heads, case.q_len, case.kv_len)
    return allowed[:, :, seen:, :seen].flatten(0, 2).any(0).nonzero().flatten().tolist()


@given(data=st.data())
@settings(max_examples=70)
def test_no_key_is_let_go_of_that_a_later_query_reads(data: st.DataObject) -> None:
    mask = data.draw(masks(depth=data.draw(st.integers(0, 2))))
    case = AttentionCase(batch=2, heads=2, kv_heads=2, q_len=24, kv_len=24)
    tables = data.draw(tables_for(mask, case))
    with EFFORT.using(proof_ms=150):
        found = sd.cache_bound(mask)
        for seen in (0, 1, 7, 8, 16, 23):
            held = found.keep(seen, batch=2, heads=2, **{name: tables[name] for name in _sizes(found) if name in tables}).tolist()
            lost = set(needed(mask, case, tables, seen)) - set(held)
            assert not lost, f"{mask}: {found} lets go of {sorted(lost)} after {seen} tokens"


def _sizes(found: sd.CacheBound) -> set[str]:
    return {name for number in (found.first, found.recent) if not isinstance(number, int) for name in number.tables}


@given(recent=st.integers(1, 20), first=st.integers(0, 9), block=st.sampled_from((1, 2, 4, 8)), every=st.sampled_from((0, 5, 8)))
@settings(max_examples=25)
def test_keys_are_let_go_of_as_soon_as_may_be(recent: int, first: int, block: int, every: int) -> None:
    """Without tables the keys held are those that brute force finds, on a grid long enough to show every reader."""
    mask = causal & ((kv_idx < first) | (q_idx // block - kv_idx // block < recent))
    mask = mask | (causal & (kv_idx % every == every - 1)) if every else mask
    found, case = sd.cache_bound(mask), AttentionCase(q_len=40 + recent * block, kv_len=40 + recent * block)
    assert found.tight
    for seen in (1, 8, 17, 32):
        assert found.keep(seen).tolist() == needed(mask, case, {}, seen)


@given(data=st.data())
@settings(max_examples=60)
def test_what_the_bounds_of_a_clause_say_covers_it(data: st.DataObject) -> None:
    """By brute force, before anything is proved."""
    mask = causal & data.draw(masks(depth=1, tables=False))
    case = AttentionCase(batch=2, heads=3, kv_heads=3, q_len=24, kv_len=24)
    env = case.env
    covered = torch.zeros(2, 3, 24, 24, dtype=torch.bool)
    q, k = env["q_idx"], env["kv_idx"]
    for clause in clauses(mask.expr):
        share = share_of(clause)
        if share is None:
            return
        covered |= (q - k < evaluate(share.recent, env)) | (k < evaluate(share.first, env))
        if share.every is not None:
            covered |= torch.isin(k % share.every, torch.tensor(share.residues))
    allowed = evaluate(mask.expr, env).expand(2, 3, 24, 24)
    assert not bool((allowed & ~covered).any()), mask
