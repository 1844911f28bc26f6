"""Facts of the targets, and the target that the properties of a device stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.targets import PRODUCTS, TARGETS, device_target, target_named, target_of

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


@pytest.mark.parametrize("target", (TARGETS | PRODUCTS).values(), ids=(TARGETS | PRODUCTS).keys())
def test_facts_agree_with_each_other(target):
    assert target_named(target) is target
    assert target.shared_per_block + target.shared_reserved <= target.shared_per_sm
    assert target.warps * target.warp_size * 32 <= target.registers_per_sm, "32 registers a thread allow full occupancy"
    assert target.half_tflops > target.tf32_tflops >= target.float_tflops
    own = TARGETS[target.name]
    products = {"device", "sms", "half_tflops", "tf32_tflops", "float_tflops", "memory_gb_s", "l2_bytes"}
    for field in dataclasses.fields(target):
        if field.name not in products:
            assert getattr(target, field.name) == getattr(own, field.name), field.name


def test_the_manual_lists_all():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(("| `sm", "| `gfx"))
    ]
    assert {name: products.split(", ") for name, *_, products in rows} == {
        name: [product for product, target in PRODUCTS.items() if target.name == name] for name in TARGETS
    }
    for name, matrix, shared, _ in rows:
        assert TARGETS[name].matrix[0].startswith(matrix)
        assert f"{TARGETS[name].shared_per_block // 1024} KiB" == shared


def test_architectures_by_name():
    assert list(TARGETS) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121", "gfx942"]
    for name, target in TARGETS.items():
        assert target.name == name
        assert target_named(name) is target
        assert target_named(target.device) is target, "the report of a build names a device that it does not take"


@pytest.mark.parametrize(
    ("given", "name", "device", "sms"),
    [
        ("A100", "sm_80", "A100 SXM 80 GB", 108),
        ("nvidia a10", "sm_86", "A10", 72),
        ("RTX3090", "sm_86", "RTX 3090", 82),
        ("l4", "sm_89", "L4", 58),
        ("L40S", "sm_89", "L40S", 142),
        (" NVIDIA GeForce RTX 4090 ", "sm_89", "RTX 4090", 128),
        ("H200", "sm_90", "H200", 132),
        ("b200", "sm_100", "B200", 148),
        ("rtx 5090", "sm_120", "RTX 5090", 170),
        ("RTX PRO 6000 Blackwell", "sm_120", "RTX PRO 6000 Blackwell", 188),
        ("dgx spark", "sm_121", "GB10", 48),
        ("AMD Instinct MI300X", "gfx942", "MI300X", 304),
        ("SM_120", "sm_120", "RTX PRO 6000 Blackwell", 188),
    ],
)
def test_products_by_the_names_they_are_sold_under(given, name, device, sms):
    found = target_named(given)
    assert (found.name, found.device, found.sms) == (name, device, sms)


@pytest.mark.parametrize(
    ("given", "meant"), [("sm_75", ""), ("RTX 4080", "'RTX 4090'"), ("sm_1000", "'sm_100'"), (90, ""), ("", "")]
)
def test_an_unknown_name_lists_the_known(given, meant):
    with pytest.raises(UnsupportedError) as caught:
        target_named(given)
    text = str(caught.value)
    assert text.startswith(
        "target must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, sm_121, gfx942, or a GPU by name: A100, A10, "
    )
    assert ", GB10, DGX Spark, MI300X; got " in text
    assert f"; got {given!r}" in text
    assert meant in text


def test_a_device_keeps_its_own_limits():
    found = target_of(H200, is_hip=False)
    assert found == dataclasses.replace(PRODUCTS["H200"], device="NVIDIA H200", l2_bytes=62914560)
    plain = SimpleNamespace(**{**vars(H200), "name": "NVIDIA H100 80GB HBM3", "L2_cache_size": 52428800})
    assert target_of(plain, is_hip=False) == dataclasses.replace(TARGETS["sm_90"], device="NVIDIA H100 80GB HBM3")


def test_a_device_by_its_name():
    found = target_of(RTX_4090, is_hip=False)
    assert found == dataclasses.replace(PRODUCTS["RTX 4090"], device="NVIDIA GeForce RTX 4090")


def test_a_device_that_is_not_listed():
    device = SimpleNamespace(
        **{**vars(RTX_4090), "name": "NVIDIA GeForce RTX 4070", "multi_processor_count": 46, "L2_cache_size": 0}
    )
    found = target_of(device, is_hip=False)
    assert (found.name, found.arch, found.device, found.blocks) == ("sm_89", 89, "NVIDIA GeForce RTX 4070", 24)
    assert (found.shared_per_block, found.shared_per_sm, found.warps) == (101376, 102400, 48)
    assert found.matrix == ("mma.sync",)
    assert found.half_tflops == pytest.approx(362 * 46 / 142)


@pytest.mark.parametrize(
    ("capability", "blocks"),
    [((8, 0), 32), ((8, 6), 16), ((8, 9), 24), ((9, 0), 32), ((10, 0), 32), ((12, 0), 24), ((12, 1), 24)],
)
def test_the_target_of_a_capability(capability, blocks):
    major, minor = capability
    found = target_of(SimpleNamespace(**{**vars(RTX_4090), "name": "another", "major": major, "minor": minor}), is_hip=False)
    listed = TARGETS[f"sm_{10 * major + minor}"]
    assert (found.name, found.arch, found.matrix) == (listed.name, listed.arch, listed.matrix)
    assert found.blocks == listed.blocks == blocks
    assert found.half_tflops == pytest.approx(listed.half_tflops * 128 / listed.sms)


@pytest.mark.parametrize(("capability", "blocks"), [((8, 7), 32), ((10, 3), 32), ((12, 5), 24), ((13, 0), 32)])
def test_another_capability_is_like_the_oldest_of_its_generation(capability, blocks):
    major, minor = capability
    found = target_of(SimpleNamespace(**{**vars(H200), "major": major, "minor": minor}), is_hip=False)
    assert (found.name, found.blocks) == (f"sm_{10 * major + minor}", blocks)
    assert found.matrix[0] == ("tcgen05.mma" if major == 10 else "mma.sync")


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
