"""FlashInfer's blocks and pages, splash's masks, NATTEN's neighbourhoods."""

from __future__ import annotations

import itertools

import pytest
import torch

import sparsedsl as sd
from sparsedsl.export.flashinfer_blocks import gathered_causal, packed_bits, unpacked_bits
from sparsedsl.export.natten_grid import Axis
from sparsedsl.export.splash_blocks import computed_mask
from tests.export.brute import ANY, ANY_OF_ALL, ANY_OF_HEADS, assert_is, assert_refusal_is_real, dense, random_mask

P = sd.patterns

# ---- FlashInfer -------------------------------------------------------------------------------------------------------------------


def test_t07_causal_counts_gathered_keys():
    """It is right while the last listed block ends where the rows do, and hides past keys where it does not."""
    causal = torch.ones(8, 8).tril().bool()
    lists = [[0], [1], [0, 2], [0, 1, 3]]
    for row_2, lost in (([0, 2], []), ([0], [[4, 1]])):
        lists[2] = row_2
        indptr = [0, *itertools.accumulate(map(len, lists))]
        blocks = torch.zeros(8, 8, dtype=torch.bool)
        for row, columns in enumerate(lists):
            for column in columns:
                blocks[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
        shown = gathered_causal(indptr, [n for line in lists for n in line], 8, 8, (2, 2))
        assert ((blocks & causal) ^ shown).nonzero().tolist() == lost
    assert sd.export.flashinfer(P.causal(), 8, block=2).args["causal"] is False


def test_t08_bits_are_little_endian():
    bits = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert packed_bits(bits).tolist() == [205]
    for count in (1, 7, 8, 9, 40):
        many = random_mask(count, seed=count).bool()
        packed = packed_bits(many)
        assert packed.dtype == torch.uint8 and packed.numel() == -(-count // 8)
        assert torch.equal(unpacked_bits(packed, count), many)


@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(8, 8, (2, 2)), (10, 12, (4, 3)), (7, 8, (3, 8)), (5, 6, (8, 2))])
def test_t10_blocks_hold_any_mask(q_len, kv_len, block):
    """Also where the last block row is short."""
    for seed, share in enumerate((0.05, 0.5, 1.0)):
        bits = random_mask(q_len, kv_len, share=share, seed=seed)
        bits[0, 0] = 1
        e = sd.export.flashinfer(ANY, q_len, kv_len, q_offset=0, block=block, bits=bits)
        assert_is(e, bits.bool()[None, None])
        assert (e.indptr.dtype, e.indices.dtype) == (torch.int32, torch.int32)
        assert e.indptr.numel() == -(-q_len // block[0]) + 1 and int(e.indptr[-1]) == e.indices.numel()
        assert e.mask is None or tuple(e.mask.shape) == (e.indices.numel(), *block)
        assert (share == 1.0) == (e.mask is None) or q_len % block[0]


def test_refusals_of_flashinfer():
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.flashinfer(P.causal(), 1000, block=64)
    assert str(refusal.value) == "flashinfer: 1000 keys are no multiple of C=64; C=50 fits"
    with pytest.raises(sd.UnsupportedError, match="no query sees a key"):
        sd.export.flashinfer(sd.kv_idx < 0, 8, block=2)
    bits = random_mask(2, 4, 4, seed=3)
    with pytest.raises(sd.UnsupportedError, match="heads 0 and 1 differ"):
        sd.export.flashinfer(ANY_OF_HEADS, 4, heads=2, block=2, bits=bits)
    assert_is(sd.export.flashinfer(ANY_OF_HEADS, 4, heads=2, head=1, block=2, bits=bits), bits[1].bool()[None, None])


T09 = [0, 1, 15, 16, 17, 48, 37]


def test_t09_pages():
    table = torch.full((7, 4), -7)  # what stands behind the pages of a request is not read
    free = iter(torch.randperm(40, generator=torch.Generator().manual_seed(9)).tolist())
    for n, keys in enumerate(T09):
        for page in range(-(-keys // 16)):
            table[n, page] = next(free)
    e = sd.export.flashinfer_paged(P.causal(), block_table=table, kv_lens=T09)
    assert e.requests == (1, 2, 3, 4, 5, 6)
    assert e.last_page_len.tolist() == [1, 15, 16, 1, 16, 5]
    assert e.kv_indptr.tolist() == [0, 1, 2, 3, 5, 8, 11]
    assert e.lengths() == ([1] * 6, T09[1:])
    assert e.kv_indices.tolist() == [page for row in table.tolist() for page in row if page >= 0]
    # Slots of a cache, found by the lists alone, are those of the logical keys.
    for n, request in enumerate(e.requests):
        pages = e.kv_indices[e.kv_indptr[n] : e.kv_indptr[n + 1]]
        slots = (pages[:, None] * 16 + torch.arange(16)).flatten()[: e.lengths()[1][n]]
        assert slots.tolist() == [int(table[request, key // 16]) * 16 + key % 16 for key in range(T09[request])]


@pytest.mark.parametrize(
    "mask", [P.full(), P.causal(), P.sliding_window(5), P.causal() & (P.sinks(2) | P.sliding_window(4)), P.chunked(8)], ids=str
)
def test_t09_masks_of_requests(mask):
    queries, keys = [1, 2, 3, 16, 5, 7], T09[1:]
    queries[0] = 1
    e = sd.export.flashinfer_paged(mask, queries, block_table=torch.arange(18).view(6, 3), kv_lens=keys)
    wanted = torch.zeros(sum(queries), sum(keys), dtype=torch.bool)
    row = column = 0
    for q, kv in zip(queries, keys, strict=True):
        wanted[row : row + q, column : column + kv] = dense(mask, q, kv, kv - q)[0, 0]
        row, column = row + q, column + kv
    assert_is(e, wanted[None, None])
    assert (e.custom_mask is None) == (mask.text in (P.full().text, P.causal().text, P.sliding_window(5).text))
    if e.custom_mask is not None:
        assert e.args["custom_mask"].dtype == torch.bool and e.custom_mask.numel() == sum(
            q * kv for q, kv in zip(queries, keys, strict=True)
        )


def test_pages_by_batch_entry_keep_their_numbers():
    """Request 0 has no keys and is left out; request 1 is still batch entry 1."""
    bits = random_mask(2, 1, 8, 8, seed=4)
    e = sd.export.flashinfer_paged(
        ANY_OF_ALL, [3, 3], block_table=torch.zeros(2, 1, dtype=torch.int32), kv_lens=[0, 8], bits=bits
    )
    assert_is(e, bits[1:, :, 5:].bool())


def test_wrong_pages():
    for table, keys, queries, text in (
        (
            torch.zeros(2, 1, dtype=torch.int32),
            [4, 17],
            None,
            "request 1 has 17 keys in 2 pages of 16; block_table has room for 1",
        ),
        (torch.zeros(1, 1), [4], None, "block_table must be whole numbers"),
        (torch.zeros(1, 1, dtype=torch.int32), [4, 4], None, r"block_table must be whole numbers \(2 requests, pages\)"),
        (torch.full((1, 1), -1), [4], None, "pages count from 0"),
        (torch.zeros(1, 1, dtype=torch.int32), [4], [5], "request 0 has 5 queries and 4 keys"),
        (torch.zeros(1, 1, dtype=torch.int32), [0], None, "no request has a key"),
        (torch.zeros(1, 1, dtype=torch.int32), [4], [1, 1], "as many requests"),
    ):
        with pytest.raises(sd.ShapeError, match=text):
            sd.export.flashinfer_paged(P.causal(), queries, block_table=table, kv_lens=keys)


# ---- splash -----------------------------------------------------------------------------------------------------------------------


def test_t14_four_queries_from_position_three():
    assert computed_mask("CausalMask", {"offset": 3}, 4, 7).int().tolist() == torch.ones(4, 7).tril(3).int().tolist()
    for mask in (P.causal(), P.sliding_window(2), P.sliding_window(3, two_sided=True), P.full()):
        e = sd.export.splash(mask, 4, 128, q_offset=3, block=(4, 128))
        assert e.mask_class and e.bytes == 0
        assert_is(e, dense(mask, 4, 128, 3))
    assert sd.export.splash(P.causal(), 4, 128, q_offset=3, block=(4, 128)).mask_args == {"offset": 3}


def test_splash_stores_each_partial_block_once():
    e = sd.export.splash(P.dilated(4, 3) | P.sinks(1), 512, block=(64, 128))
    assert e.mask_class is None and e.partial_mask_blocks.shape[0] < int((e.block_mask == 1).sum())
    assert_is(e, dense(P.dilated(4, 3) | P.sinks(1), 512, 512))
    bits = random_mask(3, 16, 256, seed=5) | 1 * (torch.arange(256) == 0)
    assert_is(sd.export.splash(ANY_OF_HEADS, 16, 256, q_offset=0, heads=3, block=(8, 128), bits=bits), bits.bool()[None])


def test_splash_chunks_and_what_it_refuses():
    e = sd.export.splash(P.chunked(16), 128, block=128)
    assert (e.mask_class, e.mask_args) == ("ChunkedCausalMask", {"chunk_size": 16})
    assert_is(e, dense(P.chunked(16), 128, 128))
    moved = sd.export.splash(P.chunked(16), 64, 128, block=(64, 128))  # a chunk has no offset
    assert moved.mask_class is None
    assert_is(moved, dense(P.chunked(16), 64, 128, 64))
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.splash(sd.kv_idx < sd.q_idx - 2, 128, block=128)
    assert str(refusal.value).startswith("splash: query 0 sees no key")
    for block, lens, text in (
        ((128, 64), (128, 128), "64 keys are no multiple of 128"),
        ((96, 128), (128, 128), "128 queries are no multiple"),
    ):
        with pytest.raises(sd.UnsupportedError, match=text):
            sd.export.splash(P.causal(), *lens, block=block)


# ---- NATTEN -----------------------------------------------------------------------------------------------------------------------


def neighbourhood_by_loop(length, k, s, d, causal):
    """Key by key within a group; the neighbourhood of a stride group is that of its leader, moved inwards at the edges."""
    out = torch.zeros(length, length, dtype=torch.bool)
    for x in range(length):
        group = [y for y in range(length) if y % d == x % d]
        place = group.index(x)
        leader = min(place - place % s + (s - 1 if causal else s // 2), len(group) - 1)
        if causal:
            seen = [n for n in range(place + 1) if leader - n < k]
        else:
            first = min(max(leader - k // 2, 0), len(group) - k)
            seen = range(first, first + k)
        out[x, [group[n] for n in seen]] = True
    return out


def test_t15_neighbourhoods_of_one_axis():
    """Every length up to 10, kernel, stride, dilation and causality: the closed form, and what is guessed from the mask and proved."""
    number = 0
    for length in range(2, 11):
        for k in range(2, length + 1):
            for d in range(1, length // k + 1):
                for s, causal in itertools.product(range(1, k + 1), (False, True)):
                    wanted = neighbourhood_by_loop(length, k, s, d, causal)
                    assert torch.equal(Axis(length, k, s, d, causal).mask(), wanted), (length, k, s, d, causal)
                    number += 1
                    if number % 9 == 0:
                        assert_is(sd.export.natten(ANY, shape=(length,), bits=wanted.long()), wanted[None, None])
    assert number > 500


@pytest.mark.parametrize(
    ("grid", "axes"),
    [
        ((5, 6), [(3, 1, 1, False), (3, 1, 2, True)]),
        ((6, 4), [(4, 2, 1, False), (2, 2, 2, False)]),
        ((3, 4, 5), [(2, 1, 1, True), (3, 3, 1, False), (5, 1, 1, False)]),
    ],
)
def test_t15_neighbourhoods_are_products(grid, axes):
    bits = torch.ones(1, 1, dtype=torch.int64)
    for length, axis in zip(grid, axes, strict=True):
        bits = torch.kron(bits, neighbourhood_by_loop(length, *axis[:3], axis[3]).long())
    assert_is(sd.export.natten(ANY, shape=grid, bits=bits), bits.bool()[None, None])
    wrong = bits.clone()
    wrong[len(bits) // 3, -1] ^= 1
    with pytest.raises(sd.UnsupportedError) as refusal:
        sd.export.natten(ANY, shape=grid, bits=wrong)
    assert_refusal_is_real(str(refusal.value), wrong.bool())


def test_clipped_neighbourhoods_are_not_nattens():
    mask = P.neighbourhood_2d(8, 8, 3, edge="clip")
    with pytest.raises(sd.UnsupportedError, match=r"query 0 does not see key 2, which a neighbourhood of 3 x 3 holds") as refusal:
        sd.export.natten(mask, shape=(8, 8))
    assert_refusal_is_real(str(refusal.value), dense(mask, 64, 64)[0, 0])
    with pytest.raises(sd.ShapeError, match=r"the grid .* has 64 tokens"):
        sd.export.natten(mask, 32, shape=(8, 8))
