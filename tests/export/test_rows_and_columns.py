"""cuDNN's rows, FlashMask's columns and Magi's slices: conditions by enumeration, decoders by hand, encoders by round trip."""

from __future__ import annotations

import itertools

import pytest
import torch

import sparsedsl as sd
from sparsedsl.export.cudnn_rows import decode_endpoints, encode_endpoints
from sparsedsl.export.flashmask_columns import decode_columns, encode_columns
from sparsedsl.export.magi_slices import BICAUSAL, CAUSAL, FULL, INVCAUSAL, decode_slices
from tests.export.brute import ANY, ANY_OF_ALL, ANY_OF_HEADS, assert_is, assert_refusal_is_real, dense, random_mask, spans

P = sd.patterns


def rows_of(text: str) -> list[list[int]]:
    return [[int(c) for c in row] for row in text.split("/")]


# ---- cuDNN ------------------------------------------------------------------------------------------------------------------------


def test_t01_endpoints_of_causal_and_window():
    assert sd.export.cudnn(P.causal(), 4).mask_func.tolist() == [[[1, 2, 3, 4]]]
    window = sd.export.cudnn(P.sliding_window(2), 4)
    assert window.mask_func.tolist() == [[[1, 2, 0, 0], [1, 2, 1, 2], [1, 2, 3, 4]]]
    assert window.mask_func.dtype == torch.int32 and window.mask_func.is_contiguous() and window.bytes == 48


@pytest.mark.parametrize(("nfunc", "runs"), [(1, 0), (3, 1), (5, 2)])
def test_t02_what_so_many_endpoints_hold(nfunc, runs):
    """All rising endpoints over 5 keys are decoded: the rows that come out are those with so many runs away from key 0."""
    every = torch.tensor(list(itertools.combinations_with_replacement(range(6), nfunc)))
    held = {tuple(row) for row in decode_endpoints(every.T[None], 5)[0].int().tolist()}
    rows = torch.tensor(list(itertools.product((0, 1), repeat=5)))
    found = spans(rows)
    away = [sum(run.start > 0 for run in found.at(n)) for n in range(32)]
    assert held == {tuple(row) for row, count in zip(rows.tolist(), away, strict=True) if count <= runs}
    for n, count in enumerate(away):
        assert 1 + 2 * spans(rows[n : n + 1]).most_away == 1 + 2 * count
    fitting = torch.tensor([count <= runs for count in away])
    assert torch.equal(decode_endpoints(encode_endpoints(spans(rows[fitting]), nfunc)[None], 5)[0], rows[fitting].bool())


def test_t03_endpoints_that_fall_or_leave_the_keys_raise():
    for ends in ([2, 3, 1], [2, 1, 3], [-1, 0, 0], [0, 1, 6]):
        with pytest.raises(sd.ShapeError, match=r"row 0 of head 0 has"):
            decode_endpoints(torch.tensor(ends).view(1, 3, 1), 5)
    with pytest.raises(sd.ShapeError, match="odd"):
        decode_endpoints(torch.zeros(1, 2, 1, dtype=torch.int32), 5)


def test_rows_of_heads_and_batch_entries():
    bits = random_mask(2, 3, 7, 9)
    e = sd.export.cudnn(ANY_OF_ALL, 7, 9, q_offset=0, batch=2, heads=3, bits=bits)
    assert e.mask_func.shape[0] == 3 and e.mask_func.shape[2] == 14
    assert_is(e, bits.bool())
    shared = sd.export.cudnn(ANY, 7, 9, q_offset=0, batch=2, heads=3, bits=bits[0, 0])
    assert shared.mask_func.shape[0] == 1
    assert_is(shared, bits[0, 0].bool().expand(2, 1, 7, 9))


def test_packed_rows_are_calls_of_their_own():
    e = sd.export.cudnn(P.sliding_window(3), q_lens=[4, 1, 5], kv_lens=[4, 6, 7])
    assert e.args["cu_seqlens_k"].tolist() == [0, 4, 10, 17] and e.args["max_seqlen_q"] == 5
    wanted = torch.zeros(10, 17, dtype=torch.bool)
    for q0, k0, q, kv in ((0, 0, 4, 4), (4, 4, 1, 6), (5, 10, 5, 7)):
        wanted[q0 : q0 + q, k0 : k0 + kv] = dense(P.sliding_window(3), q, kv, kv - q)[0, 0]
    assert_is(e, wanted[None, None])
    assert_is(sd.export.magi(P.sliding_window(3), q_lens=[4, 1, 5], kv_lens=[4, 6, 7]), wanted[None, None])


