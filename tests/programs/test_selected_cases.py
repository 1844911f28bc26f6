"""Choices in any place of a mask, beside any score: every backend that runs a case gives what it means, worked out densely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.selection.chunking import PIECES
from tests.programs.selected_cases import Case, dense, draw, results, run_on

Tensor = torch.Tensor


def assert_means_what_it_says(case: Case, backend: str) -> None:
    """Compare in float64.

    Raises:
        UnsupportedError: the backend refuses.
    """
    found = results(case, lambda leaves: run_on(case, backend, leaves))
    wanted = results(case, lambda leaves: dense(case, leaves))
    for name, want in wanted.items():
        got = found[name]
        assert torch.equal(got.isfinite(), want.isfinite()), (name, case.seed, case.program)
        known = want.isfinite()
        off = (got - want)[known].abs().max() if bool(known.any()) else torch.zeros(())
        # A few hundred roundings of float64, of numbers up to the largest: far below what a wrong pair would change.
        assert off <= 1e-11 * (1 + want[known].abs().max() if bool(known.any()) else 1), (
            name,
            float(off),
            case.seed,
            case.program,
        )


@given(seed=st.integers(0, 2**31))
@example(seed=147)  # a table that is read only where one choice of two picked
@example(seed=1492)  # all pairs of what two choices picked attend: nothing is left that tells the choices apart
@settings(max_examples=60)
def test_choices_anywhere_mean_what_they_say(seed: int) -> None:
    assert_means_what_it_says(draw(seed), "tiled")


@given(seed=st.integers(0, 2**31))
@example(seed=1492)
@settings(max_examples=5)
def test_the_same_in_cpp(seed: int) -> None:
    """Fewer: each mask and score is compiled."""
    assert_means_what_it_says(draw(seed), "cpp")


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_mask_that_turns_out_false_leaves_no_candidates(backend: str) -> None:
    """So that the weights of chunks add up to nothing."""
    assert_means_what_it_says(draw(888), backend)


@given(
    seed=st.integers(0, 2**31),
    room=st.sampled_from([1, 1 << 25]),
    piece=st.sampled_from([1, 3000]),
    table=st.sampled_from([1, 2000]),
    threads=st.integers(1, 3),
)
@settings(max_examples=25)
def test_cut_into_pieces_they_mean_the_same(seed: int, room: int, piece: int, table: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (
            LIMITS.using(output_bytes=room, output_bytes_each=room, numbers_cpu=piece, few=0),
            PIECES.using(table_bytes=table),
        ):
            assert_means_what_it_says(draw(seed), "tiled")
    finally:
        torch.set_num_threads(before)
