"""Pictures: what is drawn equals what the pattern says, long sequences stay cheap, and wrong arguments are named."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.picture_style import DARK, LIGHT, fit_title

Figure = pytest.importorskip("matplotlib.figure").Figure
to_hex = pytest.importorskip("matplotlib.colors").to_hex
P = sd.patterns


def image(axes):
    """The numbers of the picture in ``axes``."""
    (drawn,) = axes.images
    return np.asarray(drawn.get_array().filled(np.nan) if np.ma.isMaskedArray(drawn.get_array()) else drawn.get_array())


def caption(figure):
    """The text below the panels."""
    return figure.get_supxlabel()


def allowed(q_len, kv_len, q_offset, rule):
    return np.array([[rule(q_offset + q, kv) for kv in range(kv_len)] for q in range(q_len)])


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(1, 12))
def test_pairs_are_the_allowed_pairs(q_len, kv_len, q_offset, w):
    figure = sd.plot(P.sliding_window(w), q_len, kv_len, q_offset=q_offset)
    assert np.array_equal(image(figure.axes[0]), allowed(q_len, kv_len, q_offset, lambda q, kv: q - w < kv <= q))


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 20), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_tiles_are_their_classes(q_len, kv_len, q_offset, w, q_block, kv_block):
    figure = sd.plot(P.sliding_window(w), q_len, kv_len, q_offset=q_offset, block_size=(q_block, kv_block), panels="tiles")
    pairs = allowed(q_len, kv_len, q_offset, lambda q, kv: q - w < kv <= q)
    for (i, j), kind in np.ndenumerate(image(figure.axes[0])):
        tile = pairs[i * q_block : (i + 1) * q_block, j * kv_block : (j + 1) * kv_block]
        assert kind == (FULL if tile.all() else PARTIAL if tile.any() else EMPTY)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 20), st.integers(1, 50), st.integers(1, 4))
def test_strips_hold_every_allowed_pair(q_len, q_offset, w, step):
    figure = sd.plot(P.dilated(w, step), q_len, q_offset=q_offset, panels="strips")
    covered = np.zeros((q_len, q_offset + q_len), dtype=bool)
    whole = np.zeros_like(covered)
    for collection in figure.axes[0].collections:
        masked = len(collection.get_paths()) == 0 or to_hex(collection.get_facecolor()[0]) == LIGHT.partial
        for path in collection.get_paths():
            (left, top), (right, bottom) = path.vertices.min(0) + 0.5, path.vertices.max(0) + 0.5
            place = slice(max(0, round(top) - q_offset), round(bottom) - q_offset), slice(round(left), round(right))
            covered[place] = True
            whole[place] |= not masked
    pairs = allowed(q_len, q_offset + q_len, q_offset, lambda q, kv: (q - w * step < kv <= q) & ((q - kv) % step == 0))
    assert covered[pairs].all()
    assert step > 1 or pairs[whole].all()
    assert "pairs computed" in caption(figure)


def test_head_and_batch_entry():
    mask = P.sliding_window(sd.table("window")[sd.b, sd.h])
    windows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    figure = sd.plot(mask, 12, head=2, batch=1, window=windows)
    assert np.array_equal(image(figure.axes[0]), allowed(12, 12, 0, lambda q, kv: q - 6 < kv <= q))
    assert "batch entry 1, head 2" in caption(figure)


def test_what_the_picture_says():
    figure = sd.plot(P.causal(), 64, block_size=16)
    assert isinstance(figure, Figure)
    pairs, tiles = figure.axes
    assert (pairs.get_title(), tiles.get_title()) == ("allowed pairs", "tiles of 16 x 16")
    for axes in (pairs, tiles):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("kv_idx (key)", "q_idx (query)")
        assert axes.yaxis_inverted() and not axes.xaxis_inverted()
        assert [text.get_text() for text in axes.get_legend().get_texts()]
    assert figure.get_suptitle() == "kv_idx <= q_idx"
    assert caption(figure).splitlines() == [
        "64 queries x 64 keys",
        "2,080 of 4,096 pairs allowed (50.8 %)",
        "16 tiles: 6 full, 4 partial, 6 empty",
    ]


def test_long_titles_are_shortened():
    title = sd.plot(P.bigbird(8), 64).get_suptitle()
    assert title.endswith(" ...") and title.count("\n") == 1 and max(map(len, title.splitlines())) <= 108


@pytest.mark.parametrize("length", [513, 1000, 2048])
def test_shares_are_counted_where_that_is_cheap(length):
    mask = P.streaming_llm(100, 4)
    figure = sd.plot(mask, length, block_size=16)
    pairs = allowed(length, length, 0, lambda q, kv: kv <= q and (kv < 4 or kv > q - 100))

    def share_of(i, j, cell):
        return pairs[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean()

    share, kinds = image(figure.axes[0]), image(figure.axes[1])
    assert kinds.shape == (-(-length // 16),) * 2 and 128 < share.shape[0] <= length
    for (i, j), value in np.ndenumerate(share):
        wanted = share_of(i, j, -(-length // share.shape[0]))
        assert value == pytest.approx(max(wanted, 1e-4) if wanted else 0)
    for (i, j), kind in np.ndenumerate(kinds):
        assert kind == {0: EMPTY, 1: FULL}.get(share_of(i, j, 16), PARTIAL)
    assert "counted" in caption(figure)


def test_a_million_tokens():
    """In bounded time and memory; no window, however thin, is lost."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    figure = sd.plot(P.streaming_llm(1024, 4), 2**20)
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024
    share, kinds = image(figure.axes[0]), image(figure.axes[1])
    side = share.shape[0]
    cell = 2**20 // side
    wanted = np.eye(side, dtype=bool) | np.eye(side, k=-1, dtype=bool)
    wanted[:, 0] = True
    assert np.array_equal(share > 0, wanted) and np.array_equal(kinds == PARTIAL, wanted)
    assert "sampled at" in caption(figure) and "empty and full ones are exact" in caption(figure)
    assert "67,108,864 tiles: 57,316 full, 24,559 partial, 67,026,989 empty" in caption(figure)
    assert share[100, 100] == pytest.approx(1024 / cell, rel=0.2)


