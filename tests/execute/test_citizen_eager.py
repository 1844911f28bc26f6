"""Compiled patterns as ordinary torch functions: memory layouts, empty calls, autocast, checkpointing, torch.func, second derivatives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx
from sparsedsl.backends.reference.attention import attend_reference
from sparsedsl.backends.registry import BACKENDS
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import check_call
from sparsedsl.testing import assert_matches_reference, tensor

LOWERINGS = [name for name in ("reference", "flex", "tiled") if name in BACKENDS]
TRAINABLE = [name for name in LOWERINGS if name != "flex"]

window = (kv_idx <= q_idx) & (q_idx - kv_idx < 9)
doc = sd.table("doc", monotone=True)
bias = sd.table("bias", learned=True)
sink = sd.table("sink", learned=True)
learned = sd.attend(window, score=sd.score + bias[h, q_idx - kv_idx], sink=sink[h])

# FlexAttention compiles each number of heads and head_dim anew: one for the whole file.
HEADS, KV_HEADS, DIM = 4, 2, 16


def qkv(q_len=20, kv_len=None, batch=2, **words):
    lengths = (HEADS, q_len), (KV_HEADS, kv_len or q_len), (KV_HEADS, kv_len or q_len)
    return tuple(tensor(batch, heads, length, DIM, seed=seed, **words) for seed, (heads, length) in enumerate(lengths))


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---- memory layouts -------------------------------------------------------------------------------------------------------


def packed_projection(q, k, v):
    """Views into one (batch, length, heads, dim) tensor, as ``qkv(x).split(...)`` gives them."""
    joined = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous()
    return [t.transpose(1, 2) for t in joined.split([q.shape[1], k.shape[1], v.shape[1]], dim=2)]


LAYOUTS = {
    "transposed": lambda *t: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in t],
    "head_dim outside": lambda *t: [x.transpose(2, 3).contiguous().transpose(2, 3) for x in t],
    "packed projection": packed_projection,
    "a part of a cache": lambda *t: [torch.cat([x, x], dim=2)[:, :, 3 : 3 + x.shape[2]] for x in t],
    "every other": lambda *t: [x.repeat_interleave(2, 3)[..., ::2] for x in t],
    "one for the whole batch": lambda *t: [x[:1].expand(x.shape) for x in t],
    "one for all heads": lambda *t: [x[:, :1].expand(x.shape) for x in t],
    "one number": lambda *t: [x[:1, :1, :1, :1].expand(x.shape) for x in t],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", LOWERINGS)
def test_any_memory_layout(backend, layout):
    q, k, v = LAYOUTS[layout](*qkv(40))
    assert layout == "a part of a cache" or not q.is_contiguous()
    tables = {"bias": tensor(9, HEADS, seed=5).T, "sink": tensor(1, seed=6).expand(HEADS)} if backend in TRAINABLE else {}
    attn = sd.compile(learned if tables else window, backend=backend)
    compared = assert_matches_reference(attn, q, k, v, **tables)
    assert ("dq" in compared and "dbias" in compared) == (backend in TRAINABLE)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_gradients_reach_what_was_expanded(backend):
    q, k, v = leaves(*qkv())
    key = k.detach()[:1, :1].clone().requires_grad_()
    attn = sd.compile(window, backend=backend)
    attn(q, key.expand(k.shape), v).square().sum().backward()
    copies = key.detach().expand(k.shape).contiguous().requires_grad_()
    wanted = torch.autograd.grad(attn(q, copies, v).square().sum(), copies)[0]
    torch.testing.assert_close(key.grad, wanted.sum((0, 1), keepdim=True), rtol=1e-4, atol=1e-5)


# ---- nothing to attend to -------------------------------------------------------------------------------------------------

EMPTY = {"no batch": (0, 7, 7), "no queries": (2, 0, 7), "no keys": (2, 7, 0), "nothing": (0, 0, 0)}


def empty_inputs(name):
    batch, q_len, kv_len = EMPTY[name]
    shapes = (batch, HEADS, q_len, DIM), (batch, KV_HEADS, kv_len, DIM), (batch, KV_HEADS, kv_len, 8)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("backend", ["auto", *LOWERINGS])
def test_empty_calls(backend, name):
    q, k, v = empty_inputs(name)
    attn = sd.compile(window & (doc[q_idx] == doc[kv_idx]), backend=backend)
    ids = torch.zeros(k.shape[2], dtype=torch.int64)
    with torch.no_grad():
        out = attn(q, k, v, doc=ids)
    assert out.shape == (*q.shape[:3], 8) and out.dtype == q.dtype and not bool(out.any())
    if backend == "flex":
        with pytest.raises(sd.UnsupportedError, match="no backward pass on CPU"):
            attn(q, k, v, doc=ids)
        return
    out, lse = attn(q, k, v, doc=ids, return_lse=True)
    assert lse.shape == q.shape[:3] and bool((lse == -math.inf).all())
    for t, grad in zip((q, k, v), torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)), strict=True):
        assert grad.shape == t.shape and not bool(grad.any())


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_sinks_of_rows_without_keys(backend, name):
    q, k, v = empty_inputs(name)
    logit = torch.randn(HEADS, requires_grad=True)
    out, lse = sd.compile(sd.attend(window, sink=sink[h]), backend=backend)(q, k, v, sink=logit, return_lse=True)
    assert not bool(out.any()) and torch.equal(lse, logit[:, None].expand(lse.shape))
    lse.sum().backward()
    assert torch.equal(logit.grad, torch.full((HEADS,), float(q.shape[0] * q.shape[2])))


def test_sinks_of_rows_without_keys_are_checked():
    q, k, v = empty_inputs("no keys")
    with pytest.raises(sd.TableError, match="table 'sink' is too short"):
        sd.compile(sd.attend(window, sink=sink[h]))(q, k, v, sink=torch.randn(2))


def test_empty_calls_are_still_checked():
    q, k, v = empty_inputs("no queries")
    attn = sd.compile(window, backend="reference")
    with pytest.raises(sd.ShapeError, match="k and v must have the same length"):
        attn(q, k, v[:, :, :3])
    with pytest.raises(sd.TableError, match="unexpected argument doc"):
        attn(q, k, v, doc=torch.arange(3))


# ---- autocast ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", LOWERINGS)
def test_autocast_does_what_sdpa_does(backend):
    attn = sd.compile(window, backend=backend)
    q, k, v = qkv()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for mixed in ((q, k, v), (q.bfloat16(), k, v), (q.half(), k.bfloat16(), v)):
            out = attn(*mixed)
            assert out.dtype == F.scaled_dot_product_attention(*mixed, enable_gqa=True).dtype == torch.bfloat16
            assert torch.equal(out, attn(*(t.bfloat16() for t in mixed)))
        assert attn(q.half(), k.half(), v.half()).dtype == torch.float16
        with torch.autocast("cpu", enabled=False):
            assert attn(q, k, v).dtype == torch.float32
            with pytest.raises(sd.ShapeError, match="one dtype"):
                attn(q.bfloat16(), k, v)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_autocast_leaves_float64_alone(backend):
    q, k, v = qkv(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sd.compile(window, backend=backend)(q, k, v).dtype == torch.float64


@pytest.mark.parametrize("backend", TRAINABLE)
def test_gradients_under_autocast_are_those_of_the_low_precision_call(backend):
    attn = sd.compile(window, backend=backend)
    q, k, v = leaves(*qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attn(q, k, v).float().square().sum()
    got = torch.autograd.grad(loss, (q, k, v))
    low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(attn(*low).float().square().sum(), low)
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, w.float())


# ---- activation checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", TRAINABLE)
def test_checkpointing(backend, use_reentrant):
    attn = sd.compile(learned, backend=backend)
    inputs = leaves(*qkv(), tensor(HEADS, 9, seed=5), tensor(HEADS, seed=6))

    def block(q, k, v, bias, sink):
        out, lse = attn(q * 2, k, v, bias=bias, sink=sink, return_lse=True)
        return out * lse.sigmoid()[..., None]

    wanted = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close([t.grad for t in inputs], list(wanted))


@pytest.mark.parametrize("backend", TRAINABLE)
def test_checkpointing_keeps_nothing_but_the_inputs(backend):
    attn = sd.compile(window, backend=backend)
    q, k, v = leaves(*qkv(64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        checkpoint(lambda q, k, v: attn(q * 2, k, v), q, k, v, use_reentrant=False).sum()
        assert sum(kept) <= q.numel() + k.numel() + v.numel()
        kept.clear()
        attn(q * 2, k, v).sum()
        assert sum(kept) > q.numel() + k.numel() + v.numel()


# ---- torch.func ---------------------------------------------------------------------------------------------------------------


def one_by_one(function, dims, *stacked):
    count = next(t.shape[d] for t, d in zip(stacked, dims, strict=True) if d is not None)
    each = [function(*(t if d is None else t.select(d, i) for t, d in zip(stacked, dims, strict=True))) for i in range(count)]
    return torch.stack(each)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 2), (None, 3, None)])
@pytest.mark.parametrize("backend", LOWERINGS)
def test_vmap_over_calls(backend, dims):
    attn = sd.compile(window, backend=backend)
    stacked = [t if d is None else torch.stack([t, t.flip(2), t * 2], dim=d) for t, d in zip(qkv(), dims, strict=True)]
    with torch.no_grad():
        got = torch.vmap(attn, in_dims=dims)(*stacked)
        torch.testing.assert_close(got, one_by_one(attn, dims, *stacked), rtol=1e-5, atol=1e-5)
        if dims == (0, 0, 0):
            twice = torch.vmap(torch.vmap(attn))(*(t[None] for t in stacked))[0]
            torch.testing.assert_close(twice, got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", LOWERINGS)
def test_vmap_over_tables_and_of_patterns_that_read_the_batch(backend):
    q, k, v = qkv()
    ids = torch.stack([torch.arange(20) // n for n in (4, 7, 9)])
    attn = sd.compile(window & (doc[q_idx] == doc[kv_idx]) & ((b == 0) | (kv_idx % 2 == 0)), backend=backend)
    stacked = torch.stack([q, q * 2, q.flip(2)])
    with torch.no_grad():
        for table, dim in ((ids, 0), (ids[0], None)):
            got = torch.vmap(lambda q, ids: attn(q, k, v, doc=ids), in_dims=(0, dim))(stacked, table)
            wanted = [attn(x, k, v, doc=row) for x, row in zip(stacked, table.expand(3, 20), strict=True)]
            torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", LOWERINGS)
def test_tables_under_vmap_are_checked(backend):
    q, k, v = qkv()
    attn = sd.compile(window & (doc[q_idx] == doc[kv_idx]), backend=backend)
    with torch.no_grad():
        with pytest.raises(sd.TableError, match="declared monotone but falls"):
            torch.vmap(lambda ids: attn(q, k, v, doc=ids))(torch.stack([torch.arange(20), torch.arange(20).flip(0)]))
        with pytest.raises(sd.TableError, match="too short"):
            torch.vmap(lambda ids: attn(q, k, v, doc=ids))(torch.zeros(3, 19, dtype=torch.int64))


@pytest.mark.parametrize("backend", TRAINABLE)
def test_gradients_of_each_sample(backend):
    attn = sd.compile(learned, backend=backend)
    q, k, v = qkv()
    tables = tensor(HEADS, 9, seed=5), tensor(HEADS, seed=6)

    def loss(q, k, v, bias, sink):
        out, lse = attn(q, k, v, bias=bias, sink=sink, return_lse=True)
        return out.square().sum() + lse.sum()

    gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))
    inputs = leaves(q, k, v, *tables)
    for got, wanted in zip(gradients(*inputs), torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    stacked = torch.stack([q, q * 2, q.flip(2)])
    dims = (0, None, None, None, None)
    for got, wanted in zip(
        torch.vmap(gradients, in_dims=dims)(stacked, k, v, *tables), zip(*(gradients(x, k, v, *tables) for x in stacked), strict=True),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    other = torch.func.grad(lambda q: torch.vmap(loss, in_dims=dims)(q, k, v, *tables).sum())(stacked)
    torch.testing.assert_close(other, torch.stack([gradients(x, k, v, *tables)[0] for x in stacked]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_jacobians_by_reverse_mode(backend):
    q, k, v = (t[:1, :, :4].double() for t in qkv(4))
    attn, plain = sd.compile(window, backend=backend), sd.compile(window, backend="reference")
    got = torch.func.jacrev(lambda q: attn(q, k, v))(q)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(lambda q: plain(q, k, v), q))


def test_the_reference_has_derivatives_of_every_order():
    attn = sd.compile(learned, backend="reference")
    inputs = [t.double() for t in (*(x[:1, :, :4, :3] for x in qkv(4)), tensor(HEADS, 9, seed=5), tensor(HEADS, seed=6))]

    def call(q, k, v, bias, sink):
        return attn(q, k, v, bias=bias, sink=sink, return_lse=True)

    assert torch.autograd.gradgradcheck(call, leaves(*inputs), fast_mode=True)
    _, tangents = torch.func.jvp(call, tuple(inputs), tuple(inputs))
    small = 1e-6
    ahead, behind = call(*(t * (1 + small) for t in inputs)), call(*(t * (1 - small) for t in inputs))
    for tangent, more, less in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (more - less) / (2 * small), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [name for name in LOWERINGS if name != "reference"])
def test_what_a_lowering_has_not_names_the_way_out(backend):
    attn = sd.compile(window, backend=backend)
    q, k, v = qkv()

    def loss(q):
        return attn(q, k, v).square().sum()

    with pytest.raises(sd.UnsupportedError, match=r"no forward-mode derivatives.*backend='reference'"):
        torch.func.jvp(loss, (q,), (q,))
    first = torch.func.grad(loss)
    if backend == "flex":
        for function in (loss, lambda q: torch.vmap(loss)(q[None]).sum()):
            with pytest.raises(sd.UnsupportedError, match=r"no (backward|gradients).*backend='reference'"):
                torch.func.grad(function)(q)
        return
    with pytest.raises(sd.UnsupportedError, match=r"no second derivatives.*backend='reference'"):
        torch.func.grad(lambda q: first(q).square().sum())(q)
    (leaf,) = leaves(q)
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    with pytest.raises(sd.UnsupportedError, match=r"no second derivatives.*backend='reference'"):
        grad.square().sum().backward()


# ---- lowerings with a backward pass of their own ------------------------------------------------------------------------------


class Dense:
    """The reference, taken apart into the two passes that :func:`differentiable` joins; counts them."""

    def __init__(self, pattern):
        self.pattern, self.passes = pattern, []

    def schedule(self, call):
        return tuple(call.q.shape)

    def sight(self, call):
        return None

    def forward(self, call, schedule):
        assert schedule == tuple(call.q.shape) and not call.needs_grad
        self.passes.append(("forward", schedule[0]))
        with torch.no_grad():
            return attend_reference(self.pattern, call)

    def backward(self, call, schedule, out, lse, grad_out, grad_lse, learned):
        self.passes.append(("backward", schedule[0]))
        inputs = {"q": call.q, "k": call.k, "v": call.v, **{name: call.tables[name] for name in learned}}
        with torch.enable_grad():
            made = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            again = check_call(self.pattern, made["q"], made["k"], made["v"], {**call.tables, **{n: made[n] for n in learned}})
            results = attend_reference(self.pattern, again)
        torch.testing.assert_close((out, lse), tuple(t.detach() for t in results))
        grads = [grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse]
        dq, dk, dv, *tables = torch.autograd.grad(results, list(made.values()), grads)
        return dq, dk, dv, dict(zip(learned, tables, strict=True))


def through_dense(kernel, q, k, v, bias, sink):
    return differentiable(kernel, check_call(kernel.pattern, q, k, v, {"bias": bias, "sink": sink}))


def test_two_passes_become_a_differentiable_function():
    kernel, inputs = Dense(learned), leaves(*qkv(), tensor(HEADS, 9, seed=5), tensor(HEADS, seed=6))
    out, lse = through_dense(kernel, *inputs)
    got = torch.autograd.grad(out.square().sum() + lse.sum(), inputs)
    results = sd.compile(learned, backend="reference")(*inputs[:3], bias=inputs[3], sink=inputs[4], return_lse=True)
    wanted = torch.autograd.grad(results[0].square().sum() + results[1].sum(), inputs, retain_graph=True)
    torch.testing.assert_close(got, wanted)
    assert kernel.passes == [("forward", 2), ("backward", 2)]
    only = torch.autograd.grad(through_dense(kernel, *inputs)[1].sum(), inputs[4])
    torch.testing.assert_close(only, torch.autograd.grad(results[1].sum(), inputs[4]))


def test_vmap_of_two_passes_makes_one_larger_batch():
    kernel, (q, k, v, *tables) = Dense(learned), (*qkv(), tensor(HEADS, 9, seed=5), tensor(HEADS, seed=6))
    stacked = torch.stack([q, q * 2, q.flip(2)])
    loss = torch.func.grad(lambda q, *rest: through_dense(kernel, q, *rest)[0].square().sum())
    got = torch.vmap(loss, in_dims=(0, None, None, None, None))(stacked, k, v, *tables)
    assert kernel.passes == [("forward", 6), ("backward", 6)]
    torch.testing.assert_close(got, torch.stack([loss(x, k, v, *tables) for x in stacked]))
    kernel.passes.clear()
    torch.vmap(loss, in_dims=(None, None, None, 0, None))(q, k, v, torch.stack(tables[:1] * 3), tables[1])
    assert kernel.passes == [("forward", 2)] * 3 + [("backward", 2)] * 3


def test_two_passes_have_no_second_derivative():
    kernel, inputs = Dense(learned), (*qkv(), tensor(HEADS, 9, seed=5), tensor(HEADS, seed=6))
    first = torch.func.grad(lambda q: through_dense(kernel, q, *inputs[1:])[0].square().sum())
    with pytest.raises(sd.UnsupportedError, match=r"no second derivatives.*backend='reference'"):
        torch.func.grad(lambda q: first(q).sum())(inputs[0])
    with pytest.raises(sd.UnsupportedError, match=r"no forward-mode derivatives.*backend='reference'"):
        torch.func.jvp(lambda q: through_dense(kernel, q, *inputs[1:])[0], inputs[:1], inputs[:1])
