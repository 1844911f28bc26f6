"""The mathematics of shipped layers: golden numbers, closed forms and identities, in float64, against formulas written in another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

import sparsedsl as sd
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.models.hybrids.nha import half_life_bias

QUERY_HEADS, HEADS, TOKENS, WIDTH, SLOTS, WINDOW = 4, 2, 9, 4, 3, 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "tiled"])


def waves(start: float, *sizes: int) -> torch.Tensor:
    """``sin(start + 2.1 i + 0.7 j + 1.3 l)``."""
    steps = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in sizes), indexing="ij")
    return torch.sin(start + sum(factor * step for factor, step in zip((2.1, 0.7, 1.3), steps, strict=False)))


def heads(tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    q, k, v = ((waves(start, n, tokens, WIDTH)[None]) for start, n in ((0.1, QUERY_HEADS), (0.5, HEADS), (0.9, HEADS)))
    return q, k, v


def rotated(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * 1e4 ** (
        -torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    )
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * torch.cat([angles.cos()] * 2, -1) + turned * torch.cat([angles.sin()] * 2, -1)


def nha(program: Any, backend: str = "reference", lse: bool = False, **more: Any) -> Any:
    q, k, v = heads()
    gate = 2 * waves(1.7, HEADS, TOKENS, SLOTS)[None]
    return sd.compile(program, backend=backend)(q, k, v, gate=gate, q_rope=rotated(q), k_rope=rotated(k), return_lse=lse, **more)


def plain() -> tuple[torch.Tensor, torch.Tensor]:
    """The donor: causal attention on rotated rows, and its LSE."""
    q, k, v = heads()
    logits = rotated(q) @ rotated(k).repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(WIDTH)
    logits = logits.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -math.inf)
    return logits.softmax(-1) @ v.repeat_interleave(2, 1), logits.logsumexp(-1)


def assert_numbers(found: torch.Tensor, *numbers: float) -> None:
    torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), atol=6e-7, rtol=0)


@BACKENDS
def test_nha_numbers(backend: str) -> None:
    out = nha(sd.patterns.nha(SLOTS, WINDOW), backend)[0]
    assert_numbers(out[0, 8], -0.134531, 0.399346, 0.348180, -0.213071)
    assert_numbers(out[3, 8], 0.311619, 0.115791, -0.249671, -0.249364)
    out = nha(sd.patterns.nha(SLOTS, WINDOW, first=1), backend)[0]
    assert_numbers(out[0, 8], -0.013403, 0.449136, 0.253689, -0.313413)


def test_slots_and_a_window_of_everything() -> None:
    donor, lse = plain()
    zeros = torch.sigmoid(lse - math.log(SLOTS))[..., None] * donor
    torch.testing.assert_close(nha(sd.patterns.nha(SLOTS, TOKENS)), zeros, atol=1e-14, rtol=0)
    c = 0.7
    biased = torch.sigmoid(lse - math.log(SLOTS) - c)[..., None] * donor
    torch.testing.assert_close(nha(sd.patterns.nha(SLOTS, TOKENS, slot_bias=c)), biased, atol=1e-14, rtol=0)
    q, k, v = heads()
    named = {"q_rope": rotated(q), "k_rope": rotated(k)}
    out = sd.compile(sd.patterns.nha(SLOTS, None, slot_bias=c), backend="reference")(q, k, v, **named)
    torch.testing.assert_close(out, biased, atol=1e-14, rtol=0)
    out = sd.compile(sd.patterns.nha(SLOTS, None, empty="masked"), backend="reference")(q, k, v, **named)
    torch.testing.assert_close(out, donor, atol=1e-14, rtol=0)


def test_sinks_in_the_one_softmax() -> None:
    donor, lse = plain()
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    sinks = sd.models.sinks[sd.h]
    out = nha(sd.patterns.nha(SLOTS, TOKENS, sink=sinks, slot_bias=-80.0), sinks=logits)  # slots off
    torch.testing.assert_close(out, torch.sigmoid(lse - logits[:, None])[..., None] * donor, atol=1e-14, rtol=0)
    c = -0.4
    out = nha(sd.patterns.nha(SLOTS, TOKENS, sink=sinks, slot_bias=c), sinks=logits)
    other = torch.logaddexp(logits, torch.tensor(c + math.log(SLOTS), dtype=torch.float64))
    torch.testing.assert_close(out, torch.sigmoid(lse - other[:, None])[..., None] * donor, atol=1e-14, rtol=0)
    q, k, v = heads()
    whole = sd.compile(sd.patterns.nha(SLOTS, None, sink=sinks, slot_bias=c), backend="reference")
    torch.testing.assert_close(whole(q, k, v, q_rope=rotated(q), k_rope=rotated(k), sinks=logits), out, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("bias", "error"), [(-40.0, 2e-15), (-20.0, 1e-7)])
def test_a_low_bias_leaves_the_window_and_the_first(bias: float, error: float) -> None:
    q, k, v = heads()
    seen = sd.patterns.sliding_window(WINDOW) | sd.patterns.sinks(1)
    window = sd.compile(seen, backend="reference")(rotated(q), rotated(k), v)
    torch.testing.assert_close(nha(sd.patterns.nha(SLOTS, WINDOW, first=1, slot_bias=bias)), window, atol=error, rtol=0)


@pytest.mark.parametrize("window", [TOKENS - 1, TOKENS, TOKENS + 1])
@BACKENDS
def test_windows_about_as_long_as_the_text(window: int, backend: str) -> None:
    """One softmax over all slots and keys, worked out row by row."""
    q, k, v = heads()
    gate = 2 * waves(1.7, HEADS, TOKENS, SLOTS)
    keep = torch.sigmoid(gate) ** 0.125
    out = nha(sd.patterns.nha(SLOTS, window, first=1), backend)[0]
    for head in range(QUERY_HEADS):
        group = head // 2
        for t in range(TOKENS):
            keys, values = torch.zeros(SLOTS, WIDTH).double(), torch.zeros(SLOTS, WIDTH).double()
            for e in range(1, t - window + 1):
                a = keep[group, e][:, None]
                keys, values = a * keys + (1 - a) * k[0, group, e], a * values + (1 - a) * v[0, group, e]
            seen = [j for j in range(t + 1) if j == 0 or j > t - window]
            near = rotated(k)[0, group, seen] @ rotated(q)[0, head, t]
            logits = torch.cat([keys @ q[0, head, t], near]) / math.sqrt(WIDTH)
            row = logits.softmax(0) @ torch.cat([values, v[0, group, seen]])
            torch.testing.assert_close(out[head, t], row, atol=1e-14, rtol=0)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_first_tokens_and_chunks_of_a_scan(chunk: int) -> None:
    with LIMITS.using(scan_chunk=chunk):
        out = nha(sd.patterns.nha(SLOTS, WINDOW, first=1), "tiled")
    torch.testing.assert_close(out, nha(sd.patterns.nha(SLOTS, WINDOW, first=1)), atol=1e-14, rtol=0)


@BACKENDS
def test_gates_of_what_is_written_alone_get_gradients(backend: str) -> None:
    q, k, v = heads()
    gate = (2 * waves(1.7, HEADS, TOKENS, SLOTS)[None]).requires_grad_()
    sd.compile(sd.patterns.nha(SLOTS, WINDOW, first=2), backend=backend)(q, k, v, gate=gate).square().sum().backward()
    assert gate.grad is not None
    touched = (gate.grad.abs().sum((0, 1, 3)) > 0).nonzero()[:, 0].tolist()
    assert touched == list(range(2, TOKENS - WINDOW))
    attn = sd.compile(sd.patterns.nha(SLOTS, WINDOW, first=2), backend=backend)
    assert torch.autograd.gradcheck(lambda g: attn(q, k, v, gate=g), (gate,), atol=1e-7, fast_mode=True)


def test_half_lives() -> None:
    found = [half_life_bias(tokens) for tokens in (8, 64, 512, 4096)]
    assert found == pytest.approx([0, 2.4023, 4.5200, 6.6042], abs=5e-5)
    assert torch.sigmoid(torch.tensor(found[2])).item() ** (512 / 8) == pytest.approx(0.5, abs=1e-6)


def test_a_slow_slot_is_written_in_half_precision() -> None:
    q, k, v = (x.bfloat16() for x in heads())
    gate = torch.full((1, HEADS, TOKENS, SLOTS), half_life_bias(4096))
    _, state = sd.compile(sd.patterns.nha(SLOTS, 1), backend="tiled")(q, k, v, gate=gate, return_state=True)
    slots = next(iter(state.recurrent.values()))
    assert slots.keys.dtype is torch.float32
    assert (slots.keys.abs().sum((2, 3)) > 0).all()


@BACKENDS
def test_states_keep_the_first_tokens(backend: str) -> None:
    """Whatever the split, the rest of a call is as it was; what is kept stops growing."""
    q, k, v = heads()
    tensors = {"gate": 2 * waves(1.7, HEADS, TOKENS, SLOTS)[None], "q_rope": rotated(q), "k_rope": rotated(k)}
    attn = sd.compile(sd.patterns.nha(SLOTS, WINDOW, first=2, slot_bias=-0.5), backend=backend)
    whole, sizes = attn(q, k, v, **tensors), set()
    for splits in ([1] * 9, [9], [2, 1, 4, 1, 1], [5, *[1] * 4], [3, 6]):
        parts, state, at = [], None, 0
        for n in splits:
            now = {name: x[:, :, at : at + n] for name, x in ({"q": q, "k": k, "v": v} | tensors).items()}
            out, state = attn(**now, state=state, return_state=True)
            parts.append(out)
            at += n
        sizes.add(state.nbytes)
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-14, rtol=0)
    assert len(sizes) == 1


def test_states_that_would_read_the_first_tokens_twice_are_refused() -> None:
    gate = sd.input("gate", "batch kv_heads keys 3")
    both = sd.joint(sd.recall(sd.slots(gate, delay=4)), sd.patterns.sliding_window(4) | sd.patterns.sinks(1))
    q, k, v = heads()
    with pytest.raises(sd.UnsupportedError, match="keep in sight"):
        sd.compile(both, backend="reference")(q, k, v, gate=waves(1.7, HEADS, TOKENS, 3)[None], return_state=True)
    for hidden in (sd.patterns.sinks(2) & (sd.q_idx - sd.kv_idx < 6), sd.patterns.sinks(2) & (sd.q_idx % 2 == 0)):
        with pytest.raises(sd.UnsupportedError, match="keeps no state"):
            sd.compile(sd.patterns.sliding_window(4) | hidden, backend="reference")(q, k, v, return_state=True)
    with pytest.raises(sd.UnsupportedError, match="keeps no state"):  # a score by distance, which a state forgets
        scored = sd.attend(sd.patterns.sliding_window(4) | sd.patterns.sinks(1), sd.score - 0.1 * (sd.q_idx - sd.kv_idx))
        sd.compile(scored, backend="reference")(q, k, v, return_state=True)


def test_what_nha_refuses() -> None:
    with pytest.raises(sd.PatternError, match="window=0 leaves nothing"):
        sd.patterns.nha(3, 0, first=1)
    with pytest.raises(sd.PatternError, match="slot_bias must be a number or an expression over h"):
        sd.patterns.nha(3, 4, slot_bias=sd.score)
    with pytest.raises(sd.PatternError, match="first=1 leaves out tokens"):
        sd.patterns.nha(3, 4, "masked", first=1)


def test_ring_numbers() -> None:
    """Keys and values of two heads repeated for four, the norm over pairs of heads, a gate of one half."""
    q, k, v = heads(11)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    decay = [math.exp(-(2.0 ** (-2 * h))) for h in (1, 2, 3, 4)]
    out = sd.compile(sd.patterns.ring_linear(decay), backend="reference")(q, k, v)
    flat = out[0].transpose(0, 1).flatten(1).unflatten(1, (2, -1))
    normed = 0.5 * (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)).flatten(1)
    assert_numbers(normed[10, :4], 0.645970, 0.332749, -0.467950, -0.583101)
    still = sd.compile(sd.patterns.ring_linear([1.0] * 4), backend="reference")(q, k, v)
    torch.testing.assert_close(still, (q @ k.transpose(-1, -2)).tril() @ v / math.sqrt(WIDTH), atol=1e-14, rtol=0)


def test_moba_numbers() -> None:
    q, k, v = heads()
    assert_numbers(
        sd.compile(sd.patterns.moba(2, 2), backend="reference")(q, k, v)[0, 0, 7], -0.751537, -0.013194, 0.744478, 0.411488
    )
    causal = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sd.compile(sd.patterns.moba(2, 5), backend="tiled")(q, k, v), causal, atol=1e-14, rtol=0)
    blocks = torch.arange(TOKENS) // 4
    diagonal = (blocks[:, None] == blocks) & torch.ones(TOKENS, TOKENS).tril().bool()
    own = functional.scaled_dot_product_attention(q, k, v, attn_mask=diagonal, enable_gqa=True)
    torch.testing.assert_close(sd.compile(sd.patterns.moba(4, 1), backend="tiled")(q, k, v), own, atol=1e-14, rtol=0)


def test_nsa_gates_and_exact_masses_of_chunks() -> None:
    q, k, v = heads()
    causal = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    gate = torch.sigmoid(torch.tensor([-20.0, -20.0, 20.0]).double()).expand(1, QUERY_HEADS, TOKENS, 3)
    out = sd.compile(sd.patterns.nsa(2, 4, 3, TOKENS), backend="reference")(q, k, v, gate=gate)
    torch.testing.assert_close(out, causal, atol=5e-8, rtol=0)
    # Chunks of one token have their logit for a mass: window and chunks in one softmax are then all there is.
    k, v = k[:, :1], v[:, :1]
    before = sd.kv_idx < sd.q_idx - 2
    marks, asks = (
        sd.input(name, f"batch {heads} {rows} retrieval_dim")
        for name, heads, rows in (("marks", "kv_heads", "keys"), ("asks", "heads", "queries"))
    )
    chosen = sd.top_k(sd.dot(asks, marks), TOKENS, among=before)
    far = sd.attend(before & chosen, normaliser=sd.per_chunk(chosen, "softmax"))
    both = sd.compile(sd.joint(sd.patterns.sliding_window(3), far), backend="reference")
    causal = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(both(q, k, v, asks=q, marks=k), causal, atol=1e-14, rtol=0)
