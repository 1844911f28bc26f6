"""Attention that is no softmax, against the published formulas written as loops over keys, on every backend that runs it."""

from __future__ import annotations

import math

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.testing import tensor

P = sd.patterns
WINDOW = P.sliding_window(9)
BACKENDS = ("reference", "tiled", "cpp")


def sigmoid(row):
    return [1 / (1 + (50 * (-z).exp())) for z in row]


def relu_squared(row):
    return [z * z / 3 if z > 0 else 0 * z for z in row]


def hstu(row):
    return [z / (1 + (-z).exp()) / 7 for z in row]


def softpick(row):
    more = [z.exp() - 1 for z in row]
    total = sum(abs(x) for x in more)
    return [x / total if x > 0 else 0 * x for x in more]


def stick_breaking(row):
    found, left = [], 1.0
    for z in reversed(row):
        share = 1 / (1 + (-z).exp())
        found.append(share * left)
        left = left * (1 - share)
    return found[::-1]


# Pattern, weights of a row of scaled products in the order of the keys, and who sees whom.
CASES = {
    "sigmoid": (P.sigmoid(WINDOW, 50), sigmoid, WINDOW),
    "relu_squared": (P.relu_squared(WINDOW, 3), relu_squared, WINDOW),
    "hstu": (P.hstu(WINDOW, 7), hstu, WINDOW),
    "softpick": (P.softpick(WINDOW), softpick, WINDOW),
    "stick_breaking": (P.stick_breaking(WINDOW), stick_breaking, WINDOW & (kv_idx < q_idx)),
}


