"""Generated C++ against plain attention in float64: every way keys are found, every dtype, both passes, however strips are cut."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl.backends.cpp import prepared
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.testing import (
    AttentionCase,
    assert_causal,
    assert_matches_reference,
    assert_prefill_equals_decode,
    assert_unseen_keys_have_no_effect,
    inputs,
    patterns,
    shapes,
    tables_for,
    tensor,
)

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)
# Queries and heads of a strip; None: as the code chooses.
CUTS = {"as it is": None, "low": (5, 1), "whole vectors": (16, 1), "high": (64, 1)}


@contextlib.contextmanager
def cut(how: tuple[int, int] | None, threads: int = 1) -> Iterator[None]:
    """Calls inside have strips of this height, and run on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        if how is not None:
            patch.setattr(prepared.Preparer, "_cut", lambda self, call: how)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def assert_right(pattern: Any, q: Any, k: Any, v: Any, how: tuple[int, int] | None = None, **words: Any) -> None:
    """Output, LSE and all gradients are those of plain attention, as closely as the precision allows."""
    with cut(how):
        assert_matches_reference(sd.compile(pattern, backend="cpp"), q, k, v, **words)


def qkv(
    length: int, kv_len: int | None = None, *, batch=2, heads=4, kv_heads=2, dim=8, dim_v=5, dtype=torch.float64, **words: Any
) -> Any:
    kv_len = kv_len or length
    sizes = (heads, length, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim_v)
    return [tensor(batch, *size, seed=seed, dtype=dtype, **words) for seed, size in enumerate(sizes)]


# ---- random patterns ---------------------------------------------------------------------------------------------------------------


@given(
    pattern=patterns(),
    case=shapes(max_len=70, head_dims=(1, 8, 24)) | shapes(max_len=150, max_batch=1, max_heads=2, head_dims=(4, 16, 80)),
    how=st.sampled_from(list(CUTS.values())),
    data=st.data(),
)
@settings(max_examples=40)
def test_random_patterns(pattern, case, how, data):
    tables = data.draw(tables_for(pattern, case))
    q, k, v = data.draw(inputs(case))
    try:
        assert_right(pattern, q, k, v, how, q_offset=case.q_offset, **tables)
    except sd.UnsupportedError as error:
        assert re.search("whose last digit differs|exactly as torch rounds it", str(error))


USUAL = {
    "full": True,
    "nothing": q_idx < -1,
    "window": sd.patterns.sliding_window(40),
    "window and sinks": causal & (sd.patterns.sliding_window(30) | sd.patterns.sinks(4)),
    "not near": abs(q_idx - kv_idx) > 25,
    "dilated": sd.patterns.dilated(10, step=4),
    "strided": sd.patterns.strided(8, local=20),
    "chunks": sd.patterns.chunked(50),
    "scattered": (q_idx * kv_idx) % 3 < 2,
    "scattered per head": (q_idx * kv_idx + h) % 3 < 2,
    "against the diagonal": (q_idx + kv_idx <= 140) & (q_idx + kv_idx >= 120),
    "half as fast": (q_idx >= 2 * kv_idx) & (q_idx - 2 * kv_idx < 30),
    "window per head and batch entry": causal & (q_idx - kv_idx < 5 + 11 * h + 7 * b),
    "ALiBi": sd.attend(sd.patterns.sliding_window(40), score=sd.patterns.alibi(4)),
    "soft cap": sd.attend(causal, score=sd.patterns.softcap(5)),
    "general score": sd.attend(causal, score=score * sd.sigmoid(score) + sd.exp(-abs(q_idx - kv_idx) * 0.1)),
    "score, dilated": sd.attend(sd.patterns.dilated(10, step=4), score=score * (1 + q_idx - kv_idx) / 9),
    "softmax1": sd.attend(sd.patterns.sliding_window(40), sink=0.0),
    "minus infinity for whole rows": sd.attend(True, score=sd.where(q_idx % 3 == 0, score, -math.inf)),
    "bias that is NaN where masked": sd.attend(causal, score=score - sd.log(q_idx - kv_idx + 1)),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_patterns(name):
    assert_right(USUAL[name], *qkv(110))


@pytest.mark.parametrize("how", [how for how in CUTS if how != "as it is"])
@pytest.mark.parametrize("name", ["window", "dilated", "scattered", "window and sinks"])
def test_strips_of_every_height(name, how):
    assert_right(USUAL[name], *qkv(110, heads=2, kv_heads=2), CUTS[how])


@pytest.mark.parametrize("name", ["window", "scattered", "ALiBi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(name, dtype):
    assert_right(USUAL[name], *qkv(100, dtype=dtype))


LENGTHS = [(1, 1, 0), (1, 150, 149), (1, 150, 0), (37, 150, 100), (129, 129, 0), (3, 64, 90), (90, 7, 0)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["window", "dilated", "scattered"])
def test_lengths_and_offsets(name, lengths):
    q_len, kv_len, offset = lengths
    assert_right(USUAL[name], *qkv(q_len, kv_len, batch=1), q_offset=offset)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 1), (6, 3), (12, 2), (96, 1)])
