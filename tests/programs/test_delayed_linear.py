"""States that leave the last tokens, and the first ones, to a window: pair by pair, on every way, in pieces, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.program.program_text import read_program


def qkv(tokens: int = 70) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))


def sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, delay: int, first: int) -> torch.Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    weights = (q.exp() @ k.exp().mT) * ((j <= i - delay) & (j >= first))
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ v / torch.where(total > 0, total, 1.0), 0.0)


@pytest.mark.parametrize(("delay", "first"), [(0, 0), (5, 0), (5, 2), (0, 3), (100, 0)])
@pytest.mark.parametrize("backend", ["reference", "tiled", "cpp"])
def test_pair_by_pair_and_gradients(backend: str, delay: int, first: int) -> None:
    program = sd.linear(1.0, features="exp", normalised="sum", eps=0.0, delay=delay, first=first)
    attn, given = sd.compile(program, backend=backend), qkv()
    grads = []
    for run in (lambda q, k, v: attn(q, k, v), lambda q, k, v: sums(q, k, v, delay, first)):
        leaves = [x.clone().requires_grad_() for x in given]
        out = run(*leaves)
        (out * torch.arange(8.0)).sum().backward()
        grads.append([out, *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "tiled", "cpp"])
def test_what_no_query_reads_may_be_anything(backend: str) -> None:
    attn = sd.compile(sd.linear(1.0, features="exp", normalised="sum", eps=0.0, delay=5, first=2), backend=backend)
    q, k, v = qkv(30)
    wanted = attn(q, k, v)
    for x in (k, v):
        x[:, :, :2], x[:, :, 26:] = float("nan"), float("nan")  # the last query reads up to key 24
    torch.testing.assert_close(attn(q, k, v), wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_state_goes_on_beside_a_window_and_alone(backend: str, first: int, alone: bool) -> None:
    window, (q, k, v) = 6, qkv(40)
    near = (kv_idx <= q_idx) & ((q_idx - kv_idx < window) | (kv_idx < first))
    far = sd.linear(1.0, features="exp", normalised="sum", eps=0.0, delay=window, first=first)
    program = far if alone else sd.joint(near, far)
    attn = sd.compile(program, backend=backend)
    whole, state, parts, sizes = attn(q, k, v), None, [], []
    for start, end in ((0, 1), (1, 4), (4, 5), (5, 17), (17, 18), (18, 40)):
        part, state = attn(*(x[:, :, start:end] for x in (q, k, v)), state=state, return_state=True)
        parts.append(part)
        sizes.append(state.nbytes)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-9, rtol=0)
    assert sizes[-1] == sizes[-2] == sizes[-3]
    torch.testing.assert_close(whole, sd.compile(program, backend="reference")(q, k, v), atol=1e-9, rtol=0)
    assert f"delay={window}" in attn.program.text and read_program(attn.program.text).text == attn.program.text


@pytest.mark.parametrize(
    "words",
    [
        {"decay": 0.5, "delay": 2},
        {"decay": [1.0, 0.9], "first": 1},
        {"decay": 1.0, "delay": 2, "reads": "before"},
        {"decay": 1.0, "first": 2, "beta": sd.input("beta", "batch heads keys")},
        {"log_decay": sd.input("g", "batch heads keys"), "delay": 1},
        {"decay": 1.0, "delay": 2, "documents": sd.input("doc", "batch keys")},
    ],
)
def test_where_it_means_nothing_it_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(sd.PatternError, match="is of states in which nothing fades and nothing is corrected"):
        sd.linear(**words)


@pytest.mark.parametrize("value", [-1, 1.5, True])
@pytest.mark.parametrize("name", ["delay", "first"])
def test_numbers_are_checked(name: str, value: Any) -> None:
    with pytest.raises(sd.PatternError, match=f"{name} must be a whole number of tokens, at least 0"):
        sd.linear(1.0, **{name: value})
