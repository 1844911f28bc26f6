"""What is known of the processors that kernels are compiled for: limits that decide whether a kernel fits, and peak rates."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.advice import meant

__all__ = ["PRODUCTS", "TARGETS", "Target", "device_target", "target_named"]

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One kind of GPU. *SM* stands for what runs a block, also for AMD's CU. A *register* is 32 bits of one thread.

    ``name``                  of the architecture, as in ``sd.build(target=...)``
    ``device``                the product that ``sms``, ``l2_bytes`` and the rates are of; ``sd.build`` takes its name too
    ``backend, arch``         what Triton calls it: ``("cuda", 90)``, ``("hip", "gfx942")``
    ``warp_size``             threads of a warp
    ``sms``                   of the whole device
    ``shared_per_block``      bytes of shared memory that one block may have
    ``shared_per_sm``         bytes that the resident blocks share
    ``shared_reserved``       bytes of it that the driver takes of each resident block
    ``shared_step``           bytes that a block's share is rounded up to
    ``registers_per_sm``      of one SM
    ``registers_per_thread``  most that a thread can have; the rest spills
    ``register_step``         registers of a thread are rounded up to a multiple of this
    ``warps, blocks``         resident on an SM at most
    ``schedulers``            parts of an SM; a warp stays on one, which has its share of the registers
    ``tensor_columns``        columns of tensor memory of an SM; 0 without
    ``matrix``                matrix instructions, the best first, as the assembly spells them
    ``half_tflops, tf32_tflops, float_tflops``  peak rates of fp16/bf16 products, tf32 products, and fp32 arithmetic, without sparsity
    ``memory_gb_s, l2_bytes``                   device memory and second-level cache
    """

    name: str
    device: str
    backend: str
    arch: int | str
    warp_size: int
    sms: int
    shared_per_block: int
    shared_per_sm: int
    shared_reserved: int
    shared_step: int
    registers_per_sm: int
    registers_per_thread: int
    register_step: int
    warps: int
    blocks: int
    schedulers: int
    tensor_columns: int
    matrix: tuple[str, ...]
    half_tflops: float
    tf32_tflops: float
    float_tflops: float
    memory_gb_s: float
    l2_bytes: int


# Limits: the table "technical specifications per compute capability" of NVIDIA's CUDA programming guide. Rates, SMs and caches: the makers'
# data sheets and NVIDIA's architecture papers, products of bf16 that are summed in fp32. Cards sold for games do those at half the rate of
# the same chip in a workstation card; of GB10 one rate alone is published, that of sparse fp4, and an eighth of it is taken.
_SM_80 = Target(
    name="sm_80", device="A100 SXM 80 GB", backend="cuda", arch=80, warp_size=32, sms=108,
    shared_per_block=163 * KIB, shared_per_sm=164 * KIB, shared_reserved=KIB, shared_step=128,
    registers_per_sm=65536, registers_per_thread=255, register_step=8, warps=64, blocks=32, schedulers=4, tensor_columns=0,
    matrix=("mma.sync",), half_tflops=312, tf32_tflops=156, float_tflops=19.5, memory_gb_s=2039, l2_bytes=40 * KIB * KIB,
)  # fmt: skip

# A quarter less room for warps than sm_80, and 99 KiB a block.
_SM_86 = dataclasses.replace(
    _SM_80, name="sm_86", device="A10", arch=86, sms=72, shared_per_block=99 * KIB, shared_per_sm=100 * KIB, warps=48, blocks=16,
    half_tflops=125, tf32_tflops=62.5, float_tflops=31.2, memory_gb_s=600, l2_bytes=6 * KIB * KIB,
)  # fmt: skip

_SM_89 = dataclasses.replace(
    _SM_86, name="sm_89", device="L40S", arch=89, sms=142, blocks=24, half_tflops=362, tf32_tflops=183, float_tflops=91.6,
    memory_gb_s=864, l2_bytes=96 * KIB * KIB,
)  # fmt: skip

