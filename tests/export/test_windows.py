"""FlashAttention, xFormers and windows in every engine's number: bands against loops, traps of each version."""

from __future__ import annotations

import random

import pytest
import torch

import sparsedsl as sd
from sparsedsl.export.bands import Band, find_band, find_chunk, lines_of
from sparsedsl.export.flash_windows import flash_visible
from sparsedsl.export.xformers_bias import bias_block
from tests.export.brute import ANY, assert_is, assert_refusal_is_real, dense, random_mask, spans

P = sd.patterns


def visible_by_loop(q_len, kv_len, left, right, causal, chunk):
    """The rule of versions 2 and 3, pair by pair; negative: no limit."""
    off = kv_len - q_len
    right = 0 if causal else right
    return torch.tensor(
        [
            [
                (left < 0 or j >= i + off - left)
                and (right < 0 or j <= i + off + right)
                and (not chunk or j // chunk == (i + off) // chunk)
                for j in range(kv_len)
            ]
            for i in range(q_len)
        ]
    )


def test_t11_bands_and_chunks():
    """300 calls: the rule against a loop; and what is found in the mask that comes out gives that mask again."""
    draw = random.Random(11)
    held = 0
    for _ in range(300):
        q_len, kv_len = draw.randint(1, 12), draw.randint(1, 12)
        left, right, causal, chunk = draw.randint(-1, 6), draw.randint(-1, 6), draw.random() < 0.5, draw.choice((0, 0, 2, 3, 5))
        wanted = visible_by_loop(q_len, kv_len, left, right, causal, chunk)
        assert torch.equal(flash_visible(q_len, kv_len, (left, right), causal, 3, chunk), wanted)
        lines = lines_of(spans(wanted), kv_len - q_len)
        assert not isinstance(lines, int)
        band, size = find_band([lines]), 0
        if not (isinstance(band, Band) and band.holds_own_key):
            assert chunk or kv_len < q_len, "a band that a call said is found"
            if not (found := find_chunk(lines)):
                continue
            size, band = found
        held += 1
        ends = tuple(-1 if end is None else end for end in (band.left, band.right))
        assert torch.equal(visible_by_loop(q_len, kv_len, *ends, False, size), wanted) or not band.holds_own_key
    assert held > 240


def test_random_runs_are_bands_or_name_a_pair():
    """One random run a row: a band that is found is the mask, a misfit is real."""
    for seed in range(60):
        draw = random.Random(seed)
        mask = torch.zeros(5, 7, dtype=torch.bool)
        for row in mask:
            a = draw.randint(0, 6)
            row[a : draw.randint(a, 7)] = True
        lines = lines_of(spans(mask), 2)
        assert not isinstance(lines, int)
        found = find_band([lines])
        if isinstance(found, Band):
            ends = [99 if end is None else end for end in (found.left, found.right)]
            place, key = torch.arange(5)[:, None] + 2, torch.arange(7)
            assert torch.equal((key >= place - ends[0]) & (key <= place + ends[1]), mask)
        else:
            assert bool(mask[found.query, found.key]) == found.sees
            assert_refusal_is_real(f"query {found.query} {found}", mask)


def test_t12_version_4_takes_minus_one_for_a_number():
    assert flash_visible(3, 3, (-1, 0), False, 2).sum() == 6  # causal
    assert flash_visible(3, 3, (-1, 0), False, 4).all()  # a window whose sum is negative is dropped
    assert torch.equal(flash_visible(4, 4, (128, -1), False, 4), torch.ones(4, 4).tril(-1).bool())
    assert torch.equal(flash_visible(4, 4, (-1, -1), True, 4), torch.ones(4, 4).tril().bool())
    for mask in (P.causal(), P.full(), P.sliding_window(3), P.sliding_window(2, two_sided=True), P.chunked(4)):
        e = sd.export.flash_attention(mask, 12, version=4)
        assert all(end is None or end >= 0 for end in e.args["window_size"])
        assert_is(e, dense(mask, 12, 12))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_own_key_cannot_be_kept_from_a_query(version):
    mask = sd.kv_idx < sd.q_idx
    with pytest.raises(sd.UnsupportedError, match="does not see key 5, where it stands") as refusal:
        sd.export.flash_attention(mask, 6, version=version)
    assert_refusal_is_real(str(refusal.value), dense(mask, 6, 6)[0, 0])
    assert_is(sd.export.flash_attention(mask, 6, version=4, blocks=True, block=(4, 4)), dense(mask, 6, 6))


def test_refusals_of_flash_attention():
    two = (sd.kv_idx < 4) | P.sliding_window(4)
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.flash_attention(P.causal() & two, 10)
    assert str(refusal.value) == "flash_attention: query 8 sees keys 0-3 and 5-8, no band; version=4 with blocks=True holds it"
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.flash_attention(P.causal(), 8, 200, q_offset=100)
    assert str(refusal.value).startswith(
        "flash_attention: 8 queries from position 100 with 200 keys; this engine ends the queries at the last key (192)"
    )


def test_documents_are_lengths_of_sequences():
    doc = torch.tensor([0] * 5 + [1] * 3 + [2] * 6)
    for mask in (P.documents(), P.packed(), P.packed(2)):
        wanted = dense(mask, 14, 14, doc=doc)
        for version in (2, 4):
            e = sd.export.flash_attention(mask, 14, version=version, doc=doc)
            assert e.cu_seqlens_q.tolist() == [0, 5, 8, 14] and e.args["max_seqlen_k"] == 6
            assert_is(e, wanted)
        e = sd.export.xformers(mask, 14, doc=doc)
        assert e.k_seqstart.tolist() == [0, 5, 8, 14] and e.bias.startswith("BlockDiagonal")
        assert_is(e, wanted)
    chunks = sd.export.flash_attention(P.chunked(4), 6, 14, version=3)
    assert chunks.args["attention_chunk"] == 4 and chunks.args["causal"]
    assert_is(chunks, dense(P.chunked(4), 6, 14, 8))


def test_packed_sequences_share_a_band():
    e = sd.export.flash_attention(P.sliding_window(3), q_lens=[2, 4], kv_lens=[6, 4])
    assert (e.args["window_size"], e.args["cu_seqlens_k"].tolist()) == ((2, 0), [0, 6, 10])
    got = e.to_mask()[0, 0]
    assert torch.equal(got[:2, :6], dense(P.sliding_window(3), 2, 6, 4)[0, 0])
    assert torch.equal(got[2:, 6:], dense(P.sliding_window(3), 4, 4)[0, 0]) and not got[:2, 6:].any()
    window = sd.table("window")[sd.b]
    mask = P.causal() & (sd.q_idx - sd.kv_idx < window)
    with pytest.raises(sd.UnsupportedError, match=r"query \d of sequence 1 (sees|does not see) key"):
        sd.export.flash_attention(mask, q_lens=[6, 6], window=torch.tensor([3, 4]))


# ---- block lists of version 4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(32, 48, (8, 16)), (37, 50, (8, 16)), (5, 3, (8, 8)), (33, 33, (16, 8))])
def test_t13_full_and_masked_partial_blocks(q_len, kv_len, block):
    for seed, share in enumerate((0.02, 0.5, 0.97)):
        blocks = random_mask(-(-q_len // block[0]), -(-kv_len // block[1]), seed=seed)
        bits = blocks.repeat_interleave(block[0], 0)[:q_len].repeat_interleave(block[1], 1)[:, :kv_len]
        bits = bits | random_mask(q_len, kv_len, share=share / 8, seed=seed)
        e = sd.export.flash_attention(ANY, q_len, kv_len, q_offset=0, version=4, blocks=True, block=block, bits=bits)
        assert_is(e, bits.bool()[None, None])
        rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
        for counts, indices in ((e.full_block_cnt, e.full_block_idx), (e.mask_block_cnt, e.mask_block_idx)):
            listed = [indices[0, 0, row, : counts[0, 0, row]].tolist() for row in range(rows)]
            assert all(line == sorted(set(line)) for line in listed)
        full = [e.full_block_idx[0, 0, row, : e.full_block_cnt[0, 0, row]].tolist() for row in range(rows)]
        if kv_len % block[1]:
            assert not any(columns - 1 in line for line in full), "a block that reaches beyond the keys is partial"
        if q_len % block[0]:
            assert not full[-1], "a block that reaches beyond the queries is partial"


# ---- xFormers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [P.full(), P.causal(), P.sliding_window(3), P.sliding_window(2, two_sided=True)], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(6, 6), (3, 8), (1, 5)])
def test_t16_biases_of_one_sequence(mask, q_len, kv_len):
    assert_is(sd.export.xformers(mask, q_len, kv_len), dense(mask, q_len, kv_len, kv_len - q_len))


@pytest.mark.parametrize("padding", [None, 7, 9])
@pytest.mark.parametrize("lens", [[(3, 5), (2, 7), (4, 4)], [4, 1, 3]])
def test_t16_biases_of_blocks_and_padded_keys(lens, padding):
    pairs = [n if isinstance(n, tuple) else (n, n) for n in lens]
    masks = [P.full(), P.causal(), P.sliding_window(3)] + [P.sliding_window(3, two_sided=True)] * (padding is not None)
    for mask in masks:
        e = sd.export.xformers(mask, lens=lens, kv_padding=padding)
        begins = [n * padding if padding else sum(kv for _, kv in pairs[:n]) for n in range(len(pairs) + 1)]
        wanted = torch.zeros(sum(q for q, _ in pairs), begins[-1], dtype=torch.bool)
        row = 0
        for (q, kv), begin in zip(pairs, begins, strict=False):
            wanted[row : row + q, begin : begin + kv] = dense(mask, q, kv, kv - q)[0, 0]
            row += q
        assert_is(e, wanted[None, None])
        assert ("Padded" in e.bias) == (padding is not None)


def test_t16_which_corner_a_class_counts_from():
    assert torch.equal(bias_block("BlockDiagonalCausalMask", {}, 2, 4), torch.ones(2, 4).tril().bool())
    assert torch.equal(bias_block("BlockDiagonalCausalFromBottomRightMask", {}, 2, 4), torch.ones(2, 4).tril(2).bool())
    top = bias_block("BlockDiagonalCausalLocalAttentionMask", {"window_size": 1}, 2, 4)
    assert top.nonzero().tolist() == [[0, 0], [1, 1]]
    with pytest.raises(sd.ShapeError, match="no bias"):
        bias_block("LowerTriangle", {}, 2, 2)


def test_refusals_of_xformers():
    for mask in (
        P.causal() & (P.sinks(2) | P.sliding_window(2)),
        P.prefix(4) | P.causal(),
        P.block_causal(3),
        sd.kv_idx < sd.q_idx,
    ):
        with pytest.raises(sd.UnsupportedError, match="cudnn holds it with nfunc=") as refusal:
            sd.export.xformers(mask, 9)
        if "queries do not see" not in str(refusal.value):
            assert_refusal_is_real(str(refusal.value), dense(mask, 9, 9)[0, 0])


# ---- one window, every engine's number --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [1, 2, 3, 4, 5])
def test_t17_a_window_of_w_keys(w):
    mask, wanted = P.sliding_window(w), dense(P.sliding_window(w), 12, 12)
    for version in (2, 3, 4):
        e = sd.export.flash_attention(mask, 12, version=version)
        assert e.args["window_size"] == (w - 1, 0) and e.args["causal"]
        assert_is(e, wanted)
    assert_is(sd.export.xformers(mask, 12), wanted)
    assert sd.export.xformers(mask, 12).bias_args == {"window_size": w}
    assert sd.export.splash(mask, 128, block=128).mask_args == {"window_size": (w - 1, 0), "offset": 0}
    paged = sd.export.flashinfer_paged(mask, [12], block_table=torch.tensor([[3]]), kv_lens=[12])
    assert (paged.args["window_left"], paged.args["causal"]) == (w - 1, True)
    assert_is(paged, wanted)
    columns = sd.export.flashmask(mask, 12)
    assert columns.startend_row_indices.flatten().tolist() == [min(key + w, 12) for key in range(12)]
    if w == 1:  # T21: NATTEN has no kernel of one key
        with pytest.raises(sd.UnsupportedError, match="sees 1 of 12 places"):
            sd.export.natten(mask, shape=(12,))
    else:
        assert sd.export.natten(mask, shape=(12,)).args["kernel_size"] == (w,)


def test_t17_two_sided_windows():
    mask = P.sliding_window(3, two_sided=True)  # |q - k| <= 2
    assert sd.export.flash_attention(mask, 12).args["window_size"] == (2, 2)
    assert sd.export.xformers(mask, 12).bias_args == {"window_left": 2, "window_right": 2}
    assert sd.export.splash(mask, 128, block=128).mask_args["window_size"] == (2, 2)
