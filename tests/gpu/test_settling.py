"""Which config is taken where the first choice does not fit or spills: decided on made-up resources."""

from __future__ import annotations

import pytest

from sparsedsl.gpu.kernel_config import Config
from sparsedsl.gpu.resources import Resources
from sparsedsl.gpu.settling import lighter, settled
from sparsedsl.gpu.targets import TARGETS

FIRST = Config(128, 128, 8, 3)
HALF_N, HALF_M, HALVES = Config(128, 64, 8, 3), Config(64, 128, 8, 3), Config(64, 64, 8, 3)


def settle(spills, shared=None):
    """What is taken if the configs spill these bytes, in a loop of 100 bytes of code, and need that much shared memory; and what was
    compiled."""
    asked = []

    def compiled(config):
        asked.append(config)
        share = spills.get(config, 0) / 100
        return Resources(128, spills.get(config, 0), 0, (shared or {}).get(config, 0), 0, 256, 2, (), local_share=share)

    config, made = settled("forward", FIRST, TARGETS["sm_90"], compiled, lambda made: made)
    assert made.spills == spills.get(config, 0)
    return config, asked


def test_the_first_choice_is_taken_if_nothing_is_wrong():
    assert settle({}) == (FIRST, [FIRST])


def test_the_nearest_that_neither_spills_nor_is_too_large():
    fewer = Config(128, 128, 8, 2)
    assert settle({FIRST: 8, fewer: 8}) == (HALF_N, [FIRST, fewer, HALF_N])
    assert settle({}, {FIRST: 250_000}) == (fewer, [FIRST, fewer])


def test_spills_that_no_loop_meets_are_no_reason():
    assert settle({FIRST: 3}) == (FIRST, [FIRST])


def test_if_all_spill_the_one_that_spills_least_and_fits():
    spills = {one: 100 for one in (FIRST, *lighter("forward", FIRST))}
    config, asked = settle(spills | {HALF_M: 8, HALVES: 4}, {HALVES: 250_000})
    assert config == HALF_M
    assert asked == [FIRST, *lighter("forward", FIRST)]
    assert settle(spills)[0] == FIRST


@pytest.mark.parametrize("config", [FIRST, Config(16, 16, 4, 1), Config(16, 128, 4, 3), Config(64, 16, 8, 2)])
def test_lighter_configs_are_lighter(config):
    for one in lighter("forward", config):
        sizes = [(getattr(one, name), getattr(config, name)) for name in ("block_m", "block_n", "stages")]
        assert all(less <= more for less, more in sizes) and one != config
        assert min(one.block_m, one.block_n) >= 16
        assert one.warps == config.warps
    assert {one.block_m for one in lighter("decode", config)} <= {config.block_m}
