"""The kit for kernels by mutation: every planted fault is found, by a small case, and no right kernel is accused."""

from __future__ import annotations

import functools

import pytest

from sparsedsl import testing as kit
from tests.testing import planted_kernels

NAMES = [p.name for p in planted_kernels.planted()]
# What properties find that come late in a check; the others are looked for by all properties in order.
LATE = ("POIS", "GRAD", "BATCH", "LSE")
# What anybody plants first, and how the report names it ("": it may say what it likes).
NINE = {
    "off by one at a tile edge": ("T08", ""),
    "a future key": ("T04", ""),
    "LSE in the wrong base": ("T18", "the LSE is in base 2"),
    "a rescale that is missing": ("T11", "the sum of p v is not rescaled when the maximum grows"),
    "the wrong key head": ("T09", "head h reads key head h % Hk (wanted h // (H / Hk))"),
    "a ragged tail that is dropped": ("T02", "keys 4..4, the last partial tile of 4, are missing"),
    "NaN behind the mask": ("T22", ""),
    "the wrong scale": ("T27", "the scale is that of D = 4 in place of 1"),
    "a sum in another order each time": ("T38", ""),
}


def planted(name: str) -> planted_kernels.Planted:
    """A new kernel, which remembers nothing of other tests."""
    return next(p for p in planted_kernels.planted() if p.name == name)


def found(p: planted_kernels.Planted, examples: int = 25, locate: bool = False) -> kit.KernelFinding:
    """The first failure that a quick check reports."""
    only = (p.found_by,) if p.found_by in LATE else None
    report = kit.check(p.kernel, examples=examples, seed=0, stop_at_first=True, only=only, locate=locate)
    assert report.failures, f"not found:\n{report}"
    return report.failures[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_found_by_a_small_case(name):
    p = planted(name)
    failure = found(p)
    assert failure.case is not None
    assert failure.name == (p.found_by or failure.name), failure
    assert failure.case.size <= p.size, f"{failure.case!r} of size {failure.case.size}, stated {p.size}: {failure.detail}"


@pytest.mark.parametrize("name", NINE)
def test_what_is_planted_first_is_named(name):
    number, words = NINE[name]
    assert words in found(planted(number), locate=True).guess


def test_a_window_of_one_key_too_many_is_named():
    """Also where the smallest case holds that key alone, which no row sees."""
    p = planted("T07")
    (failure,) = kit.check(p.kernel, examples=12, seed=0, only="NUM").failures
    assert failure.case.kv_len == 1 and failure.guess == "the mask allows one key more at its earlier end"


@pytest.mark.parametrize("name", planted_kernels.right())
def test_no_right_kernel_is_accused(name):
    report = kit.check(planted_kernels.right()[name], examples=8, seed=1)
    assert report.ok, str(report)
    assert not report.warnings or name == "uneven", report.warnings


@pytest.mark.slow
@pytest.mark.parametrize("name", planted_kernels.right())
def test_no_right_kernel_is_accused_in_many_calls(name):
    report = kit.check(planted_kernels.right()[name], examples=140, seed=2, only=("NUM", "LSE", "GRAD", "MASS"), seconds=600)
    assert report.ok, str(report)


@pytest.mark.campaign
@pytest.mark.parametrize("name", planted_kernels.right())
def test_no_right_kernel_is_accused_in_ten_thousand_calls(name):
    """By all properties, on new cases until this kernel has had its share of 10,000 calls."""
    kernel, calls = planted_kernels.right()[name], []

    @functools.wraps(kernel.fn)
    def counted(*args, **words):
        calls.append(1)
        return kernel.fn(*args, **words)

    seed, counting = 100, kit.Kernel(counted, implements=kernel.given_implements, **kernel.given)
    while len(calls) < 10_000 / len(planted_kernels.right()):
        report = kit.check(counting, examples=25, seed=seed, seconds=600)
        assert report.ok, str(report)
        seed += 1
    print(f"{name}: {len(calls)} calls, seeds 100 to {seed - 1}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_found_by_other_seeds(name):
    p = planted(name)
    report = kit.check(p.kernel, examples=40, seed=7, locate=False)
    assert report.failures, str(report)
