"""Configs of the kernels: defaults fit every GPU and search spaces hold nothing that cannot run; the cost model moves the right way."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.codegen.to_triton import triton_source, variant_of
from sparsedsl.gpu.aot import compile_kernels, job_of
from sparsedsl.gpu.configs import Work, constants, default_config, of_sticks, refusal, space, split_count
from sparsedsl.gpu.costs import Held, TileCounts, banded_tiles, listed_tiles, ranked, seconds
from sparsedsl.gpu.estimates import has_descriptors, impossible, registers, shared_bytes
from sparsedsl.gpu.kernel_config import BLOCKS, WARPS, Config, Shape
from sparsedsl.gpu.targets import TARGETS, target_named
from sparsedsl.lang.pattern import as_pattern
from tests.gpu.built_for import BUILT_FOR

KERNELS = ("forward", "decode", "merge", "delta", "grad_q", "grad_kv", "grad_difference_0", "grad_table_0")
SM_90 = target_named("sm_90")
HALF = Shape("bfloat16", 64, 64)
# Cards with less shared memory, which no table knows.
SMALL = dataclasses.replace(target_named("sm_86"), sms=30)
TINY = dataclasses.replace(SMALL, name="sm_87", shared_per_block=40 * 1024)

SHAPES = st.builds(
    Shape, st.sampled_from(["float16", "bfloat16", "float32"]), st.integers(1, 256), st.integers(1, 256), st.integers(1, 64)
)
ALL_TARGETS = st.sampled_from([*TARGETS.values(), SMALL, TINY])


# ---- configs as data ----------------------------------------------------------------------------------------

CONFIGS = st.builds(
    Config, st.sampled_from(BLOCKS), st.sampled_from(BLOCKS), st.sampled_from(WARPS), st.integers(1, 8), st.booleans(), st.booleans()
)  # fmt: skip


@given(CONFIGS)
@settings(max_examples=50)
def test_a_config_comes_back(config):
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


GOOD = Config(128, 64, 4, 3).to_json()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (None, "got NoneType, wanted the fields"),
        ([128, 64], "got list"),
        (GOOD | {"warp_groups": 1}, "wanted the fields"),
        ({name: value for name, value in GOOD.items() if name != "stages"}, "wanted the fields"),
        (GOOD | {"block_m": 96}, "block_m: got 96, wanted one of 16, 32, 64, 128, 256"),
        (GOOD | {"block_m": 128.0}, "block_m: got 128.0"),
        (GOOD | {"block_n": 1 << 40}, "block_n: got 1099511627776"),
        (GOOD | {"warps": 3}, "warps: got 3"),
        (GOOD | {"warps": True}, "warps: got True"),
        (GOOD | {"stages": 0}, "stages: got 0"),
        (GOOD | {"stages": "3"}, "stages: got '3'"),
        (GOOD | {"heavy_first": 1}, "heavy_first: got 1"),
        (GOOD | {"descriptors": None}, "descriptors: got None"),
    ],
)
def test_other_data_is_no_config(data, problem):
    with pytest.raises(ValueError) as caught:
        Config.from_json(data)
    assert problem in str(caught.value)


def test_importing_loads_neither_torch_nor_triton():
    code = (
        "import sys, sparsedsl.gpu.configs, sparsedsl.gpu.costs, sparsedsl.gpu.autotune\n"
        "print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ---- defaults and the space ---------------------------------------------------------------------------------


@given(st.sampled_from(KERNELS), SHAPES, ALL_TARGETS)
@settings(max_examples=200)
def test_the_default_fits_by_the_estimates_and_is_the_first_of_the_space(kernel, shape, target):
    default = default_config(kernel, shape, target)
    assert Config.from_json(default.to_json()) == default
    if target is not TINY:  # what fits nowhere is left to the compiler to refuse
        assert impossible(kernel, shape, target, default) is None
        assert space(kernel, shape, target)[0] == default


@given(
    st.sampled_from(KERNELS), SHAPES, ALL_TARGETS,
    st.builds(Work, st.sampled_from([1.0, 2.0]), st.sampled_from([None, 8.0, 300.0, 1e5]), st.booleans()),
)  # fmt: skip
@settings(max_examples=100)
def test_the_space_holds_nothing_that_cannot_run(kernel, shape, target, work):
    found = space(kernel, shape, target, work)
    assert len(set(found)) == len(found) < 600
    for config in found:
        assert refusal(kernel, shape, target, work, config) is None
        assert Config.from_json(config.to_json()) == config
        assert shared_bytes(kernel, shape, target, config) <= target.shared_per_block
        assert registers(kernel, shape, target, config) <= target.registers_per_thread


def test_the_space_offers_every_choice_that_makes_a_difference():
    plain = space("forward", HALF, SM_90)
    assert {config.stages for config in plain} == {1, 2, 3, 4} and {config.warps for config in plain} == {4, 8}
    # Four warps are 64 rows high: of fewer, some would repeat what others do.
    assert {config.block_m for config in plain} == {64, 128} and {config.block_n for config in plain} == {32, 64, 128}
    assert not any(config.heavy_first or config.descriptors for config in plain)
    assert {config.heavy_first for config in space("forward", HALF, SM_90, Work(imbalance=2.0))} == {False, True}
    assert {config.descriptors for config in space("forward", HALF, SM_90, Work(descriptors=True))} == {False, True}


def test_rows_of_few_keys_get_no_wide_tiles():
    narrow = space("forward", HALF, SM_90, Work(row_width=16))
    assert {config.block_n for config in narrow if config != default_config("forward", HALF, SM_90)} == {32}


@pytest.mark.parametrize(
    ("shape", "target", "wanted"),
    [
        (HALF, "sm_90", True),
        (HALF, "sm_100", True),
        (HALF, "sm_80", False),
        (HALF, "gfx942", False),
        (Shape("float16", 72, 64), "sm_90", True),  # 144 bytes a row
        (Shape("float16", 68, 64), "sm_90", False),  # 136
        (Shape("float16", 64, 68), "sm_90", False),
        (Shape("float32", 68, 64), "sm_90", True),  # 272
        (dataclasses.replace(HALF, aligned=False), "sm_90", False),
    ],
)
def test_descriptors_need_the_hardware_and_rows_of_16_bytes(shape, target, wanted):
    assert has_descriptors(shape, target_named(target)) is wanted
    offered = any(config.descriptors for config in space("forward", shape, target_named(target), Work(descriptors=True)))
    assert offered is wanted
    asked = dataclasses.replace(default_config("forward", shape, target_named(target)), descriptors=True)
    assert (impossible("forward", shape, target_named(target), asked) is None) is wanted


def test_what_cannot_be_says_why():
    assert "of shared memory, sm_90 has 232,448 a block" in str(impossible("forward", HALF, SM_90, Config(256, 256, 8, 8)))
    wide = Shape("float16", 256, 256)
    assert "registers a thread, sm_90 has 255" in str(impossible("grad_kv", wide, SM_90, Config(16, 128, 4, 1)))
    assert "no tensor descriptors on sm_80" in str(
        impossible("forward", HALF, target_named("sm_80"), Config(64, 64, 4, 2, descriptors=True))
    )
    assert "rows" in str(refusal("decode", Shape("float16", 64, 64, group=32), SM_90, Work(), Config(16, 64, 4, 2)))
    assert "the kernel has none" in str(refusal("forward", HALF, SM_90, Work(), Config(64, 64, 4, 2, descriptors=True)))


@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
def test_estimates_grow_with_tiles_stages_and_dims(kernel):
    small = Config(32, 32, 4, 2)
    for larger in (Config(64, 32, 4, 2), Config(32, 64, 4, 2)):
        assert shared_bytes(kernel, HALF, SM_90, larger) > shared_bytes(kernel, HALF, SM_90, small)
        assert registers(kernel, HALF, SM_90, larger) > registers(kernel, HALF, SM_90, small)
    assert shared_bytes(kernel, HALF, SM_90, Config(32, 32, 4, 3)) > shared_bytes(kernel, HALF, SM_90, small)
    assert registers(kernel, HALF, SM_90, Config(32, 32, 8, 2)) < registers(kernel, HALF, SM_90, small)
    for estimate in (shared_bytes, registers):
        assert estimate(kernel, Shape("float16", 128, 128), SM_90, small) > estimate(kernel, HALF, SM_90, small)
        assert estimate(kernel, Shape("float16", 70, 70), SM_90, small) == estimate(
            kernel, Shape("float16", 80, 80), SM_90, small
        )


def test_decode_tiles_hold_the_heads_of_a_group():
    rows = [default_config("decode", Shape("float16", 64, 64, group), SM_90).block_m for group in (1, 8, 16, 17, 64)]
    assert rows == [16, 16, 16, 32, 64]


# ---- constants and splits -----------------------------------------------------------------------------------


def kernel_with(*names):
    return SimpleNamespace(
        name="forward", arguments=[SimpleNamespace(name=name, type="constexpr") for name in names], blocks=None
    )


def test_blocks_of_a_mask_are_not_cut_by_tiles_that_divide_them():
    for blocks, sides, wanted in (
        ((128, 64), (128, 64), True),
        ((128, 64), (64, 128), False),
        ((64, 64), (128, 64), False),
        (None, (64, 64), False),
    ):
        kernel = kernel_with("BLOCK_WISE")
        kernel.blocks = blocks
        assert constants(kernel, HALF, Config(*sides, 4, 2)) == {"BLOCK_WISE": wanted}


def test_constants_are_those_that_the_kernel_has():
    config, shape = Config(128, 64, 4, 3, heavy_first=True), Shape("float16", 80, 40, 4)
    assert constants(kernel_with("BLOCK_M", "HEAVY_FIRST"), shape, config) == {"BLOCK_M": 128, "HEAVY_FIRST": True}
    names = ("q", "BLOCK_N", "BLOCK", "PRECISION", "ALIGN", "HAS_GRAD_LSE", "ELSEWHERE")
    assert constants(kernel_with(*names), shape, config) == {
        "BLOCK_N": 64, "BLOCK": 64, "PRECISION": "ieee", "ALIGN": 8, "HAS_GRAD_LSE": True,
    }  # fmt: skip


@pytest.mark.parametrize(("shape", "align"), [(HALF, 8), (Shape("float16", 66, 64), 1), (Shape("float16", 64, 3), 1)])
def test_strides_are_said_to_be_aligned_only_if_they_are(shape, align):
    assert constants(kernel_with("ALIGN"), shape, Config(64, 64, 4, 2)) == {"ALIGN": align}
    assert constants(kernel_with("ALIGN"), dataclasses.replace(shape, aligned=False), Config(64, 64, 4, 2)) == {"ALIGN": 1}


@given(st.integers(1, 1 << 16), st.integers(1, 1 << 16), ALL_TARGETS)
def test_splits_fill_the_device_and_no_more(tiles, programs, target):
    splits = split_count(tiles, programs, target)
    assert 1 <= splits <= max(1, tiles // 2)
    assert splits == 1 or programs * (splits - 1) < 2 * target.sms
    assert split_count(2 * tiles, programs, target) >= splits >= split_count(tiles, 2 * programs, target)


# ---- the cost model -----------------------------------------------------------------------------------------

COUNTS = st.builds(
    lambda full, partial, programs, extra: TileCounts(
        full, partial, programs, min(full + partial, -(-(full + partial) // programs) + extra)
    ),
    st.integers(0, 100_000), st.integers(0, 100_000), st.integers(1, 5_000), st.integers(0, 500),
)  # fmt: skip
CASES = st.tuples(
    st.sampled_from(["forward", "grad_q", "grad_kv"]), st.sampled_from([HALF, Shape("float16", 128, 128), Shape("float32", 64, 64)]),
    st.sampled_from(list(TARGETS.values())), st.sampled_from([Config(128, 64, 8, 2), Config(64, 64, 4, 3), Config(32, 32, 4, 1)]),
    COUNTS, st.builds(Held, st.integers(1, 8), st.floats(0, 0.5)),
)  # fmt: skip


@given(CASES)
@settings(max_examples=200)
def test_the_cost_model_moves_the_right_way(case):
    kernel, shape, target, config, tiles, held = case
    base = seconds(*case)
    assert 0 < base < float("inf")
    more = [
        dataclasses.replace(tiles, full=tiles.full + 1000, longest=tiles.longest + 1),
        dataclasses.replace(tiles, partial=tiles.partial + 1000, longest=tiles.longest + 1),
        dataclasses.replace(tiles, full=0, partial=tiles.full + tiles.partial),
        dataclasses.replace(tiles, longest=tiles.longest + 50),
    ]
    for slower in more:
        assert seconds(kernel, shape, target, config, slower, held) >= base * (1 - 1e-12), slower
    better = dataclasses.replace(target, memory_gb_s=2 * target.memory_gb_s)
    assert seconds(kernel, shape, better, config, tiles, held) <= base * (1 + 1e-12)
    twice = dataclasses.replace(
        target, sms=2 * target.sms, memory_gb_s=2 * target.memory_gb_s, half_tflops=2 * target.half_tflops,
        tf32_tflops=2 * target.tf32_tflops, float_tflops=2 * target.float_tflops,
    )  # fmt: skip
    assert seconds(kernel, shape, twice, config, tiles, held) <= base * (1 + 1e-12)
    assert seconds(
        kernel, shape, target, config, tiles, dataclasses.replace(held, local_share=held.local_share + 0.08)
    ) >= base * (1 - 1e-12)
    first = dataclasses.replace(config, heavy_first=True)
    assert seconds(kernel, shape, target, first, tiles, held) <= base * (1 + 1e-12)
    assert seconds(kernel, shape, target, config, tiles, dataclasses.replace(held, blocks=held.blocks + 1)) <= base * (1 + 1e-12)


def test_spills_cost_time():
    tiles = TileCounts(1000, 100, 64, 20)
    took = [seconds("forward", HALF, SM_90, Config(128, 64, 8, 2), tiles, Held(1, share)) for share in (0.0, 0.08, 0.4)]
    assert took == sorted(set(took))


def test_a_narrow_window_wants_smaller_tiles_than_a_wide_one():
    def best(width):
        tiles_at = lambda block: banded_tiles(16384, 16384, width, block, copies=16)  # noqa: E731
        return ranked("forward", HALF, SM_90, space("forward", HALF, SM_90), tiles_at)[0]

    assert best(64).block_m * best(64).block_n < best(8192).block_m * best(8192).block_n


def test_ranking_leaves_out_what_does_not_run():
    candidates = [Config(64, 64, 4, 2), Config(128, 64, 4, 2), Config(64, 64, 4, 3)]
    asked = []

    def tiles_at(block):
        asked.append(block)
        return banded_tiles(4096, 4096, 512, block, copies=1)

    found = ranked("forward", HALF, SM_90, candidates, tiles_at, lambda config: None if config.stages == 3 else Held(2))
    assert set(found) == set(candidates[:2]) and sorted(asked) == [(64, 64), (128, 64)]


BLOCK_PAIRS = list(itertools.product((32, 64, 128), repeat=2))


@pytest.mark.parametrize(("q_len", "window"), [(512, 128), (512, 64), (256, 256)])
@pytest.mark.parametrize("block", BLOCK_PAIRS)
@pytest.mark.parametrize("by_key", [False, True])
def test_counts_without_lists_are_near_those_of_lists(q_len, window, block, by_key):
    domain = Domain(rows=q_len, kv_len=q_len + window, q_offset=window)  # no row is cut off at the start
    mask = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < window)
    listed = listed_tiles(classify(mask.expr, domain, block), batch=2, heads=3, by_key=by_key)
    guess = banded_tiles(q_len, q_len + window, window, block, copies=6, by_key=by_key)
    assert guess.programs == listed.programs
    assert listed.full + listed.partial == pytest.approx(guess.full + guess.partial, rel=0.25)
    assert abs(listed.full - guess.full) <= 0.2 * (listed.full + listed.partial)
    assert listed.longest <= guess.longest + 2


def test_full_attention_has_no_partial_tile():
    assert banded_tiles(256, 512, 512, (64, 64), copies=2) == TileCounts(full=64, partial=0, programs=8, longest=8)


# ---- what the compiler says ---------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling kernels needs Triton")
@pytest.mark.parametrize("target", BUILT_FOR)
def test_the_defaults_do_not_spill_in_loops_and_the_estimate_of_shared_memory_holds(target):
    """One pattern here, of head dims 64; the static library at 64 and 128 is built in the tests of `sd.build`."""
    pattern = as_pattern(sd.kv_idx <= sd.q_idx)
    source, found = triton_source(pattern, variant_of(pattern)), target_named(target)
    for kernel in ("forward", "grad_q", "grad_kv"):
        config = default_config(kernel, HALF, found)
        (binary,) = compile_kernels([job_of(source, source.kernel(kernel), HALF, config, found)])
        assert not binary.resources.slowed, (kernel, config)
        assert binary.resources.shared_bytes <= 1.5 * shared_bytes(kernel, HALF, found, config), (kernel, config)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
def test_kernels_of_sticks_agree_on_the_keys_of_a_tile(target, dtype, width):
    shape, gpu = Shape(dtype, width, width), target_named(target)
    kernels = ("left", "grad_q", "grad_kv", "grad_bias_0")
    found = {name: [of_sticks(name, shape, gpu, config) for config in space(name, shape, gpu)] for name in kernels}
    assert len({config.block_n for configs in found.values() for config in configs}) == 1
    assert all(config.block_m == config.block_n for config in found["grad_bias_0"])
