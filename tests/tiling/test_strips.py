"""Strips of a residue: every allowed pair is in one key tile of one strip, key tiles say what they leave open, and progressions
stay few."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import masks, shapes, tables_for
from sparsedsl.tiling.residues import residue_classes
from sparsedsl.tiling.schedule import KeyTile, StridedSeries
from sparsedsl.tiling.strips import ResidueSpace, jumps, strided_series, strip_edges

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 1000)
doc = sd.table("doc", monotone=True)


def cut(space: ResidueSpace, height: int, least: int = 16) -> tuple[StridedSeries, ...]:
    return strided_series(space, strip_edges(space, height, jumps(space, least)), 0)


def space_of(
    mask: sd.Mask, q_len: int, kv_len: int | None = None, q_offset: int = 0, head: int = 0, **tables: Any
) -> ResidueSpace:
    (residue,) = residue_classes(mask.expr)
    assert not residue.scattered
    kv_len = q_len if kv_len is None else kv_len
    return ResidueSpace(
        residue.mask, q_offset, q_len, kv_len, {"b": 0, "h": head, "q_len": q_offset + q_len, "kv_len": kv_len, **tables}
    )


def assert_pieces_are_the_mask(space: ResidueSpace, found: tuple[StridedSeries, ...]) -> None:
    """Brute force over the grid of a residue: each pair is in at most one key tile, and the key tiles allow what the mask allows."""
    q, kv = torch.arange(space.first, space.first + space.rows)[:, None], torch.arange(space.kv_len)
    env = {**space.env, "q_idx": q, "kv_idx": kv}
    wanted = evaluate(space.mask, env).expand(space.rows, space.kv_len)
    key_tiles, strips = torch.zeros(wanted.shape, dtype=torch.int32), torch.zeros(space.rows, dtype=torch.int32)
    allowed = torch.zeros(wanted.shape, dtype=torch.bool)
    for series in found:
        assert series.key_tiles and series.keys == sum(key_tile.length for key_tile in series.key_tiles)
        for turn in range(series.count):
            first = series.q_start + turn * series.step - space.first
            assert 0 <= first and first + series.height <= space.rows
            rows = slice(first, first + series.height)
            strips[rows] += 1
            for key_tile in series.key_tiles:
                start = key_tile.start + turn * key_tile.step
                assert key_tile.length > 0 and 0 <= start and start + key_tile.length <= space.kv_len
                keys = slice(start, start + key_tile.length)
                key_tiles[rows, keys] += 1
                here = {**env, "q_idx": q[rows], "kv_idx": kv[keys]}
                size = (series.height, key_tile.length)
                allowed[rows, keys] = True if key_tile.residual is None else evaluate(key_tile.residual, here).expand(size)
    assert int(key_tiles.max()) <= 1 and int(strips.max()) <= 1, "a pair is in two key tiles, or a query in two strips"
    assert torch.equal(allowed, wanted)


@given(
    mask=masks(),
    case=shapes(max_len=70, max_heads=3),
    height=st.sampled_from((1, 3, 8, 16, 64)),
    least=st.integers(1, 16),
    data=st.data(),
)
@settings(max_examples=200)
def test_pieces_are_the_mask(mask, case, height, least, data):
    tables = data.draw(tables_for(mask, case))
    batch, head = data.draw(st.integers(0, case.batch - 1)), data.draw(st.integers(0, case.heads - 1))
    for residue in residue_classes(mask.expr):
        if residue.scattered:
            continue
        first = max(0, -(-(case.q_offset - residue.q_start) // residue.q_step))
        rows = (case.q_offset + case.q_len - 1 - residue.q_start) // residue.q_step - first + 1
        kv_len = -(-(case.kv_len - residue.kv_start) // residue.kv_step)
        if rows < 1 or kv_len < 1:
            continue
        lengths = {"q_len": case.q_offset + case.q_len, "kv_len": case.kv_len}
        space = ResidueSpace(residue.mask, first, rows, kv_len, {"b": batch, "h": head, **lengths, **tables})
        assert_pieces_are_the_mask(space, cut(space, height, least))


@pytest.mark.parametrize("height", [16, 64, 100])
@pytest.mark.parametrize(
    "mask",
    [
        causal & (q_idx - kv_idx < 70),
        causal & ((q_idx - kv_idx < 50) | (kv_idx < 4)),
        (causal & (q_idx - kv_idx < 30)) | (kv_idx < 90),
        q_idx // 64 == kv_idx // 64,
        (q_idx + kv_idx <= 320) & (q_idx + kv_idx >= 280),
        (2 * q_idx - kv_idx >= 0) & (2 * q_idx - kv_idx <= 60),
        causal & (q_idx - kv_idx < 20 + 7 * h),
        abs(q_idx - kv_idx) >= 40,
    ],
    ids=str,
)
def test_pieces_of_usual_masks(mask, height):
    space = space_of(mask, 300, head=3)
    found = cut(space, height)
    assert_pieces_are_the_mask(space, found)
    assert all(series.height <= height for series in found)


# ---- cuts ------------------------------------------------------------------------------------------------------------------


def test_strips_end_where_a_document_ends():
    lengths = [50, 3, 80, 1, 100, 40, 26]
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    space = space_of(causal & (doc[q_idx] == doc[kv_idx]), len(ids), doc=ids)
    # Where the keys begin fewer than 16 further on is no jump.
    assert jumps(space) == [50, 133, 234, 274]
    found = cut(space, 64)
    assert_pieces_are_the_mask(space, found)
    assert max(series.keys for series in found) <= max(lengths) + 3, "a strip reads keys that only its neighbours want"


def test_strips_end_where_a_chunk_ends():
    space = space_of(causal & (q_idx // 100 == kv_idx // 100), 450)
    assert jumps(space) == [100, 200, 300, 400]
    assert strip_edges(space, 64, jumps(space)).tolist() == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450]
    assert_pieces_are_the_mask(space, cut(space, 64))


def test_a_window_has_no_jumps():
    assert jumps(space_of(window, 5000)) == []


def test_jumps_at_every_query_are_no_cuts():
    start = sd.table("start", monotone=True)
    space = space_of((kv_idx >= start[q_idx]) & (kv_idx < start[q_idx] + 30), 100, 3000, start=torch.arange(100) * 20)
    assert jumps(space) == [] and jumps(space, least=21) == []
    assert_pieces_are_the_mask(space, cut(space, 256))


@given(rows=st.integers(1, 500), first=st.integers(0, 50), height=st.integers(1, 300), data=st.data())
@settings(max_examples=200)
def test_edges_cover_the_queries_in_order(rows, first, height, data):
    space = ResidueSpace(causal.expr, first, rows, 10, {})
    places = sorted(data.draw(st.sets(st.integers(first + 1, first + rows - 1), max_size=8))) if rows > 1 else []
    edges = strip_edges(space, height, places)
    assert edges[0] == first and edges[-1] == first + rows
    assert bool((edges.diff() >= 1).all()) and int(edges.diff().max()) <= height
    kept = first
    for place in places:  # a part is joined with the next only if it is shorter than an eighth of the height
        if place - kept >= max(1, height // 8):
            assert place in edges
            kept = place


# ---- progressions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        (window, 6),
        (causal & ((q_idx - kv_idx < 1000) | (kv_idx < 4)), 8),
        (q_idx // (1 << 18) == kv_idx // (1 << 18), 8),
        (abs(q_idx - kv_idx) < 500, 8),
    ],
    ids=["window", "window and sinks", "chunks", "two-sided"],
)
def test_a_million_tokens_are_a_handful_of_families(mask, most):
    length = 1 << 20
    space = space_of(mask, length)
    cut(space_of(mask, 1000), 256)  # what sympy remembers is not counted
    tracemalloc.start()
    found = cut(space, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) <= most
    assert peak < 32 << 20  # lists of strips, not of queries
    assert sum(series.count * series.height for series in found) == length


def test_steps_of_a_window():
    space = space_of(causal & (q_idx - kv_idx < 64), 640)
    *_, last = cut(space, 64)
    assert (last.height, last.step, last.q_start + last.count * last.step) == (64, 64, 640)
    assert {key_tile.step for key_tile in last.key_tiles} == {64}
    assert str(last).startswith(f"{last.count} strips of 64 queries from query {last.q_start}: ")


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 90), st.integers(0, 2), st.sampled_from((0, 16)), st.booleans()), min_size=1, max_size=6
    ),
    most=st.integers(1, 200),
)
@settings(max_examples=200)
def test_segments_are_the_pieces(lengths, most):
    key_tiles, at = [], 0
    for length, gap, step, masked in lengths:
        at += gap
        key_tiles.append(KeyTile(at, length, step, causal.expr if masked else None))
        at += length
    key_ranges = StridedSeries(0, 0, 16, 3, 16, tuple(key_tiles)).key_ranges(most)
    wanted = {
        key: (key_tile.step, key_tile.residual)
        for key_tile in key_tiles
        for key in range(key_tile.start, key_tile.start + key_tile.length)
    }
    got: dict[int, Any] = {}
    for key_range in key_ranges:
        assert 1 <= key_range.length <= most
        for key in range(key_range.start, key_range.start + key_range.length):
            assert key not in got
            residuals = [r for low, high, r in key_range.masks if key_range.start + low <= key < key_range.start + high]
            assert len(residuals) <= 1
            got[key] = (key_range.step, residuals[0] if residuals else None)
        assert all(0 <= low < high <= key_range.length for low, high, _ in key_range.masks)
    assert got == wanted


def test_neighbours_that_move_together_are_one_segment():
    together = (KeyTile(0, 10, 16, causal.expr), KeyTile(10, 5, 16, None), KeyTile(15, 5, 0, None))
    assert [(s.start, s.length, s.step) for s in StridedSeries(0, 0, 16, 2, 16, together).key_ranges(1000)] == [
        (0, 15, 16),
        (15, 5, 0),
    ]
    assert str(together[0]) == "10 keys from key 0, 16 further in each strip, masked" and str(together[2]) == "5 keys from key 15"
