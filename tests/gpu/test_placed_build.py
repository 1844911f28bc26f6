"""Kernels that read rows of keys by their numbers, as those of pages are, compiled ahead of time: they fit, and no loop spills."""

from __future__ import annotations

import itertools

import pytest

import sparsedsl as sd
from sparsedsl.codegen.to_triton import triton_source, variant_of
from sparsedsl.gpu.aot import compile_kernels, job_of
from sparsedsl.gpu.configs import default_config
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.gpu.resources import misfits
from sparsedsl.gpu.settling import settled
from sparsedsl.gpu.targets import TARGETS
from sparsedsl.program.packing import packing_of
from tests.gpu.built_for import KINDS

PATTERNS = {
    "causal": sd.attend(sd.patterns.causal()),
    "streaming": sd.attend(sd.patterns.streaming_llm(1024, sink_count=4)),
    "alibi": sd.attend(sd.patterns.sliding_window(512), score=sd.patterns.alibi(32)),
    "tiles": sd.attend((sd.kv_idx <= sd.q_idx) & sd.table("keep", dtype=bool)[sd.h, sd.q_idx // 64, sd.kv_idx // 64]),
}
# One for one target; the others are a campaign.
USUAL = [("streaming", "sm_90", 64)]
CASES = [
    pytest.param(*case, id="-".join(map(str, case)), marks=() if case in USUAL else pytest.mark.campaign)
    for case in itertools.product(PATTERNS, KINDS, (64, 128))
]


@pytest.mark.parametrize(("name", "target", "width"), CASES)
def test_no_loop_spills(name: str, target: str, width: int) -> None:
    pytest.importorskip("triton")
    pattern = packing_of(PATTERNS[name]).pattern
    source = triton_source(pattern, variant_of(pattern, head_dim=width, placed=True))
    assert [kernel.name for kernel in source.kernels] == ["forward", "decode", "merge"]
    shape, facts = Shape("bfloat16", width, width, 4), TARGETS[target]
    for kernel in source.kernels[:2]:

        def made(config, kernel=kernel):  # type: ignore[no-untyped-def]
            return compile_kernels([job_of(source, kernel, shape, config, facts)])[0].resources

        _, found = settled(kernel.name, default_config(kernel.name, shape, facts), facts, made, lambda resources: resources)
        assert misfits(found, facts) == ()
        assert not found.slowed
        assert found.tensor_core
