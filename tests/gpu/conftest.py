"""A small hand-written module of kernels, in the shape in which the generator returns its own."""

from __future__ import annotations

import pytest

TEXT = """
import triton
import triton.language as tl


@triton.jit
def forward(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_step, kv_step, q_len, kv_len, scale,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    q_step, kv_step = q_step // 8 * 8, kv_step // 8 * 8
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + rows[:, None] * q_step + width[None, :], mask=rows[:, None] < q_len, other=0.0)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(0, kv_len, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + keys[None, :] * kv_step + width[:, None], mask=keys[None, :] < kv_len, other=0.0)
        logits = tl.dot(q, k, input_precision=PRECISION) * scale
        logits = tl.where(keys[None, :] <= rows[:, None], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + keys[:, None] * kv_step + width[None, :], mask=keys[:, None] < kv_len, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * q_step + width[None, :], out, mask=rows[:, None] < q_len)
    tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < q_len)


@triton.jit
def delta(lse_ptr, doc_ptr, out_ptr, q_len, BLOCK_M: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    value = tl.load(lse_ptr + rows, mask=rows < q_len, other=0.0) + tl.load(doc_ptr + rows, mask=rows < q_len, other=0)
    tl.store(out_ptr + rows, tl.sin(value).to(out_ptr.dtype.element_ty), mask=rows < q_len)
"""

FORWARD = (
    *((name, "*data") for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")), ("lse_ptr", "*fp32"),
    *((name, "i32") for name in ("q_step", "kv_step", "q_len", "kv_len")), ("scale", "fp32"),
    *((name, "constexpr") for name in ("BLOCK_M", "BLOCK_N", "PRECISION")),
)  # fmt: skip
DELTA = (("lse_ptr", "*fp32"), ("doc_ptr", "*table:doc"), ("out_ptr", "*data"), ("q_len", "i32"), ("BLOCK_M", "constexpr"))


@pytest.fixture(scope="session")
def by_hand():
    """The module for a width of heads: "forward" is two products and a softmax; "delta" has a sine, which needs memory of its own."""
    from sparsedsl.codegen.to_triton import Argument, KernelSource, TritonSource
    from sparsedsl.lang.pattern import as_pattern

    kernels = tuple(
        KernelSource(name, tuple(Argument(*argument) for argument in arguments), f"{name}, by hand")
        for name, arguments in (("forward", FORWARD), ("delta", DELTA))
    )

    def write(width):
        return TritonSource(as_pattern(True), text=TEXT.replace("WIDTH", str(width)), kernels=kernels, table_kinds={"doc": "int"})

    return write