# ---- FlashMask --------------------------------------------------------------------------------------------------------------------


def test_t04_columns_of_a_window_and_of_documents():
    window = sd.export.flashmask(P.sliding_window(3), 10)
    assert (window.causal, window.startend_row_indices.shape) == (True, (1, 1, 10, 1))
    assert window.startend_row_indices.flatten().tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10]
    doc = torch.tensor([0] * 4 + [1] * 3 + [2] * 3)
    documents = sd.export.flashmask(P.documents(), 10, doc=doc)
    assert documents.causal is False
    assert documents.startend_row_indices[0, 0].tolist() == [[4, 0]] * 4 + [[7, 4]] * 3 + [[10, 7]] * 3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("q_len", "kv_len"), [(4, 4), (3, 5), (5, 3)])
def test_t05_columns_that_fit_are_those_that_some_numbers_say(q_len, kv_len, causal):
    """All numbers are decoded for every key: a column is encoded, with the least C, where they give it, and refused elsewhere."""
    widths = (1, 2) if causal else (2, 4)
    held = {}
    for count in widths:
        every = torch.tensor(list(itertools.product(range(q_len + 1), repeat=count)))
        masks = decode_columns(every[:, None, :].expand(-1, kv_len, -1), q_len, causal)
        for key in range(kv_len):
            held[count, key] = {tuple(column) for column in masks[:, :, key].int().tolist()}
    row, key_of = torch.arange(q_len)[:, None], torch.arange(kv_len)
    plain = (key_of <= row + kv_len - q_len).int() if causal else torch.ones(q_len, kv_len, dtype=torch.int32)
    for key, column in itertools.product(range(kv_len), itertools.product((0, 1), repeat=q_len)):
        mask = plain.clone()
        mask[:, key] = torch.tensor(column)
        found = encode_columns(spans(mask.T), q_len, causal)
        least = next((count for count in widths if column in held[count, key]), None)
        if least is None:
            assert not isinstance(found, torch.Tensor) and found.column == key
            assert_refusal_is_real(f"key {key} {found.why}", mask.bool(), kv_len - q_len)
        else:
            assert isinstance(found, torch.Tensor) and found.shape[1] == least
            assert torch.equal(decode_columns(found, q_len, causal), mask.bool())


def test_columns_without_keys_and_wrong_numbers():
    for count, causal in ((1, False), (4, True), (3, False)):
        with pytest.raises(sd.ShapeError, match=f"C={count} with causal={causal}"):
            decode_columns(torch.zeros(3, count, dtype=torch.int32), 3, causal)
    with pytest.raises(sd.ShapeError, match=r"lie in 0 \.\. 3"):
        decode_columns(torch.full((3, 1), -1), 3, True)
    e = sd.export.flashmask(sd.kv_idx < 0, 4)
    assert not e.to_mask().any()


def test_columns_of_key_heads():
    causal = torch.ones(6, 6, dtype=torch.int64).tril()
    pairs = torch.stack([causal, causal])
    pairs[0, 2:, 0] = pairs[1, 4:, 1] = 0
    doubled = pairs.repeat_interleave(2, dim=0)
    e = sd.export.flashmask(ANY_OF_HEADS, 6, heads=4, kv_heads=2, bits=doubled)
    assert e.startend_row_indices.shape[1] == 2 and e.causal
    assert_is(e, doubled.bool()[None])
    with pytest.raises(sd.UnsupportedError, match=r"query heads 0 and 1 of key head 0 differ \(first at key 0, query 2\)"):
        sd.export.flashmask(ANY_OF_HEADS, 6, heads=4, kv_heads=2, bits=pairs.repeat(2, 1, 1))


def test_columns_of_batch_entries():
    doc = torch.tensor([[0] * 4 + [1] * 6, [0] * 7 + [1] * 3])
    e = sd.export.flashmask(P.packed(batched=True), 10, batch=2, doc=doc)
    assert tuple(e.startend_row_indices.shape) == (2, 1, 10, 1)
    assert_is(e, dense(P.packed(batched=True), 10, 10, batch=2, doc=doc))
    assert_is(sd.export.flashmask(P.causal(), 10, batch=2), dense(P.causal(), 10, 10, batch=2))


