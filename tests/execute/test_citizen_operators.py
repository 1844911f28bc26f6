"""The operators ``sparsedsl::attend`` and ``sparsedsl::attend_backward``: torch's own checks, handles, ``torch.func``."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx
from sparsedsl.backends.registry import BACKENDS
from sparsedsl.execute.call_words import CallWords
from sparsedsl.execute.operators import attend_traced, remember
from sparsedsl.program.program_text import read_program
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import check_call
from sparsedsl.testing import patterns, tensor

LOWERINGS = [name for name in ("reference", "flex", "tiled") if name in BACKENDS]
TRAINABLE = [name for name in LOWERINGS if name != "flex"]

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
bias = sd.table("bias", learned=True)
sink = sd.table("sink", learned=True)

attend, attend_backward = torch.ops.sparsedsl.attend, torch.ops.sparsedsl.attend_backward

# name -> pattern, tables, query heads, key/value heads, head_dim of v, dtype
SAMPLES = {
    "causal": (sd.attend(causal), {}, 4, 4, 16, torch.float32),
    "groups, wide values": (sd.attend(causal), {}, 4, 2, 24, torch.float32),
    "documents": (sd.attend(causal & (doc[q_idx] == doc[kv_idx])), {"doc": torch.arange(64) // 9}, 4, 2, 16, torch.float32),
    "learned": (
        sd.attend(causal, score=sd.score + bias[h, q_idx - kv_idx], sink=sink[h]),
        {"bias": tensor(4, 64, seed=5), "sink": tensor(4, seed=6)}, 4, 2, 16, torch.float32,
    ),
    "float64": (sd.attend(causal, scale=0.5), {}, 2, 2, 8, torch.float64),
    "bfloat16": (sd.attend(causal & (q_idx - kv_idx < 5)), {}, 2, 1, 16, torch.bfloat16),
}  # fmt: skip
FLEX = ("causal", "documents")  # each takes seconds to compile


def handle_of(pattern, backend):
    return f"{backend} \n{sd.Program(pattern).text}"


def arguments(name, backend, *, grad=False, lse=False, rows=12):
    """The operator's, without a gradient where none is asked for."""
    pattern, tables, heads, kv_heads, dim_v, dtype = SAMPLES[name]
    offset = 20 - rows
    q, k = tensor(2, heads, rows, 16, seed=0, dtype=dtype), tensor(2, kv_heads, 20, 16, seed=1, dtype=dtype, layout="transposed")
    v = tensor(2, kv_heads, 20, dim_v, seed=2, dtype=dtype)
    tensors = [t.detach().requires_grad_(grad) for t in (q, k, v)]
    values = [t.detach().requires_grad_(grad and t.is_floating_point()) for t in tables.values()]
    return (handle_of(pattern, backend), ",".join(tables), *tensors, values, offset, None, None, lse or grad, grad)


# ---- torch's checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("backend", TRAINABLE)
def test_opcheck(backend, name):
    with_gradients = arguments(name, backend, grad=True)
    opcheck(attend.default, with_gradients)
    opcheck(attend.default, arguments(name, backend), test_utils=("test_schema", "test_faketensor"))
    handle, names, q, k, v, tables, offset, start, scale, *_ = with_gradients
    with torch.no_grad():
        out, lse = attend(*with_gradients)
        plain = [t.detach() for t in (q, k, v)], [t.detach() for t in tables]
    wanted = [True, False, True, *(t.is_floating_point() for t in tables)]
    for grads in ((torch.randn_like(out), torch.randn_like(lse)), (None, torch.randn_like(lse)), (torch.randn_like(out), None)):
        opcheck(
            attend_backward.default, (handle, names, *grads, out, lse, *plain[0], plain[1], offset, start, scale, wanted),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
    opcheck(
        attend_backward.default, (handle, names, *grads, out, lse, *plain[0], plain[1], offset, start, scale, wanted),
        test_utils=("test_aot_dispatch_dynamic",),
    )  # fmt: skip


@pytest.mark.parametrize("backend", TRAINABLE)
def test_fake_results_have_the_strides_of_real_ones(backend):
    """Which :func:`opcheck` does not look at, and inductor relies on."""
    layouts = [lambda t: t, lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), lambda t: t[:1, :1].expand(t.shape)]
    for change in layouts:
        handle, names, q, k, v, tables, offset, start, scale, lse, grad = arguments("learned", backend, lse=True)
        q, k, v = (change(t) for t in (q, k, v))
        results = []
        for mode in (contextlib.nullcontext(), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)):
            with mode:
                out, lse_found = attend(handle, names, q, k, v, tables, offset, start, scale, lse, grad)
                words = (out, lse_found, q, k, v, tables, offset, start, scale, [True] * 5)
                results.append(
                    [out, lse_found, *attend_backward(handle, names, change(out), change(lse_found[..., None])[..., 0], *words)]
                )
        assert [(t.shape, t.stride(), t.dtype) for t in results[0]] == [(t.shape, t.stride(), t.dtype) for t in results[1]]


