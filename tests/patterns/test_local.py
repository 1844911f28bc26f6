"""Windows, chunks and strides against their definitions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsedsl as sd

lengths = st.integers(1, 24)
counts = st.integers(1, 12)


@given(lengths, lengths)
def test_full_and_causal(assert_pairs, q_len, kv_len):
    assert_pairs(sd.patterns.full(), lambda q, kv: True, q_len, kv_len)
    assert_pairs(sd.patterns.causal(), lambda q, kv: kv <= q, q_len, kv_len)


@given(lengths, lengths, counts)
def test_sliding_window_counts_the_query_itself(assert_pairs, q_len, kv_len, w):
    assert_pairs(sd.patterns.sliding_window(w), lambda q, kv: kv in range(q - w + 1, q + 1), q_len, kv_len)
    assert_pairs(
        sd.patterns.sliding_window(w, two_sided=True),
        lambda q, kv: kv in range(q - w + 1, q + w),
        q_len,
        kv_len,
    )


def test_a_row_of_a_window_has_w_keys(values):
    rows = values(sd.patterns.sliding_window(5), 20, 20).sum(1)
    assert rows.tolist() == [1, 2, 3, 4] + [5] * 16


@given(st.lists(counts, min_size=1, max_size=4))
def test_window_of_each_head(assert_pairs, windows):
    mask = sd.patterns.sliding_window(sd.table("window")[sd.h])
    for h, w in enumerate(windows):
        assert_pairs(mask, lambda q, kv, w=w: q - w < kv <= q, 16, h=h, window=torch.tensor(windows))


@given(lengths, lengths, st.integers(1, 6), st.integers(1, 5))
def test_dilated(assert_pairs, q_len, kv_len, w, step):
    back = [step * i for i in range(w)]
    assert_pairs(sd.patterns.dilated(w, step), lambda q, kv: q - kv in back, q_len, kv_len)
    assert_pairs(sd.patterns.dilated(w, step, two_sided=True), lambda q, kv: abs(q - kv) in back, q_len, kv_len)


@given(lengths, lengths, st.integers(1, 8), st.integers(1, 8))
def test_strided(assert_pairs, q_len, kv_len, step, local):
    def allowed(q, kv, local=local):
        return kv <= q and (q - kv < local or (q - kv) % step == 0)

    assert_pairs(sd.patterns.strided(step, local=local), allowed, q_len, kv_len)
    assert_pairs(sd.patterns.strided(step), lambda q, kv: allowed(q, kv, step), q_len, kv_len)


@given(lengths, lengths, st.integers(1, 8), st.data())
def test_strided_fixed(assert_pairs, q_len, kv_len, step, data):
    summary = data.draw(st.integers(1, step))
    ends = {block * step + i for block in range(24) for i in range(step - summary, step)}

    def allowed(q, kv):
        return kv <= q and (kv in ends or kv in range(q - q % step, q + 1))

    assert_pairs(sd.patterns.strided_fixed(step, summary=summary), allowed, q_len, kv_len)


@given(lengths, lengths, st.integers(1, 9))
def test_chunked(assert_pairs, q_len, kv_len, size):
    assert_pairs(sd.patterns.chunked(size), lambda q, kv: q - q % size <= kv <= q, q_len, kv_len)


def test_chunk_of_each_head(assert_pairs):
    mask = sd.patterns.chunked(sd.table("size", values_in=(1, 64))[sd.h])
    for h, size in enumerate([1, 3, 8]):
        assert_pairs(mask, lambda q, kv, size=size: q - q % size <= kv <= q, 20, h=h, size=torch.tensor([1, 3, 8]))
