"""The kernels of recurrent sources, compiled for every target as the launchers launch them: they fit, spill nothing, and know no length."""

from __future__ import annotations

import functools
import inspect
import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sparsedsl.backends.tiled.scan_slots import SlotState
from sparsedsl.backends.triton import scan_gated, scan_linear, scan_pass, scan_slots
from sparsedsl.gpu.aot import BuildJob, compile_kernels
from sparsedsl.gpu.kernel_config import Config
from sparsedsl.gpu.resources import misfits
from sparsedsl.gpu.targets import TARGETS
from tests.gpu.built_for import BUILT_FOR

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8"}
LENGTH, HEADS, GROUP = 300, 2, 2
GATED = {"make_pairs", "write_states", "read_states", "carry_back", "slopes"}
# Bytes a thread that heads of 128 spill where the assembler keeps less in registers: most on sm_100 (docs/kernels.md).
GATED_SPILLS = 64
WITH_PRODUCTS = {"sum_chunks", "read_chunks", "read_slots", "read_values", *GATED}


def leaf(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def documents():
    return torch.zeros(1, LENGTH, dtype=torch.int32)


def run_linear(dtype, width, width_v):
    q, k, v = (leaf(1, heads, LENGTH, size, dtype=dtype) for heads, size in ((4, width), (2, width), (2, width_v)))
    state = leaf(1, 4, width, width_v)
    return scan_linear.linear_scan_triton(q, k, v, torch.zeros(4), scale=1.0, state=state, documents=documents())


def run_slots(dtype, width, width_v, slots=64):
    q, k, v, gate = (
        leaf(1, heads, LENGTH, size, dtype=dtype) for heads, size in ((4, width), (2, width), (2, width_v), (2, slots))
    )
    state = SlotState(leaf(1, 2, slots, width), leaf(1, 2, slots, width_v), torch.ones(1, 2, dtype=torch.bool))
    words = {"delay": 32, "temperature": 8.0, "scale": 1.0, "empty": "masked"}
    out, lse, last = scan_slots.slot_scan_triton(q, k, v, gate, state=state, documents=documents(), **words)
    return out, lse, last.keys, last.values


def run_gated(dtype, width, width_v, *, vector=True):
    q, k, v = (leaf(1, heads, LENGTH, size, dtype=dtype) for heads, size in ((4, width), (2, width), (2, width_v)))
    g, beta, state = leaf(1, 2, LENGTH, *([width] if vector else [])), leaf(1, 2, LENGTH), leaf(1, 2, width, width_v)
    return scan_gated.gated_scan_triton(q, k, v, g, beta, scale=1.0, state=state, documents=documents())


def run_rwkv(dtype, width, width_v, *, erases):
    """A decay a channel, a key of its own that erases (RWKV-7), or nothing that does (RWKV-6)."""
    q, k, v, erase = (leaf(1, 2, LENGTH, size, dtype=dtype) for size in (width, width, width_v, width))
    g, state = leaf(1, 2, LENGTH, width), leaf(1, 2, width, width_v)
    by_rule = (torch.ones(1, 1, LENGTH), erase) if erases else ()
    return scan_gated.gated_scan_triton(q, k, v, g, *by_rule, scale=1.0, state=state)


def run_scalar_gated(dtype, width, width_v):
    return run_gated(dtype, width, width_v, vector=False)


@pytest.fixture
def launches(monkeypatch):
    """Runs a call and its backward pass for a target without running a kernel; what would have been launched."""

    def record(target, run, *arguments):
        found = []

        def launch(kernel, programs, values, *, warps):
            assert programs > 0
            found.append((kernel, {name: values[name] for name in kernel.arg_names}, warps))

        for module in (scan_pass, scan_gated, scan_linear, scan_slots):
            monkeypatch.setattr(module, "launch", launch)
        for module in (scan_gated, scan_linear, scan_slots):
            monkeypatch.setattr(module, "target_of", lambda device: TARGETS[target])
        monkeypatch.setattr(scan_pass, "missing", lambda device: None)
        sum(result.sum() for result in run(*arguments)).backward()
        return found

    return record


def job_of(kernel, values, warps, target):
    """What there is to compile for a launch."""
    types = {}
    for parameter in kernel.params:
        value = values[parameter.name]
        kind = "fp32" if isinstance(value, float) else "i32"
        types[parameter.name] = (
            "constexpr" if parameter.is_constexpr else POINTERS[value.dtype] if isinstance(value, torch.Tensor) else kind
        )
    constants = {name: values[name] for name, kind in types.items() if kind == "constexpr"}
    text = Path(inspect.getfile(kernel.fn)).read_text(encoding="utf-8")
    return BuildJob(text, kernel.fn.__name__, types, constants, Config(16, 16, warps, 1), True, TARGETS[target])


def assert_fits(found, target, most_spills=0):
    jobs = {}
    for kernel, values, warps in found:
        job = job_of(kernel, values, warps, target)
        jobs.setdefault((job.kernel, str(job.constants)), job)
    for job, binary in zip(jobs.values(), compile_kernels(jobs.values()), strict=True):
        needs = binary.resources
        assert misfits(needs, job.target) == (), job.kernel
        assert needs.spills <= most_spills, f"{job.kernel} {job.constants}: {needs}"
        assert (
            bool(needs.tensor_core) == (job.kernel in WITH_PRODUCTS and job.constants["PRECISION"] == "tf32")
            or target == "gfx942"
        )
    return {name for name, _ in jobs}


@pytest.mark.parametrize("target", BUILT_FOR)
def test_linear_attention(launches, target):
    names = assert_fits(launches(target, run_linear, torch.bfloat16, 128, 128), target)
    assert names == {"sum_chunks", "carry", "read_chunks"}


@pytest.mark.parametrize("target", BUILT_FOR)
def test_slots(launches, target):
    names = assert_fits(launches(target, run_slots, torch.bfloat16, 128, 128), target)
    assert names == {"sum_chunks", "carry", "read_slots", "read_values", "slot_weights", "weight_gradient", "decay_gradient"}


# One form on one target takes the compiler as long as all of the others above.
@pytest.mark.parametrize(
    ("run", "target"),
    [
        pytest.param(run, target, marks=() if (run, target) == (run_scalar_gated, "sm_90") else pytest.mark.campaign)
        for run in (run_gated, run_scalar_gated)
        for target in TARGETS
    ],
)
def test_gated_linear_attention(launches, run, target):
    found = launches(target, run, torch.bfloat16, 128, 128)
    assert assert_fits(found, target, 0 if target in ("sm_90", "gfx942") else GATED_SPILLS) == GATED


@pytest.mark.parametrize("erases", [False, True])
def test_rwkv(launches, erases):
    """Heads of 64 as published, on the target that most train on: nothing spills."""
    found = launches("sm_90", functools.partial(run_rwkv, erases=erases), torch.bfloat16, 64, 64)
    assert assert_fits(found, "sm_90") == GATED


WIDTHS = {"half": (torch.float16, (64, 64)), "single": (torch.float32, (80, 48))}
# Every scan, every precision and every target; the spills are those of sm_90 and sm_100.
ALWAYS = {
    (run_linear, "half", "gfx942"),
    (run_linear, "single", "sm_100"),
    (run_slots, "half", "sm_80"),
    (run_slots, "single", "sm_90"),
}
EVERY = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.campaign)
    for case in itertools.product((run_linear, run_slots, run_gated, run_scalar_gated), WIDTHS, TARGETS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "precision", "target"), EVERY)
def test_other_widths(launches, run, precision, target):
    dtype, widths = WIDTHS[precision]
    # In float32 the sums of heads beyond 64 do not all stay in registers: 8 to 72 bytes a thread on sm_90 and sm_100 (docs/kernels.md).
    most = 72 if dtype == torch.float32 else GATED_SPILLS if run in (run_gated, run_scalar_gated) else 0
    assert_fits(launches(target, run, dtype, *widths), target, most)


def test_nothing_is_compiled_again_for_another_length(launches):
    """All that is no pointer and no constant is taken as it comes, whatever its value."""
    for run in (run_linear, run_slots, run_gated):
        for kernel, _, _ in launches("sm_90", run, torch.bfloat16, 64, 64):
            special = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize or p.name.endswith("_ptr"))]
            assert special == [], kernel.fn.__name__
