"""What ``attend(normaliser=)`` means to everything that is no kernel: text, refusals, programs, reports."""

from __future__ import annotations

import pickle

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx, score
from sparsedsl.program.program_text import read_given, read_program
from sparsedsl.testing import assert_matches_reference, check, tensor

causal = kv_idx <= q_idx
NAMES = ("pointwise", "softpick", "stick_breaking")


def qkv(length=70, **words):
    return [tensor(1, heads, length, 8, seed=n, **words) for n, heads in enumerate((4, 2, 2))]


@pytest.mark.parametrize("name", NAMES)
def test_text_and_identity(name):
    pattern = sd.attend(causal, score=score / 2, scale=0.5, normaliser=name)
    assert pattern.text == f"attend(q_idx >= kv_idx, score=score / 2, scale=0.5, normaliser={name!r})"
    assert read_given(pattern.text) == pattern == pickle.loads(pickle.dumps(pattern))
    softmax = sd.attend(causal, score=score / 2, scale=0.5)
    assert pattern != softmax and pattern.key != softmax.key and hash(pattern) != hash(softmax)
    assert sd.attend(causal, normaliser="softmax") == sd.attend(causal) == sd.attend(causal, normaliser=None)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("entmax", sd.UnsupportedError, "threshold depends on all scores of a row"),
        ("sparsemax", sd.UnsupportedError, "normaliser='pointwise'"),
        ("talking_heads", sd.UnsupportedError, "logits of all heads"),
        ("sigmoid", sd.PatternError, r"sd.patterns.sigmoid\(mask"),
        ("softmax1", sd.PatternError, "sink=0.0"),
        ("nothing", sd.PatternError, "'softmax', 'pointwise', 'softpick', 'stick_breaking'"),
        (3, sd.PatternError, r"got 3 \(int\)"),
    ],
)
def test_other_normalisers_are_refused_with_the_reason(name, kind, words):
    with pytest.raises(kind, match=words):
        sd.attend(causal, normaliser=name)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_no_sum_to_share(name):
    pattern = sd.attend(causal, normaliser=name)
    with pytest.raises(sd.PatternError, match="no softmax and so no weight"):
        sd.joint(pattern, causal)
    with pytest.raises(sd.PatternError, match="sink"):
        sd.attend(causal, sink=0.0, normaliser=name)
    for backend in ("auto", "reference", "tiled"):
        with pytest.raises(sd.UnsupportedError, match="no LSE"):
            sd.compile(pattern, backend=backend)(*qkv(), return_lse=True)
    with pytest.raises(sd.UnsupportedError, match="no normaliser"):
        sd.compile(pattern, backend="flex")(*qkv())
    with pytest.raises(sd.UnsupportedError, match="would be lost"):
        sd.export.flash_attention(pattern, 64, 64)


def test_auto_takes_who_can():
    pointwise, broken = (sd.compile(sd.attend(causal, normaliser=name)) for name in ("pointwise", "stick_breaking"))
    assert "backend: cpp" in str(pointwise.explain(4096, 4096))
    told = str(broken.explain(4096, 4096))
    assert "backend: cpp" in told and "until nothing is left" in told and " lse" not in told
    assert "until nothing is left" in str(sd.compile(broken.pattern, backend="tiled").explain(4096, 4096))
    with pytest.raises(sd.UnsupportedError, match="range of float16"):
        sd.compile(pointwise.pattern, backend="triton")(*qkv(dtype=torch.float16))


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_read_as_tables(name):
    """Results along lists are joined by their LSE: where there is none, the mask reads what was chosen."""
    chosen = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2)
    node = sd.attend(causal & ((q_idx // 8 == kv_idx // 8) | chosen), score=score * 2, normaliser=name)
    assert read_program(sd.Program(node).text) == sd.Program(node)
    assert assert_matches_reference(sd.compile(node, backend="tiled"), *qkv(40))[-4:] == ("out", "dq", "dk", "dv")


def test_mixed_with_others():
    gate = torch.rand(1, 4, 70, 3)
    mixed = sd.mix(
        sd.patterns.stick_breaking(), sd.patterns.hstu(causal, 9), causal, weights=sd.input("gate", "batch heads queries 3")
    )
    q, k, v = qkv()
    parts = [
        sd.compile(p, backend="reference")(q, k, v) for p in (sd.patterns.stick_breaking(), sd.patterns.hstu(causal, 9), causal)
    ]
    wanted = sum(gate[..., n, None] * part for n, part in enumerate(parts))
    assert torch.allclose(sd.compile(mixed)(q, k, v, gate=gate), wanted, atol=1e-5)


@pytest.mark.parametrize(("backend", "name"), [(b, name) for b in ("tiled", "cpp") for name in NAMES])
def test_the_kit_holds(name, backend):
    """Random shapes; causality, calls, order and what is unseen, gradients included. Two residues meet in the second pattern."""
    bias = sd.table("bias", learned=True)
    cut = sd.attend(((q_idx - kv_idx) % 3 == 0) | (q_idx - kv_idx == 4), score=score + bias[q_idx % 7], normaliser=name)
    report = check(cut, backend=backend, examples=4, seed=11)
    assert report.ok, report


@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name):
    q, k, v = qkv(dtype=torch.bfloat16)
    assert assert_matches_reference(sd.compile(sd.attend(causal, normaliser=name), backend="cpp"), q, k, v) == (
        "out",
        "dq",
        "dk",
        "dv",
    )


def test_a_stick_of_which_nothing_is_left_ends_its_row():
    """Keys that a float could give nothing to are not read; those within reach are, over many tiles."""
    q, k, v = qkv(400)
    k[:, :, :100], v[:, :, :100] = float("nan"), float("nan")
    attn = sd.compile(sd.attend(kv_idx < q_idx, score=score + 3, normaliser="stick_breaking"), backend="tiled")
    late = attn(q[:, :, 300:], k, v, q_offset=300)
    k[:, :, :100], v[:, :, :100] = 0.0, 0.0
    wanted = sd.compile(attn.pattern, backend="reference")(q[:, :, 300:], k, v, q_offset=300)
    assert torch.allclose(late, wanted, atol=1e-6)


def test_in_a_graph_and_from_state():
    q, k, v = qkv()
    attn = sd.compile(sd.patterns.sigmoid(sd.patterns.sliding_window(7), 10), backend="tiled")
    whole = attn(q, k, v)
    first, state = attn(q[:, :, :50], k[:, :, :50], v[:, :, :50], return_state=True)
    rest = attn(q[:, :, 50:], k[:, :, 50:], v[:, :, 50:], state=state)
    assert torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-6)
    assert torch.equal(torch.vmap(lambda x: attn(x, k, v))(torch.stack([q, q]))[1], whole)


def test_kernels_that_are_not_ours():
    """A kernel that implements such a pattern is compared with its weights, and not with a softmax."""

    def mine(q, k, v, bias=3.0):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return torch.sigmoid(q @ k.mT * q.shape[3] ** -0.5 - bias).tril() @ v

    pattern = sd.attend(causal, score=sd.sigmoid(score - 3), normaliser="pointwise")
    words = {"implements": pattern, "group": 2, "offset": False, "scale": False}
    assert_matches_reference(sd.testing.Kernel(mine, **words), *qkv(9))
    with pytest.raises(AssertionError, match="wanted"):
        assert_matches_reference(sd.testing.Kernel(lambda q, k, v: mine(q, k, v, 3.1), **words), *qkv(9))
