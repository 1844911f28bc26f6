"""Calls of a kind that was checked before skip what that proves, and nothing else: they give and refuse what first calls do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.backends.cpp.attention import CppKernel
from sparsedsl.execute.calls import Calls
from sparsedsl.execute.node_rules import LOWERED_RULES
from sparsedsl.execute.static import StaticAttention
from sparsedsl.program.branches import Attend
from sparsedsl.program.scores import Bound
from sparsedsl.program.select import TopK
from sparsedsl.program.tensors import Summary
from sparsedsl.runtime.heads import lse_merge
from sparsedsl.testing import tensor

CAUSAL = sd.kv_idx <= sd.q_idx
WINDOW = CAUSAL & (sd.q_idx - sd.kv_idx < 9)
CHOICE = CAUSAL & ((sd.q_idx - sd.kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 3))


def qkv(rows: int, keys: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [
        tensor(1, heads, size, 8, seed=seed, dtype=dtype) for seed, (heads, size) in enumerate(((4, rows), (2, keys), (2, keys)))
    ]


@pytest.fixture(params=[WINDOW, CHOICE], ids=["pattern", "program"])
def warm(request: pytest.FixtureRequest) -> sd.Attention:
    attn = sd.compile(request.param, backend="cpp")
    attn(*qkv(1, 60), q_offset="end", return_lse=True)
    attn(*qkv(40, 40))
    return attn


QUEST = sd.attend(CAUSAL & sd.top_k(sd.bound(sd.q, sd.k, 8), 3))
SYSTEMS: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "moba": (sd.patterns.moba(8, 3), {}),
    "quest": (QUEST, {}),
    "hsa": (sd.patterns.hsa(8, 3), {"retrieval_q": (2, 1, 8), "landmarks": (2, 0, 8)}),
    "hsa, stick breaking": (sd.patterns.hsa(8, 3, "stick_breaking", inner="softmax1"), {"retrieval_q": (1, 1, 8), "landmarks": (1, 0, 8)}),
    "nsa": (sd.patterns.nsa(4, 8, 4, 9), {"gate": (4, 1, 3)}),
    "two widths": (CAUSAL & (sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 1)), {}),
    "soft cap": (sd.attend(CHOICE, score=sd.patterns.softcap(3.0)), {}),
    "sink": (sd.attend(CHOICE, sink=0.5), {}),
    "top p": (CAUSAL & ((sd.q_idx - sd.kv_idx < 9) | sd.top_p(sd.dot(sd.q, sd.summary(sd.k, 8)), 0.7)), {}),
}  # fmt: skip


def system_call(
    name: str, rows: int, keys: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """q, k, v and the inputs, whose shapes are given as heads, whether for queries (1) or chunks of 8 keys (0), width."""
    lengths = (-(-keys // 8), rows)
    shapes = SYSTEMS[name][1]
    named = {word: tensor(1, h, lengths[of], d, seed=9 + n, dtype=dtype) for n, (word, (h, of, d)) in enumerate(shapes.items())}
    return qkv(rows, keys, dtype), named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SYSTEMS)
def test_warm_calls_of_systems_give_what_first_calls_do(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = sd.compile(SYSTEMS[name][0], backend="cpp")
    calls = [(rows, keys) for rows in (1, 16) for keys in (33, 40, 41, 57, 64)]
    given = [system_call(name, *call, dtype) for call in calls]
    with torch.no_grad():
        for _ in range(2):
            found = [attn(*qkv, q_offset="end", **named) for qkv, named in given]
        ordinary(monkeypatch)
        wanted = [attn(*qkv, q_offset="end", **named) for qkv, named in given]
        dense = [sd.compile(attn.program, backend="reference")(*(t.double() for t in qkv), q_offset="end", **{
            word: t.double() for word, t in named.items()}) for qkv, named in given]  # fmt: skip
    assert all(map(torch.equal, found, wanted))
    if dtype == torch.float64:
        for one, other in zip(found, dense, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["moba", "quest", "hsa", "nsa"])
def test_shortcuts_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = sd.compile(SYSTEMS[name][0], backend="cpp")
    (q, k, v), named = system_call(name, 1, 57)
    wanted = attn(q, k, v, q_offset="end", **named)
    for kind in (Attend, TopK, Summary, Bound):
        monkeypatch.setitem(LOWERED_RULES, kind, None)
    assert torch.equal(attn(q, k, v, q_offset="end", **named), wanted)
    with pytest.raises(TypeError):  # seen to be looked for
        attn(q.repeat(2, 1, 1, 1), *(t.repeat(2, 1, 1, 1) for t in (k, v)), q_offset="end", **named)


def test_inputs_of_warm_calls_are_looked_at() -> None:
    attn = sd.compile(SYSTEMS["hsa"][0], backend="cpp")
    qkv_, named = system_call("hsa", 1, 57)
    for _ in range(2):
        plain = attn(*qkv_, q_offset="end", **named)
    marks, asked = named["landmarks"], named["retrieval_q"]
    assert torch.equal(attn(*qkv_, q_offset="end", **named | {"landmarks": marks[:, :, :7]}), plain)  # whole chunks alone
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"landmarks": marks[:, :, :6]}, sd.ShapeError, "landmarks"), ({"retrieval_q": asked[..., :5]}, sd.ShapeError, "retrieval"),
        ({"landmarks": None}, sd.TableError, "missing input"), ({"bias": marks}, sd.TableError, "bias"),
        ({"landmarks": [1.0]}, sd.TableError, "torch tensor"), ({"retrieval_q": asked[:, :, :0]}, sd.ShapeError, "retrieval_q"),
    ]  # fmt: skip
    for change, error, words in wrong:
        with pytest.raises(error, match=words):
            attn(*qkv_, q_offset="end", **named | change)
    leaf = asked.clone().requires_grad_()
    attn(*qkv_, q_offset="end", **named | {"retrieval_q": leaf}).sum().backward()
    assert leaf.grad is not None and leaf.grad.any()
    other = attn(*qkv_, q_offset="end", **named | {"retrieval_q": torch._neg_view(asked)})
    assert torch.equal(other, attn(*qkv_, q_offset="end", **named | {"retrieval_q": -asked})) and not torch.equal(other, plain)


def ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is a first call."""
    monkeypatch.setattr(Calls, "_again", lambda *_: None)
    monkeypatch.setattr(StaticAttention, "again", lambda *_: None)


