"""Compiled patterns inside somebody's ``torch.compile`` and ``torch.export``: one graph for all lengths, nothing broken, errors of ours."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.backends.registry import BACKENDS
from sparsedsl.runtime import call as checks
from sparsedsl.testing import tensor

LOWERINGS = [name for name in ("reference", "flex", "tiled") if name in BACKENDS]
TRAINABLE = [name for name in LOWERINGS if name != "flex"]

window = (kv_idx <= q_idx) & (q_idx - kv_idx < 9)
doc = sd.table("doc", monotone=True)
bias = sd.table("bias", learned=True)
packed = window & (doc[q_idx] == doc[kv_idx])
learned = sd.attend(window, score=sd.score + bias[h, q_idx - kv_idx])


@pytest.fixture(autouse=True)
def room_for_graphs():
    """Each test compiles the same code with a compiler of its own. Starting afresh would compile FlexAttention again."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def qkv(q_len, kv_len=None, batch=2):
    lengths = (4, q_len), (2, kv_len or q_len), (2, kv_len or q_len)
    return tuple(tensor(batch, heads, length, 16, seed=seed) for seed, (heads, length) in enumerate(lengths))


def compiled(function, **words):
    """The function in torch.compile without a break, and the counter of its compiles. aot_eager: all of the tracing, no C++."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **words), counter


class Layer(torch.nn.Module):
    """Self-attention as a model has it, with a learned table of its own."""

    def __init__(self, backend):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.join = torch.nn.Linear(32, 128), torch.nn.Linear(64, 32)
        self.bias = None if backend == "flex" else torch.nn.Parameter(tensor(4, 9, seed=5))
        self.attn = sd.compile(window if backend == "flex" else learned, backend=backend)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in self.project(x).split([64, 32, 32], dim=-1))
        tables = {} if self.bias is None else {"bias": self.bias}
        return self.join(self.attn(q, k, v, **tables).transpose(1, 2).flatten(2))


# ---- one graph ------------------------------------------------------------------------------------------------------------------

CALLS = [(20, 20, 0), (31, 31, 0), (33, 40, 7), (9, 64, 50), (40, 40, 0)]  # q_len, kv_len, q_offset


@pytest.mark.parametrize("backend", LOWERINGS)
def test_lengths_and_offsets_compile_once(backend):
    attn = sd.compile(packed, backend=backend)
    lse = backend in TRAINABLE
    ids = torch.arange(70) // 13
    function, counter = compiled(lambda q, k, v, offset: attn(q, k, v, q_offset=offset, return_lse=lse, doc=ids), dynamic=True)
    fixed, other_counter = compiled(lambda q, k, v, offset: attn(q, k, v, q_offset=offset, doc=ids))
    with torch.no_grad():
        for q_len, kv_len, offset in CALLS[2:]:
            q, k, v = qkv(q_len, kv_len, batch=3)
            wanted = attn(q, k, v, q_offset=offset, return_lse=lse, doc=ids)
            for place in (offset, torch.tensor(offset)):
                got = function(q, k, v, place)
                torch.testing.assert_close(got, wanted)
        assert counter.frame_count <= 2  # an offset that is a number, and one that is a tensor
        for length in (20, 31, 40, 52):  # without dynamic=True torch finds out at the second length
            torch.testing.assert_close(fixed(*qkv(length), 0), attn(*qkv(length), doc=ids))
        assert other_counter.frame_count <= 2


@pytest.mark.parametrize("backend", LOWERINGS)
def test_a_layer_of_a_model_compiles_once(backend):
    layer = Layer(backend)
    step, counter = compiled(layer)
    x = tensor(2, 20, 32, seed=1)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.set_grad_enabled(backend in TRAINABLE):
        for length in (20, 33, 47):
            x = x if length == 20 else tensor(2, length, 32, seed=1)
            out, wanted = step(x), layer(x)
            torch.testing.assert_close(out, wanted)
            if backend in TRAINABLE:
                weights = list(layer.parameters())
                grads = [torch.autograd.grad(y.square().sum(), weights) for y in (out, wanted)]
                torch.testing.assert_close(*grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", TRAINABLE)
def test_through_inductor(backend):
    layer = Layer(backend)
    step = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (20, 33):
        x = tensor(2, length, 32, seed=1)
        out, wanted = step(x), layer(x)
        torch.testing.assert_close(out, wanted)
        weights = list(layer.parameters())
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weights) for y in (out, wanted)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", LOWERINGS)
def test_autocast_inside_a_graph(backend):
    layer = Layer(backend)
    step, counter = compiled(layer)
    x = tensor(2, 20, 32, seed=1)
    with torch.set_grad_enabled(backend in TRAINABLE), torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = step(x), layer(x)
        mixed, _ = compiled(
            lambda q, k, v: layer.attn(q, k.bfloat16(), v, **({} if layer.bias is None else {"bias": layer.bias}))
        )
        assert mixed(*qkv(20)).dtype == torch.bfloat16
    assert out.dtype == wanted.dtype == torch.bfloat16 and torch.equal(out, wanted)
    if backend in TRAINABLE:
        weights = list(layer.parameters())
        grads = [torch.autograd.grad(y.float().square().sum(), weights) for y in (out, wanted)]
        torch.testing.assert_close(*grads, rtol=2**-6, atol=2**-6)  # sums of bfloat16 in another order
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", LOWERINGS)
def test_steps_of_a_training_share_what_is_known_of_the_tables(backend, monkeypatch):
    made = []
    monkeypatch.setattr(checks, "check_reads", lambda pattern, domain: made.append(domain.rows))
    trains = backend in TRAINABLE
    attn = sd.compile(sd.attend(packed, score=sd.score + bias[h, q_idx - kv_idx]) if trains else packed, backend=backend)
    ids, weight = torch.arange(20) // 7, tensor(4, 9, seed=5).requires_grad_()
    step, _ = compiled(lambda q, k, v, tables: attn(q, k, v, **tables))
    with torch.set_grad_enabled(trains):
        for number in range(3):
            q, k, v = (t.detach().requires_grad_(trains) for t in qkv(20))
            tables = {"doc": ids} | ({"bias": weight} if trains else {})
            for call in (step, lambda q, k, v, tables: attn(q, k, v, **tables)):
                out = call(q, k, v, tables)
                if trains:
                    out.sum().backward()
            with torch.no_grad():
                weight += number
    assert made == [20]


def test_graphs_and_ordinary_calls_share_what_flex_compiles():
    attn = sd.compile((kv_idx <= q_idx) & (q_idx - kv_idx < 11), backend="flex")
    step, _ = compiled(lambda q, k, v: attn(q, k, v))
    with torch.no_grad():
        step(*qkv(20))
        torch._dynamo.utils.counters.clear()
        for layout in ("contiguous", "transposed", "expanded"):
            inputs = [tensor(3, heads, 33, 16, seed=1, layout=layout) for heads in (4, 2, 2)]
            torch.testing.assert_close(attn(*inputs), torch.vmap(attn)(*(t[None] for t in inputs))[0])
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", TRAINABLE)
def test_checkpointing_inside_a_graph(backend):
    layer = Layer(backend)
    step, _ = compiled(lambda x: checkpoint(layer, x, use_reentrant=False))
    x, weights = tensor(2, 20, 32, seed=1), list(layer.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), weights) for f in (step, layer)))


@pytest.mark.parametrize("backend", TRAINABLE)
def test_transforms_inside_a_graph(backend):
    attn, (q, k, v) = sd.compile(window, backend=backend), qkv(12)

    def loss(q):
        return attn(q, k, v).square().sum()

    stacked = torch.stack([q, q * 2])
    for function, x in ((torch.func.grad(loss), q), (torch.vmap(loss), stacked), (torch.vmap(torch.func.grad(loss)), stacked)):
        torch.testing.assert_close(compiled(function)[0](x), function(x), rtol=1e-4, atol=1e-5)
    second = torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"no second derivatives.*backend='reference'"):
        compiled(second)[0](q)


@pytest.mark.parametrize("backend", LOWERINGS)
def test_empty_calls_inside_a_graph(backend):
    attn = sd.compile(window, backend=backend)
    step, _ = compiled(lambda q, k, v: attn(q, k, v))
    with torch.no_grad():
        for q_len, kv_len in ((0, 7), (7, 0)):
            q, k, v = (torch.randn(2, n, length, 16) for n, length in ((4, q_len), (2, kv_len), (2, kv_len)))
            assert torch.equal(step(q, k, v), torch.zeros(2, 4, q_len, 16))


# ---- errors ---------------------------------------------------------------------------------------------------------------------

WRONG = {
    "lengths": (lambda a, q, k, v: a(q, k, v[:, :, 1:]), sd.ShapeError, "k and v must have the same length"),
    "dimensions": (lambda a, q, k, v: a(q[0], k, v), sd.ShapeError, "q must have 4 dimensions"),
    "offset": (lambda a, q, k, v: a(q, k, v, q_offset=-1), sd.ShapeError, "q_offset must be a whole number of at least 0"),
    "surplus table": (lambda a, q, k, v: a(q, k, v, other=q), sd.TableError, "unexpected argument other"),
    "missing table": (lambda a, q, k, v: sd_packed(q, k, v), sd.TableError, "missing table doc"),
    "short table": (lambda a, q, k, v: sd_packed(q, k, v, doc=torch.arange(5)), sd.TableError, "table 'doc' is too short"),
    "lse": (lambda a, q, k, v: sd_flex(q, k, v, return_lse=True), sd.UnsupportedError, "does not return the LSE on CPU"),
}
sd_plain, sd_packed = (sd.compile(pattern, backend="reference") for pattern in (window, packed))
sd_flex = sd.compile(window, backend="flex")


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_ours_come_out_of_a_graph(name):
    function, kind, text = WRONG[name]
    step, _ = compiled(lambda q, k, v: function(sd_plain, q, k, v))
    with pytest.raises(kind, match=text):
        step(*qkv(20))


def test_a_lowering_without_gradients_refuses_when_the_graph_runs():
    step, _ = compiled(lambda q, k, v: sd_flex(q, k, v))
    with pytest.raises(sd.UnsupportedError, match=r"no backward pass on CPU\. Use .*backend='reference'"):
        step(*(t.requires_grad_() for t in qkv(20)))


@pytest.mark.parametrize("words", [{"q_offset": 1.5}, {"q_offset": True}, {"scale": "large"}, {"doc": [0, 1]}])
def test_what_no_graph_can_hold_is_said_while_it_is_made(words):
    step, _ = compiled(lambda q, k, v: sd_plain(q, k, v, **words))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(Shape|Table)Error\(.*must be a"):
        step(*qkv(20))


def test_what_a_graph_lacks_is_refused_by_the_backward_pass():
    q, k, v = (t.requires_grad_() for t in qkv(20))
    step, _ = compiled(lambda q, k, v: sd_plain(q, k, v))
    (grad,) = torch.autograd.grad(step(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


# ---- export ---------------------------------------------------------------------------------------------------------------------


def exported(backend, strict):
    layer = Layer(backend).eval()
    length = torch.export.Dim("length", min=2, max=4096)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (tensor(2, 20, 32, seed=1),), dynamic_shapes={"x": {0: batch, 1: length}}, strict=strict)
    return layer, program


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("backend", LOWERINGS)
def test_export_round_trip(backend, strict, tmp_path):
    layer, program = exported(backend, strict)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for batch, length in ((2, 20), (3, 47), (5, 9)):
        x = tensor(batch, length, 32, seed=3)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), layer(x))
    if backend in TRAINABLE:
        weights = list(loaded.parameters())
        assert len(weights) == 5
        got = torch.autograd.grad(loaded(x).square().sum(), weights)
        names = dict(layer.named_parameters())
        wanted = torch.autograd.grad(layer(x).square().sum(), [names[n] for n, _ in loaded.named_parameters()])
        torch.testing.assert_close(got, wanted)


def test_an_exported_program_runs_in_another_process(tmp_path):
    layer, program = exported(TRAINABLE[-1], False)
    torch.export.save(program, tmp_path / "layer.pt2")
    x = tensor(3, 33, 32, seed=3)
    torch.save((x, layer(x).detach()), tmp_path / "wanted.pt")
    code = """
        import sys, torch
        from sparsedsl import Attention  # registers the operators
        x, wanted = torch.load(sys.argv[2])
        torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x).detach(), wanted)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), tmp_path / "layer.pt2", tmp_path / "wanted.pt"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_tables_that_are_bound_travel_with_an_exported_program(tmp_path):
    class Bound(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = sd.compile(packed.bind(doc=torch.arange(64) // 7), backend="reference")

        def forward(self, q, k, v):
            return self.attn(q, k, v)

    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Bound(), qkv(20), dynamic_shapes=({2: length},) * 3)
    torch.export.save(program, tmp_path / "bound.pt2")
    got = torch.export.load(tmp_path / "bound.pt2").module()(*qkv(50))
    torch.testing.assert_close(got, sd_packed(*qkv(50), doc=torch.arange(64) // 7))
