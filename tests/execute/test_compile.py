"""The compiled callable: which lowering runs and why, what is remembered, BlockMasks for plain FlexAttention, text and pickles."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.registry import choose as choose_for
from sparsedsl.backends.registry import named
from sparsedsl.backends.tiled.attention import HeadSizes
from sparsedsl.runtime.request import CallFacts, Request
from sparsedsl.testing import tensor

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 100)
doc = sd.table("doc", monotone=True)


def facts(**words):
    plain = {"device": "cpu", "dtype": "float32", "batch": 1, "heads": 8, "kv_heads": 8, "q_len": 8192, "kv_len": 8192}
    return CallFacts(**(plain | {"head_dim": 64, "head_dim_v": 64} | words))


def choose(pattern, facts, backend):
    return choose_for(Request("attention", facts, pattern), backend)


def test_auto_compiles_on_cpu_where_it_is_worth_it():
    plan = choose(sd.attend(window), facts(), "auto")
    assert plan.backend == "cpp" and hash(plan) == hash(choose(sd.attend(window), facts(), "auto"))
    few = facts(heads=1, kv_heads=1, q_len=300, kv_len=300, grad=True)
    plan = choose(sd.attend(window), few, "auto")
    assert plan.backend == "tiled" and plan.reason == "needs no compiler"


def test_auto_takes_flex_on_cuda(monkeypatch):
    monkeypatch.setattr("sparsedsl.backends.triton.backend.missing", lambda device: "no kernels here")
    plan = choose(sd.attend(window), facts(device="cuda", grad=True, lse=True), "auto")
    assert plan.backend == "flex" and "never visited" in plan.reason


def test_auto_takes_the_reference_for_few_logits():
    plan = choose(sd.attend(window & (kv_idx % 7 != 6)), facts(q_len=1, kv_len=1024), "auto")  # compiled by no other test
    assert plan.backend == "reference" and "8,192 logits are few" in plan.reason


@pytest.mark.parametrize(
    ("words", "reason"),
    [({"grad": True}, "no backward pass on CPU"), ({"lse": True}, "the LSE on CPU"), ({"dtype": "float64"}, "no float64")],
)
@pytest.mark.parametrize("length", [2048, 32768, 1 << 20])
def test_auto_does_what_flex_cannot_do_at_any_length(words, reason, length):
    assert choose(sd.attend(window), facts(q_len=length, kv_len=length, **words), "auto").backend == "cpp"
    words = {"return_lse" if name == "lse" else name: value for name, value in words.items()}
    explained = sd.compile(window).explain(length, heads=8, **words)
    assert explained.plan.backend == "cpp" and reason in explained.others["flex"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"grad": True}, "FlexAttention has no backward pass on CPU"),
        ({"lse": True}, "FlexAttention does not return the LSE on CPU"),
        ({"dtype": "float64"}, "FlexAttention has no float64"),
    ],
)
def test_flex_refuses_with_a_way_out(words, text):
    assert named("flex").refusal(Request("attention", facts(**words), sd.attend(window))) == text
    with pytest.raises(sd.UnsupportedError, match=f"backend 'flex' cannot run this call: {text}. Use backend='tiled'"):
        choose(sd.attend(window), facts(**words), "flex")


def test_flex_trains_on_cuda():
    request = Request("attention", facts(device="cuda", grad=True, lse=True), sd.attend(window))
    assert named("flex").refusal(request) is None


def test_explain_says_what_would_happen():
    text = str(sd.compile(window, backend="flex").explain(8192, heads=8))
    assert "backend: flex" in text and "q_idx - 99 <= kv_idx <= q_idx" in text and "causal           PROVED" in text
    refused = sd.compile(window, backend="flex").explain(32768, heads=8, grad=True)
    assert refused.plan is None and "backend: none" in str(refused)
    attn = sd.compile(window)
    assert "backend: cpp" in str(attn.explain(32768, heads=8, grad=True))
    assert "strips of up to" in str(sd.compile(window, backend="tiled").explain(8192, grad=True))
    assert "<pre" in attn.explain(64)._repr_html_()
    text = str(sd.compile(causal & ((q_idx * kv_idx) % 3 == 0)).explain(256))
    assert "kv_idx <= q_idx; where also kv_idx*q_idx % 3 == 0, looked at tile by tile" in text


def test_explain_expects_times_of_the_backend_taken_and_of_the_others():
    attn = sd.compile(window, backend="tiled")
    found = attn.explain(8192, heads=8)
    assert {"tiled", "reference", "flex"} <= {*found.expected} and [*found.expected.values()] == sorted(found.expected.values())
    assert (
        found.expected["tiled"]
        == attn.static.runner("tiled").schedule_of(Domain(8192, 8192, 0, 1, 8), HeadSizes(8, 64, 64)).seconds
    )
    assert found.expected["reference"] > 10 * found.expected["tiled"]
    text = str(found)
    assert "(an estimate from the rates of this machine, " in text and ", chosen\n" in text
    wider = sd.compile(causal, backend="tiled").explain(8192, heads=8).expected
    assert all(wider[name] > seconds for name, seconds in found.expected.items() if name != "reference")
    assert set(found.expected).isdisjoint(found.others) and "triton" in found.others and "need a GPU" in text
    assert sd.compile(window).explain(8192, device="cuda").expected == {} or torch.cuda.is_available()


def test_explain_prints_values_where_they_are_known():
    widths = torch.tensor([16, 64, 1024, 64])
    mask = causal & (q_idx - kv_idx < sd.table("w", values_in=(1, 5000))[sd.h])
    found = sd.compile(mask, backend="tiled").explain(4096, heads=4, w=widths)
    text = str(found)
    assert "w = table('w', values_in=(1, 5000))  # [16, 64, 1024, 64]" in text
    assert "heads 1, 3:" in text and "w[h] is 1,024 here" in text
    assert (found.cache_need.recent, found.cache_need.first) == (1024, 0)
    assert "any earlier key; as query" in str(sd.compile(causal, backend="tiled").explain(64))


def test_lists_are_remembered_while_tables_live_unchanged(monkeypatch):
    from sparsedsl.execute import static as module

    made = []
    monkeypatch.setattr(module, "classify", lambda *a, **words: made.append(a) or classify(*a, **words))
    from sparsedsl.analysis.tiles import classify

    attn = sd.compile(causal & (doc[q_idx] == doc[kv_idx]))
    ids = torch.arange(256) // 50
    for _ in range(3):
        first = attn.lists(Domain(256, 256, tables={"doc": ids}), (32, 32))
    assert len(made) == 1
    attn.lists(Domain(256, 256, batch=4, heads=2, tables={"doc": ids}), (32, 32))
    assert len(made) == 1  # neither batch nor head is read
    ids.zero_()
    changed = attn.lists(Domain(256, 256, tables={"doc": ids}), (32, 32))
    assert len(made) == 2 and not torch.equal(changed.classes(), first.classes())
    attn.lists(Domain(256, 256, tables={"doc": ids.clone()}), (32, 32))
    assert len(made) == 3
    del ids
    gc.collect()
    for offset in range(100):
        attn.lists(Domain(16, 256, offset, tables={"doc": torch.zeros(256, dtype=torch.int64)}), (32, 32))
    made.clear()  # which holds the tables
    gc.collect()
    assert len(attn.static._lists) == 0, "lists go with their tables"


def test_block_mask_in_plain_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attn = sd.compile(sd.attend(window & (kv_idx % 3 != h), score=sd.tanh(sd.score)))
    q, k, v = (tensor(1, 3, 200, 16, seed=s) for s in range(3))
    mine = attn.block_mask(200, 200, heads=3, block_size=32)
    theirs = create_block_mask(attn.mask_mod(), 1, 3, 200, 200, device="cpu", BLOCK_SIZE=32)
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    assert mine.kv_indices.untyped_storage().nbytes() < mine.kv_indices.numel() * 4
    out = flex_attention(q, k, v, block_mask=mine, score_mod=attn.score_mod())
    wanted = sd.compile(attn.pattern, backend="reference")(q, k, v)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_block_mask_at_an_offset_takes_local_indices():
    from torch.nn.attention.flex_attention import flex_attention

    attn = sd.compile(window, backend="reference")
    q, k, v = tensor(1, 2, 30, 16, seed=0), tensor(1, 2, 300, 16, seed=1), tensor(1, 2, 300, 16, seed=2)
    mask = attn.block_mask(30, 300, q_offset=270, block_size=(16, 64))
    assert bool(mask.mask_mod(0, 0, torch.tensor(0), torch.tensor(270))) and not bool(
        mask.mask_mod(0, 0, torch.tensor(0), torch.tensor(271))
    )
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), attn(q, k, v, q_offset=270), rtol=1e-5, atol=1e-5)


def test_plain_functions_give_the_patterns_values():
    attn = sd.compile(sd.attend(causal & (doc[q_idx] == doc[kv_idx]), score=sd.score - 0.5 * (q_idx - kv_idx)))
    ids = torch.tensor([0, 0, 1, 1])
    mask, score = attn.mask_mod(doc=ids, q_offset=2), attn.score_mod(doc=ids, q_offset=2)
    assert mask(0, 0, torch.tensor(1), torch.arange(4)).tolist() == [False, False, True, True]
    assert float(score(torch.tensor(1.0), 0, 0, torch.tensor(1), torch.tensor(1))) == 0.0
    assert sd.compile(causal).score_mod() is None


def test_backend_names():
    with pytest.raises(sd.PatternError, match="one of 'auto', 'reference', 'tiled', 'cpp', 'flex', 'triton'; got 'fast'"):
        sd.compile(causal, backend="fast")


@pytest.mark.parametrize("value", [3, "causal", None], ids=["number", "text", "nothing"])
def test_compile_wants_a_pattern(value):
    with pytest.raises(sd.PatternError, match="pattern must be a Mask or a Pattern"):
        sd.compile(value)


def test_pickle_and_copy_keep_the_pattern():
    attn = sd.compile(sd.attend(causal & (doc[q_idx] == doc[kv_idx]), sink=0.0), backend="reference")
    for again in (pickle.loads(pickle.dumps(attn)), copy.deepcopy(attn)):
        assert again.pattern == attn.pattern and again.backend == attn.backend


def test_in_a_module_under_autograd():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)
            self.attn = sd.compile(window)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return self.attn(q, k, v)

    layer = Layer()
    layer(torch.randn(2, 20, 16)).sum().backward()
    assert layer.qkv.weight.grad is not None and bool(layer.qkv.weight.grad.isfinite().all())


def test_source():
    assert sd.compile(window, backend="reference").source == "attend((q_idx >= kv_idx) & (q_idx - kv_idx <= 99))"
    assert "def mask_mod(b, h, q_idx, kv_idx):" in sd.compile(window, backend="flex").source
    assert "void ends(const Call *call" in sd.compile(window).source


def test_block_masks_with_sinks_at_any_length(monkeypatch):
    """A column that every query sees makes the lists by key as wide as there are rows: they are refused by name, or left out."""
    from sparsedsl.analysis import lists

    monkeypatch.setattr(lists, "memory", lambda device: 1 << 32)
    attn = sd.compile((kv_idx <= q_idx) & ((q_idx - kv_idx < 1024) | (kv_idx < 4)))
    with pytest.raises(
        sd.UnsupportedError,
        match=r"by key, for gradients, 32,768 tiles of keys.*32,7\d\d, would take at least 4 GiB.*backward=False",
    ):
        attn.block_mask(2**22, 2**22)
    mask = attn.block_mask(2**22, 2**22, backward=False)
    assert mask.q_indices is None and mask.kv_indices.shape == (1, 1, 2**15, 2**15)
    assert mask.kv_indices.untyped_storage().nbytes() < 1 << 22
    everywhere = sd.compile((kv_idx <= q_idx) & (q_idx - kv_idx < 1024) | (q_idx == 0))
    with pytest.raises(sd.UnsupportedError, match=r"32,768 tiles of queries.*32,7\d\d, would take at least 4 GiB.*block_size="):
        everywhere.block_mask(2**22, 2**22, backward=False)
    short = attn.block_mask(512, 512)
    lean = attn.block_mask(512, 512, backward=False)
    assert short.q_indices is not None and torch.equal(short.to_dense(), lean.to_dense())


def test_strips_of_any_length_are_refused_in_explain():
    explained = sd.compile(window, backend="tiled").explain(2**40)
    assert explained.plan is None and "134,217,728 queries at most; got 1,099,511,627,776" in explained.refusal
    assert explained.analysis.totals.listed > 2**33
