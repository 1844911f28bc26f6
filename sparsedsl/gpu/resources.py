"""What a compiled kernel needs of an SM, read from its binary: registers, spills, shared memory, matrix instructions; how many blocks fit.

Works on every ``CompiledKernel`` of Triton, whether built ahead of time or by the JIT. Needs no device: the numbers come from the tools
that Triton brings along (NVIDIA) and from the assembly (AMD).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu import amdgcn, sass
from sparsedsl.gpu.machine_loops import LoopCounts
from sparsedsl.gpu.nvidia_tools import run_tool
from sparsedsl.gpu.targets import Target
from sparsedsl.plain_values import Reported
from sparsedsl.quantities import share_text

__all__ = ["MOST_LOCAL", "Occupancy", "Resources", "loops_of", "misfits", "occupancy", "resources_of"]

# As they begin in PTX and in AMD's assembly.
MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
MOST_THREADS = 1024
# Of the instructions of a loop, loads and stores of spilled registers that other work hides.
MOST_LOCAL = 0.03


@dataclass(frozen=True)
class Resources(Reported):
    """What one compiled kernel takes.

    ``registers``       32-bit registers of a thread
    ``spills``          bytes of a thread's registers that are kept in memory because it has too few
    ``local_share``     most of the instructions in a loop that reads or writes such memory; beside the loops it costs nothing
    ``local_bytes``     bytes of memory of a thread's own: spills, and arrays such as ``sin`` needs for large arguments
    ``shared_bytes``    of a block
    ``tensor_columns``  columns of tensor memory of a block (Blackwell)
    ``threads``         of a block
    ``products``        matrix products in the source
    ``instructions``    matrix instructions in the assembly: pairs of name and how often it is written
    ``async_copies``    instructions that load into shared memory beside the arithmetic (NVIDIA): the pipeline of ``stages``
    ``remarks``         what the assembler says about speed; read only if asked for, or if there is local memory
    """

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    tensor_columns: int
    threads: int
    products: int
    instructions: tuple[tuple[str, int], ...]
    async_copies: int = 0
    remarks: tuple[str, ...] = ()
    local_share: float = 0.0

    @property
    def slowed(self) -> bool:
        """Whether spills are in the way of the work: more than :data:`MOST_LOCAL` of the instructions of a loop."""
        return self.local_share > MOST_LOCAL

    @property
    def tensor_core(self) -> dict[str, int]:
        """Matrix instruction -> how often it is written; empty if the kernel has none."""
        return dict(self.instructions)

    def _said(self) -> dict[str, Any]:
        return self.to_json()

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON data."""
        return asdict(self) | {"instructions": self.tensor_core, "remarks": list(self.remarks)}


@dataclass(frozen=True)
class Occupancy(Reported):
    """``blocks`` and ``warps`` resident on an SM at a time, the ``share`` of the warps it can hold, and what ``limit`` s them."""

    blocks: int
    warps: int
    share: float
    limit: str

    def __str__(self) -> str:
        return f"{self.blocks} blocks, {share_text(self.share)} of warps ({self.limit})"