_SM_90 = dataclasses.replace(
    _SM_80, name="sm_90", device="H100 SXM", arch=90, sms=132, shared_per_block=227 * KIB, shared_per_sm=228 * KIB,
    matrix=("wgmma.mma_async", "mma.sync"), half_tflops=989, tf32_tflops=494, float_tflops=67, memory_gb_s=3350,
    l2_bytes=50 * KIB * KIB,
)  # fmt: skip

_SM_100 = dataclasses.replace(
    _SM_90, name="sm_100", device="B200", arch=100, sms=148, tensor_columns=512, matrix=("tcgen05.mma", "mma.sync"),
    half_tflops=2250, tf32_tflops=1125, float_tflops=75, memory_gb_s=8000, l2_bytes=126 * KIB * KIB,
)  # fmt: skip

# No tensor memory and no tcgen05: of the instructions of sm_100 it has none that matters here.
_SM_120 = dataclasses.replace(
    _SM_89, name="sm_120", device="RTX PRO 6000 Blackwell", arch=120, sms=188, half_tflops=504, tf32_tflops=252, float_tflops=126,
    memory_gb_s=1792, l2_bytes=128 * KIB * KIB,
)  # fmt: skip

_SM_121 = dataclasses.replace(
    _SM_120, name="sm_121", device="GB10", arch=121, sms=48, half_tflops=125, tf32_tflops=62.5, float_tflops=31, memory_gb_s=273,
    l2_bytes=24 * KIB * KIB,
)  # fmt: skip

# Registers: four parts of 512 a lane, vector and accumulation registers together.
_GFX942 = Target(
    name="gfx942", device="MI300X", backend="hip", arch="gfx942", warp_size=64, sms=304,
    shared_per_block=64 * KIB, shared_per_sm=64 * KIB, shared_reserved=0, shared_step=512,
    registers_per_sm=4 * 512 * 64, registers_per_thread=512, register_step=8, warps=32, blocks=32, schedulers=4, tensor_columns=0,
    matrix=("v_mfma",), half_tflops=1307, tf32_tflops=654, float_tflops=163, memory_gb_s=5300, l2_bytes=4 * KIB * KIB,
)  # fmt: skip

TARGETS = {
    target.name: target for target in (_SM_80, _SM_86, _SM_89, _SM_90, _SM_100, _SM_120, _SM_121, _GFX942)
}  # fmt: skip


def _as(target: Target, device: str, sms: int, half: float, tf32: float, single: float, memory: float, l2_mib: int) -> Target:
    """Another product with the limits of ``target``; numbers as in :class:`Target`."""
    return dataclasses.replace(
        target, device=device, sms=sms, half_tflops=half, tf32_tflops=tf32, float_tflops=single, memory_gb_s=memory,
        l2_bytes=l2_mib * KIB * KIB,
    )  # fmt: skip


# By the name they are sold under.
PRODUCTS = {
    "A100": _SM_80,
    "A10": _SM_86,
    "A40": _as(_SM_86, "A40", 84, 149.7, 74.8, 37.4, 696, 6),
    "RTX A6000": _as(_SM_86, "RTX A6000", 84, 154.8, 77.4, 38.7, 768, 6),
    "RTX 3090": _as(_SM_86, "RTX 3090", 82, 71, 35.6, 35.6, 936, 6),
    "L4": _as(_SM_89, "L4", 58, 121, 60, 30.3, 300, 48),
    "L40S": _SM_89,
    "RTX 6000 Ada": _as(_SM_89, "RTX 6000 Ada", 142, 364, 182, 91.1, 960, 96),
    "RTX 4090": _as(_SM_89, "RTX 4090", 128, 165.2, 82.6, 82.6, 1008, 72),
    "H100": _SM_90,
    "H200": dataclasses.replace(_SM_90, device="H200", memory_gb_s=4800),
    "B200": _SM_100,
    "RTX PRO 6000": _SM_120,
    "RTX 5090": _as(_SM_120, "RTX 5090", 170, 209.5, 104.8, 104.8, 1792, 96),
    "GB10": _SM_121,
    "DGX Spark": _SM_121,
    "MI300X": _GFX942,
}
# Words that stand beside a name, or not.
_LEFT_OUT = ("nvidia", "geforce", "amd", "instinct", "blackwell")


