"""FlexAttention against the reference: one compile a pattern for all lengths, batches, offsets and layouts; refusals with a way out."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.testing import assert_matches_reference, tensor

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)

# Name -> pattern, query heads, key/value heads, head_dim, head_dim_v. One C++ compile each, shared by all shapes below.
PATTERNS = {
    "window and sinks": (sd.attend(causal & ((q_idx - kv_idx < 100) | (kv_idx < 4))), 6, 2, 32, 24),
    "documents, soft cap": (sd.attend(causal & (doc[q_idx] == doc[kv_idx]), score=sd.tanh(sd.score / 5) * 5), 3, 1, 16, 16),
    "learned bias, sink": (
        sd.attend(causal & (q_idx - kv_idx < 90), score=sd.score + bias[h, q_idx - kv_idx], sink=sink[h]),
        4,
        4,
        40,
        40,
    ),
}
# q_len, kv_len, q_offset, batch
SHAPES = [
    (300, 300, 0, 2),
    (301, 301, 0, 1),
    (1, 400, 399, 1),
    (77, 500, 300, 3),
    (129, 129, 0, 2),
    (2, 640, 638, 1),
    (1, 1, 0, 1),
]


def tables_of(pattern, length, heads):
    made = {"doc": torch.arange(length) // 60, "bias": tensor(heads, 90, seed=8), "sink": tensor(heads, seed=9)}
    return {name: made[name] for name in pattern.tables}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_length_matches_the_reference_with_one_compile(name):
    pattern, heads, kv_heads, dim, dim_v = PATTERNS[name]
    attn = sd.compile(pattern, backend="flex")
    counters.clear()
    for q_len, kv_len, offset, batch in SHAPES:
        q = tensor(batch, heads, q_len, dim, seed=1)
        k = tensor(batch, kv_heads, kv_len, dim, seed=2, layout="transposed")
        v = tensor(batch, kv_heads, kv_len, dim_v, seed=3)
        with torch.no_grad():
            assert_matches_reference(attn, q, k, v, q_offset=offset, **tables_of(pattern, max(kv_len, q_len + offset), heads))
    assert counters["stats"]["unique_graphs"] <= 1, dict(counters["stats"])


def test_lists_decide_what_is_visited():
    """A list that lacks a tile changes the result: the kernel follows the lists, not the mask alone."""
    attn = sd.compile(PATTERNS["window and sinks"][0], backend="flex")
    q, k, v = tensor(1, 6, 300, 32, seed=1), tensor(1, 2, 300, 32, seed=2), tensor(1, 2, 300, 24, seed=3)
    whole = attn(q, k, v)
    lists = attn.lists(Domain(300, 300), (128, 128))
    lists.partial.columns[-1] = 0  # the last row of tiles no longer visits its own keys
    attn.static.runner("flex")._packed = Cache()
    assert not torch.equal(attn(q, k, v)[:, :, 256:], whole[:, :, 256:])
    assert torch.equal(attn(q, k, v)[:, :, :256], whole[:, :, :256])


def test_rows_without_keys_give_zero():
    attn = sd.compile(causal & (q_idx - kv_idx >= 3), backend="flex")
    q, k, v = (tensor(1, 2, 40, 16, seed=s) for s in range(3))
    out = attn(q, k, v)
    assert not bool(out[:, :, :3].any()) and bool(out.isfinite().all())


@pytest.mark.parametrize(
    ("words", "change", "text"),
    [
        (
            {},
            lambda t: t.requires_grad_(),
            "FlexAttention has no backward pass on CPU. Use backend='tiled'.*'reference'.*torch.no_grad",
        ),
        (
            {"return_lse": True},
            lambda t: t,
            "FlexAttention does not return the LSE on CPU. Use backend='tiled'.*backend='reference'",
        ),
        ({}, lambda t: t.double(), "FlexAttention has no float64. Use backend='tiled'.*backend='reference'.*q.float"),
    ],
    ids=["gradients", "lse", "float64"],
)
def test_what_flex_cannot_do_names_the_way_out(words, change, text):
    q, k, v = (change(tensor(1, 2, 40, 16, seed=s)) for s in range(3))
    with pytest.raises(sd.UnsupportedError, match=text):
        sd.compile(causal, backend="flex")(q, k, v, **words)