def occupancy(resources: Resources, target: Target) -> Occupancy:
    """How many blocks of a kernel fit on an SM of ``target`` at a time: an estimate, as the driver may reserve more.

    >>> from sparsedsl.gpu.targets import TARGETS
    >>> kernel = Resources(168, 0, 0, 81920, 0, 256, 2, (("wgmma.mma_async", 16),))
    >>> occupancy(kernel, TARGETS["sm_90"])
    Occupancy(blocks=1, warps=8, share=0.125, limit='registers')
    """
    warps = -(-resources.threads // target.warp_size)
    per_thread = _rounded(max(resources.registers, 1), target.register_step)
    warps_by_registers = target.registers_per_sm // target.schedulers // (per_thread * target.warp_size) * target.schedulers
    limits = {"warps": target.warps // warps, "blocks": target.blocks, "registers": warps_by_registers // warps}
    if resources.shared_bytes:
        limits["shared memory"] = target.shared_per_sm // _rounded(
            resources.shared_bytes + target.shared_reserved, target.shared_step
        )
    if resources.tensor_columns:
        limits["tensor memory"] = target.tensor_columns // resources.tensor_columns
    limit = min(limits, key=lambda name: limits[name])
    blocks = 0 if misfits(resources, target) else limits[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / target.warps, limit)


def misfits(resources: Resources, target: Target) -> tuple[str, ...]:
    """Why a kernel cannot be launched on ``target``; empty if it can."""
    taken = _rounded(resources.registers, target.register_step) * resources.threads
    needs = (
        ("bytes of shared memory a block", resources.shared_bytes, target.shared_per_block),
        ("registers a thread", resources.registers, target.registers_per_thread),
        ("registers a block", taken, target.registers_per_sm),
        ("threads a block", resources.threads, MOST_THREADS),
        ("columns of tensor memory a block", resources.tensor_columns, target.tensor_columns),
    )
    return tuple(f"needs {got:,} {what}, {target.name} has {most:,}" for what, got, most in needs if got > most)


def _rounded(value: int, step: int) -> int:
    return -(-value // step) * step


def resources_of(compiled: Any, *, remarks: bool = False) -> Resources:
    """What a compiled kernel takes.

    Args:
        compiled: a ``CompiledKernel``, as ``triton.compile`` and a launch return it.
        remarks: also ask NVIDIA's assembler what it says about speed, such as products that it had to run one after the other;
            this compiles the assembly once more.

    Raises:
        UnsupportedError: Triton's copy of ``cuobjdump`` cannot be run.
    """
    metadata = compiled.metadata
    assembly = compiled.asm.get("ptx") or compiled.asm.get("amdgcn") or ""
    read = _amd if metadata.target.backend == "hip" else _nvidia
    registers, spills, local_bytes, said = read(compiled, assembly, remarks)
    counts = ((name, assembly.count(name)) for name in MATRIX_INSTRUCTIONS)
    return Resources(
        registers=registers, spills=spills, local_bytes=local_bytes, shared_bytes=metadata.shared,
        tensor_columns=getattr(metadata, "tmem_size", None) or 0, threads=metadata.num_warps * metadata.target.warp_size,
        products=len(re.findall(r"\btt\.dot(?:_scaled)?\b", compiled.asm.get("ttir", ""))),
        instructions=tuple((name, count) for name, count in counts if count),
        async_copies=len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk\.tensor)\b", assembly)), remarks=said,
        local_share=max((loop.local_share for loop in loops_of(compiled)), default=0.0) if spills else 0.0,
    )  # fmt: skip


def loops_of(compiled: Any) -> tuple[LoopCounts, ...]:
    """What the innermost loops of a compiled kernel that multiply matrices do in one turn, in the order of the machine code.

    Raises:
        UnsupportedError: Triton's copy of ``cuobjdump`` cannot be run, or does not know the binary's processor.
    """
    if compiled.metadata.target.backend == "hip":
        return amdgcn.loops_in(compiled.asm["amdgcn"])
    return sass.loops_of(compiled.asm["cubin"])


Needs = tuple[int, int, int, tuple[str, ...]]  # registers, spills, local_bytes, remarks


def _amd(compiled: Any, assembly: str, remarks: bool) -> Needs:
    """Vector and accumulation registers are one file; some spills go from the one kind to the other and never see memory."""
    fields = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    local_bytes = int(fields["private_segment_fixed_size"])
    return int(fields["vgpr_count"]), min(4 * int(fields["vgpr_spill_count"]), local_bytes), local_bytes, ()


def _nvidia(compiled: Any, assembly: str, remarks: bool) -> Needs:
    """Local memory is spills or arrays: only the assembler knows which, so it is asked if there is any."""
    usage = run_tool("cuobjdump", compiled.asm["cubin"], ".cubin", ["-res-usage"])
    found = re.search(rf"Function {re.escape(compiled.metadata.name)}:\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise UnsupportedError(f"cuobjdump says nothing about the kernel {compiled.metadata.name!r}: {usage.strip()!r}")
    registers, local_bytes = int(found[1]), int(found[2]) + int(found[3])
    if not local_bytes and not remarks:
        return registers, 0, 0, ()
    log = _assembler_log(compiled, assembly, registers, local_bytes)
    if log is None:
        return registers, local_bytes, local_bytes, ()
    spilled = any(int(count) for count in re.findall(r"(\d+) bytes spill", log))
    said = (line.partition(" : ")[2].strip() or line for line in log.splitlines() if re.search(r"\(C\d+\)", line))
    return registers, local_bytes if spilled else 0, local_bytes, tuple(dict.fromkeys(said))


def _assembler_log(compiled: Any, assembly: str, registers: int, local_bytes: int) -> str | None:
    """What ptxas says on making the same kernel again; None if it makes another one, of which nothing should be believed."""
    metadata = compiled.metadata
    processor = re.search(r"^\.target\s+(\w+)", assembly, re.MULTILINE)
    if processor is None:
        return None
    common = ["-v", "-lineinfo", f"--gpu-name={processor[1]}", "-o", "/dev/null", *(metadata.ptx_options or "").split()]
    common += [] if metadata.enable_fp_fusion else ["--fmad=false"]
    name = "ptxas_blackwell" if metadata.target.arch >= 100 else "ptxas"
    for more in (["--regAllocOptLevel=2"], []):  # releases of Triton differ in this option
        try:
            log = run_tool(name, assembly.encode(), ".ptx", common + more)
        except UnsupportedError:
            continue
        if f"Used {registers} registers" in log and f"{local_bytes} bytes stack frame" in log:
            return log
    return None
