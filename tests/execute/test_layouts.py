"""``layout="bshd"``: the same numbers, of the same memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import sparsedsl as sd

CAUSAL = sd.kv_idx <= sd.q_idx
PATTERNS = {
    "static": sd.attend(CAUSAL, sink=0.25),
    "moba": sd.patterns.moba(chunk=4, top_k=2),
    "nha": sd.patterns.nha(window=4, slots=3),
}


def qkv(q_len: int = 20) -> list[torch.Tensor]:
    return [torch.randn(2, n, heads, 8, dtype=torch.float64) for n, heads in ((q_len, 4), (20, 2), (20, 2))]


def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


@pytest.mark.parametrize("name", ["static", "moba"])
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_results_and_gradients_are_those_of_heads_first(name, backend):
    q, k, v = (x.to(torch.float32).requires_grad_() for x in qkv())
    turned = sd.compile(PATTERNS[name], backend=backend, layout="bshd")
    plain = sd.compile(PATTERNS[name], backend=backend)
    out, lse = turned(q, k, v, return_lse=True)
    wanted, wanted_lse = plain(*flat(q, k, v), return_lse=True)
    assert out.shape == (2, 20, 4, 8) and lse.shape == (2, 4, 20)
    torch.testing.assert_close(out.transpose(1, 2), wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-6, rtol=1e-5)
    got = torch.autograd.grad(out.square().sum() + lse.sum(), [q, k, v])
    expected = torch.autograd.grad(wanted.square().sum() + wanted_lse.sum(), [q, k, v])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_states_offsets_and_choices():
    q, k, v = qkv()
    gate = torch.randn(2, 2, 20, 3, dtype=torch.float64)
    nha = sd.compile(PATTERNS["nha"], layout="bshd", backend="tiled")
    names = list(nha.program.inputs)
    given = {name: gate for name in names if name == "gate"}
    whole = nha(q, k, v, **given)
    parts, state = [], None
    for rows in (slice(0, 9), slice(9, 20)):
        more = {name: x[:, :, rows] for name, x in given.items()}
        out, state = nha(q[:, rows], k[:, rows], v[:, rows], state=state, return_state=True, **more)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    attn = sd.compile(CAUSAL, layout="bshd")
    torch.testing.assert_close(attn(q[:, -1:], k, v, q_offset="end"), attn(q, k, v)[:, -1:])
    moba = sd.compile(PATTERNS["moba"], layout="bshd", backend="tiled")
    (chosen,), (wanted,) = (list(a.choices(*x).values()) for a, x in ((moba, (q, k, v)), (moba.heads_first, flat(q, k, v))))
    assert torch.equal(chosen.indices, wanted.indices)


def test_nothing_is_copied():
    """Neither on the way in nor out: the operators get the very memory that was given."""
    q, k, v = qkv()
    attn = sd.compile(CAUSAL, layout="bshd", backend="reference")
    seen = []
    inner = attn._calls
    attn._calls = lambda q, *rest: (seen.append(q), inner(q, *rest))[1]
    out = attn(q, k, v)
    assert seen[0].data_ptr() == q.data_ptr() and seen[0].shape == (2, 4, 20, 8)
    assert out._base is not None or out.transpose(1, 2).is_contiguous()


def test_it_is_part_of_what_is_copied_and_shown():
    attn = sd.compile(CAUSAL, layout="bshd")
    for twin in (copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        assert twin.layout == "bshd"
    assert "layout='bshd'" in repr(attn)
    assert "layout" not in repr(sd.compile(CAUSAL))


def test_errors_speak_of_it():
    q, k, v = qkv()
    attn = sd.compile(CAUSAL, layout="bshd")
    with pytest.raises(sd.ShapeError, match=r"The call has layout='bshd', its tensors are \(B, S, H, D\)"):
        attn(q, k, v[:, :5])
    with pytest.raises(sd.ShapeError, match=r"must have 4 dimensions.*layout='bshd'"):
        attn(q[0], k, v)
    with pytest.raises(sd.PatternError, match=r"layout must be one of 'bhsd', 'bshd'; got 'sbhd'\. Did you mean 'bshd'"):
        sd.compile(CAUSAL, layout="sbhd")


def test_the_kit_takes_it_heads_first():
    attn = sd.compile(CAUSAL, layout="bshd", backend="tiled")
    sd.testing.assert_matches_reference(attn, *flat(*qkv()))
    sd.testing.assert_causal(attn)
    sd.testing.assert_prefill_equals_decode(sd.compile(PATTERNS["moba"], layout="bshd", backend="tiled"))
