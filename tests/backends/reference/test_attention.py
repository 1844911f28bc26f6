"""The reference defines the meaning, so it is held against things written independently: torch's SDPA and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, patterns, shapes, tables_for, tensor

causal = kv_idx <= q_idx


def by_loops(pattern, q, k, v, offset, tables):
    """One query at a time in Python floats: out and lse."""
    batch, heads, rows, dim = q.shape
    group = heads // k.shape[1]
    scale = pattern.scale or dim**-0.5
    out, lse = (
        torch.zeros(batch, heads, rows, v.shape[3], dtype=torch.float64),
        torch.zeros(batch, heads, rows, dtype=torch.float64),
    )
    for b in range(batch):
        for head in range(heads):
            keys, values = k[b, head // group], v[b, head // group]
            for row in range(rows):
                env = {"b": b, "h": head, "q_idx": row + offset, "q_len": rows + offset, "kv_len": k.shape[2], **tables}
                logits, kept = [], []
                for j in range(k.shape[2]):
                    if bool(evaluate(pattern.mask.expr, {**env, "kv_idx": j})):
                        dot = sum(x * y for x, y in zip(q[b, head, row].tolist(), keys[j].tolist(), strict=True)) * scale
                        score = torch.tensor(dot, dtype=torch.float64)
                        logits.append(float(evaluate(pattern.score.expr, {**env, "kv_idx": j, "score": score})))
                        kept.append(values[j])
                if pattern.sink is not None:
                    logits.append(float(evaluate(pattern.sink.expr, env)))
                    kept.append(torch.zeros_like(values[0]))
                top = max(logits, default=-math.inf)
                weights = [math.exp(x - top) for x in logits] if top > -math.inf else []
                total = sum(weights)
                lse[b, head, row] = top + math.log(total) if total else -math.inf
                for weight, value in zip(weights, kept, strict=False):
                    out[b, head, row] += weight / total * value
    return out, lse


@given(data=st.data())
@settings(max_examples=60)
def test_against_loops(data):
    pattern = data.draw(patterns(depth=2))
    group, kv_heads = data.draw(st.sampled_from(((1, 1), (2, 1), (3, 2))))
    rows, kv_len, offset = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from((0, 2))))
    case = AttentionCase(batch=2, heads=group * kv_heads, kv_heads=kv_heads, q_len=rows, kv_len=kv_len, q_offset=offset)
    tables = {n: t.double() if t.is_floating_point() else t for n, t in data.draw(tables_for(pattern, case)).items()}
    q = tensor(2, group * kv_heads, rows, 4, seed=1, dtype=torch.float64)
    k, v = (tensor(2, kv_heads, kv_len, d, seed=s, dtype=torch.float64) for d, s in ((4, 2), (3, 3)))
    try:
        out, lse = sd.compile(pattern, backend="reference")(q, k, v, q_offset=offset, return_lse=True, **tables)
    except sd.TableError:
        return  # a table that is too short for an allowed pair is refused, not read
    wanted, wanted_lse = by_loops(pattern, q, k, v, offset, tables)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 2), (5, 1)])
def test_against_sdpa(dtype, heads, kv_heads):
    q, k, v = tensor(2, heads, 33, 16, seed=0), tensor(2, kv_heads, 33, 16, seed=1), tensor(2, kv_heads, 33, 16, seed=2)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    got = sd.compile(causal, backend="reference")(q.to(dtype), k.to(dtype), v.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol={torch.bfloat16: 3e-2, torch.float32: 2e-6}.get(dtype, 1e-12))


def test_empty_rows_give_zero_minus_infinity_and_no_gradient():
    mask = causal & (q_idx - kv_idx >= 3)
    q, k, v = (tensor(1, 2, 8, 4, seed=s, dtype=torch.float64).requires_grad_() for s in range(3))
    out, lse = sd.compile(mask, backend="reference")(q, k, v, return_lse=True)
    assert torch.equal(out[:, :, :3], torch.zeros(1, 2, 3, 4, dtype=torch.float64))
    assert bool((lse[:, :, :3] == -math.inf).all()) and bool(lse[:, :, 3:].isfinite().all())
    (out.sum() + lse[:, :, 3:].sum()).backward()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v)) and not bool(q.grad[:, :, :3].any())


def test_gradients_by_finite_differences():
    bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)
    pattern = sd.attend(causal & (q_idx - kv_idx < 4), score=sd.tanh(sd.score) * 3 + bias[h, q_idx - kv_idx], sink=sink[h])
    attn = sd.compile(pattern, backend="reference")
    inputs = [
        tensor(1, 4, 6, 3, seed=0),
        tensor(1, 2, 6, 3, seed=1),
        tensor(1, 2, 6, 2, seed=2),
        tensor(4, 4, seed=3),
        tensor(4, seed=4),
    ]
    inputs = [t.double().requires_grad_() for t in inputs]

    def call(q, k, v, bias, sink):
        return attn(q, k, v, bias=bias, sink=sink, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs)


def test_extreme_logits_stay_finite():
    q, k, v = tensor(1, 1, 9, 4, seed=0) * 1e4, tensor(1, 1, 9, 4, seed=1) * 1e2, tensor(1, 1, 9, 4, seed=2)
    out, lse = sd.compile(causal, backend="reference")(q, k, v, return_lse=True)
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


def test_masked_pairs_do_not_leak_through_score_functions():
    """log of a non-positive logit is NaN, but only where the mask drops it."""
    pattern = sd.attend(kv_idx == q_idx, score=sd.log(sd.score))
    q = torch.eye(4, dtype=torch.float64)[None, None].clone().requires_grad_()
    k = (torch.eye(4, dtype=torch.float64) * 3 - 1)[None, None]
    out = sd.compile(pattern, backend="reference")(q, k, k)
    out.sum().backward()
    assert bool(out.isfinite().all()) and bool(q.grad.isfinite().all())


@given(case=shapes(max_len=20), data=st.data())
@settings(max_examples=30)
def test_offset_is_a_slice_of_one_shot(case, data):
    pattern = data.draw(patterns(depth=2, tables=False))
    if {s.name for e in pattern.exprs for s in e.free_symbols} & {"q_len", "kv_len"}:
        return  # a length is another length in a part of the sequence
    length = case.kv_len
    attn = sd.compile(pattern, backend="reference")
    q = tensor(case.batch, case.heads, length, case.head_dim, seed=0, dtype=torch.float64)
    k, v = tensor(*case.k_shape, seed=1, dtype=torch.float64), tensor(*case.v_shape, seed=2, dtype=torch.float64)
    start = data.draw(st.integers(0, length - 1))
    whole, lse = attn(q, k, v, return_lse=True)
    part, part_lse = attn(q[:, :, start:], k, v, q_offset=start, return_lse=True)
    torch.testing.assert_close(part, whole[:, :, start:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part_lse, lse[:, :, start:], rtol=1e-12, atol=1e-12)
