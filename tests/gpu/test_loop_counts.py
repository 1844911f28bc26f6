"""What the loops of our kernels do, counted in machine code against FlexAttention's: no work twice, few spills, fewer instructions.

``benchmarks/aot_vs_flex.py`` compares all patterns; here are those that have gone wrong, on sm_90.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsedsl.gpu.estimates import idle_rows, repeats
from sparsedsl.gpu.kernel_config import Config
from sparsedsl.gpu.targets import TARGETS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling kernels needs Triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# (pattern, head_dim, kernel)
CHECKED = [
    ("causal", 64, "forward"), ("causal", 128, "forward"), ("causal", 128, "grad_q"), ("causal", 128, "grad_kv"), ("causal", 64, "grad_kv"),
    ("alibi", 64, "forward"), ("blocks", 128, "forward"),
]  # fmt: skip
# FlexAttention's are compiled for these.
COMPARED = [("causal", 128)]


@pytest.fixture(scope="module")
def counts() -> Any:
    """The modules of the benchmark."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    import aot_cases
    import aot_kernels
    import aot_vs_flex

    return {"cases": aot_cases.CASES, "kernels": aot_kernels, "settled": aot_vs_flex.settled_kernel}


def ours(counts: Any, case: str, head_dim: int, kernel: str) -> Any:
    made = counts["kernels"].Ours(counts["cases"][case], head_dim)
    return counts["settled"](made, kernel, "sm_90")


@pytest.mark.parametrize(("case", "head_dim", "kernel"), CHECKED)
def test_no_work_is_done_twice(case, head_dim, kernel, counts):
    found = ours(counts, case, head_dim, kernel)
    useful = counts["kernels"].KERNELS[kernel] * head_dim * found.block[0] * found.block[1]
    recorded = record(case, head_dim, kernel)
    for kind, loop in found.loops.items():
        assert loop.products(found.warps) <= 1.02 * useful, kind
        assert loop.exponentials * 32 * found.warps <= 1.15 * found.block[0] * found.block[1], kind
        assert kind == "partial" or loop.local_share <= 0.03
        if recorded is not None and recorded["config"] == found.config:
            assert loop.issued <= 1.03 * recorded["loops"][kind]["issued"], f"{kind}: longer than what aot_vs_flex.py recorded"


def test_warps_of_64_lanes_have_32_rows_each(counts):
    """As the search for tiles has it: of two warps on 64 rows none repeats what the other does, of four each does half for nothing."""
    made = counts["kernels"].Ours(counts["cases"]["causal"], 64)
    for warps in (2, 4):
        config, target = Config(64, 64, warps, 1), TARGETS["gfx942"]
        loop = counts["kernels"].our_kernel(made, "forward", "gfx942", config).loops["full"]
        executed = loop.exponentials * target.warp_size * warps / 64**2
        assert executed == pytest.approx(repeats("forward", made.shape, target, config), rel=0.05)


def test_rows_of_tensor_memory_that_lie_idle_are_paid_for(counts):
    """By the cost model as by the counts: a product of 64 rows takes as long as one of 128."""
    made, target = counts["kernels"].Ours(counts["cases"]["causal"], 64), TARGETS["sm_100"]
    per_pair, expected = [], []
    for rows in (64, 128):
        config = Config(rows, 64, 4, 2)
        found = counts["kernels"].our_kernel(made, "forward", "sm_100", config)
        assert {kind.shape[0] for kind in found.loops["full"].matrix} == {rows}
        # One instruction takes as long as another, whatever its rows.
        per_pair.append(sum(kind.count * kind.shape[1] * kind.shape[2] for kind in found.loops["full"].matrix) / (rows * 64))
        expected.append(idle_rows("forward", made.shape, target, config))
    assert per_pair[0] / per_pair[1] == expected[0] / expected[1] == 2


@pytest.mark.parametrize(("case", "head_dim"), COMPARED)
def test_fewer_instructions_than_flex_attention(case, head_dim, counts):
    flex = counts["kernels"].flex_kernels(counts["cases"][case], head_dim, "sm_90")
    records = {
        kernel: [side.record("sm_90", head_dim) for side in (ours(counts, case, head_dim, kernel), flex[kernel])]
        for kernel in flex
    }
    issued = {kernel: [side["issue_of_case"] for side in sides] for kernel, sides in records.items()}
    assert issued["forward"][0] <= 0.85 * issued["forward"][1]
    backward = [issued["grad_q"][side] + issued["grad_kv"][side] for side in (0, 1)]
    assert backward[0] <= 0.95 * backward[1]
    for kernel, (mine, theirs) in records.items():
        assert mine["serial"] <= theirs["serial"] and mine["overlapped"] <= theirs["overlapped"], kernel


def record(case: str, head_dim: int, kernel: str) -> dict[str, Any] | None:
    """What the benchmark recorded of a kernel of ours, if it was with the same compiler."""
    import triton

    content = json.loads((BENCHMARKS / "results" / "aot_vs_flex.json").read_text())
    if content["machine"]["triton"] != triton.__version__:
        return None
    for one in content["records"]:
        if (one["case"], one["head_dim"], one["kernel"], one["side"], one["target"]) == (case, head_dim, kernel, "ours", "sm_90"):
            return dict(one)
    return None
