"""``sd.nn.Attention``: who owns which table, and that everything torch does with modules works on it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import sparsedsl as sd

CAUSAL = sd.kv_idx <= sd.q_idx
BIAS, DOC = sd.table("bias", learned=True), sd.table("doc", monotone=True)
PATTERN = sd.attend(CAUSAL & (DOC[sd.q_idx] == DOC[sd.kv_idx]), score=sd.score + BIAS[sd.h, sd.q_idx - sd.kv_idx])
IDS = torch.arange(12) // 5


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, heads, 12, 8, dtype=dtype) for heads in (4, 2, 2)]


def module(**words: object) -> sd.nn.Attention:
    return sd.nn.Attention(PATTERN, bias=torch.randn(4, 12), doc=IDS, **words)


def test_who_owns_what():
    attn = module()
    assert [name for name, _ in attn.named_parameters()] == ["bias"]
    assert [name for name, _ in attn.named_buffers()] == ["doc"]
    assert attn.doc is IDS
    values = torch.randn(4, 12)
    bound = sd.nn.Attention(PATTERN.bind(bias=values, doc=IDS))
    assert torch.equal(bound.bias, values) and bound.bias.data_ptr() != values.data_ptr()
    shared = torch.nn.Parameter(values)
    assert sd.nn.Attention(PATTERN.bind(bias=shared)).bias is shared
    assert not sd.nn.Attention(PATTERN, bias=(4, 12)).bias.any()
    assert not attn.pattern.bound, "the values are kept once"


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_it_gives_what_the_pattern_gives_and_learns(layout):
    attn = module(layout=layout)
    q, k, v = qkv()
    turn = (lambda x: x.transpose(1, 2)) if layout == "bshd" else (lambda x: x)
    out, lse = attn(turn(q), turn(k), turn(v), return_lse=True)
    wanted, wanted_lse = sd.compile(PATTERN)(q, k, v, bias=attn.bias, doc=IDS, return_lse=True)
    torch.testing.assert_close(turn(out), wanted)
    torch.testing.assert_close(lse, wanted_lse)
    out.square().sum().backward()
    assert attn.bias.grad.abs().sum() > 0
    before = attn.bias.detach().clone()
    torch.optim.SGD(attn.parameters(), lr=0.1).step()
    assert not torch.equal(before, attn.bias)
    assert not torch.equal(turn(attn(turn(q), turn(k), turn(v))), wanted)


def test_tables_given_with_the_call():
    q, k, v = qkv()
    attn = sd.nn.Attention(PATTERN, bias=(4, 12))
    with pytest.raises(sd.TableError, match="missing table doc"):
        attn(q, k, v)
    for words in ({"doc": IDS}, {"tables": {"doc": IDS}}):
        torch.testing.assert_close(attn(q, k, v, **words), sd.compile(PATTERN)(q, k, v, doc=IDS, bias=torch.zeros(4, 12)))
    other = torch.zeros(12, dtype=torch.long)
    torch.testing.assert_close(
        module(backend="tiled")(q, k, v, doc=other, bias=torch.zeros(4, 12)), sd.attention(q, k, v, CAUSAL)
    )


def test_state_dict_round_trip_is_strict():
    one, two = module(), module()
    assert set(one.state_dict()) == {"bias", "doc"}
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(one(*qkv_fixed), two(*qkv_fixed))
    with pytest.raises(RuntimeError, match="bias"):
        two.load_state_dict({"doc": IDS}, strict=True)


qkv_fixed = qkv()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_parameters_of_their_own(twin):
    attn = module(backend="tiled", layout="bshd")
    other = twin(attn)
    q, k, v = (x.transpose(1, 2) for x in qkv_fixed)
    assert torch.equal(attn(q, k, v), other(q, k, v))
    with torch.no_grad():
        other.bias.zero_()
    assert attn.bias.any()
    assert (other.compiled.backend, other.compiled.layout) == ("tiled", "bshd")


def test_to_casts_float_tables_alone():
    attn = module().to(torch.float64)
    assert attn.bias.dtype == torch.float64 and attn.doc.dtype == torch.int64
    assert attn(*qkv(torch.float64)).dtype == torch.float64
    assert attn.to("meta").bias.is_meta


def test_programs_and_their_inputs():
    q, k, v = qkv()
    program = sd.joint(PATTERN.bind(doc=IDS), sd.patterns.moba(chunk=4, top_k=1))
    attn = sd.nn.Attention(program, bias=torch.randn(4, 12), backend="tiled")
    assert set(attn.state_dict()) == {"bias", "doc"} and not attn.pattern.bound
    torch.testing.assert_close(attn(q, k, v), sd.compile(program, backend="tiled")(q, k, v, bias=attn.bias))
    hsa = sd.nn.Attention(sd.patterns.hsa(chunk=4, top_k=1), backend="tiled")
    assert "given with the call: landmarks, retrieval_q" in repr(hsa)
    rows, marks = torch.randn(2, 2, 12, 6), torch.randn(2, 2, 3, 6)
    assert hsa(q, k, v, retrieval_q=rows, landmarks=marks).shape == q.shape
    with pytest.raises(sd.TableError, match="landmarks is an input of the program: give it with each call"):
        sd.nn.Attention(sd.patterns.hsa(), landmarks=marks)


def test_what_it_shows():
    text = repr(module(backend="tiled", layout="bshd"))
    assert "attend((doc[q_idx] == doc[kv_idx]) & (q_idx >= kv_idx), score=" in text
    assert "backend='tiled', layout='bshd', learned: bias (4, 12), fixed: doc (12,)" in text
    assert "given with the call: bias, doc" in repr(sd.nn.Attention(PATTERN))
    assert repr(sd.nn.Attention(CAUSAL)) == "Attention(attend(q_idx >= kv_idx))"


def test_names_that_modules_have_already():
    attn = sd.nn.Attention(sd.attend(sd.table("forward")[sd.q_idx] >= sd.kv_idx), forward=torch.arange(12))
    assert list(attn.state_dict()) == ["forward_table"]
    torch.testing.assert_close(attn(*qkv_fixed), sd.attention(*qkv_fixed, CAUSAL))  # another pattern's code: not bit for bit
    other = sd.nn.Attention(sd.attend(sd.table("backend")[sd.q_idx] >= sd.kv_idx), tables={"backend": torch.arange(12)})
    assert list(other.state_dict()) == ["backend"]


def test_a_compiled_pattern_and_a_function():
    attn = sd.nn.Attention(sd.compile(CAUSAL, backend="tiled", layout="bshd"))
    assert (attn.compiled.backend, attn.compiled.layout) == ("tiled", "bshd")
    slopes = torch.nn.Parameter(torch.randn(4))

    def score_mod(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    assert sd.nn.Attention(score_mod).slopes is slopes


def test_one_graph_under_torch_compile():
    torch._dynamo.reset()
    attn = module()
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv_fixed), attn(*qkv_fixed))


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"bais": (4, 12)}, sd.TableError, "unexpected argument bais: the pattern reads bias, doc. Did you mean 'bias'"),
        ({"bias": (4, 0)}, sd.TableError, "give its first values as a tensor, or its shape"),
        ({"bias": torch.zeros(4)}, sd.TableError, "is read with 2 indices but has shape"),
        ({"doc": torch.zeros(12)}, sd.TableError, "declared as int"),
        ({"doc": torch.tensor([1, 0])}, sd.TableError, "monotone"),
        ({"layout": "x"}, sd.PatternError, "layout must be one of"),
    ],
)
def test_mistakes_are_named(words, error, text):
    with pytest.raises(error, match=text):
        sd.nn.Attention(PATTERN, **words)