def by_loops(weights, mask, q, k, v, values):
    allowed, out = values(mask, q.shape[2], k.shape[2]), []
    for head in range(q.shape[1]):
        z = q[0, head] @ k[0, head // 2].T * q.shape[3] ** -0.5
        for row, seen in zip(z, allowed, strict=True):
            keys = seen.nonzero()[:, 0].tolist()
            out.append(
                sum((w * v[0, head // 2, j] for w, j in zip(weights([row[j] for j in keys]), keys, strict=True)), 0 * v[0, 0, 0])
            )
    return torch.stack(out).view(1, q.shape[1], q.shape[2], -1)


@pytest.mark.parametrize("name", CASES)
def test_the_published_formula(values, name):
    pattern, weights, mask = CASES[name]
    leaves = [tensor(1, heads, 19, 8, seed=n, dtype=torch.float64).requires_grad_() for n, heads in enumerate((4, 2, 2))]
    slope = tensor(1, 4, 19, 8, seed=5, dtype=torch.float64)
    wanted = by_loops(weights, mask, *leaves, values)
    gradients = torch.autograd.grad((wanted * slope).sum(), leaves)
    for backend in BACKENDS:
        attn = sd.compile(pattern, backend=backend)
        out = attn(*leaves)
        assert torch.allclose(out, wanted, rtol=1e-11, atol=1e-12), backend
        for found, right in zip(torch.autograd.grad((out * slope).sum(), leaves), gradients, strict=True):
            assert torch.allclose(found, right, rtol=1e-10, atol=1e-11), backend
        with torch.no_grad():
            last = attn(leaves[0][:, :, 18:], *leaves[1:], q_offset=18)
        assert torch.allclose(last, wanted[:, :, 18:], rtol=1e-11, atol=1e-12), backend


# ---- published numbers ---------------------------------------------------------------------------------------------------------------


def hashed(seed, *shape):
    """Numbers between -1 and 1 that any language makes the same."""
    found = []
    for i in range(math.prod(shape)):
        x = (2654435761 * i + 40503 * seed) % 2**32
        x = (x ^ x >> 15) * 2246822519 % 2**32
        x = (x ^ x >> 13) * 3266489917 % 2**32
        found.append((x ^ x >> 16) / 2**31 - 1)
    return torch.tensor(found, dtype=torch.float64).view(shape)


def digest(x):
    return float((x.detach().flatten() * hashed(99, x.numel())).sum())


def drawn(first, length):
    return [factor * hashed(first + n, 1, 2, length, 8) for n, factor in enumerate((2, 1, 1))]


def test_numbers_of_hstu():
    """T27 of the numbered tests."""
    q, k, v = drawn(71, 40)
    out = sd.compile(P.hstu(P.causal(), 40), backend="tiled")(q.requires_grad_(), k, v)
    (slope,) = torch.autograd.grad(out, q, hashed(89, 1, 2, 40, 8))
    assert [out[0, 0, 39, 0].item(), digest(out), slope[0, 1, 30, 2].item()] == pytest.approx(
        [-0.0130032740, 0.4134921613, 0.0077707934], abs=1e-9
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_stick_breaking(backend):
    """T32: also the change of one logit, which a learned table added to it receives."""
    z = sd.table("z", learned=True)
    table = torch.zeros(2, 48, 48, dtype=torch.float64, requires_grad=True)
    attn = sd.compile(P.stick_breaking(logit=score + z[h, q_idx, kv_idx]), backend=backend)
    out = attn(*drawn(101, 48), z=table)
    (slope,) = torch.autograd.grad(out, table, hashed(105, 1, 2, 48, 8))
    assert [out[0, 0, 47, 0].item(), digest(out), slope[1, 30, 27].item()] == pytest.approx(
        [0.4408131601, 4.811428230, -0.0040622739], abs=2e-9
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_of_a_stick(backend):
    """T32: to the own value, by what the weights add up to; and to the first key, whose weight it then is."""
    q, k, v = drawn(101, 48)
    out, ones = sd.compile(P.stick_breaking(), backend=backend), torch.ones_like(v[..., :1])
    assert digest(out(q, k, v) + (1 - out(q, k, ones)) * v) == pytest.approx(1.152846137, abs=2e-9)
    first = sd.compile(P.stick_breaking(rest="first"), backend=backend)
    weights = first(q, k, torch.eye(48, dtype=torch.float64).expand(1, 2, 48, 48))
    assert weights[0, 0, 1, 0] == 1.0 and torch.allclose(weights.sum(-1)[..., 1:], torch.ones(47, dtype=torch.float64))
    z = q @ k.mT * 8**-0.5
    left = torch.sigmoid(-z).masked_fill(torch.ones(48, 48).triu().bool(), 1.0)[..., 1:].prod(-1)
    assert torch.allclose(weights[..., 1:, 0], left[..., 1:], rtol=1e-12, atol=0)  # with all digits, down to 1e-16


def test_numbers_of_sigmoid():
    """T33."""
    q, k, v = drawn(101, 48)
    attn = sd.compile(P.sigmoid(P.causal(), 48), backend="tiled")
    out, total = attn(q, k, v), attn(q, k, torch.ones_like(v))
    assert [out[0, 0, 47, 0].item(), digest(out), total[0, 0, 47, 0].item()] == pytest.approx(
        [-0.1378509304, 0.9853272781, 1.2707820120], abs=1e-9
    )


# ---- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: P.sigmoid(WINDOW, 0),
        lambda: P.relu_squared(WINDOW, -1),
        lambda: P.hstu(WINDOW, "4096"),
        lambda: P.softpick(WINDOW, logit="x"),
        lambda: P.stick_breaking(WINDOW, rest="last"),
    ],
)
def test_arguments_that_make_no_sense(make):
    with pytest.raises(sd.PatternError, match=r"sigmoid\(\)|relu_squared\(\)|hstu\(\)|softpick\(\)|stick_breaking\(\)"):
        make()


def test_the_own_value_is_not_in_line():
    with pytest.raises(sd.UnsupportedError, match=r"Add it outside: out \+ \(1 - attn\(q, k, ones\)\) \* v"):
        P.stick_breaking(rest="own")
