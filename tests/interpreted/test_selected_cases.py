"""Random masks that read choices, beside any score, on interpreted kernels: what they mean, worked out densely in float64.

``TRITON_INTERPRET=1 SPARSEDSL_TEST_EXAMPLES=1000 pytest tests/interpreted/test_selected_cases.py`` is a campaign of a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.programs.selected_cases import Case, dense, draw, results, run_on

# Queries of all heads: the interpreter takes a second for some tiles of them.
MOST_ROWS = 48


def with_inputs(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    """The case with every float that it is given changed by a function."""
    return replace(case, inputs={name: change(x) if x.is_floating_point() else x for name, x in case.inputs.items()})


def assert_kernels_mean_what_it_says(case: Case) -> None:
    """Results and gradients in float32 against the dense meaning of the same numbers in float64.

    A result may be off by 64 times as much as it moves where every number that is given is off by about a rounding of float32, plus
    64 roundings of its largest number.
    """
    eps = torch.finfo(torch.float32).eps
    made = torch.Generator().manual_seed(case.seed)
    case = with_inputs(case, torch.Tensor.float)
    exact = with_inputs(case, torch.Tensor.double)
    near = with_inputs(exact, lambda x: x * (1 + eps * torch.randn(x.shape, generator=made, dtype=x.dtype)))
    wanted = results(exact, lambda leaves: dense(exact, leaves))
    moved = results(near, lambda leaves: dense(near, leaves))
    found = results(case, lambda leaves: run_on(case, "triton", leaves))
    for name, want in wanted.items():
        got, finite = found[name].double(), want.isfinite()
        assert torch.equal(got.isfinite(), finite), (name, case.seed, case.program)
        if not finite.any():
            continue
        shift = torch.where(moved[name].isfinite() & finite, (moved[name] - want).abs(), 0.0).amax()
        allowed = 64 * (shift + eps * (1 + want[finite].abs().amax()))
        off = (got - want)[finite].abs().amax()
        assert off <= allowed, (name, float(off), float(allowed), case.seed, case.program)


@given(seed=st.integers(0, 2**31))
@example(seed=5535)  # one residue of positions at a time
@example(seed=1103)  # an interval from key 0 that only some heads have, beside one that all have
@settings(max_examples=6)
def test_choices_anywhere_mean_what_they_say(seed: int) -> None:
    case = draw(seed)
    assume(case.sizes.batch * case.sizes.heads * case.sizes.q_len <= MOST_ROWS)
    assert_kernels_mean_what_it_says(case)