def test_patterns_that_need_trying_are_decided_where_intervals_do_and_else_sampled_and_the_caption_says_so():
    start = time.process_time()
    blocks = sd.plot(P.random_blocks(256, 4, seed=0), 2**15)
    mixed = sd.plot((sd.q_idx * sd.kv_idx) % 65_521 <= 65_519, 2**15)
    assert time.process_time() - start < 60
    assert "sampled" not in caption(blocks)
    kinds = image(blocks.axes[1])
    assert {EMPTY} < set(kinds.flatten().tolist()) <= {EMPTY, PARTIAL, FULL}
    assert "sampled picture" in caption(mixed) and "some classes sampled" in caption(mixed)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize(("length", "dpi"), [(400, 72), (2**16, 72), (2**16, 110)])
def test_a_global_token_is_seen_in_every_row_of_the_picture(length, dpi, theme, tmp_path):
    """What is one pixel wide, or less, is not lost when the picture is scaled."""
    Image = pytest.importorskip("PIL.Image")
    middle = length // 2 + 7
    mask = P.sliding_window(8) | (sd.kv_idx == middle)
    figure = sd.plot(mask, length, panels="pairs", theme=theme.name)
    figure.savefig(tmp_path / "picture.png", dpi=dpi)
    drawn = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
    (axes,) = (axis for axis in figure.axes if axis.get_title())
    box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
    height, left, right = figure.get_size_inches()[1], box.x0 * dpi, box.x1 * dpi
    rows = range(int((height - box.y1) * dpi) + 4, int((height - box.y0) * dpi) - 4)
    across = slice(int(left + (right - left) * (middle / length) - 4), int(left + (right - left) * (middle / length) + 6))
    empty = np.array([int(theme.nothing[i : i + 2], 16) for i in (1, 3, 5)])
    for row in rows:
        assert np.abs(drawn[row, across] - empty).sum(axis=1).max() > 60, row


def test_scores_are_scaled_to_where_they_vary():
    def limits(figure):
        return figure.axes[-1].images[0].get_clim()

    low, high = limits(sd.plot(P.alibi_window(8, 6), 20, head=2, panels="score"))
    assert high == 0 and -0.625 <= low < -0.5
    far = sd.attend(P.causal(), score=sd.where((sd.q_idx == 9) & (sd.kv_idx == 3), -1e9, -0.01 * (sd.q_idx - sd.kv_idx)))
    figure = sd.plot(far, 64, panels="score")
    assert -0.64 < limits(figure)[0] < -0.4
    low, high = limits(
        sd.plot(
            P.relative_bias(4), 20, panels="score", relative_bias=torch.tensor([[-3.0], [-1], [0], [0], [0], [0], [0], [2], [1]])
        )
    )
    assert low == -high < 0


