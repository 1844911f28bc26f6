"""On a CUDA device: graphs, streams, no waiting of the host, nothing compiled per length, determinism, several devices, torch.compile."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl.testing import assert_matches_reference

pytestmark = pytest.mark.gpu

NAMES = ("causal", "documents", "blocks", "learned bias")


def training(attn, inputs, tables):
    """A call that gives output and gradients of everything that has one."""
    learned = [t for name, t in tables.items() if attn.pattern.tables[name].learned]
    leaves = [x.requires_grad_() for x in (*inputs, *learned)]
    d_out = torch.ones_like(inputs[0])

    def call():
        out = attn(*inputs, **tables)
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    return call


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_graph_of_forward(kit, triton_backend, name):
    pattern, length = kit.patterns[name], kit.length(500)
    attn, tables = sd.compile(pattern, backend=triton_backend), kit.tables(pattern, length)
    inputs, others = kit.inputs(length=length), kit.inputs(length=length, seed=7)
    with torch.no_grad():
        attn(*inputs, **tables)
        replay = kit.captured(lambda: attn(*inputs, **tables))
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
        assert_same_bits([replay()], [attn(*others, **tables)])


def test_graph_of_decode(kit, triton_backend):
    length = kit.length(2000)
    attn = sd.compile(kit.patterns["causal"], backend=triton_backend)
    inputs, others = (kit.inputs((8, 2), 1, length, seed=seed) for seed in (0, 7))
    with torch.no_grad():
        replay = kit.captured(lambda: attn(*inputs, q_offset=length - 1))
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
        assert_same_bits([replay()], [attn(*others, q_offset=length - 1)])


@pytest.mark.parametrize("name", NAMES)
def test_graph_of_training(kit, triton_backend, name):
    pattern, length = kit.patterns[name], kit.length(500)
    attn, tables = sd.compile(pattern, backend=triton_backend), kit.tables(pattern, length)
    inputs, others = kit.inputs(length=length), kit.inputs(length=length, seed=7)
    replay = kit.captured(training(attn, inputs, tables))
    with torch.no_grad():
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other)
    assert_same_bits(replay(), training(attn, others, tables)())


@pytest.mark.parametrize("name", NAMES)
def test_streams(kit, backend, name):
    """Inputs are made late on another stream: kernels and everything they read must wait there, and nowhere else."""
    pattern, length = kit.patterns[name], kit.length(500)
    attn, tables = sd.compile(pattern, backend=backend), kit.tables(pattern, length)
    wanted_inputs = kit.inputs(length=length)
    wanted = training(attn, wanted_inputs, tables)()
    with kit.late_stream():
        inputs = [(x.detach() * 2) / 2 for x in wanted_inputs]
        got = training(attn, inputs, tables)()
    if backend == "triton":
        assert_same_bits(got, wanted)
    for mine, theirs in zip(got, wanted, strict=True):  # the others may add up gradients in any order
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_call_does_not_wait_for_the_device(kit, triton_backend, name):
    pattern, length = kit.patterns[name], kit.length(500)
    attn, tables = sd.compile(pattern, backend=triton_backend), kit.tables(pattern, length)
    call = training(attn, kit.inputs(length=length), tables)
    call()
    with kit.no_synchronisation():
        call()


def test_a_warm_decode_does_not_wait_for_the_device(kit, triton_backend):
    attn = sd.compile(kit.patterns["window and sinks"], backend=triton_backend)
    q, k, v = kit.inputs((8, 2), 1, kit.length(2000))
    offset = k.shape[2] - 1
    with torch.no_grad():
        attn(q, k, v, q_offset=offset)
        with kit.no_synchronisation():
            attn(q, k, v, q_offset=offset)


@pytest.mark.parametrize("name", ["causal", "documents", "blocks", "dilated"])
def test_nothing_is_compiled_for_another_length(kit, backend, name):
    pattern = kit.patterns[name]
    attn = sd.compile(pattern, backend=backend)

    def run(length, batch):
        training(attn, kit.inputs(length=length, batch=batch), kit.tables(pattern, length))()

    run(kit.length(512), 2)
    with kit.compiles() as compiled:
        for length, batch in kit.some(((640, 2), (1000, 1), (1001, 3), (130, 2), (33, 1))):
            run(max(33, kit.length(length)), batch)
    assert compiled == []


def test_nothing_is_compiled_for_another_step_of_decoding(kit, triton_backend):
    attn = sd.compile(kit.patterns["window and sinks"], backend=triton_backend)
    q, k, v = kit.inputs((8, 2), 1, kit.length(2000))

    def step(length):
        with torch.no_grad():
            attn(q, k[:, :, :length], v[:, :, :length], q_offset=length - 1)

    step(kit.length(1600))
    with kit.compiles() as compiled:
        for length in kit.some((1601, 1602, 1616, 1999)):
            step(kit.length(length))
    assert compiled == []


def test_the_count_of_compiles_sees_one(kit, triton_backend):
    if kit.rehearsing:
        pytest.skip("rehearsal: an interpreter compiles nothing")
    q, k, v = kit.inputs(length=100, dims=(80, 80))
    with kit.compiles() as compiled:
        sd.compile(kit.patterns["causal"], backend=triton_backend)(q, k, v)
    assert compiled


@pytest.mark.parametrize("name", [*NAMES, "window and sinks", "learned sink"])
def test_the_same_call_gives_the_same_bits(kit, triton_backend, name):
    pattern, length = kit.patterns[name], kit.length(2000)
    attn, tables = sd.compile(pattern, backend=triton_backend), kit.tables(pattern, length, (8, 2))
    call = training(attn, kit.inputs((8, 2), length), tables)
    first = call()
    for _ in range(1 if kit.rehearsing else 3):
        assert_same_bits(call(), first)


def test_two_devices_in_one_process(kit, triton_backend):
    if kit.rehearsing or torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; this machine has {0 if kit.rehearsing else torch.cuda.device_count()}")
    attn = sd.compile(kit.patterns["causal"], backend=triton_backend)
    inputs = kit.inputs(length=500)
    there = [x.to("cuda:1") for x in inputs]  # while cuda:0 is the current device
    assert_same_bits([attn(*there).cpu()], [attn(*inputs).cpu()])
    assert_matches_reference(attn, *there)


def test_inside_torch_compile(kit, triton_backend):
    if kit.rehearsing:
        pytest.skip("rehearsal: operators inside graphs have their own tests")
    attn = sd.compile(kit.patterns["window and sinks"], backend=triton_backend)
    q, k, v = (x.requires_grad_() for x in kit.inputs(length=500))
    block = torch.compile(lambda q, k, v: torch.relu(attn(q * 2, k, v)), fullgraph=True)
    got, wanted = block(q, k, v), torch.relu(attn(q * 2, k, v))
    torch.testing.assert_close(got, wanted)
    grads = (torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (got, wanted))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02)