def test_steps_of_a_known_kind_are_not_checked_again(warm, monkeypatch):
    steps = [qkv(1, keys) for keys in range(50, 64)]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(1, 61)]
    with monkeypatch.context() as patch:
        for name in ("check_call", "check_program_call"):
            patch.setattr(f"sparsedsl.execute.calls.{name}", None)
        found = [warm(*step, q_offset=step[1].shape[2] - 1, return_lse=True) for step in steps]
        ends = [warm(*step, q_offset="end") for step in steps]
        other = warm(*strided, q_offset=60)
    ordinary(monkeypatch)
    for step, (out, lse), end in zip(steps, found, ends, strict=True):
        wanted, weight = warm(*step, q_offset=step[1].shape[2] - 1, return_lse=True)
        assert torch.equal(out, wanted) and torch.equal(lse, weight) and torch.equal(end, wanted)
    assert torch.equal(other, warm(*strided, q_offset=60))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kinds_are_told_apart_by_dtype_scale_and_heads(dtype, warm, monkeypatch):
    q, k, v = qkv(1, 60, dtype)
    calls: list[Any] = [
        lambda: warm(q, k, v, q_offset=59), lambda: warm(q.float(), k.float(), v.float(), q_offset=59, scale=0.3),
        lambda: warm(q, k[:, :1], v[:, :1], q_offset=59), lambda: warm(q, k, v[..., :5], q_offset=59), lambda: warm(q, k, v, q_offset=40),
    ]  # fmt: skip
    found = [(call(), call()) for call in calls]
    ordinary(monkeypatch)
    for call, (first, second) in zip(calls, found, strict=True):
        wanted = call()
        assert torch.equal(first, wanted) and torch.equal(second, wanted) and second.dtype == wanted.dtype


def test_what_does_not_fit_is_refused_as_at_the_first_call(warm):
    q, k, v = qkv(1, 60)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"q": q.double()}, "one dtype"), ({"k": k[:, :, :59]}, "same length"), ({"v": v[:, :1]}, "number of heads"),
        ({"k": k[..., :7]}, "head_dim"), ({"q": q[0]}, "4 dimensions"), ({"q_offset": -1}, "q_offset"), ({"q_offset": 1.5}, "q_offset"),
        ({"scale": 0.0}, "scale"), ({"scale": [1]}, "scale"), ({"k": k[:, :, :0], "v": v[:, :, :0], "q_offset": "end"}, "no more queries"),
    ]  # fmt: skip
    for change, words in wrong:
        with pytest.raises(sd.ShapeError, match=words):
            warm(**{"q": q, "k": k, "v": v, "q_offset": 59} | change)
    with pytest.raises(sd.TableError, match="bias"):
        warm(q, k, v, q_offset=59, bias=q)


