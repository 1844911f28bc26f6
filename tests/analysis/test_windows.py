"""Cells of a window are what all of their pairs say, wherever the window lies, and a window of a million tokens is quick."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.analysis.windows import LOOKING, Window, window_cells
from sparsedsl.lang.evaluation import evaluate

P = sd.patterns
DOC = (torch.arange(300) * 7 // 50) % 5
TABLES = {"doc": DOC, "chosen": torch.randn(40, 40, generator=torch.Generator().manual_seed(0)) > 0.5}
MASKS = {
    "causal": P.causal(),
    "window": P.sliding_window(13),
    "streaming": P.streaming_llm(20, 3),
    "dilated": P.dilated(6, step=5),
    "strided": P.strided(7),
    "chunked": P.chunked(11),
    "bigbird": P.bigbird(block=8, random_count=2),
    "blocks": P.blocks("chosen", 8),
    "documents, not in order": sd.table("doc")[sd.q_idx] == sd.table("doc")[sd.kv_idx],
    "2-D": P.neighbourhood_2d(15, 20, kernel=5),
    "of lengths": (sd.kv_idx > sd.kv_len // 3) ^ (sd.q_idx > sd.q_len // 2),
    "two windows that touch": ((sd.q_idx - sd.kv_idx >= 0) & (sd.q_idx - sd.kv_idx <= 9))
    | ((sd.q_idx - sd.kv_idx >= 10) & (sd.q_idx - sd.kv_idx <= 40)),
    "nothing": P.causal() & (sd.kv_idx > sd.q_idx),
}


def pairs_of(mask, domain, window):
    rows, keys = torch.tensor(list(window.queries))[:, None], torch.tensor(list(window.keys))[None]
    env = domain.lengths | dict(domain.tables) | {"q_idx": rows, "kv_idx": keys}
    return evaluate(mask.expr, env).broadcast_to(len(window.queries), len(window.keys))


def assert_cells_are_what_pairs_say(found, pairs):
    window = found.window
    for i in range(window.rows):
        for j in range(window.columns):
            part = pairs[i * window.cell[0] : (i + 1) * window.cell[0], j * window.cell[1] : (j + 1) * window.cell[1]]
            kind = FULL if part.all() else PARTIAL if part.any() else EMPTY
            assert not found.certain[i, j] or found.classes[i, j] == kind, (i, j)
            assert found.certain[i, j] or found.classes[i, j] != PARTIAL


@st.composite
def windows(draw, q_offset, rows, keys):
    q_start, kv_start = draw(st.integers(0, rows - 1)), draw(st.integers(0, keys - 1))
    queries = range(q_offset + q_start, q_offset + draw(st.integers(q_start + 1, rows)))
    return Window(queries, range(kv_start, draw(st.integers(kv_start + 1, keys))), draw(st.tuples(*[st.integers(1, 40)] * 2)))


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_cells_are_what_their_pairs_say(name, data):
    q_offset = data.draw(st.integers(0, 60))
    rows, keys = data.draw(st.integers(1, 160)), data.draw(st.integers(1, 200))
    mask = MASKS[name]
    domain = Domain(rows, keys, q_offset, tables={n: TABLES[n] for n in mask.tables} | dict(mask.bound))
    window = data.draw(windows(q_offset, rows, keys))
    with LOOKING.using(few=data.draw(st.sampled_from((0, 1 << 19)))):
        found = window_cells(mask.expr, domain, window)
    assert found.certain.all()
    assert_cells_are_what_pairs_say(found, pairs_of(mask, domain, window))


def test_cells_that_no_points_are_left_for_say_so():
    mask = (sd.q_idx * sd.kv_idx) % 97 <= 94
    domain = Domain(512, 512)
    window = Window(range(0, 512), range(0, 512), (4, 4))
    with LOOKING.using(few=0):
        found = window_cells(mask.expr, domain, window, points=0)
        assert not found.certain.all() and (found.classes[~found.certain] != PARTIAL).all()
        assert_cells_are_what_pairs_say(found, pairs_of(mask, domain, window))
        assert window_cells(mask.expr, domain, window).certain.all()


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        (P.streaming_llm(1024, 1), {(511, 0): PARTIAL, (511, 511): PARTIAL, (511, 300): EMPTY, (0, 1): EMPTY}),
        (P.causal() & (sd.kv_idx % 4096 == 17), {(511, 2): PARTIAL, (511, 3): EMPTY, (2, 511): EMPTY}),
        (P.random_blocks(4096, 4, seed=0), {}),
        (P.causal() & (P.sliding_window(1024) | P.dilated(64, step=8192)), {(511, 511): PARTIAL, (511, 507): PARTIAL}),
    ],
)
def test_a_million_tokens_are_quick_and_nothing_thin_is_lost(mask, places):
    domain = Domain(1 << 20, 1 << 20, tables=dict(mask.bound))
    whole, close = (
        Window(range(1 << 20), range(1 << 20), (2048, 2048)),
        Window(range(900_000, 900_512), range(899_700, 900_212), (1, 1)),
    )
    window_cells(mask.expr, domain, close)
    times = []
    for window in (whole, close):
        start = time.process_time()
        found = window_cells(mask.expr, domain, window)
        times.append(time.process_time() - start)
        if window is whole:
            assert {place: int(found.classes[place]) for place in places} == places
        else:
            assert found.certain.all() and torch.equal(found.classes == FULL, pairs_of(mask, domain, close))
    assert max(times) < 4, times  # of a processor: others may compute beside


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(range(0), range(3), (1, 1)), "queries must be a range of at least one position"),
        (lambda: Window(range(3), range(3), (1, 0)), "cell must be two whole numbers"),
        (lambda: window_cells(P.causal().expr, Domain(4, 4, 2), Window(range(4), range(4), (1, 1))), "reaches beyond queries"),
    ],
)
def test_wrong_windows(make, message):
    with pytest.raises(sd.ShapeError, match=message):
        make()
