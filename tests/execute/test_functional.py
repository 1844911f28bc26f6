"""``sd.attention``: what a compiled pattern gives, without compiling twice, and without keeping what is not its own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import sparsedsl as sd
from sparsedsl.execute import functional

CAUSAL = sd.kv_idx <= sd.q_idx
DOC = sd.table("doc", monotone=True)
PACKED = CAUSAL & (DOC[sd.q_idx] == DOC[sd.kv_idx])
BIAS = sd.table("bias", learned=True)


def alike(one, other):
    """The same but for rounding: a library that is ready by the second call may take over from torch."""
    return torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def qkv(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(2, heads, 12, 8, dtype=dtype) for heads in (4, 2, 2)]


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    sd.clear_caches()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is compiled, in order."""
    seen: list[object] = []

    def compile(pattern: object, **words: object) -> sd.Attention:
        seen.append(pattern)
        return sd.compile(pattern, **words)

    monkeypatch.setattr(functional, "compile_pattern", compile)
    return seen


@pytest.mark.parametrize("backend", ["reference", "tiled", None])
@pytest.mark.parametrize(
    ("pattern", "tables"),
    [
        (CAUSAL, {}),
        (sd.attend(CAUSAL, score=sd.score * 2, sink=0.5, scale=0.3), {}),
        (PACKED, {"doc": torch.arange(12) // 5}),
        (sd.Program(CAUSAL), {}),
        (sd.patterns.moba(chunk=4, top_k=1), {}),
        (True, {}),
    ],
)
def test_it_is_the_compiled_call(pattern, tables, backend):
    q, k, v = qkv()
    words = {"q_offset": 0, "return_lse": True, **tables}
    for got, wanted in zip(
        sd.attention(q, k, v, pattern, backend=backend, **words),
        sd.compile(pattern, backend=backend or "auto")(q, k, v, **words),
        strict=True,
    ):
        assert alike(got, wanted)


def test_what_says_the_same_is_compiled_once(compilations):
    q, k, v = qkv()
    for _ in range(3):
        sd.attention(q, k, v, (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4))
    assert len(compilations) == 1
    sd.attention(q, k, v, (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5))
    sd.attention(q, k, v, (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4), backend="reference")
    assert len(compilations) == 3
    sd.clear_caches()
    sd.attention(q, k, v, (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4))
    assert len(compilations) == 4


def test_heads_scale_and_constants_that_hash_alike_are_told_apart():
    q, k, v = qkv()
    table = sd.table("t", values_in=(0, 99))
    values = torch.arange(12)
    for far in (1, 2):  # -1 and -2 have one hash
        mask = (table[sd.maximum(sd.q_idx - far, 0)] <= sd.kv_idx) & CAUSAL
        assert alike(sd.attention(q, k, v, mask, t=values), sd.compile(mask)(q, k, v, t=values))
    for scale in (None, 0.5, 1.0):
        pattern = sd.attend(CAUSAL, scale=scale)
        assert alike(sd.attention(q, k, v, pattern), sd.compile(pattern)(q, k, v))
    sd.attention(q, k, v, sd.attend(CAUSAL))
    with pytest.raises(sd.ShapeError, match="8 heads"):
        sd.attention(q, k, v, sd.attend(CAUSAL, heads=8))


def test_bound_tensors_count_and_are_not_kept(compilations):
    q, k, v = qkv()
    for ids in (torch.arange(12) // 5, torch.arange(12) // 3):
        assert alike(sd.attention(q, k, v, PACKED.bind(doc=ids)), sd.compile(PACKED)(q, k, v, doc=ids))
    assert len(compilations) == 1
    gone = weakref.ref(ids)
    assert alike(sd.attention(q, k, v, PACKED.bind(doc=ids), doc=torch.zeros(12, dtype=int)), sd.attention(q, k, v, CAUSAL))
    del ids
    gc.collect()
    assert gone() is None


def test_a_program_with_bound_tensors_keeps_none_of_them():
    q, k, v = qkv()
    found = []
    for ids in (torch.arange(12) // 5, torch.arange(12) // 3):
        program = sd.joint(PACKED.bind(doc=ids), sd.attend(CAUSAL))
        found.append(sd.attention(q, k, v, program))
        assert alike(found[-1], sd.attention(q, k, v, sd.joint(PACKED, sd.attend(CAUSAL)), doc=ids))
    assert not alike(*found)
    gone = weakref.ref(ids)
    del ids, program
    gc.collect()
    assert gone() is None


def test_the_memory_bound_counts(monkeypatch, compilations):
    monkeypatch.setenv("SPARSEDSL_MEMORY_BYTES", "0")
    q, k, v = qkv()
    for _ in range(2):
        sd.attention(q, k, v, CAUSAL, backend="reference")
    assert len(compilations) == 2


def test_hundreds_are_remembered_and_no_more():
    q = torch.zeros(1, 1, 1, 1)
    for width in range(1, 9):
        sd.attention(q, q, q, sd.q_idx - sd.kv_idx < width, backend="reference")
    known = functional._COMPILED
    assert len(known) == 8
    assert 100 <= known._most / (known._bytes / 8) <= 500


def test_a_compiled_pattern_has_its_own_options():
    q, k, v = qkv()
    attn = sd.compile(CAUSAL, backend="reference")
    assert alike(sd.attention(q, k, v, attn, backend="reference"), attn(q, k, v))
    with pytest.raises(
        sd.ArgumentError, match="backend='tiled' is for a pattern; got a compiled one, whose backend is 'reference'"
    ):
        sd.attention(q, k, v, attn, backend="tiled")
    with pytest.raises(sd.ArgumentError, match="layout='bshd' is for a pattern"):
        sd.attention(q, k, v, attn, layout="bshd")


def test_functions_are_traced_at_each_call():
    q, k, v = qkv()
    width = 3

    def local(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (q_idx - kv_idx < width)

    for width in (3, 5):  # the function reads it
        assert alike(sd.attention(q, k, v, local), sd.compile(CAUSAL & (sd.q_idx - sd.kv_idx < width))(q, k, v))


def test_gradients_reach_tensors_and_learned_tables():
    q, k, v = (x.requires_grad_() for x in qkv())
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    pattern = sd.attend(CAUSAL, score=sd.score * BIAS[sd.h])
    for bound in (pattern, pattern.bind(bias=bias)):
        words = {} if bound is not pattern else {"bias": bias}
        got = torch.autograd.grad(sd.attention(q, k, v, bound, **words).square().sum(), [q, k, v, bias])
        wanted = torch.autograd.grad(sd.compile(pattern)(q, k, v, bias=bias).square().sum(), [q, k, v, bias])
        assert all(map(torch.allclose, got, wanted))


@pytest.mark.parametrize(
    "pattern", [sd.patterns.moba(chunk=4, top_k=1), PACKED.bind(doc=torch.arange(12) // 5)], ids=["program", "bound mask"]
)
def test_one_graph_under_torch_compile(pattern):
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    def step(q, k, v, pattern):
        return sd.attention(q * 2, k, v, pattern, layout="bshd").sin()

    torch._dynamo.reset()
    q, k, v = (x.transpose(1, 2) for x in qkv())
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for _ in range(2):
        assert torch.allclose(compiled(q, k, v, pattern), step(q, k, v, pattern))
    assert len(graphs) == 1
    other = sd.q_idx - sd.kv_idx < 3
    assert torch.allclose(compiled(q, k, v, other), step(q, k, v, other))


def test_a_function_within_torch_compile_is_refused():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="could change unseen"):
        torch.compile(lambda q: sd.attention(q, q, q, lambda b, h, m, n: m >= n), backend="eager", fullgraph=True)(qkv()[0])


def test_names_that_are_words_of_the_call_go_into_tables():
    q, k, v = qkv()
    ids = torch.arange(12) // 5
    assert alike(sd.attention(q, k, v, PACKED, tables={"doc": ids}), sd.attention(q, k, v, PACKED, doc=ids))
    with pytest.raises(sd.TableError, match="table 'doc' is given twice"):
        sd.attention(q, k, v, PACKED, tables={"doc": ids}, doc=ids)
    with pytest.raises(sd.TableError, match="tables must be a mapping, name -> tensor"):
        sd.attention(q, k, v, PACKED, tables=[ids])
    named_so = sd.table("tables")
    torch.testing.assert_close(  # another pattern's code: not bit for bit
        sd.attention(q, k, v, (named_so[sd.q_idx] == named_so[sd.kv_idx]) & CAUSAL, tables=ids),
        sd.attention(q, k, v, PACKED, doc=ids),
    )


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"backend": "tilde"}, sd.PatternError, "Did you mean 'tiled'"),
        ({"backend": 3}, sd.PatternError, "backend"),
        ({"layout": "bsdh"}, sd.PatternError, "layout must be one of 'bhsd', 'bshd'; got 'bsdh'"),
        ({"allow": ["x"]}, sd.PatternError, "a static pattern has no effects"),
        ({"dcos": 1}, sd.TableError, "dcos"),
    ],
)
def test_mistakes_are_named(words, error, text):
    with pytest.raises(error, match=text):
        sd.attention(*qkv(), CAUSAL, **words)
    with pytest.raises(sd.PatternError, match="must be a Mask or a Pattern; got 'causal'"):
        sd.attention(*qkv(), "causal")
