"""The test kit on a Triton kernel of somebody else's, interpreted: a right one holds, and with a fault it is found and named."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import sparsedsl as sd
from sparsedsl import testing as kit

CAUSAL = sd.kv_idx <= sd.q_idx


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
    stride_vn, heads, group, rows, keys, q_offset, scale,
    WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, RESCALED: tl.constexpr,
):  # fmt: skip
    m, bh = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1)
    b, h = bh // heads, bh % heads
    d = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + m[:, None] * stride_qm + d[None, :], mask=m[:, None] < rows, other=0.0)
    peak = tl.full([BM], -1.0e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    k_ptr += b * stride_kb + (h // group) * stride_kh
    v_ptr += b * stride_vb + (h // group) * stride_vh
    for start in range(0, keys, BN):
        n = start + tl.arange(0, BN)
        there = n < keys
        inside = there[:, None] if MASKED else (n[:, None] < start + BN)
        k = tl.load(k_ptr + n[:, None] * stride_kn + d[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + n[:, None] * stride_vn + d[None, :], mask=inside, other=0.0)
        s = tl.sum(q[:, None, :] * k[None, :, :], 2) * scale
        seen = (n[None, :] <= m[:, None] + q_offset) & (there[None, :] if MASKED else (n[None, :] >= 0))
        s = tl.where(seen, s, -1.0e30)
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.where(seen, tl.exp(s - higher[:, None]), 0.0)
        fade = tl.exp(peak - higher)
        total = total * fade + tl.sum(p, 1)
        if RESCALED:
            acc = acc * fade[:, None]
        acc += tl.sum(p[:, :, None] * v[None, :, :], 1)
        peak = higher
    none = total == 0.0
    safe = tl.where(none, 1.0, total)
    place = bh * rows + m
    tl.store(out_ptr + place[:, None] * WIDTH + d[None, :], acc / safe[:, None], mask=m[:, None] < rows)
    tl.store(lse_ptr + place, tl.where(none, float("-inf"), peak + tl.log(safe)), mask=m < rows)


def attend(q, k, v, q_offset=0, scale=None, *, masked=True, rescaled=True):
    """``(out, lse)`` of causal attention; last strides must be 1."""
    if any(x.stride(3) != 1 for x in (q, k, v)):
        raise ValueError("the last stride must be 1")
    (batch, heads, rows, width), keys = q.shape, k.shape[2]
    out, lse = q.new_empty(batch, heads, rows, width), torch.empty(batch, heads, rows)
    scale = width**-0.5 if scale is None else scale
    strides = (x.stride(i) for x in (q, k, v) for i in range(3))
    _attend[(triton.cdiv(rows, 16), batch * heads)](
        q, k, v, out, lse, *strides, heads, heads // k.shape[1], rows, keys, q_offset, scale,
        WIDTH=width, BM=16, BN=16, MASKED=masked, RESCALED=rescaled,
    )  # fmt: skip
    return out, lse


# Interpreted, every program of a grid takes its time: few lengths.
CLAIMS = {"implements": CAUSAL, "lse": True, "dtypes": "float32", "head_dims": [(16, 16)], "tiles": (16, 16), "group": (1, 2)}
CLAIMS |= {"lengths": (1, 2, 5, 17, 33)}


def test_a_right_kernel_holds():
    report = kit.check(
        kit.Kernel(attend, **CLAIMS), examples=4, seed=0, seconds=600, only=("PURE", "NUM", "LSE", "CAUS", "MERGE")
    )
    assert report.ok, str(report)


def rushed(q, k, v, q_offset=0, scale=None):
    return attend(q, k, v, q_offset, scale, rescaled=False)


def unmasked(q, k, v, q_offset=0, scale=None):
    return attend(q, k, v, q_offset, scale, masked=False)


@pytest.mark.parametrize(("fn", "words"), [(rushed, "is not rescaled"), (unmasked, "")])
def test_a_fault_is_found(fn, words):
    failure = kit.check(kit.Kernel(fn, **CLAIMS), examples=12, seed=0, only="NUM", seconds=600).failures[0]
    assert failure.case.kv_len <= 33 and failure.case.batch == failure.case.heads == 1
    assert words in failure.guess