@pytest.mark.parametrize("name", FLEX)
def test_opcheck_without_gradients(name):
    opcheck(attend.default, arguments(name, "flex"))


@pytest.mark.parametrize(
    ("backend", "name"), [(backend, name) for backend in LOWERINGS for name in (FLEX if backend == "flex" else SAMPLES)]
)
def test_operators_give_what_the_call_gives(backend, name):
    pattern, tables, *_ = SAMPLES[name]
    trains = backend in TRAINABLE
    given_arguments = arguments(name, backend, grad=trains)
    _, _, q, k, v, values, offset, *_ = given_arguments
    attn, named = sd.compile(pattern, backend=backend), dict(zip(tables, values, strict=True))
    out, lse = attend(*given_arguments)
    if not trains:
        assert torch.equal(out, attn(q, k, v, q_offset=offset, **named)) and lse.shape == (*q.shape[:2], 0)
        return
    wanted = attn(q, k, v, q_offset=offset, return_lse=True, **named)
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])
    sources = [t for t in (q, k, v, *values) if t.requires_grad]
    grads = [torch.autograd.grad(o.float().square().sum() + s.sum(), sources) for o, s in ((out, lse), wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_only_the_gradients_that_are_asked_for(backend):
    _, _, q, k, v, tables, *_ = given_arguments = arguments("learned", backend, grad=True)
    out, _ = attend(*given_arguments)
    (alone,) = torch.autograd.grad(out.sum(), tables[0])
    all_of_them = torch.autograd.grad(attend(*given_arguments)[0].sum(), [q, k, v, *tables])
    torch.testing.assert_close(alone, all_of_them[3])


class Counted:
    """What the operators take for a compiled pattern: a lowering with two passes of its own, which it counts."""

    has_lse = True

    def __init__(self, pattern):
        self.pattern, self.passes, self.plain = pattern, [], sd.compile(pattern, backend="reference")
        self.static, self.program = pattern, self.plain.program

    def attend_now(self, q, k, v, words):
        assert words.where is None
        checked = check_call(self.pattern, q, k, v, words.named, q_offset=words.q_offset, scale=words.scale)
        out, lse = differentiable(self, checked)
        return (out, lse) if words.return_lse else out

    def schedule(self, call):
        return None

    def sight(self, call):
        return None

    def forward(self, call, schedule):
        self.passes.append("forward")
        return self.plain(call.q, call.k, call.v, return_lse=True)

    def backward(self, call, schedule, out, lse, grad_out, grad_lse, learned):
        self.passes.append("backward")
        assert grad_lse is None and torch.equal(lse, self.plain(call.q, call.k, call.v, return_lse=True)[1])
        return grad_out.sum() * call.q, grad_out.sum() * call.k, grad_out.sum() * call.v, {}


def test_the_backward_pass_takes_the_results_of_the_forward_pass():
    counted = Counted(sd.attend(causal & (q_idx - kv_idx < 7)))
    handle = handle_of(counted.pattern, "counted")
    remember(handle, counted)
    q, k, v = (tensor(2, 4, 12, 16, seed=s).requires_grad_() for s in range(3))
    out, _ = attend(handle, "", q, k, v, [], 0, None, None, True, True)
    out.sum().backward()
    assert counted.passes == ["forward", "backward"]
    torch.testing.assert_close(k.grad, k.detach() * out.numel())
    out, lse = attend(handle, "", q, k, v, [], 0, None, None, False, False)  # as an exported program has it
    assert lse.numel() == 0
    counted.passes.clear()
    out.sum().backward()
    assert counted.passes == ["forward", "backward"]


@pytest.mark.parametrize("backend", TRAINABLE)
def test_no_second_derivatives(backend):
    given_arguments = arguments("causal", backend, grad=True)
    q = given_arguments[2]
    (grad,) = torch.autograd.grad(attend(*given_arguments)[0].square().sum(), q, create_graph=True)
    with pytest.raises(sd.UnsupportedError, match=r"no second derivatives.*backend='reference'"):
        grad.sum().backward()


# ---- torch.func -------------------------------------------------------------------------------------------------------------------


def operator(attn):
    """The call as an operator, as a graph has it."""

    def call(q, k, v, **words):
        calls, said = attn._calls, CallWords(words.pop("tables", {}), 0)._replace(**words)
        return attend_traced(calls.handle, calls.bound, q, k, v, said)

    return call


@pytest.mark.parametrize("backend", TRAINABLE)
def test_operators_under_transforms(backend):
    pattern, tables, *_ = SAMPLES["learned"]
    plain_attn = sd.compile(pattern, backend="reference")
    q, k, v = (tensor(2, heads, 12, 16, seed=s) for s, heads in enumerate((4, 2, 2)))
    stacked = torch.stack([q, q * 2, q.flip(2)])

    def loss(call):
        return lambda q, bias: call(q, k, v, return_lse=True, tables={**tables, "bias": bias})[0].square().sum()

    plain = loss(lambda q, k, v, return_lse, tables: plain_attn(q, k, v, return_lse=return_lse, **tables))
    opaque = loss(operator(sd.compile(pattern, backend=backend)))
    both = (stacked, torch.stack([tables["bias"], tables["bias"] * 2, tables["bias"]]))
    for dims in ((0, None), (0, 0)):
        inputs = both[0], both[1] if dims[1] == 0 else tables["bias"]
        for transform in (
            lambda f, dims: torch.vmap(f, in_dims=dims),
            lambda f, dims: torch.vmap(torch.func.grad(f, argnums=(0, 1)), in_dims=dims),
            lambda f, dims: torch.func.grad(lambda *x: torch.vmap(f, in_dims=dims)(*x).sum(), argnums=(0, 1)),
        ):
            got, wanted = (transform(f, dims)(*inputs) for f in (opaque, plain))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(sd.UnsupportedError, match=r"no second derivatives.*backend='reference'"):
        torch.func.grad(lambda q: torch.func.grad(opaque)(q, tables["bias"]).square().sum())(q)
    with pytest.raises(sd.UnsupportedError, match=r"no forward-mode derivatives.*backend='reference'"):
        torch.func.jvp(lambda q: opaque(q, tables["bias"]), (q,), (q,))


def test_vmap_of_an_operator_whose_pattern_reads_the_batch():
    call = operator(sd.compile(causal & ((b == 0) | (kv_idx % 2 == 0)), backend="reference"))
    q, k, v = (tensor(3, 2, 4, 12, 16, seed=s) for s in range(3))
    wanted = torch.stack([call(*sample) for sample in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(q, k, v), wanted)


# ---- handles ------------------------------------------------------------------------------------------------------------------------


@given(pattern=patterns(depth=3))
@settings(max_examples=60)
def test_a_pattern_is_read_back_from_its_text(pattern):
    again = read_program(sd.Program(pattern).text).static
    assert again == pattern and again.text == pattern.text and again.tables == pattern.tables


def test_text_forms_carry_all_that_is_declared():
    chosen, order = sd.table("chosen", dtype=bool), sd.table("order", bijective=True)
    width = sd.table("width", values_in=(1, 9))
    mask = chosen[h, q_idx // 16, kv_idx // 16] & (order[q_idx] >= order[kv_idx]) & (q_idx - kv_idx < width[h])
    pattern = sd.attend(mask, score=sd.tanh(sd.score / 30) * 30 + bias[h, 0], sink=-0.5, scale=0.1)
    assert read_program(sd.Program(pattern).text).static == pattern
    for plain in (sd.attend(True), sd.attend(False, sink=0.0), sd.attend(causal, score=q_idx - kv_idx)):
        assert read_program(sd.Program(plain).text).static == plain


@pytest.mark.parametrize("text", ["kv_idx <= q_idx", "attend()", "attend(True, True)", "other(True)"])
def test_other_texts_are_no_patterns(text):
    with pytest.raises(sd.PatternError):
        read_program(f"only = {text}")


def test_reading_never_executes():
    with pytest.raises(sd.PatternError):
        read_program("only = attend(__import__('os').getcwd() == q_idx)")


def test_fake_and_meta_tensors_give_shapes():
    attn = sd.compile(SAMPLES["documents"][0], backend="flex")
    ids = SAMPLES["documents"][1]["doc"]
    with torch._subclasses.FakeTensorMode() as mode:
        inputs = [torch.empty(2, n, 1 << 20, 16, dtype=torch.bfloat16) for n in (4, 2, 2)]
        out, lse = attn(*inputs, doc=mode.from_tensor(ids), return_lse=True)
    for got in (out, attn(*(torch.empty(2, n, 1 << 20, 16, dtype=torch.bfloat16, device="meta") for n in (4, 2, 2)), doc=ids)):
        assert got.shape == (2, 4, 1 << 20, 16) and got.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 1 << 20) and lse.dtype == torch.float32
