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
from sparsedsl import plotting
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.strip_picture import MASKED

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
        masked = len(collection.get_paths()) == 0 or to_hex(collection.get_facecolor()[0]) == MASKED
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
    share, kinds = image(figure.axes[0]), image(figure.axes[1])
    pairs = allowed(length, length, 0, lambda q, kv: kv <= q and (kv < 4 or kv > q - 100))
    cell = -(-length // (16 * plotting.CELLS)) * 16
    for (i, j), value in np.ndenumerate(share):
        wanted = pairs[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].mean()
        assert value == pytest.approx(max(wanted, 1e-4) if wanted else 0)
        assert kinds[i, j] == (FULL if wanted == 1 else PARTIAL if wanted else EMPTY)
    assert "counted" in caption(figure)


def test_a_million_tokens():
    """In bounded time and memory; no window, however thin, is lost."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    figure = sd.plot(P.streaming_llm(1024, 4), 2**20)
    assert time.perf_counter() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024
    share, kinds = image(figure.axes[0]), image(figure.axes[1])
    wanted = np.eye(256, dtype=bool) | np.eye(256, k=-1, dtype=bool)
    wanted[:, 0] = True
    assert np.array_equal(share > 0, wanted) and np.array_equal(kinds == PARTIAL, wanted)
    assert "sampled at" in caption(figure) and "empty and full ones are exact" in caption(figure)
    assert "67,108,864 tiles: 57,316 full, 24,559 partial, 67,026,989 empty" in caption(figure)
    assert share[100, 100] == pytest.approx(1024 / 4096, rel=0.2)


def test_patterns_that_need_trying_are_sampled_and_the_caption_says_so():
    start = time.perf_counter()
    figure = sd.plot(P.random_blocks(256, 4, seed=0), 2**16)
    assert time.perf_counter() - start < 60
    assert "sampled picture" in caption(figure) and "classes sampled" in caption(figure)
    kinds = image(figure.axes[1])
    assert set(kinds.flatten().tolist()) == {EMPTY, FULL}  # a cell of the picture is a block of the pattern
    assert ((kinds == FULL).sum(axis=1) <= 4).all()


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
