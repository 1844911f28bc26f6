"""The kernel that chooses blocks, compiled as it is launched: it fits, no loop is slowed by spills, nothing is multiplied twice."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sparsedsl.backends.triton import choosing
from sparsedsl.codegen.kernels import block_choice
from sparsedsl.gpu.aot import BuildJob, compile_kernel, is_interpreting
from sparsedsl.gpu.kernel_config import Config
from sparsedsl.gpu.resources import loops_of, misfits, resources_of
from sparsedsl.gpu.targets import TARGETS
from sparsedsl.selection.candidates import Candidates, IntervalRule
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores
from sparsedsl.selection.derived_scores import RegroupedScores, SoftmaxScores
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.scores import DotScores
from tests.gpu.built_for import BUILT_FOR

pytestmark = pytest.mark.skipif(is_interpreting(), reason="kernels are interpreted in this process")

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
ROWS, BLOCKS = 200, 64
CAUSAL = Candidates(end=torch.arange(ROWS) // 2)


def dot(width: int, dtype: torch.dtype) -> DotScores:
    return DotScores(torch.zeros(1, 4, ROWS, width, dtype=dtype), torch.zeros(1, 1, BLOCKS, width, dtype=dtype), 0.5)


def moba(width, dtype):
    """The best by means of their keys."""
    top_k(dot(width, dtype), 16, CAUSAL, choose=choosing.choose_blocks)


def nsa(width, dtype):
    """The attention that a group of heads pays pairs of means, two blocks forced."""
    shares = RegroupedScores(GroupedScores(SoftmaxScores(dot(width, dtype), None, CAUSAL), 1), 2)
    row = torch.arange(ROWS).view(1, 1, ROWS, 1)
    forced = IntervalRule(((row * 0, row * 0), (row // 4, row // 4 + 1)), 1, 1)
    top_k(shares, 16, Candidates(end=torch.arange(ROWS) // 4), forced=forced, choose=choosing.choose_blocks)


def quest(width, dtype):
    """The greatest bounds of pages, a query's own page on top."""
    source = dot(width, dtype)
    row = torch.arange(ROWS).view(1, 1, ROWS, 1)
    words = {"forced": IntervalRule(((row // 4, row // 4),), 1, 4), "forced_extra": BLOCKS}
    top_k(BoundScores(source.a, source.b, source.b), 64, CAUSAL, choose=choosing.choose_blocks, **words)


@pytest.fixture
def jobs(monkeypatch):
    """What a choice would launch on a target, without running anything."""

    def record(target, choice, width=128, dtype=torch.bfloat16):
        found = {}

        def launch(job, name, programs, values):
            assert programs > 0
            kernel, types = getattr(block_choice, name), {}
            for parameter in kernel.params:
                value = values[parameter.name]
                kind = "fp32" if isinstance(value, float) else "i32"
                kind = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else kind
                types[parameter.name] = "constexpr" if parameter.is_constexpr else kind
            constants = {name: values[name] for name, kind in types.items() if kind == "constexpr"}
            text = Path(inspect.getfile(kernel.fn)).read_text(encoding="utf-8")
            config = Config(16, 16, job.tiles.warps, job.tiles.stages)
            found[name] = BuildJob(text, name, types, constants, config, True, TARGETS[target])

        monkeypatch.setattr(choosing._Job, "launch", launch)
        monkeypatch.setattr(choosing, "target_of", lambda device: TARGETS[target])
        monkeypatch.setattr(choosing, "missing", lambda device: None)
        choice(width, dtype)
        return found

    return record


# Where something waits in memory, outside the loop over heads and landmarks of a score or seldom within: a few numbers of a thread.
CROWDED = {(nsa, "sm_100"), (quest, "gfx942")}
# A choice, and the targets that it is built for in every run.
CHOICES = {moba: ("sm_90",), nsa: ("sm_100",), quest: ("sm_80", "gfx942")}
EVERY = [
    pytest.param(choice, target, marks=() if target in CHOICES[choice] else pytest.mark.campaign)
    for choice, target in itertools.product(CHOICES, TARGETS)
]


@pytest.mark.parametrize(("choice", "target"), EVERY)
def test_it_fits_spills_nothing_in_loops_and_multiplies_once(jobs, choice, target):
    for name, job in jobs(target, choice).items():
        compiled = compile_kernel(job)
        needs = resources_of(compiled)
        assert misfits(needs, job.target) == () and not needs.slowed, (name, needs)
        assert needs.spills <= (192 if (choice, target) in CROWDED else 0)
        useful = 128 * job.constants["ROWS"] * job.constants["COLUMNS"] * (2 if job.constants["BOUND"] else 1)
        loops = loops_of(compiled)
        assert len(loops) == (2 if name == "choose_best" else 1)
        assert [loop.products(job.config.warps) for loop in loops] == [useful] * len(loops), name


@pytest.mark.parametrize("target", BUILT_FOR)
@pytest.mark.campaign
@pytest.mark.parametrize(("width", "dtype"), [(64, torch.float16), (256, torch.bfloat16), (128, torch.float32)])
def test_other_widths_fit(jobs, target, width, dtype):
    for job in jobs(target, moba, width, dtype).values():
        needs = resources_of(compile_kernel(job))
        assert misfits(needs, job.target) == () and not needs.slowed


def test_a_score_costs_a_few_instructions_beside_its_products(jobs):
    """On sm_90, where 128 products take 8 issue slots: in the first pass less than that, partial tiles included, in the second twice."""
    job = jobs("sm_90", moba)["choose_best"]
    of_a_thread = job.constants["ROWS"] * job.constants["COLUMNS"] / (32 * job.config.warps)
    first, second = loops_of(compile_kernel(job))
    assert first.issued / of_a_thread < 10 and second.issued / of_a_thread < 24


def test_nothing_is_compiled_again_for_another_length(jobs):
    """All that is no pointer and no constant is taken as it comes, whatever its value."""
    for choice in CHOICES:
        for name in jobs("sm_90", choice):
            kernel = getattr(block_choice, name)
            special = [p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize or p.name.endswith("_ptr"))]
            assert special == [], name
