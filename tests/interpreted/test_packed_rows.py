"""Rows of many requests on generated kernels: what each request gets by itself, also where no length is looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sparsedsl as sd
from sparsedsl.execute.packed_calls import PackedAttention
from sparsedsl.runtime.packed_rows import KeyRows, requests_of

ENDS, KEY_ENDS = torch.tensor([0, 5, 6, 8]), torch.tensor([0, 20, 37, 39])
NEAR = sd.patterns.sliding_window(7)
LEARNED = sd.attend(NEAR, score=sd.score + sd.table("bias", learned=True)[sd.h, sd.q_idx - sd.kv_idx])
# Of sums of 16 products and of 7 weighted values, all about 1, in float32.
CLOSE = {"rtol": 0.0, "atol": 64 * 2**-23}


@pytest.mark.parametrize("looked_at", [True, False])
def test_rows_of_requests(looked_at: bool) -> None:
    made = torch.Generator().manual_seed(1)
    shapes = (8, 2, 16), (40, 1, 16), (40, 1, 16), (2, 7)
    exact = [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        q, k, v, bias = leaves = [x.to(dtype).requires_grad_() for x in exact]
        if looked_at or backend == "reference":
            out = sd.compile(LEARNED, backend=backend).ragged(q, k, v, ENDS, KEY_ENDS, bias=bias)
        else:
            packed = PackedAttention(LEARNED, backend)
            requests = replace(requests_of(ENDS, KEY_ENDS.diff(), None, len(q), q.device), looked_at=False)
            keys = KeyRows.behind_each_other(KEY_ENDS, len(k), packed.packing.span)
            rows = (x.transpose(0, 1)[None] for x in (q, k, v))
            told = packed.told(requests, keys, q.device)
            out = packed.attend(*rows, requests, told, {"bias": bias}, scale=None, lse=False)[0][0].transpose(0, 1)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    torch.testing.assert_close([x.float() for x in results[0]], results[1], **CLOSE)
