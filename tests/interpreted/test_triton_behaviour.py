"""Generated kernels, interpreted, as ordinary torch functions; and numbers at the edge of what their precision holds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.testing import (
    AttentionCase,
    assert_causal,
    assert_equivariant,
    assert_matches_reference,
    assert_prefill_equals_decode,
    assert_unseen_keys_have_no_effect,
    tensor,
)

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 9)
doc = sd.table("doc", monotone=True)
bias, sink, pairs, rows, columns = (sd.table(name, learned=True) for name in ("bias", "sink", "pairs", "rows", "columns"))
learned = sd.attend(window, score=score + bias[h, sd.clamp(q_idx - kv_idx, 0, 8)], sink=sink[h])
lists = causal & ((q_idx * kv_idx) % 3 < 2)


def compiled(pattern):
    return sd.compile(pattern, backend="triton")


def qkv(length=20, kv_len=None, batch=1, heads=(2, 1), **words):
    sizes = (heads[0], length), (heads[1], kv_len or length), (heads[1], kv_len or length)
    return tuple(tensor(batch, *size, 16, seed=seed, **words) for seed, size in enumerate(sizes))


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---- numbers at the edge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("mask", [window, lists], ids=["window", "lists"])
def test_logits_of_every_size(mask, size):
    q, k, v = qkv(35)
    assert_matches_reference(compiled(mask), q * size, k, v)
    assert_matches_reference(compiled(mask), q[:, :, :3] * size, k, v, q_offset=32)


@pytest.mark.parametrize("rows", [20, 3])
@pytest.mark.parametrize("number", [1e30, -1e30, torch.finfo(torch.float32).min, torch.finfo(torch.float32).max / 2])
def test_scores_of_the_largest_numbers(number, rows):
    """Equal logits, however large, weigh the same; beside them others are nothing, or everything."""
    q, k, v = leaves(*qkv(20))
    q = q[:, :, -rows:]
    large = float(number) + 0 * score
    for where in (q_idx % 2 == 0, kv_idx % 3 == 1):
        pattern = sd.attend(causal, score=sd.where(where, score, large))
        got, wanted = (
            sd.compile(pattern, backend=name)(q, k, v, q_offset=20 - rows, return_lse=True) for name in ("triton", "reference")
        )
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        # Weights made again from an LSE of this size are not what they were, but they are numbers.
        assert all(bool(grad.isfinite().all()) for grad in torch.autograd.grad(got[0].sum(), (q, k, v)))


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_what_a_bias_is_where_pairs_are_masked_does_not_matter(value):
    wild = tensor(2, 60, seed=5)
    wild[:, 9:] = value
    pattern = sd.attend(window, score=score + sd.table("wild", dtype=float)[h, sd.clamp(q_idx - kv_idx, 0, 59)])
    assert_matches_reference(compiled(pattern), *qkv(35), wild=wild)
    apart = sd.attend(window, score=score - sd.log(q_idx - kv_idx + 1))  # NaN where masked
    assert_matches_reference(compiled(apart), *qkv(35))
    assert_matches_reference(compiled(sd.attend(window, score=score * sd.sqrt(q_idx - kv_idx + 1))), *qkv(35))


def test_biases_of_minus_infinity():
    dropped = torch.zeros(2, 9)
    dropped[0, 4:] = dropped[1, :3] = -math.inf
    q, k, v = qkv(35)
    pattern = sd.attend(window, score=score + sd.table("dropped", dtype=float)[h, sd.clamp(q_idx - kv_idx, 0, 8)])
    assert_matches_reference(compiled(pattern), q, k, v, dropped=dropped)
    out, lse = compiled(pattern)(q, k, v, return_lse=True, dropped=torch.full((2, 9), -math.inf))
    assert not bool(out.any()) and bool((lse == -math.inf).all())


def test_the_largest_logits_are_masked():
    """A maximum taken before the mask would leave nothing of the rows it masks."""
    q, k, v = qkv(35)
    q, k = q.abs() + 0.1, k.abs() + 0.1
    k[:, :, 20:] *= 1e4
    for mask in (causal & (kv_idx < 20), lists & (kv_idx < 20)):
        assert_matches_reference(compiled(mask), q, k, v)


@pytest.mark.parametrize("rows", [20, 3])
def test_rows_that_see_nothing(rows):
    q, k, v = qkv(rows, 40)
    for mask in (q_idx - kv_idx > 8, (q_idx % 5 == 2) & causal, (q_idx * kv_idx) % 97 == 5, q_idx < -1):
        assert_matches_reference(compiled(mask), q, k, v)
        assert_matches_reference(compiled(sd.attend(mask, sink=0.5)), q, k, v)


def test_a_sink_of_minus_infinity_is_no_sink():
    q, k, v = qkv(20)
    values = torch.tensor([-math.inf, 0.5])
    for mask in (kv_idx < q_idx, lists):
        got, wanted = (sd.compile(sd.attend(mask, sink=sink[h]), backend=name)(q, k, v, sink=values, return_lse=True)
                       for name in ("triton", "reference"))  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# ---- what holds of any attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [lists, learned], ids=["lists", "learned"])
def test_nothing_depends_on_the_future_the_cut_or_the_order(pattern):
    tables = {"bias": tensor(2, 9, seed=5), "sink": tensor(2, seed=6)} if pattern is learned else {}
    small = AttentionCase(heads=2, kv_heads=1, q_len=18, kv_len=18)
    assert_causal(compiled(pattern), small, **tables)
    assert_equivariant(compiled(pattern), replace(small, batch=2), **tables)
    assert "token by token" in assert_prefill_equals_decode(compiled(pattern), small, **tables)


def test_two_runs_give_the_same_bits(options):
    options(LIMITS, pair_bytes=1)
    pattern = sd.attend(lists, score=score * (1 + pairs[q_idx // 5, kv_idx // 5]) + bias[h, abs(q_idx - kv_idx)], sink=sink[h])
    inputs = leaves(*qkv(20), tensor(4, 4, seed=3), tensor(2, 20, seed=4), tensor(2, seed=5))
    runs = []
    for _ in range(2):
        q, k, v, *tables = inputs
        out, lse = compiled(pattern)(q, k, v, return_lse=True, **dict(zip(("pairs", "bias", "sink"), tables, strict=True)))
        runs.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_pairs_in_pieces_are_the_whole(options):
    pattern = sd.attend(causal, score=score + pairs[q_idx, kv_idx])
    found = []
    for size in (1 << 28, 4 * 2 * 20 * 16, 4 * 2 * 20 * 3):
        options(LIMITS, pair_bytes=size)
        q, k, v, table = leaves(*qkv(20), tensor(20, 20, seed=3))
        found.append(torch.autograd.grad(compiled(pattern)(q, k, v, pairs=table).square().sum(), table)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["acc", "tile", "d", "x", "out", "lse", "rows", "s", "ds", "p", "row", "grad_q", "first", "tl"])
def test_tables_may_have_any_name(name):
    table = sd.table(name, learned=True)
    pattern = sd.attend(causal, score=score * table[h, q_idx] + table[h, kv_idx])
    assert_matches_reference(compiled(pattern), *qkv(18), **{name: tensor(2, 18, seed=9)})


# ---- a citizen of torch ------------------------------------------------------------------------------------------------------------------


def test_only_the_gradients_that_are_wanted():
    names = ("q", "k", "v", "bias", "sink")
    values = dict(zip(names, (*qkv(), tensor(2, 9, seed=5), tensor(2, seed=6)), strict=True))
    for wanted in (("q",), ("v", "bias"), ("sink",)):
        found = []
        for backend in ("triton", "reference"):
            here = {name: t.clone().requires_grad_(name in wanted) for name, t in values.items()}
            sd.compile(learned, backend=backend)(**here).square().sum().backward()
            found.append([t.grad for t in here.values()])
        for mine, theirs in zip(*found, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_gradients_through_the_lse_alone():
    q, k, v = leaves(*qkv())
    mine, theirs = (
        torch.autograd.grad(sd.compile(window, backend=name)(q, k, v, return_lse=True)[1].square().sum(), [q, k])
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_autocast():
    q, k, v = qkv()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        out = compiled(window)(q, k, v)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v, enable_gqa=True).dtype == torch.float16
        assert torch.equal(out, compiled(window)(q.half(), k.half(), v.half()))


def test_checkpointing():
    inputs = leaves(*qkv(), tensor(2, 9, seed=5), tensor(2, seed=6))

    def block(q, k, v, bias, sink):
        out, lse = compiled(learned)(q * 2, k, v, bias=bias, sink=sink, return_lse=True)
        return out * lse.sigmoid()[..., None]

    wanted = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    checkpoint(block, *inputs, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close([t.grad for t in inputs], list(wanted))


def test_vmap():
    q, k, v = qkv()
    stacked = torch.stack([q, q * 2])
    ids = torch.stack([torch.arange(20) // n for n in (4, 7)])
    attn = compiled(window & (doc[q_idx] == doc[kv_idx]) & ((b == 0) | (kv_idx % 2 == 0)))
    with torch.no_grad():
        got = torch.vmap(lambda q, ids: attn(q, k, v, doc=ids))(stacked, ids)
        wanted = [attn(x, k, v, doc=row) for x, row in zip(stacked, ids, strict=True)]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_gradients_of_each_sample():
    q, k, v = qkv()
    tables = tensor(2, 9, seed=5), tensor(2, seed=6)

    def loss(q, k, v, bias, sink):
        out, lse = compiled(learned)(q, k, v, bias=bias, sink=sink, return_lse=True)
        return out.square().sum() + lse.sum()

    gradients = torch.func.grad(loss, argnums=(0, 3))
    stacked = torch.stack([q, q * 2])
    got = torch.vmap(gradients, in_dims=(0, None, None, None, None))(stacked, k, v, *tables)
    wanted = [torch.stack(found) for found in zip(*(gradients(x, k, v, *tables) for x in stacked), strict=True)]
    torch.testing.assert_close(list(got), wanted, rtol=1e-4, atol=1e-5)


def test_torch_compile_keeps_one_graph():
    attn = compiled(learned)

    def block(q, k, v, bias, sink):
        out, lse = attn(q * 2, k, v, bias=bias, sink=sink, return_lse=True)
        return out * lse.sigmoid()[..., None]

    inputs = leaves(*qkv(), tensor(2, 9, seed=5), tensor(2, seed=6))
    compiled_block = torch.compile(block, fullgraph=True, backend="aot_eager")
    got, wanted = compiled_block(*inputs), block(*inputs)
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(*(torch.autograd.grad(t.square().sum(), inputs) for t in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


EMPTY = {"no batch": (0, 7, 7), "no queries": (2, 0, 7), "no keys": (2, 7, 0)}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_calls(name):
    batch, q_len, kv_len = EMPTY[name]
    q, k, v = (torch.randn(batch, n, length, 16, requires_grad=True) for n, length in ((2, q_len), (1, kv_len), (1, kv_len)))
    out, lse = compiled(window)(q, k, v, return_lse=True)
    assert out.shape == q.shape and not bool(out.any()) and bool((lse == -math.inf).all())
    assert all(not bool(grad.any()) for grad in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))


def test_what_it_refuses():
    q, k, v = qkv()
    with pytest.raises(sd.UnsupportedError, match="float64"):
        compiled(window)(q.double(), k.double(), v.double())
    wide = torch.zeros(1, 1, 4, 257)
    with pytest.raises(sd.UnsupportedError, match="257"):
        compiled(window)(wide, wide, wide)


def test_decode_of_many_splits_is_decode_of_one(options):
    q, k, v = qkv(2, 70, heads=(4, 2))
    found = []
    for splits in (1, 2, 5, 9):
        options(LIMITS, splits=splits)
        found.append(compiled(learned)(q, k, v, q_offset=68, return_lse=True, bias=tensor(4, 9, seed=5), sink=tensor(4, seed=6)))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)


# ---- rows that lie far apart ---------------------------------------------------------------------------------------------------------


residues = causal & ((q_idx - kv_idx) % 2 == 0) & (q_idx - kv_idx < 9)
# Gradients by row, by column, along diagonals and pair by pair: each has a kernel that reads all tensors.
sums = sd.attend(
    window, score=score + rows[q_idx] + columns[kv_idx] + bias[h, sd.clamp(q_idx - kv_idx, 0, 8)] + pairs[q_idx * kv_idx % 7]
)


@pytest.mark.parametrize("pattern", [window, residues, lists, sums], ids=["window", "residues", "lists", "tables"])
def test_rows_whose_offsets_take_64_bits(apart, pattern):
    """Of one tensor alone, also of the gradient of the output, which a call does not know of."""
    t = dict(zip("qkv", (t.half() for t in qkv(36)), strict=True)) | {"grad_out": tensor(1, 2, 36, 16, seed=9).half()}
    tables = {"rows": 36, "columns": 36, "bias": (2, 9), "pairs": 7} if pattern is sums else {}
    made = {name: tensor(*(size if isinstance(size, tuple) else (size,)), seed=5) for name, size in tables.items()}

    def run(q, k, v, grad_out):
        given = [t.detach().requires_grad_() for t in (q, k, v)]
        learned = dict(zip(made, leaves(*made.values()), strict=True))
        out = compiled(pattern)(*given, **learned)
        return out, *torch.autograd.grad(out, [*given, *learned.values()], grad_out)

    near = run(**t)
    for which in t:
        for one, other in zip(near, run(**(t | {which: apart(t[which])})), strict=True):
            assert torch.equal(one, other), f"where rows of {which} lie far apart"


@pytest.mark.parametrize("pattern", [window, lists], ids=["window", "lists"])
def test_few_queries_whose_offsets_take_64_bits(apart, pattern):
    t = dict(zip("qkv", (t.half() for t in qkv(3, 36)), strict=True))
    near = compiled(pattern)(**t, q_offset=33)
    for which in t:
        far = apart(t[which], 1 << 30 if which == "q" else 1 << 26)
        assert torch.equal(compiled(pattern)(**(t | {which: far}), q_offset=33), near), f"where rows of {which} lie far apart"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mask", "rows"), [(window, 20), (lists, 20), (window, 3)], ids=["window", "lists", "decode"])
def test_unseen_keys_have_no_effect(mask, rows, seed):
    case = AttentionCase(heads=2, kv_heads=1, q_len=rows, kv_len=20, q_offset=20 - rows)
    assert_unseen_keys_have_no_effect(compiled(mask), case, seed=seed)
