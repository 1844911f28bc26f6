"""Sinks, prefixes and global tokens against their definitions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsedsl as sd

lengths = st.integers(1, 20)
counts = st.integers(0, 22)


@given(lengths, lengths, counts)
def test_anchors(assert_pairs, q_len, kv_len, n):
    first = set(range(n))
    assert_pairs(sd.patterns.sinks(n), lambda q, kv: kv in first and kv <= q, q_len, kv_len)
    assert_pairs(sd.patterns.prefix(n), lambda q, kv: kv in first or kv <= q, q_len, kv_len)
    assert_pairs(sd.patterns.global_tokens(n), lambda q, kv: q in first or kv in first, q_len, kv_len)


@given(st.lists(counts, min_size=1, max_size=3))
def test_prefix_of_each_batch_entry(assert_pairs, prefix):
    mask = sd.patterns.prefix(sd.table("prefix")[sd.b])
    for b, n in enumerate(prefix):
        assert_pairs(mask, lambda q, kv, n=n: kv < n or kv <= q, 14, b=b, prefix=torch.tensor(prefix))


def test_no_prefix_is_causal_and_sinks_never_look_ahead():
    assert sd.patterns.prefix(0).same_as(sd.patterns.causal())
    mask = sd.patterns.sliding_window(4) | sd.patterns.sinks(8)
    assert not any(bool(mask.expr.subs({sd.q_idx.expr: q, sd.kv_idx.expr: kv})) for q in range(12) for kv in range(q + 1, 12))
