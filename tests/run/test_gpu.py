"""On a CUDA device: the flex and tiled lowerings, forward and backward, LSE, sinks and learned tables, against the fp64 reference."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.testing import assert_matches_reference

pytestmark = pytest.mark.gpu

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)

PATTERNS = {
    "causal": sd.attend(causal),
    "window and sinks": sd.attend(causal & ((q_idx - kv_idx < 200) | (kv_idx < 4))),
    "documents": sd.attend(causal & (doc[q_idx] == doc[kv_idx])),
    "soft cap": sd.attend(causal & (q_idx - kv_idx < 200), score=sd.tanh(sd.score / 5) * 5),
    "learned bias": sd.attend(causal & (q_idx - kv_idx < 200), score=sd.score + bias[h, q_idx - kv_idx]),
    "sink": sd.attend(causal & (q_idx - kv_idx < 200), sink=sink[h]),
    "empty rows": sd.attend(causal & (q_idx - kv_idx > 100)),
}


def tables_of(pattern, length, heads):
    made = {
        "doc": torch.arange(length, device="cuda") // 300,
        "bias": torch.randn(heads, 200, device="cuda"),
        "sink": torch.randn(heads, device="cuda"),
    }
    return {name: made[name] for name in pattern.tables}


@pytest.mark.parametrize("backend", ["flex", "tiled"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_forward_and_backward(name, dtype, heads, backend):
    pattern, length = PATTERNS[name], 1000
    q = torch.randn(2, heads[0], length, 64, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, heads[1], length, 64, device="cuda", dtype=dtype) for _ in range(2))
    assert_matches_reference(sd.compile(pattern, backend=backend), q, k, v, **tables_of(pattern, length, heads[0]))


@pytest.mark.parametrize("backend", ["flex", "tiled"])
@pytest.mark.parametrize("name", PATTERNS)
def test_decode_reads_the_same_rows(name, backend):
    pattern, length = PATTERNS[name], 700
    q = torch.randn(1, 4, length, 64, device="cuda")
    k, v = (torch.randn(1, 4, length, 64, device="cuda") for _ in range(2))
    attn, tables = sd.compile(pattern, backend=backend), tables_of(pattern, length, 4)
    whole = attn(q, k, v, **tables)
    last = attn(q[:, :, -1:], k, v, q_offset=length - 1, **tables)
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-3, atol=1e-3)


def test_lists_on_the_device_equal_those_on_cpu():
    ids = (torch.arange(5000) // 300).to(torch.int32)
    for mask in (causal & (doc[q_idx] == doc[kv_idx]), (doc[q_idx] == doc[kv_idx]) & ((q_idx * kv_idx) % 3 == 0)):
        there = classify(mask.expr, Domain(5000, 5000, tables={"doc": ids.cuda()}))
        here = classify(mask.expr, Domain(5000, 5000, tables={"doc": ids}))
        assert there.full.columns.is_cuda
        assert torch.equal(there.classes().cpu(), here.classes())
