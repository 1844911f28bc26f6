"""Tile lists against brute force: sound, minimal, and full where full, for random masks, tables, shapes and blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.tiles import classify
from sparsedsl.errors import ShapeError
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, masks, tables_for
from sparsedsl.testing.list_checks import assert_lists_sound

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
taken = sd.table("taken", dtype=bool)
width = sd.table("width", values_in=(0, 300))

FAMILIES = {
    "causal": causal,
    "window": causal & (q_idx - kv_idx < 100),
    "window and sinks": causal & ((q_idx - kv_idx < 100) | (kv_idx < 4)),
    "dilated": causal & (q_idx - kv_idx < 256) & ((q_idx - kv_idx) % 4 == 0),
    "documents": causal & (doc[q_idx] == doc[kv_idx]),
    "documents and window": causal & (doc[q_idx] == doc[kv_idx]) & (q_idx - kv_idx < 40),
    "dilated documents": causal & ((q_idx - kv_idx) % 8 == 0) & (doc[q_idx] == doc[kv_idx]),
    "other documents": causal & (doc[q_idx] != doc[kv_idx]),
    "chunked": causal & (q_idx // 64 == kv_idx // 64),
    "per-head windows": causal & (q_idx - kv_idx < width[h]),
    "per-batch prefix": causal | (kv_idx < width[b]),
    "neighbourhood": (abs(q_idx // 16 - kv_idx // 16) <= 2) & (abs(q_idx % 16 - kv_idx % 16) <= 2),
    "block table": causal & taken[q_idx // 32, kv_idx // 32],
    "strided": causal & ((q_idx - kv_idx < 32) | (kv_idx % 32 == 31)),
    "products": (q_idx * kv_idx) % 7 == 0,
    "exclusive": causal ^ (q_idx - kv_idx < 50),
    "nothing": causal & (q_idx < kv_idx),
    "everything": causal | (q_idx < kv_idx),
    "halves fill a tile": (kv_idx % 2 == 0) | (kv_idx % 2 == 1),
    "chunk and a band off the diagonal": (q_idx // 64 == kv_idx // 64) & (q_idx - kv_idx >= 40) & (q_idx - kv_idx <= 45),
    "a slope with gaps": 2 * q_idx == 3 * kv_idx,
    "dilation that ends": causal & ((q_idx - kv_idx) % 8 == 0) & ((q_idx - kv_idx < 100) | (kv_idx < 64)),
    "two windows fill a tile": (abs(q_idx - kv_idx) < 20) | (q_idx - kv_idx >= 20),
}
SHAPES = [
    (300, 300, 0, (32, 32)),
    (100, 517, 417, (32, 64)),
    (1, 300, 299, (16, 16)),
    (257, 129, 0, (64, 32)),
    (97, 64, 500, (7, 13)),
]
SHAPES += [(300, 300, 0, (128, 16)), (300, 300, 0, (16, 16)), (90, 60, 0, (7, 1)), (100, 101, 0, (1, 2))]


def family_tables(mask, rows, kv_len, offset, seed=0):
    generator = torch.Generator().manual_seed(seed)
    longest = max(rows + offset, kv_len)
    tables = {
        "doc": torch.randint(0, 9, (longest,), generator=generator).sort().values,
        "width": torch.tensor([10, 64, 200]),
        "taken": torch.rand((longest // 32 + 1,) * 2, generator=generator) < 0.4,
    }
    return {name: tables[name] for name in mask.tables}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, shape):
    rows, kv_len, offset, block = shape
    mask = FAMILIES[name]
    tables = family_tables(mask, rows, kv_len, offset)
    assert_lists_sound(mask, rows, kv_len, block, batch=2, heads=3, q_offset=offset, **tables)


@given(data=st.data())
@settings(max_examples=150)
def test_random_masks(data):
    mask = data.draw(masks())
    rows, kv_len = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    offset = data.draw(st.sampled_from((0, 0, 1, 17, 40)))
    block = data.draw(st.tuples(st.sampled_from((1, 3, 4, 8, 16, 32)), st.sampled_from((1, 4, 5, 8, 16, 64))))
    batch, heads = data.draw(st.sampled_from(((1, 1), (2, 3))))
    case = AttentionCase(batch=batch, heads=heads, kv_heads=heads, q_len=rows, kv_len=kv_len, q_offset=offset)
    tables = data.draw(tables_for(mask, case))
    assert_lists_sound(mask, rows, kv_len, block, batch=batch, heads=heads, q_offset=offset, **tables)


@given(data=st.data())
@settings(max_examples=40)
def test_random_masks_where_boxes_descend(data):
    """Grids of more than ROOT tiles, so that the descent has several levels."""
    mask = data.draw(masks(depth=2))
    rows, kv_len = data.draw(st.integers(100, 300)), data.draw(st.integers(100, 300))
    block = data.draw(st.sampled_from(((1, 2), (2, 1), (2, 3), (4, 4))))
    case = AttentionCase(q_len=rows, kv_len=kv_len)
    tables = data.draw(tables_for(mask, case))
    assert_lists_sound(mask, rows, kv_len, block, **tables)


def test_chunks_do_not_change_the_lists(options):
    wanted = {}
    for name, mask in FAMILIES.items():
        tables = family_tables(mask, 300, 300, 0)
        wanted[name] = classify(mask.expr, Domain(300, 300, 0, 2, 3, tables), (16, 16)).classes()
    options(EFFORT, tiles=64, boxes=64, points=512, kinds=4)
    for name, mask in FAMILIES.items():
        tables = family_tables(mask, 300, 300, 0)
        got = classify(mask.expr, Domain(300, 300, 0, 2, 3, tables), (16, 16)).classes()
        assert torch.equal(got, wanted[name]), name


@given(data=st.data())
@settings(max_examples=25)
def test_large_tiles_are_decided_by_their_parts(data):
    mask = data.draw(masks(depth=2))
    case = AttentionCase(
        heads=2, kv_heads=2, q_len=data.draw(st.integers(1, 90)), kv_len=data.draw(st.integers(1, 90)), q_offset=7
    )
    tables = data.draw(tables_for(mask, case))
    block = data.draw(st.sampled_from(((32, 4), (4, 48), (33, 17))))
    with EFFORT.using(fine=4):
        assert_lists_sound(mask, case.q_len, case.kv_len, block, heads=2, q_offset=7, **tables)


def test_few_points_of_large_tiles_are_looked_at(monkeypatch):
    """Tiles of several blocks of a table, cut by none of them, are decided without a point."""
    from sparsedsl.analysis import points

    chosen = torch.rand((16, 16), generator=torch.Generator().manual_seed(0)) < 0.3
    mask = taken[q_idx // 1024, kv_idx // 1024]
    monkeypatch.setattr(points.PointDecider, "decide", lambda *_: pytest.fail("points were looked at"))
    classes = classify(mask.expr, Domain(16384, 16384, tables={"taken": chosen}), (2048, 128)).classes()[0, 0]
    wanted = chosen.view(8, 2, 16).sum(dim=1).repeat_interleave(8, dim=1)
    assert torch.equal(classes, wanted.to(torch.int8))


def test_more_points_than_anyone_waits_for_are_refused():
    with pytest.raises(
        sd.UnsupportedError, match="tiles of 536,870,912 x 536,870,912 tokens would have to be looked at pair by pair"
    ):
        classify(FAMILIES["halves fill a tile"].expr, Domain(2**34, 2**34), 2**29)


def test_dimensions_the_mask_does_not_read_have_size_one():
    domain = Domain(64, 64, 0, 2, 3, {"width": torch.tensor([4, 8, 16])})
    assert classify(causal.expr, domain, (16, 16)).shape == (1, 1, 4, 4)
    assert classify((causal & (q_idx - kv_idx < width[h])).expr, domain, (16, 16)).shape == (1, 3, 4, 4)
    assert classify((causal | (kv_idx < width[b])).expr, domain, (16, 16)).shape == (2, 1, 4, 4)


def test_padded_and_transposed_lists():
    mask = FAMILIES["window and sinks"]
    lists = classify(mask.expr, Domain(300, 260), (32, 32))
    dense = lists.classes()[0, 0]
    for value, part in ((1, lists.partial), (2, lists.full)):
        padded = part.padded()
        for row in range(lists.shape[2]):
            count = int(part.counts[0, 0, row])
            assert padded[0, 0, row, :count].tolist() == (dense[row] == value).nonzero()[:, 0].tolist()
        turned = part.transposed(lists.shape[3])
        padded = turned.padded()
        for column in range(lists.shape[3]):
            count = int(turned.counts[0, 0, column])
            assert padded[0, 0, column, :count].tolist() == (dense[:, column] == value).nonzero()[:, 0].tolist()


def test_a_million_tokens_stay_small():
    """Listed tiles, not the grid: 8192 x 8192 tiles would be 64 Mi entries."""
    length = 1 << 20
    lists = classify(FAMILIES["window and sinks"].expr, Domain(length, length), (128, 128))
    assert lists.nbytes < 1 << 20
    rows = torch.arange(8192)
    expected = torch.minimum(rows + 1, torch.tensor(2)) + (rows > 1)
    assert torch.equal((lists.full.counts + lists.partial.counts)[0, 0].to(torch.int64), expected)


@pytest.mark.parametrize("block", [0, -1, (16, 0), True, (16, 16.0)], ids=str)
def test_wrong_block_sizes(block):
    pair = block if isinstance(block, tuple) else (block, block)
    with pytest.raises(ShapeError, match="block_size must be a positive number"):
        classify(causal.expr, Domain(8, 8), pair)


def test_a_minimum_that_also_stands_inside_another_function():
    """It is taken apart where it is a term, not where a function of it is."""
    least = sd.minimum(q_idx, sd.table("doc")[abs(kv_idx - q_idx)])
    mask = 2 * (q_idx & least) > least
    for doc in (torch.tensor([0, 0, 0, 0, 0]), torch.tensor([3, 1, 2, 0, 5])):
        domain = Domain(5, 5, tables={"doc": doc})
        q, kv = torch.arange(5)[:, None], torch.arange(5)
        m = torch.minimum(q, doc[(kv - q).abs()])
        wanted = 2 * (q & m) > m
        assert torch.equal(classify(mask.expr, domain, 1).classes()[0, 0] > 0, wanted)
        either = torch.zeros_like(wanted)
        for clause in clauses(mask.expr):
            assert not clause.bounds
            for part in clause.rest:
                either |= evaluate(part, {"q_idx": q, "kv_idx": kv, "doc": doc, **domain.lengths})
        assert torch.equal(either, wanted)
