"""A decode step: what one query gets is what the reference gives it, and no schedule is made for its length."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, q_len, score
from sparsedsl.backends.tiled import attention, decoding
from sparsedsl.backends.tiled.limits import LIMITS

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
WINDOW = CAUSAL & (q_idx - kv_idx < 9)
bias = sd.table("bias", learned=True)
chosen = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2)

STATIC: dict[str, Any] = {
    "causal": CAUSAL,
    "window": WINDOW,
    "sinks": CAUSAL & ((q_idx - kv_idx < 9) | (kv_idx < 3)),
    "neighbours": CAUSAL & ((q_idx - kv_idx < 9) | ((q_idx - kv_idx >= 9) & (q_idx - kv_idx < 12))),
    "only some queries": CAUSAL & (q_idx % 2 == 0),
    "future": kv_idx > q_idx,
    "ALiBi": sd.attend(WINDOW, score=score - (q_idx - kv_idx) * 0.25 * (h + 1)),
    "bias of -inf": sd.attend(CAUSAL, score=score + sd.where(kv_idx % 2 == 0, 0.0, -float("inf"))),
    "soft cap": sd.attend(WINDOW, score=5 * sd.tanh(score / 5)),
    "general": sd.attend(WINDOW, score=score * (1 + h) + 0.1 * score * score),
    "learned": sd.attend(CAUSAL, score=score + bias[h, q_idx - kv_idx]),
    "sink": sd.attend(WINDOW, sink=0.5 * h),
    "length": CAUSAL & (kv_idx >= q_len - 5),
}  # fmt: skip
CHOICES: dict[str, Any] = {
    "chosen": CAUSAL & chosen,
    "window or chosen": CAUSAL & ((q_idx - kv_idx < 5) | chosen),
    "without chosen": CAUSAL & ~chosen,
    "two": CAUSAL & (chosen | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 1)),
    "two, one taken away": CAUSAL & (chosen & ~sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 1)),
    "ALiBi": sd.attend(CAUSAL & chosen, score=score - (q_idx - kv_idx) * 0.25 * (h + 1)),
    "soft cap": sd.attend(CAUSAL & chosen, score=5 * sd.tanh(score / 5)),
    "general": sd.attend(CAUSAL & chosen, score=score * (1 + h)),
    "a softmax a chunk": sd.attend(CAUSAL & chosen, normaliser=sd.per_chunk(chosen)),
    "softmax1 a chunk": sd.attend(CAUSAL & chosen, normaliser=sd.per_chunk(chosen, "sigmoid", inner="softmax1")),
}


def inputs(seed: int, batch: int, kv_heads: int, group: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, kv_heads * group, 1, 8), (batch, kv_heads, length, 8), (batch, kv_heads, length, 6)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("name", [*STATIC, *(f"choice: {name}" for name in CHOICES)])
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.integers(1, 40),
    before=st.integers(0, 6),
)
@settings(max_examples=12)
def test_one_query_is_what_it_means(
    name: str, seed: int, batch: int, kv_heads: int, group: int, length: int, before: int
) -> None:
    pattern = STATIC[name] if name in STATIC else CHOICES[name.removeprefix("choice: ")]
    q, k, v = inputs(seed, batch, kv_heads, group, length)
    words: dict[str, Any] = {"q_offset": max(0, length - 1 - before), "return_lse": True}
    if name == "learned":
        words["bias"] = torch.randn(kv_heads * group, 64, dtype=torch.float64)
    out, lse = sd.compile(pattern, backend="tiled")(q, k, v, **words)
    want, want_lse = sd.compile(pattern, backend="reference")(q, k, v, **words)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["window", "sinks", "ALiBi", "soft cap", "sink", "length"])
def test_no_schedule_is_made_for_its_length(name: str) -> None:
    q, k, v = inputs(0, 1, 1, 2, 33)
    attn = sd.compile(STATIC[name], backend="tiled")
    with mock.patch.object(attention, "make_schedule", side_effect=AssertionError("a schedule was made")):
        attn(q, k, v, q_offset="end")


def test_more_keys_than_are_worked_on_at_once_are_cut_into_tiles() -> None:
    q, k, v = inputs(1, 1, 2, 2, 300)
    attn = sd.compile(STATIC["sinks"], backend="tiled")
    want = attn(q, k, v, q_offset="end")
    with LIMITS.using(decode_numbers=8), mock.patch.object(decoding, "_softmax", side_effect=AssertionError):
        torch.testing.assert_close(attn(q, k, v, q_offset="end"), want, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("name", ["window or chosen", "a softmax a chunk", "two"])
def test_a_key_that_nobody_sees_may_hold_anything(name: str) -> None:
    q, k, v = inputs(2, 1, 1, 2, 40)
    attn = sd.compile(CHOICES[name], backend="tiled")
    want = attn(q, k, v, q_offset=37)
    v = v.clone()
    v[:, :, 38:] = float("nan")  # keys after the query, of which two lie in a block that it may choose
    assert torch.equal(attn(q, k, v, q_offset=37), want)