def _plain(name: str) -> str:
    """A name without case, blanks, and the words of its maker.

    >>> _plain("NVIDIA GeForce RTX 4090"), _plain("l40s")
    ('rtx4090', 'l40s')
    """
    return "".join(word for word in name.lower().split() if word not in _LEFT_OUT)


_BY_PLAIN_NAME = {_plain(name): target for name, target in (TARGETS | PRODUCTS).items()}
# What the report of a build calls a device is a name too.
_BY_PLAIN_NAME |= {_plain(target.device): target for target in TARGETS.values()}


def target_named(name: str | Target) -> Target:
    """The target of an architecture or a product, case and blanks ignored; a :class:`Target` is returned as it is.

    Raises:
        UnsupportedError: neither among ``TARGETS`` nor among ``PRODUCTS``.

    >>> target_named("sm_90").shared_per_block
    232448
    >>> found = target_named("rtx 4090")
    >>> found.name, found.device, found.sms
    ('sm_89', 'RTX 4090', 128)
    """
    if isinstance(name, Target):
        return name
    found = _BY_PLAIN_NAME.get(_plain(name)) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedError(
            f"target must be one of {', '.join(TARGETS)}, or a GPU by name: {', '.join(PRODUCTS)}; got {name!r}"
            f"{meant(name, [*TARGETS, *PRODUCTS])}"
        )
    return found


@functools.lru_cache
def device_target(index: int = 0) -> Target:
    """The GPU at hand: limits as its driver states them, the rest from the product of its name, else from the target nearest to it.

    Rates are those of that product or target, by number of SMs; they rank candidates and are not promised.

    Raises:
        UnsupportedError: no such GPU, or one too old for the generated kernels (compute capability below 8.0).
    """
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise UnsupportedError(
            f"there is no CUDA device {index}: name a target instead, one of {', '.join(TARGETS)}, to build without a device"
        )
    return target_of(torch.cuda.get_device_properties(index), is_hip=torch.version.hip is not None)


def target_of(found: Any, *, is_hip: bool) -> Target:
    """What the properties of a device (as torch gives them) say, on top of the product of its name or the target nearest to it."""
    listed = _BY_PLAIN_NAME.get(_plain(found.name))
    if is_hip:
        name = found.gcnArchName.split(":")[0]
        near = listed if listed is not None and listed.arch == name else _GFX942
        facts: dict[str, Any] = {"arch": name}
    else:
        capability = 10 * found.major + found.minor
        if capability < 80:
            raise UnsupportedError(
                f"the generated kernels need compute capability 8.0 or newer; {found.name} has {found.major}.{found.minor}: "
                "use backend='flex' or 'tiled'"
            )
        name = f"sm_{capability}"
        near = listed if listed is not None and listed.arch == capability else _nearest(capability)
        facts = {
            "arch": capability,
            "shared_per_block": found.shared_memory_per_block_optin,
            "shared_per_sm": found.shared_memory_per_multiprocessor,
            "registers_per_sm": found.regs_per_multiprocessor,
            "warps": found.max_threads_per_multi_processor // found.warp_size,
        }
    share = found.multi_processor_count / near.sms
    rates = {rate: getattr(near, rate) * share for rate in ("half_tflops", "tf32_tflops", "float_tflops")}
    facts |= {"name": name, "device": found.name, "sms": found.multi_processor_count, "warp_size": found.warp_size} | rates
    return dataclasses.replace(near, **facts, l2_bytes=getattr(found, "L2_cache_size", 0) or near.l2_bytes)


def _nearest(capability: int) -> Target:
    """The target of a compute capability, or the oldest of its generation: warp-group and tensor-memory instructions belong to one
    each. A generation that is not listed has what all have."""
    same = [target for target in TARGETS.values() if isinstance(target.arch, int) and target.arch // 10 == capability // 10]
    return TARGETS.get(f"sm_{capability}") or (same[0] if same else _SM_80)
