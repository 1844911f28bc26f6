"""Facts of the targets, and the target that the properties of a device stand for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.targets import TARGETS, device_target, target_named, target_of

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    L2_cache_size=62914560,
)  # fmt: skip
RTX_4090 = SimpleNamespace(
    name="NVIDIA GeForce RTX 4090", major=8, minor=9, multi_processor_count=128, warp_size=32, shared_memory_per_block_optin=101376,
    shared_memory_per_multiprocessor=102400, regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536,
    L2_cache_size=75497472,
)  # fmt: skip


def test_names_and_limits():
    assert list(TARGETS) == ["sm_80", "sm_90", "sm_100", "gfx942"]
    for name, target in TARGETS.items():
        assert target.name == name
        assert target_named(name) is target_named(target) is target
        assert target.shared_per_block + target.shared_reserved <= target.shared_per_sm
        assert target.warps * target.warp_size * 32 <= target.registers_per_sm, "32 registers a thread allow full occupancy"
        assert target.half_tflops > target.tf32_tflops > target.float_tflops


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UnsupportedError, match="target must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_75'"):
        target_named("sm_75")


def test_a_device_keeps_its_own_limits():
    found = target_of(H200, is_hip=False)
    expected = dataclasses.replace(TARGETS["sm_90"], device="NVIDIA H200", l2_bytes=62914560)
    assert found == expected


def test_a_device_that_is_not_listed():
    found = target_of(RTX_4090, is_hip=False)
    assert (found.name, found.arch, found.device) == ("sm_89", 89, "NVIDIA GeForce RTX 4090")
    assert (found.shared_per_block, found.shared_per_sm, found.warps) == (101376, 102400, 48)
    assert found.matrix == ("mma.sync",)
    assert found.half_tflops == pytest.approx(312 * 128 / 108)


def test_newer_generations_keep_to_their_own_matrix_instructions():
    for major, matrix in ((9, "wgmma.mma_async"), (10, "tcgen05.mma"), (12, "mma.sync")):
        device = SimpleNamespace(**{**vars(H200), "major": major})
        assert target_of(device, is_hip=False).matrix[0] == matrix


def test_a_device_that_is_too_old():
    old = SimpleNamespace(**{**vars(H200), "name": "Tesla T4", "major": 7, "minor": 5})
    with pytest.raises(UnsupportedError, match=r"capability 8\.0 or newer; Tesla T4 has 7\.5: use backend='flex' or 'tiled'"):
        target_of(old, is_hip=False)


def test_an_amd_device():
    device = SimpleNamespace(
        name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, warp_size=64
    )
    assert target_of(device, is_hip=True) == dataclasses.replace(TARGETS["gfx942"], device="AMD Instinct MI300X")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_device_names_the_way_out():
    with pytest.raises(UnsupportedError, match="there is no CUDA device 0: name a target instead, one of sm_80"):
        device_target()


@pytest.mark.gpu
def test_the_device_at_hand():
    found = device_target(torch.cuda.current_device())
    assert found.shared_per_block >= 48 * 1024
    assert found.sms == torch.cuda.get_device_properties().multi_processor_count