@pytest.mark.parametrize("name", ["window", "scattered", "scattered per head"])
def test_heads(name, heads, kv_heads):
    assert_right(USUAL[name], *qkv(50, heads=heads, kv_heads=kv_heads, batch=1))


@pytest.mark.parametrize(("dim", "dim_v"), [(1, 1), (3, 16), (64, 64), (128, 100), (80, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widths_of_heads(dim, dim_v, dtype):
    assert_right(USUAL["window"], *qkv(70, dim=dim, dim_v=dim_v, batch=1, dtype=dtype))


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim outside": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one for all heads": lambda t: t[:, :1].expand(t.shape),
    "one for all positions": lambda t: t[:, :, :1].expand(t.shape),
    "a part of a projection": lambda t: torch.cat([t, t], dim=3)[..., 3 : 3 + t.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype, layout):
    assert_right(USUAL["window"], *map(LAYOUTS[layout], qkv(90, dtype=dtype)))


def test_many_keys_for_few_queries_are_shared():
    """One strip a head, thousands of keys: in parts, which are joined."""
    for mask in (causal, USUAL["window"], USUAL["scattered"]):
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(mask, *qkv(2, 5000, batch=1, dtype=dtype), q_offset=4998)
    assert_right(
        sd.attend(causal, sink=sink[h]), *qkv(1, 3000, batch=1), q_offset=2999, sink=tensor(4, seed=9, dtype=torch.float64)
    )


# ---- tables ------------------------------------------------------------------------------------------------------------------------

LEARNED = {
    "relative bias": (sd.attend(sd.patterns.sliding_window(40), score=score + bias[h, q_idx - kv_idx]), {"bias": (4, 40)}),
    "bias of keys, dilated": (sd.attend(sd.patterns.dilated(10, step=4), score=score + bias[kv_idx]), {"bias": (130,)}),
    "factor": (sd.attend(causal, score=score * bias[q_idx - kv_idx]), {"bias": (130,)}),
    "cap": (sd.attend(causal, score=sd.tanh(score / 5) * bias[h]), {"bias": (4,)}),
    "scattered": (sd.attend((q_idx * kv_idx) % 3 == 0, score=score + bias[h, kv_idx // 7]), {"bias": (4, 19)}),
    "sink and bias": (sd.attend(causal, score=score + bias[h], sink=sink[b, h]), {"bias": (4,), "sink": (2, 4)}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LEARNED)
def test_learned_tables(name, dtype):
    pattern, sizes = LEARNED[name]
    tables = {table: tensor(*size, seed=7 + i, dtype=dtype) for i, (table, size) in enumerate(sizes.items())}
    assert_right(pattern, *qkv(100, dtype=dtype), **tables)


def test_documents():
    ids = torch.repeat_interleave(torch.arange(7), torch.tensor([20, 3, 40, 1, 45, 25, 16]))
    near = causal & (doc[q_idx] == doc[kv_idx])
    for mask in (near, near & (q_idx - kv_idx < 20), (doc[q_idx] == doc[kv_idx]) | sd.patterns.sliding_window(30)):
        for table in (ids, ids.to(torch.int32)):
            assert_right(mask, *qkv(150, batch=1), doc=table)
    batched = causal & (doc[b, q_idx] == doc[b, kv_idx])
    assert_right(batched, *qkv(150), doc=torch.stack([ids, ids.flip(0).neg()]))


def test_tables_that_change_are_seen():
    attn, (q, k, v) = sd.compile(causal & (doc[q_idx] == doc[kv_idx]), backend="cpp"), qkv(150)
    ids = torch.arange(150) // 40
    for _ in range(2):
        assert_matches_reference(attn, q, k, v, doc=ids)
        ids += torch.arange(150) // 60
    assert_matches_reference(attn, q, k, v, doc=torch.zeros(150, dtype=torch.int64))


def test_a_table_is_let_go():
    """What is remembered of a call holds no table of the caller."""
    import gc
    import weakref

    attn, (q, k, v) = sd.compile(causal & (doc[q_idx] == doc[kv_idx]), backend="cpp"), qkv(50)
    ids = torch.arange(50) // 40
    attn(q, k, v, doc=ids)
    gone = weakref.ref(ids)
    del ids
    gc.collect()
    assert gone() is None


# ---- numbers at the edge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["window", "scattered"])
def test_logits_of_every_size(name, size, dtype):
    """An LSE of a thousand and more has lost digits: weights of the backward pass are not made of it."""
    q, k, v = qkv(80, dtype=dtype, batch=1)
    assert_right(USUAL[name], q * size, k, v)


def test_the_largest_logits_are_masked():
    """A maximum taken before the mask would leave nothing of the rows it masks."""
    q, k, v = qkv(100, dtype=torch.float32, batch=1)
    q, k = q.abs() + 0.1, k.abs() + 0.1
    k[:, :, 60:] *= 1e4
    assert_right(sd.attend(causal & (kv_idx < 60)), q, k, v)
    assert_right(sd.attend(((q_idx * kv_idx) % 3 < 2) & (kv_idx < 60)), q, k, v)


def test_empty_rows():
    mask = causal & (q_idx - kv_idx >= 30)
    assert_right(mask, *qkv(100))
    assert_right(sd.attend(mask, sink=0.5), *qkv(100))
    q, k, v = qkv(100, dtype=torch.float32)
    out, lse = sd.compile(mask, backend="cpp")(q, k, v, return_lse=True)
    assert not bool(out[:, :, :30].any()) and bool((lse[:, :, :30] == -math.inf).all()) and bool(lse[:, :, 30:].isfinite().all())


@pytest.mark.parametrize("mask", [causal, USUAL["scattered"] & causal], ids=["intervals", "lists"])
def test_keys_that_nobody_may_see_have_no_effect(mask):
    case = AttentionCase(batch=2, heads=4, kv_heads=2, q_len=90, kv_len=90)
    assert_unseen_keys_have_no_effect(sd.compile(mask, backend="cpp"), case, seed=0)


# ---- threads, torch ----------------------------------------------------------------------------------------------------------------


def test_digits_do_not_depend_on_the_number_of_threads():
    pattern, sizes = LEARNED["relative bias"]
    q, k, v = qkv(300, dtype=torch.float32, batch=1, dim=64)
    table = tensor(4, 40, seed=3)
    seen = []
    for threads in (1, 2, 3):
        with cut(None, threads):
            leaves = [t.clone().requires_grad_() for t in (q, k, v, table)]
            out, lse = sd.compile(pattern, backend="cpp")(*leaves[:3], bias=leaves[3], return_lse=True)
            seen.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    for other in seen[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(other, seen[0], strict=True))
    assert sizes


def test_parts_of_a_head_add_up():
    """Few heads, many queries: the backward pass is worked on in parts, each with sums of its own."""
    for mask in (sd.patterns.sliding_window(100), USUAL["dilated"], USUAL["scattered"]):
        q, k, v = qkv(2100, dtype=torch.float32, batch=1, heads=2, kv_heads=1)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        grads = []
        for parts in (16, 1):
            with LIMITS.using(parts=parts):
                grads.append(torch.autograd.grad(sd.compile(mask, backend="cpp")(*leaves).square().sum(), leaves))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_after_a_fork_with_one_thread():
    import os

    attn, (q, k, v) = sd.compile(causal, backend="cpp"), qkv(100, dtype=torch.float32)
    with cut(None, 1):
        wanted = attn(q, k, v)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(attn(q, k, v), wanted) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_a_row_does_not_depend_on_the_rest_of_the_call():
    case = AttentionCase(batch=2, heads=4, kv_heads=2, q_len=40, kv_len=40)
    for mask in (USUAL["window"], USUAL["dilated"], USUAL["scattered"] & causal):
        attn = sd.compile(mask, backend="cpp")
        assert_causal(attn, case)
        assert "token by token" in assert_prefill_equals_decode(attn, case)


def test_gradients_by_finite_differences():
    pattern = sd.attend(causal & (q_idx - kv_idx < 4), score=sd.tanh(score) * 3 + bias[h, q_idx - kv_idx], sink=sink[h])
    attn, sizes = sd.compile(pattern, backend="cpp"), ((1, 4, 6, 3), (1, 2, 6, 3), (1, 2, 6, 2), (4, 4), (4,))
    leaves = [tensor(*size, seed=i, dtype=torch.float64).requires_grad_() for i, size in enumerate(sizes)]

    def call(q, k, v, bias, sink):
        return attn(q, k, v, bias=bias, sink=sink, return_lse=True)

    assert torch.autograd.gradcheck(call, leaves)


def test_vmap_checkpoint_and_compile():
    attn, (q, k, v) = sd.compile(USUAL["window"], backend="cpp"), qkv(60, dtype=torch.float32)
    wanted = attn(q, k, v)
    stacked = torch.vmap(attn)(torch.stack([q, q * 2]), torch.stack([k, k]), torch.stack([v, v]))
    torch.testing.assert_close(stacked[0], wanted)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    plain = torch.autograd.grad(attn(*leaves).sum(), leaves)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(attn, *leaves, use_reentrant=False).sum(), leaves)
    grads = torch.func.grad(lambda *t: attn(*t).sum(), argnums=(0, 1, 2))(q, k, v)
    for one, two, three in zip(plain, again, grads, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


# ---- what it says ------------------------------------------------------------------------------------------------------------------


def test_it_explains_how_keys_are_found():
    def lines(mask: Any, **words: Any) -> str:
        return str(sd.compile(mask, backend="cpp").explain(4096, heads=4, **words))

    assert "1 interval a query, worked out by the code" in lines(USUAL["window"])
    assert "lists of blocks of 64 keys" in lines(USUAL["scattered"])
    assert "one residue modulo 4" in lines(USUAL["dilated"])
    assert "bfloat16 is widened to float32" in lines(USUAL["window"], dtype="bfloat16")
    ids = torch.zeros(4096, dtype=torch.int64)
    assert "1 of them looked up in monotone tables" in lines(causal & (doc[q_idx] == doc[kv_idx]), doc=ids)


def test_its_source_is_readable():
    text = sd.compile(USUAL["ALiBi"], backend="cpp").source
    assert "first[i] = larger(q_idx - 39, 0);" in text and "const real score = tile[j * lanes->count + i] * scale;" in text
    assert "kv_idx % 3" not in text


def test_auto_takes_it_where_a_compiler_is_worth_it():
    attn = sd.compile(sd.patterns.sliding_window(77))
    assert attn.explain(8192, heads=4).plan.backend == "cpp"
    assert attn.explain(8192, heads=4, grad=True, return_lse=True).plan.backend == "cpp"
    assert attn.explain(64, heads=4, grad=True).plan.backend == "reference"
    assert attn.explain(200, heads=4, grad=True).plan.backend == "tiled"
    assert attn.explain(8192, heads=4, device="cuda").plan.backend != "cpp"


def test_what_it_refuses_has_a_way_out():
    q, k, v = qkv(20)
    rounded = sd.compile(sd.log(q_idx + 1) * 3 > sd.log(kv_idx + 2), backend="cpp")
    with pytest.raises(sd.UnsupportedError, match=r"the mask compares log\(.*last digit.*Use backend='tiled'"):
        rounded(q, k, v)


def test_exact_operations():
    near = sd.parse("f32_to_int64(f32_mul(f32_log(q_idx - kv_idx + 1), 3.5)) < 9")
    assert_right(causal & near, *qkv(90))
    scores = sd.parse("score + f32_div(f32_add(q_idx, 0.5), 7.0) - f16_mul(kv_idx, 0.1)")
    assert_right(sd.attend(causal, score=scores), *qkv(90, dtype=torch.float32))