def test_what_surrounds_a_call_is_heeded(warm):
    q, k, v = qkv(1, 60)
    plain = warm(q, k, v, q_offset=59)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert warm(q, k, v, q_offset=59).dtype == torch.bfloat16
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(warm(q, k, v, q_offset=59), torch._subclasses.fake_tensor.FakeTensor)
    each = torch.vmap(lambda one: warm(one, k, v, q_offset=59))(torch.stack([q, q]))
    torch.testing.assert_close(each[1], plain)
    leaf = q.clone().requires_grad_()
    warm(leaf, k, v, q_offset=59).sum().backward()
    assert leaf.grad is not None and leaf.grad.any()
    assert torch.equal(warm(leaf.detach(), k, v, q_offset=59), plain)
    v = v.clone()
    v[:, :, 59] = float("nan")
    assert warm(q, k, v, q_offset=59).isnan().all()
    assert torch.equal(warm(q, k, v, q_offset=58).isnan().any(), torch.tensor(False))  # nobody sees it


def test_an_offset_that_is_left_out_is_warned_of_after_warm_calls():
    attn = sd.compile(CAUSAL & (sd.q_idx - sd.kv_idx < 11), backend="cpp")
    q, k, v = qkv(1, 60)
    attn(q, k, v, q_offset=0)
    with pytest.warns(sd.CallWarning, match="no q_offset was given"):
        attn(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn(q, k, v)  # once


def test_integers_are_checked_again_for_longer_calls():
    attn = sd.compile(sd.kv_idx <= sd.maximum(sd.q_idx * 2**52, sd.q_idx + 3), backend="cpp")
    q, k, v = qkv(1, 200)
    for keys in (100, 101, 128):
        attn(q, k[:, :, :keys], v[:, :, :keys], q_offset="end")
    q, k, v = qkv(1, 600)
    with pytest.raises(sd.UnsupportedError, match=r"2\*\*60"):
        attn(q, k, v, q_offset="end")


def test_patterns_with_tables_and_those_that_read_lengths_are_ordinary_calls(monkeypatch):
    doc = sd.table("doc", monotone=True)
    attn = sd.compile(WINDOW & (doc[sd.q_idx] == doc[sd.kv_idx]), backend="cpp")
    q, k, v = qkv(40, 40)
    ids = torch.arange(40) // 7
    first = attn(q, k, v, doc=ids)
    assert not torch.equal(first, attn(q, k, v, doc=ids // 3))
    with pytest.raises(sd.TableError, match="monotone"):
        attn(q, k, v, doc=ids.flip(0).contiguous())
    late = sd.compile(sd.kv_idx >= sd.kv_len - 5, backend="cpp")
    one, few = late(q, k, v), late(q, k[:, :, :30], v[:, :, :30], q_offset=0)
    ordinary(monkeypatch)
    assert torch.equal(one, late(q, k, v)) and torch.equal(few, late(q, k[:, :, :30], v[:, :, :30], q_offset=0))


@pytest.mark.parametrize("backend", ["cpp", "tiled"])
def test_a_view_that_negates_is_read_as_what_it_says(backend):
    q, k, v = qkv(40, 40)
    attn = sd.compile(WINDOW, backend=backend)
    wanted = attn(-q, k, -v)
    for _ in range(2):
        assert torch.equal(attn(torch._neg_view(q), k, torch._neg_view(v)), wanted)


def test_auto_repeats_what_it_chose(monkeypatch):
    pattern = CAUSAL & (sd.q_idx - sd.kv_idx < 13)
    q, k, v = qkv(16, 16)
    few = sd.compile(pattern)
    wanted = few(q, k, v)  # too little to compile
    monkeypatch.setattr(CppKernel, "forward", None)
    assert torch.equal(few(q, k, v), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_branches_are_merged_alike_with_and_without_gradients(dtype):
    outs, lses = torch.randn(2, 2, 3, 300, 5, dtype=dtype), 5 * torch.randn(2, 2, 3, 300, dtype=dtype)
    lses[0, 0, 0, :9], lses[1, 0, 0, 5:12] = -float("inf"), -float("inf")
    outs[:, 0, 0, 5:9] = 0
    lses[0, 1, 1, 1], lses[1, 1, 1, 2] = float("nan"), float("inf")
    with torch.enable_grad():
        wanted = lse_merge(list(zip(outs, lses, strict=True)))
    with torch.no_grad():
        quick = lse_merge(list(zip(outs, lses, strict=True)))
    for one, other in zip(wanted, quick, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
