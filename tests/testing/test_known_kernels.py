"""The kit on kernels that people use: torch's own attention and FlexAttention, with the limits that they have."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sparsedsl as sd
from sparsedsl import testing as kit

CAUSAL = sd.kv_idx <= sd.q_idx
SDPA = torch.nn.functional.scaled_dot_product_attention


def torch_causal(q, k, v, scale=None):
    """torch's own, whose ``is_causal`` stands rows at 0, 1, ..."""
    return SDPA(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def torch_full(q, k, v, scale=None):
    """torch's own without a mask."""
    return SDPA(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


# Its dense way rounds logits and weights to the dtype of the inputs.
CLAIMS = {"grad": "qkv", "rounds": ("p", "out", "q", "s"), "head_dims": [(8, 8), (16, 16), (32, 32)]}


@pytest.mark.parametrize(
    ("fn", "implements", "more"),
    [(torch_causal, CAUSAL, {"lengths": "square"}), (torch_full, sd.kv_idx >= 0, {})],
    ids=["causal", "full"],
)
def test_torch_attention_is_right_within_its_limits(fn, implements, more):
    kernel = kit.Kernel(fn, implements=implements, dtypes="float32", **CLAIMS, **more)
    report = kit.check(kernel, examples=10, seed=0)
    assert report.ok, str(report)


def test_torch_attention_in_bfloat16_is_right():
    kernel = kit.Kernel(torch_causal, implements=CAUSAL, dtypes="bfloat16", lengths="square", **CLAIMS)
    report = kit.check(kernel, examples=12, seed=0, only="NUM")
    assert report.ok, str(report)


def test_is_causal_stands_rows_at_the_first_keys():
    kernel = kit.Kernel(torch_causal, implements=CAUSAL, dtypes="float32", head_dims=[(8, 8)], offset="last")
    failure = kit.check(kernel, examples=20, seed=0, only="NUM").failures[0]
    assert failure.case.q_len != failure.case.kv_len
    assert failure.guess == "rows stand at 0 (top-left alignment) in the mask"


def test_a_mask_of_torch_is_right_with_rows_anywhere():
    def masked(q, k, v, q_offset=0):
        seen = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + q_offset
        return SDPA(q, k, v, attn_mask=seen, enable_gqa=True)

    kernel = kit.Kernel(masked, implements=CAUSAL, dtypes="float32", head_dims=[(8, 8)], rounds=("p", "out", "q", "s"))
    report = kit.check(kernel, examples=10, seed=0, only=("NUM", "EMPTY", "CAUS", "CUT", "STRIDE", "PERM"))
    assert report.ok, str(report)


@pytest.mark.slow
def test_flex_attention_with_a_block_mask_is_right():
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def flex(q, k, v):
        size = q.shape[2], k.shape[2]
        if size not in masks:
            masks[size] = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < 20), None, None, *size, device="cpu")
        return compiled(q, k, v, block_mask=masks[size], enable_gqa=q.shape[1] != k.shape[1])

    window = CAUSAL & (sd.q_idx - sd.kv_idx < 20)
    kernel = kit.Kernel(
        flex, implements=window, dtypes="float32", lengths=[(32, 32), (65, 65)], head_dims=[(16, 16)], group=(1, 2)
    )
    with torch.no_grad():
        report = kit.check(kernel, examples=6, seed=0, only=("PURE", "REPEAT", "NUM", "MASS", "CAUS", "POIS"))
    assert report.ok, str(report)
    shifted = kit.Kernel(
        flex, implements=CAUSAL & (sd.q_idx - sd.kv_idx < 19), dtypes="float32", lengths=[(32, 32)], head_dims=[(16, 16)]
    )
    assert kit.check(shifted, examples=3, seed=0, only="NUM", locate=False).failures
