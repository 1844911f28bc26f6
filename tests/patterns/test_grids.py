"""Neighbourhoods against definitions that walk over the grid."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.lang.evaluation import evaluate


def visible(i, size, kernel, dilation, causal, edge):
    """Positions that position ``i`` of an axis sees, found by search among the positions of its residue class."""
    line = [j for j in range(size) if j % dilation == i % dilation]
    place = line.index(i)
    if causal:
        return set(line[max(place - kernel + 1, 0) : place + 1])
    wanted = range(place - kernel // 2, place - kernel // 2 + kernel)
    if edge == "clip":
        return {line[p] for p in wanted if 0 <= p < len(line)}
    # all windows inside the line; take the one that begins nearest to where it should
    start = min(range(len(line) - kernel + 1), key=lambda s: abs(s - wanted.start))
    return set(line[start : start + kernel])


def order_of(shape, order, tile):
    """The grid's points in the order in which the sequence holds them."""
    points = list(itertools.product(*map(range, shape)))
    if order == "tiled":
        return sorted(
            points, key=lambda p: ([x // t for x, t in zip(p, tile, strict=True)], [x % t for x, t in zip(p, tile, strict=True)])
        )
    if order == "morton":
        return sorted(points, key=lambda p: [bit for level in range(8, -1, -1) for bit in ((x >> level) & 1 for x in p)])
    return points


@st.composite
def grids(draw, axes):
    """Arguments of a neighbourhood that fit each other."""
    order = draw(st.sampled_from(["raster", "tiled", "morton"]))
    tile = None
    if order == "morton":
        shape = (2 ** draw(st.integers(0, 2 if axes == 3 else 3)),) * axes
    elif order == "tiled":
        tile = tuple(draw(st.integers(1, 3)) for _ in range(axes))
        shape = tuple(t * draw(st.integers(1, 2)) for t in tile)
    else:
        shape = draw(st.permutations([draw(st.integers(1, 13)), *(draw(st.integers(1, 4)) for _ in range(axes - 1))]))
        shape = tuple(shape)
    edge = draw(st.sampled_from(["shift", "clip"]))
    dilation = tuple(draw(st.integers(1, min(3, n))) for n in shape)
    kernel = tuple(draw(st.integers(1, n // d if edge == "shift" else n + 2)) for n, d in zip(shape, dilation, strict=True))
    causal = tuple(draw(st.booleans()) for _ in range(axes))
    return shape, {
        "kernel": kernel,
        "dilation": dilation,
        "causal": causal,
        "edge": edge,
        "order": order,
        "tile": tile,
    }


def check(assert_pairs, mask, shape, kernel, dilation, causal, edge, order, tile):
    points = order_of(shape, order, tile)

    def allowed(q, kv):
        axes = zip(points[q], points[kv], shape, kernel, dilation, causal, strict=True)
        return all(j in visible(i, n, k, d, c, edge) for i, j, n, k, d, c in axes)

    assert_pairs(mask, allowed, len(points))


@settings(max_examples=60)
@given(grids(2))
def test_neighbourhood_2d(assert_pairs, grid):
    shape, options = grid
    check(assert_pairs, sd.patterns.neighbourhood_2d(*shape, **options), shape, **options)


@settings(max_examples=25)
@given(grids(3))
def test_neighbourhood_3d(assert_pairs, grid):
    shape, options = grid
    check(assert_pairs, sd.patterns.neighbourhood_3d(*shape, **options), shape, **options)


def test_a_dilated_kernel_at_the_end_of_a_short_residue_class(assert_pairs):
    options = {"kernel": (1, 5), "dilation": (1, 2), "causal": (False, False), "edge": "shift"}
    check(assert_pairs, sd.patterns.neighbourhood_2d(2, 11, **options), (2, 11), **options, order="raster", tile=None)


def test_one_number_means_every_axis():
    short = sd.patterns.neighbourhood_2d(6, 7, 3, dilation=2, causal=True)
    assert short.same_as(sd.patterns.neighbourhood_2d(6, 7, (3, 3), dilation=(2, 2), causal=(True, True)))


def test_shifted_rows_have_one_number_of_keys_and_clipped_ones_have_not(values):
    shifted = values(sd.patterns.neighbourhood_2d(7, 9, (3, 4)), 63, 63).sum(1)
    clipped = values(sd.patterns.neighbourhood_2d(7, 9, (3, 4), edge="clip"), 63, 63).sum(1)
    assert set(shifted.tolist()) == {12}
    assert clipped[0] == 2 * 2 and clipped[4 * 9 + 4] == 12


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.data()), min_size=2, max_size=3))
def test_sliding_tile(assert_pairs, axes):
    tile = tuple(t for t, _, _ in axes)
    counts = tuple(n for _, n, _ in axes)
    tiles_seen = tuple(data.draw(st.integers(1, n)) for _, n, data in axes)
    shape = tuple(t * n for t, n in zip(tile, counts, strict=True))
    points = order_of(shape, "tiled", tile)

    def allowed(q, kv):
        return all(
            j // t in visible(i // t, n, k, 1, False, "shift")
            for i, j, t, n, k in zip(points[q], points[kv], tile, counts, tiles_seen, strict=True)
        )

    mask = sd.patterns.sliding_tile(shape, tuple(t * k for t, k in zip(tile, tiles_seen, strict=True)), tile)
    assert_pairs(mask, allowed, len(points))


def test_sliding_tile_cuts_no_tile(values):
    tile = (2, 3)
    got = values(sd.patterns.sliding_tile((8, 12), (4, 9), tile), 96, 96)
    blocks = got.view(16, 6, 16, 6).sum((1, 3))
    assert set(blocks.flatten().tolist()) == {0, math.prod(tile) ** 2}


@given(grids(2))
def test_grid_position(grid):
    shape, options = grid
    points = order_of(shape, options["order"], options["tile"])
    place = sd.patterns.grid_position(sd.kv_idx, shape, order=options["order"], tile=options["tile"])
    got = [evaluate(axis.expr, {"kv_idx": torch.arange(len(points))}).broadcast_to(len(points)).tolist() for axis in place]
    assert list(zip(*got, strict=True)) == points