def test_refusal_of_a_crowded_column_names_the_gaps():
    bits = torch.ones(64, 64, dtype=torch.int64).tril()
    for low, high in ((20, 24), (31, 41), (52, 61)):
        bits[low:high, 17] = 0
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.flashmask(ANY, 64, bits=bits)
    text = (
        "flashmask: key 17 has 3 gaps below the diagonal (queries 20-23, 31-40, 52-60), room for one; cudnn holds it with nfunc=3"
    )
    assert str(refusal.value) == text
    assert_refusal_is_real(text, bits.bool())


# ---- MagiAttention ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "q_len", "kv_len", "text"),
    [
        (CAUSAL, 2, 5, "11110/11111"),
        (INVCAUSAL, 2, 5, "11111/01111"),
        (BICAUSAL, 2, 5, "11110/01111"),
        (FULL, 2, 5, "11111/11111"),
        (CAUSAL, 5, 2, "00/00/00/10/11"),
        (BICAUSAL, 5, 2, "00/00/00/00/00"),
    ],
)
def test_t06_slices(kind, q_len, kv_len, text):
    got = decode_slices(torch.tensor([[0, q_len]]), torch.tensor([[0, kv_len]]), torch.tensor([kind]), q_len, kv_len)
    assert got.int().tolist() == rows_of(text)


@pytest.mark.parametrize("seed", range(12))
def test_t06_random_masks_hold_each_pair_once(seed):
    bits = random_mask(9, 11, share=(seed + 1) / 14, seed=seed)
    e = sd.export.magi(ANY, 9, 11, q_offset=0, bits=bits)
    assert_is(e, bits.bool()[None, None])  # decoding raises where a pair lies in two slices


def test_a_pair_in_two_slices_raises():
    twice = torch.tensor([[0, 2], [1, 2]])
    with pytest.raises(sd.ShapeError, match="query 1 and key 1 lie in two slices"):
        decode_slices(twice, twice, torch.tensor([FULL, FULL]), 2, 2)


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (P.causal(), 1),
        (P.sliding_window(8), 2),
        (P.sliding_window(8, two_sided=True), 3),
        (P.causal() & (P.sinks(4) | P.sliding_window(8)), 3),
        (P.chunked(16), 4),
        (P.prefix(10) | P.causal(), 2),
        (P.block_causal(8), 8),
        (P.global_tokens(4) | P.sliding_window(7, two_sided=True), 5),
        (P.dilated(4, 3), 4),
        (P.neighbourhood_2d(8, 8, 3, edge="clip"), 66),
    ],
    ids=str,
)
def test_slices_follow_runs_as_long_as_they_move_by_one_step(mask, count):
    e = sd.export.magi(mask, 64)
    assert e.attn_type_map.numel() == count
    assert_is(e, dense(mask, 64, 64))


def test_a_row_behind_a_cut_begins_a_slice_of_any_step():
    """Rows that grow by a key, stand still once and grow on: the row behind the cut is the first of those that grow on."""
    bits = torch.tensor([[int(key < length) for key in range(5)] for length in (1, 2, 3, 3, 4, 5)])
    e = sd.export.magi(ANY, 6, 5, q_offset=0, bits=bits)
    assert (e.q_ranges.tolist(), e.attn_type_map.tolist()) == ([[0, 3], [3, 6]], [CAUSAL, CAUSAL])
    assert_is(e, bits.bool()[None, None])


def test_slices_have_no_heads():
    bits = torch.stack([random_mask(14, 9, seed=1)] * 4)
    bits[3, 12, 4] ^= 1
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.magi(ANY_OF_HEADS, 14, 9, q_offset=0, heads=4, bits=bits)
    assert str(refusal.value) == (
        "magi: heads 0 and 3 differ (first at query 12, key 4), slices have no heads; export one head: head=0"
    )
    assert_is(sd.export.magi(ANY_OF_HEADS, 14, 9, q_offset=0, heads=4, head=3, bits=bits), bits[3].bool()[None, None])


def test_batch_entries_are_packed():
    bits = random_mask(3, 1, 5, 6, seed=2)
    e = sd.export.magi(ANY_OF_ALL, 5, 6, q_offset=0, batch=3, bits=bits)
    assert int(e.q_ranges.max()) <= 15
    assert_is(e, bits.bool())
