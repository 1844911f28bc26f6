"""What is known of the processors that kernels are compiled for: limits that decide whether a kernel fits, and peak rates."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.advice import meant

__all__ = ["TARGETS", "Target", "device_target", "target_named"]

KIB = 1024


@dataclass(frozen=True)
class Target:
    """One kind of GPU. *SM* stands for what runs a block, also for AMD's CU. A *register* is 32 bits of one thread.

    ``name``                  as in ``sd.build(target=...)``
    ``device``                the product that ``sms``, ``l2_bytes`` and the rates are of
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


_SM_80 = Target(
    name="sm_80", device="A100 SXM 80 GB", backend="cuda", arch=80, warp_size=32, sms=108,
    shared_per_block=163 * KIB, shared_per_sm=164 * KIB, shared_reserved=KIB, shared_step=128,
    registers_per_sm=65536, registers_per_thread=255, register_step=8, warps=64, blocks=32, schedulers=4, tensor_columns=0,
    matrix=("mma.sync",), half_tflops=312, tf32_tflops=156, float_tflops=19.5, memory_gb_s=2039, l2_bytes=40 * KIB * KIB,
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

# Registers: four parts of 512 a lane, vector and accumulation registers together.
_GFX942 = Target(
    name="gfx942", device="MI300X", backend="hip", arch="gfx942", warp_size=64, sms=304,
    shared_per_block=64 * KIB, shared_per_sm=64 * KIB, shared_reserved=0, shared_step=512,
    registers_per_sm=4 * 512 * 64, registers_per_thread=512, register_step=8, warps=32, blocks=32, schedulers=4, tensor_columns=0,
    matrix=("v_mfma",), half_tflops=1307, tf32_tflops=654, float_tflops=163, memory_gb_s=5300, l2_bytes=4 * KIB * KIB,
)  # fmt: skip

TARGETS = {target.name: target for target in (_SM_80, _SM_90, _SM_100, _GFX942)}


def target_named(name: str | Target) -> Target:
    """The target of a name; a :class:`Target` is returned as it is.

    Raises:
        UnsupportedError: not one of ``TARGETS``.

    >>> target_named("sm_90").shared_per_block
    232448
    """
    if isinstance(name, Target):
        return name
    if not isinstance(name, str) or name not in TARGETS:
        raise UnsupportedError(f"target must be one of {', '.join(TARGETS)}; got {name!r}{meant(name, TARGETS)}")
    return TARGETS[name]


@functools.lru_cache
def device_target(index: int = 0) -> Target:
    """The GPU at hand: limits as its driver states them, the rest from the listed target nearest to it.

    Rates are those of the listed target, by number of SMs; they rank candidates and are not promised.

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
    """What the properties of a device (as torch gives them) say, on top of the listed target nearest to it."""
    if is_hip:
        name = found.gcnArchName.split(":")[0]
        near = _GFX942
        facts: dict[str, Any] = {"arch": name}
    else:
        capability = 10 * found.major + found.minor
        if capability < 80:
            raise UnsupportedError(
                f"the generated kernels need compute capability 8.0 or newer; {found.name} has {found.major}.{found.minor}: "
                "use backend='flex' or 'tiled'"
            )
        name = f"sm_{capability}"
        near = _nearest(capability)
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
    """Warp-group and tensor-memory instructions belong to one generation each; all others have those of sm_80."""
    return {9: _SM_90, 10: _SM_100}.get(capability // 10, _SM_80)