def test_a_picture_for_each_head():
    windows = torch.tensor([1, 5, 2, 9, 3, 4])
    figure = sd.plot(P.sliding_window(sd.table("window")[sd.h]), 12, head=range(6), window=windows)
    for head, axes in enumerate(figure.axes):
        assert axes.get_title() == f"head {head}"
        width = int(windows[head])
        assert np.array_equal(image(axes), allowed(12, 12, 0, lambda q, kv, w=width: q - w < kv <= q))
    biases = sd.plot(P.alibi_window(heads=4, window=9), 20, head=[0, 3])
    first, second = biases.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["head 0", "head 3"]
    assert first.images[0].get_clim() == second.images[0].get_clim()
    own = Figure().subplots(1, 2)
    assert sd.plot(P.alibi_window(heads=4, window=9), 20, head=(0, 1), panels="tiles", ax=own) is own[0].figure


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])
def test_what_a_patch_attends_to_on_the_image(shape):
    """Against distances on the grid, with tokens in raster order and in tiles of one row."""
    kernel = 3
    for order, words in (("raster", {}), ("tiled", {"tile": (*[1] * (len(shape) - 1), shape[-1])})):
        name = P.neighbourhood_2d if len(shape) == 2 else P.neighbourhood_3d
        mask = name(*shape, kernel, edge="clip", order=order, **words)
        coordinates = P.grid_position(sd.q_idx, shape, order=order, **words)
        query = tuple(n // 2 for n in shape)
        figure = sd.plot(mask, grid=shape, query=query, coordinates=coordinates)
        seen = np.stack([image(axes) for axes in figure.axes])
        for place in np.ndindex(shape):
            near = all(abs(a - b) <= 1 for a, b in zip(place, query, strict=True))
            frame = place[0] if len(shape) == 3 else 0
            assert seen[frame][place[-2:]] == near
    assert f"attends to {3 ** len(shape)} of" in caption(figure)


def test_themes_and_titles():
    dark = sd.plot(P.causal(), 16, theme="dark")
    assert to_hex(dark.get_facecolor()) == DARK.page and to_hex(dark.axes[0].title.get_color()) == DARK.text
    assert to_hex(sd.plot(P.moba(), theme="dark").get_facecolor()) == DARK.page
    long = str(P.bigbird(8))
    for width in range(20, 140):
        for row in fit_title(long, width).splitlines():
            assert row.count("(") == row.count(")") and len(row) <= width, row


def distance_of_colours(first, second, lacking):
    """How far apart two colours are for somebody who lacks a kind of cone: CIE 1976, after Machado et al. 2009, severity 1."""
    matrices = {
        "none": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(colour):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = to_xyz @ np.clip(np.array(matrices[lacking]) @ linear, 0, 1) / (to_xyz @ np.ones(3))
        x, y, z = np.cbrt(np.maximum(xyz, 0.008856))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    return float(np.linalg.norm(lab(first) - lab(second)))


@pytest.mark.parametrize("lacking", ["none", "protan", "deutan", "tritan"])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_are_told_apart_by_everybody(theme, lacking):
    colours = (theme.nothing, theme.partial, theme.full)
    for i, first in enumerate(colours):
        for second in colours[i + 1 :]:
            assert distance_of_colours(first, second, lacking) > 35
    assert distance_of_colours(theme.nothing, theme.faint, lacking) > 15
    assert distance_of_colours(theme.pair, theme.query, lacking) > 25


def test_score_over_positions_and_over_logits():
    figure = sd.plot(P.alibi_window(8, 6), 20, head=2)
    values = image(figure.axes[2])
    for q in range(20):
        for kv in range(20):
            shown = -0.125 * (q - kv) if q - 6 < kv <= q else np.nan
            assert np.isclose(values[q, kv], shown, equal_nan=True)
    (curve,) = [line for line in sd.plot(P.softcap(10), 8).axes[0].lines if line.get_label() == "modified"]
    assert np.allclose(curve.get_ydata(), 10 * np.tanh(np.asarray(curve.get_xdata()) / 10))


def test_score_tables_are_only_wanted_for_the_score():
    pattern = sd.attend(P.causal(), score=P.t5_bias(), sink=sd.table("sinks", learned=True)[sd.h])
    assert len(sd.plot(pattern, 32).axes) == 2
    assert sd.plot(pattern, 32, t5_bias=torch.randn(32, 1)).axes[2].get_title() == "logit, where q · k = 0"
    with pytest.raises(sd.TableError, match="the score panel wants t5_bias"):
        sd.plot(pattern, 32, panels=["score"])


def test_bound_tables_are_found():
    mask = P.packed().bind(doc=torch.arange(20) // 7)
    assert image(sd.plot(mask, 20).axes[0]).sum() == 28 + 28 + 21


def test_into_axes_of_ones_own():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert sd.plot(P.causal(), 16, ax=left) is figure
    assert sd.plot(P.causal(), 16, ax=[left, right], panels=("pairs", "tiles")) is figure
    assert right.get_title().startswith("tiles")
    assert figure.get_suptitle() == ""


def test_figure_options(tmp_path):
    figure = sd.plot(P.causal(), 16, figsize=(5, 4), title="mine", panels="pairs")
    assert figure.get_suptitle() == "mine" and figure.get_size_inches().tolist() == [5, 4]
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "picture.svg")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": -1}, sd.ShapeError, "head must be a whole number of at least 0; got -1"),
        ({"head": 3, "window": torch.ones(3)}, sd.TableError, "window"),
        ({"head": 3, "window": torch.ones(3, dtype=torch.int64)}, sd.ShapeError, "head=3, but the table 'window' has 3"),
        ({}, sd.TableError, "missing table window"),
        ({"window": torch.ones(1, dtype=torch.int64), "doc": 1}, sd.TableError, "unexpected argument doc"),
        ({"window": torch.ones(1, dtype=torch.int64), "block_size": 0}, sd.ShapeError, "block_size must be"),
        ({"window": torch.ones(1, dtype=torch.int64), "kv_len": 0}, sd.ShapeError, "kv_len must be"),
        ({"window": torch.ones(1, dtype=torch.int64), "panels": "mask"}, sd.PatternError, "panels must be some of"),
        ({"window": torch.ones(1, dtype=torch.int64), "panels": "score"}, sd.PatternError, "does not modify the score"),
        ({"window": torch.ones(1, dtype=torch.int64), "ax": 3}, sd.PatternError, "ax must be 1 matplotlib axes"),
        (
            {"window": torch.ones(1, dtype=torch.int64), "theme": "blue"},
            sd.PatternError,
            "theme must be 'light' or 'dark'; got 'blue'",
        ),
        ({"window": torch.ones(1, dtype=torch.int64), "query": 3}, sd.PatternError, r"give grid=\(rows, columns\) too"),
        ({"window": torch.ones(1, dtype=torch.int64), "head": []}, sd.ShapeError, "head names no head"),
        ({"window": torch.ones(1, dtype=torch.int64), "head": [0, -1]}, sd.ShapeError, "head must be a whole number"),
        (
            {"window": torch.ones(9, dtype=torch.int64), "head": [0], "panels": ("pairs", "tiles")},
            sd.PatternError,
            "one panel is drawn",
        ),
        (
            {"window": torch.ones(1, dtype=torch.int64), "grid": (2, 3)},
            sd.PatternError,
            "all 6 patches are the sequence, and q_len says nothing",
        ),
        ({"window": torch.ones(1, dtype=torch.int64), "grid": (4, 4), "panels": "tiles"}, sd.PatternError, "panels says nothing"),
        ({"window": torch.ones(1, dtype=torch.int64), "grid": 16}, sd.ShapeError, r"grid must be \(rows, columns\)"),
        (
            {"window": torch.ones(1, dtype=torch.int64), "grid": (4, 4), "query": (4, 0)},
            sd.ShapeError,
            "query must be a token below 16",
        ),
        (
            {"window": torch.ones(1, dtype=torch.int64), "grid": (4, 4), "coordinates": 3},
            sd.PatternError,
            "coordinates must be 2 expressions",
        ),
        (
            {"window": torch.ones(1, dtype=torch.int64), "grid": (4, 4), "coordinates": (sd.q_idx // 4, sd.q_idx)},
            sd.PatternError,
            "outside of the grid",
        ),
        (
            {"window": torch.ones(1, dtype=torch.int64), "grid": (4, 4), "coordinates": (sd.q_idx // 4, sd.q_idx * 0)},
            sd.PatternError,
            "two tokens at one place",
        ),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        sd.plot(P.sliding_window(sd.table("window")[sd.h]), 16, **options)


def test_a_thing_that_is_no_pattern():
    with pytest.raises(sd.PatternError, match="the pattern of plot"):
        sd.plot(lambda b, h, q, kv: q >= kv, 16)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(sd.UnsupportedError, match=r"pip install '.\[plots\]' in a checkout"):
        sd.plot(P.causal(), 16)


def test_pyplot_is_left_alone():
    code = "import sys, sparsedsl as sd; sd.plot(sd.patterns.causal(), 16).savefig('/dev/null', format='png')"
    subprocess.run([sys.executable, "-c", code + "; assert 'matplotlib.pyplot' not in sys.modules"], check=True)
