"""Generated kernels, interpreted, whose integers lie at the ends of int64: what Python's integers give, or a refusal of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event, given, settings

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.testing.far_integers import far_cases

INT64 = torch.iinfo(torch.int64)
LENGTH = 40
causal = kv_idx <= q_idx
doc, end, start = sd.table("doc"), sd.table("end"), sd.table("start")


def assert_attends(pattern: Any, allowed: torch.Tensor, q_offset: int = 0, **tables: torch.Tensor) -> None:
    """Output, LSE and gradients of the kernels are those of attention over the pairs ``allowed``."""
    rows, keys = allowed.shape
    q, k, v = (torch.randn(1, 1, n, 16).requires_grad_() for n in (rows, keys, keys))
    out, lse = sd.compile(pattern, backend="triton")(q, k, v, q_offset=q_offset, return_lse=True, **tables)
    logits = (q @ k.mT * 16**-0.5).masked_fill(~allowed, float("-inf"))
    wanted = logits.softmax(-1).masked_fill(~allowed, 0.0).nan_to_num(0.0) @ v
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
    full = allowed.any(1)  # torch's softmax gives NaN gradients to rows without keys
    got, right = (torch.autograd.grad(x[:, :, full].square().sum(), (q, k, v)) for x in (out, wanted))
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other.nan_to_num(0.0), atol=1e-3, rtol=1e-3)


@settings(max_examples=6)
@given(far_cases())
def test_kernels_give_what_pythons_integers_give(cases):
    (case,) = cases
    q = torch.zeros(1, 1, case.q_len, 16)
    k = torch.zeros(1, 1, case.kv_len, 16)
    try:
        sd.compile(case.pattern, backend="reference")(q, k, k, q_offset=case.q_offset, **case.own)
    except (sd.TableError, sd.UnsupportedError, sd.ShapeError) as refused:
        event("refused")
        with pytest.raises(type(refused)):
            sd.compile(case.pattern, backend="triton")(q, k, k, q_offset=case.q_offset, **case.own)
        return
    event("run")
    assert_attends(case.pattern, case.allowed(), case.q_offset, **case.own)


def positions(q_offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(LENGTH)[:, None] + q_offset, torch.arange(LENGTH)


def test_documents_and_ends_may_lie_anywhere():
    q, kv = positions()
    ids = torch.where(torch.arange(LENGTH) % 3 == 0, -(2**62) - 1, 2**62)
    assert_attends(causal & (doc[q_idx] == doc[kv_idx]), (kv <= q) & (ids[:, None] == ids), doc=ids)
    assert_attends(causal & (kv_idx < end[q_idx]), kv <= q, end=torch.full((LENGTH,), INT64.max))
    assert_attends(causal & (kv_idx >= start[q_idx]), kv <= q, start=torch.full((LENGTH,), INT64.min))


def test_monotone_documents_are_searched_wherever_they_lie():
    doc = sd.table("doc", monotone=True)
    q, kv = positions()
    for low, high, dtype in ((INT64.min, INT64.max, torch.int64), (-(2**31), 2**31 - 1, torch.int32)):
        ids = torch.tensor([low] * 13 + [0] * 9 + [high] * (LENGTH - 22), dtype=dtype)
        assert_attends(causal & (doc[q_idx] == doc[kv_idx]), (kv <= q) & (ids[:, None] == ids), doc=ids)


def test_the_least_int32_has_an_absolute_value():
    far = torch.where(torch.arange(LENGTH) % 2 == 0, -(2**31), 5).to(torch.int32)
    q, kv = positions()
    assert_attends(causal & (abs(doc[kv_idx]) > 5), (kv <= q) & (far == -(2**31)), doc=far)


@pytest.mark.parametrize("offset", [2**31 - 5, 2**40, 2**60 - LENGTH])
def test_far_positions(offset):
    q, kv = positions(offset)
    doc = sd.table("doc", monotone=True)
    ids = torch.arange(LENGTH) // 7
    assert_attends(q_idx - kv_idx < offset + 9, q - kv < offset + 9, offset)
    assert_attends((doc[kv_idx] >= 2) & (q_idx >= kv_idx + 3), ((ids >= 2) & (q >= kv + 3)), offset, doc=ids)
    assert_attends((q_idx - kv_idx) % 3 == offset % 3, (q - kv) % 3 == offset % 3, offset)
    assert_attends((q_idx - kv_idx) % 3 == 0, (q - kv) % 3 == 0, offset)
    assert_attends((q_idx // 4 + kv_idx) % 3 == 1, (q // 4 + kv) % 3 == 1, offset)
