"""``sd.build``: every kernel of a pattern for a named GPU, compiled without one, and a report of what each takes.

pattern  --codegen.to_triton-->  source  --configs-->  tiles, warps, stages  --aot-->  binaries  --resources-->  report
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsedsl.codegen.to_triton import TritonSource, triton_source, variant_of
from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.gpu.aot import Binary, BuildJob, compile_kernels, job_of
from sparsedsl.gpu.configs import default_config, of_sticks
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.loading import triton as load_triton
from sparsedsl.gpu.resources import Occupancy, Resources, misfits, occupancy
from sparsedsl.gpu.settling import settled
from sparsedsl.gpu.targets import Target, target_named
from sparsedsl.html_card import card, grid
from sparsedsl.lang.normalisers import STICK_BREAKING
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.lang.thumbnail import thumbnail
from sparsedsl.plain_values import Reported, plain
from sparsedsl.quantities import bytes_text, share_text

__all__ = ["Build", "BuiltKernel", "build"]

DTYPES = ("float16", "bfloat16", "float32")
PRECISIONS = ("ieee", "tf32")
# Raised when report.json changes so that its readers must know.
REPORT_FORMAT = 1


@dataclass(frozen=True)
class BuiltKernel:
    """One kernel of a :class:`Build`: what it is for, what was compiled, and what came of it."""

    purpose: str
    job: BuildJob
    binary: Binary
    occupancy: Occupancy
    problems: tuple[str, ...]

    @property
    def resources(self) -> Resources:
        """What it takes of an SM."""
        return self.binary.resources

    @property
    def config(self) -> Config:
        """Tiles, warps and stages."""
        return self.job.config


@dataclass(frozen=True, repr=False)
class Build(Reported):
    """The kernels of one pattern for one target; made by :func:`build`. ``print`` it for a table.

    ``kernels``: name -> :class:`BuiltKernel`; ``sources``: file name -> text of the module they are compiled from; there is a second one
    if some read K and V through tensor descriptors.

    >>> import tempfile
    >>> import sparsedsl as sd
    >>> built = sd.build(sd.patterns.sliding_window(1024), "sm_90", head_dim=64)
    >>> list(built.kernels)
    ['forward', 'decode', 'merge', 'delta', 'grad_q', 'grad_kv']
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in built.save(folder).glob("forward.*"))
    ['forward.cubin', 'forward.ptx']
    """

    _adds = ("problems",)
    _leaves_out = ("sources",)

    pattern: Pattern
    target: Target
    shape: Shape
    sources: Mapping[str, str]
    triton_version: str
    kernels: Mapping[str, BuiltKernel]

    @property
    def source(self) -> str:
        """The text of the generated modules."""
        return "\n\n".join(self.sources.values())

    @property
    def registers(self) -> dict[str, int]:
        """Kernel -> registers of a thread."""
        return {name: kernel.resources.registers for name, kernel in self.kernels.items()}

    @property
    def spills(self) -> dict[str, int]:
        """Kernel -> bytes of a thread's registers that are kept in memory for want of registers."""
        return {name: kernel.resources.spills for name, kernel in self.kernels.items()}

    @property
    def shared_bytes(self) -> dict[str, int]:
        """Kernel -> bytes of shared memory of a block."""
        return {name: kernel.resources.shared_bytes for name, kernel in self.kernels.items()}

    @property
    def occupancy(self) -> dict[str, Occupancy]:
        """Kernel -> how many blocks fit on an SM at a time."""
        return {name: kernel.occupancy for name, kernel in self.kernels.items()}

    @property
    def tensor_core(self) -> dict[str, dict[str, int]]:
        """Kernel -> matrix instruction -> how often it is written in the assembly; kernels without products have none."""
        return {name: kernel.resources.tensor_core for name, kernel in self.kernels.items()}

    @property
    def problems(self) -> list[str]:
        """What a user should know: kernels that do not fit, spill, or multiply without matrix instructions."""
        return [f"{name}: {problem}" for name, kernel in self.kernels.items() for problem in kernel.problems]

    def _about(self) -> str:
        dims = f"{self.shape.head_dim}" + ("" if self.shape.head_dim == self.shape.head_dim_v else f"/{self.shape.head_dim_v}")
        group = "one query head a key head" if self.shape.group == 1 else f"{self.shape.group} query heads a key head"
        return f"{self.target.name} ({self.target.device}), {self.shape.dtype}, head_dim {dims}, {group}, Triton {self.triton_version}"

    def __str__(self) -> str:
        rows = [_HEADER, *(_row(kernel) for kernel in self.kernels.values())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = [*str(self.pattern).splitlines(), f"  {self._about()}"]
        lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines + [f"  ! {problem}" for problem in self.problems])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        kernels = grid(_HEADER, [_row(kernel) for kernel in self.kernels.values()])
        picture = thumbnail(self.pattern.mask.expr, self.pattern.bound)
        return card("Build", str(self.pattern), [("for", self._about())], picture, self.problems, kernels)

    def _said(self) -> dict[str, Any]:
        told = self.to_json()
        words = {"pattern": self.pattern.text, "target": told["target"], "shape": told["shape"]}
        return {**words, "triton_version": self.triton_version, "kernels": told["kernels"], "problems": self.problems}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data; binaries are named by the file that :meth:`save` writes them to."""
        kernels = {}
        for name, kernel in self.kernels.items():
            kernels[name] = {
                "purpose": kernel.purpose, "entry": kernel.binary.entry, "binary": f"{name}.{kernel.binary.extension}",
                "signature": dict(kernel.job.signature), "constants": dict(kernel.job.constants), "config": kernel.config.to_json(),
                "resources": kernel.resources.to_json(), "problems": list(kernel.problems),
                "occupancy": plain(kernel.occupancy),
            }  # fmt: skip
        shape = {"dtype": self.shape.dtype, "head_dim": self.shape.head_dim, "head_dim_v": self.shape.head_dim_v}
        shape |= {"group": self.shape.group, "precision": self.shape.precision}
        return {"format": REPORT_FORMAT, "pattern": self.pattern.text, "target": self.target.name, "triton": self.triton_version} | {
            "shape": shape, "kernels": kernels,
        }  # fmt: skip

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write binaries, assembly, ``kernels.py`` and ``report.json`` to ``folder``: all of it or nothing.

        The folder is new, empty, or an earlier build, which is replaced.

        Raises:
            FileExistsError: the folder holds something else.
        """
        place = Path(folder).absolute()
        if place.exists() and not (place.is_dir() and (not any(place.iterdir()) or (place / "report.json").is_file())):
            raise FileExistsError(f"{place} exists and is no earlier build (it has no report.json): name another folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        made, old = (place.with_name(f".{place.name}.{word}-{secrets.token_hex(4)}") for word in ("new", "old"))
        try:
            made.mkdir()
            for name, kernel in self.kernels.items():
                (made / f"{name}.{kernel.binary.extension}").write_bytes(kernel.binary.content)
                (made / f"{name}.{'amdgcn' if kernel.binary.extension == 'hsaco' else 'ptx'}").write_text(kernel.binary.assembly)
            for name, text in self.sources.items():
                (made / name).write_text(text)
            (made / "report.txt").write_text(f"{self}\n")
            (made / "report.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
            _exchange(made, place, old)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return place


def _exchange(made: Path, place: Path, old: Path) -> None:
    """Put ``made`` in the place of ``place``, which goes to ``old``; undone if the second step fails."""
    if not place.exists():
        made.rename(place)
        return
    place.rename(old)
    try:
        made.rename(place)
    except OSError:
        old.rename(place)
        raise


_HEADER = (
    "kernel",
    "tile",
    "warps",
    "stages",
    "registers",
    "spills",
    "shared",
    "blocks/SM",
    "warps/SM",
    "limit",
    "matrix",
    "copies",
)


def _row(kernel: BuiltKernel) -> tuple[str, ...]:
    needs, found = kernel.resources, kernel.occupancy
    matrix = ", ".join(f"{count} {name}" for name, count in needs.instructions) or ("none" if needs.products else "-")
    return (
        kernel.job.kernel, f"{kernel.config.block_m}x{kernel.config.block_n}", str(kernel.config.warps), str(kernel.config.stages),
        str(needs.registers), bytes_text(needs.spills) if needs.spills else "-", bytes_text(needs.shared_bytes), str(found.blocks),
        share_text(found.share), found.limit, matrix, str(needs.async_copies or "-"),
    )  # fmt: skip


def build(
    pattern: Any,
    target: str | Target = "sm_90",
    dtype: Any = "bfloat16",
    head_dim: int = 64,
    head_dim_v: int | None = None,
    group: int = 1,
    configs: Mapping[str, Config] | None = None,
    *,
    precision: str = "ieee",
    wide: bool = False,
    remarks: bool = False,
) -> Build:
    """Compile all kernels of a pattern ahead of time, for a GPU that need not be there.

    Args:
        pattern: a Mask or a Pattern. Its tables need no values.
        target: an architecture, "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_121" (NVIDIA) or "gfx942" (AMD); or a GPU
            as it is sold, case and blanks ignored: "A100", "A10", "L4", "L40S", "RTX 4090", "H100", "H200", "B200", "RTX 5090", "GB10",
            "MI300X" and others, which the error about an unknown one lists.
        dtype: of queries, keys and values: "float16", "bfloat16" or "float32", or torch's.
        head_dim, head_dim_v: width of queries and keys, and of values (default: the same); 1 to 256.
        group: query heads that share a key head; decoding computes them side by side.
        configs: kernel name -> :class:`~sparsedsl.gpu.kernel_config.Config` (tiles, warps, stages), taken as it is. The default is one
            that neither spills in a loop nor is too large for the target, if there is one nearby.
        precision: of fp32 products, "ieee" or "tf32".
        wide: positions beyond 32 bits.
        remarks: also report what NVIDIA's assembler says about speed; doubles its time.

    Returns:
        :class:`Build`: binaries, registers, spills, shared memory, occupancy, matrix instructions. ``print`` it for a report,
        ``save`` it to a folder. Kernels whose tiles divide the blocks of a mask such as ``chosen[q_idx // 128, kv_idx // 128]`` are for
        calls whose first query begins a block: ``BLOCK_WISE`` among the constants of the report says so.

    Raises:
        PatternError: not a pattern; or ``configs`` names a kernel that it does not have.
        ShapeError: a dtype or size with no meaning.
        UnsupportedError: no Triton; a target, dtype, or size that the kernels do not have; or Triton cannot compile a kernel.

    >>> import sparsedsl as sd
    >>> built = sd.build(sd.patterns.sliding_window(1024), "sm_90", head_dim=64)
    >>> built.spills["forward"], list(built.tensor_core["forward"]), built.occupancy["forward"].blocks
    (0, ['wgmma.mma_async'], 1)
    """
    pattern = as_pattern(pattern)
    target = target_named(target)
    shape = _shape(dtype, head_dim, head_dim_v, group, precision)
    version = load_triton().__version__
    given = dict(configs or {})
    variant = variant_of(pattern, head_dim=shape.head_dim, head_dim_v=shape.head_dim_v, wide=wide)
    sources = {"kernels.py": triton_source(pattern, variant)}
    if any(config.descriptors for config in given.values()):
        sources["kernels_descriptors.py"] = triton_source(pattern, dataclasses.replace(variant, descriptors=True))
    names = [kernel.name for kernel in sources["kernels.py"].kernels]
    if unknown := sorted(set(given) - set(names)):
        raise PatternError(f"configs names {', '.join(unknown)}; the kernels of this pattern are {', '.join(names)}")
    kernels = {}
    for name in names:
        source = sources["kernels_descriptors.py" if name in given and given[name].descriptors else "kernels.py"]
        kernels[name] = _built(source, name, given.get(name), shape, target, remarks)
    return Build(pattern, target, shape, {name: source.text for name, source in sources.items()}, version, kernels)


def _built(source: TritonSource, name: str, given: Config | None, shape: Shape, target: Target, remarks: bool) -> BuiltKernel:
    """One kernel: as it is told to be, or by default lighter where that does not fit or spills."""
    kernel = source.kernel(name)

    def compiled(config: Config) -> tuple[BuildJob, Binary]:
        job = job_of(source, kernel, shape, config, target)
        return job, compile_kernels([job], remarks=remarks)[0]

    if given is not None:
        job, binary = compiled(given)
    else:
        default, sticks = default_config(name, shape, target), source.pattern.normaliser == STICK_BREAKING

        def fitting(config: Config) -> tuple[BuildJob, Binary]:
            return compiled(of_sticks(name, shape, target, config) if sticks else config)

        _, (job, binary) = settled(name, default, target, fitting, lambda made: made[1].resources)
    problems = tuple(_problems(binary.resources, shape, job))
    return BuiltKernel(kernel.purpose, job, binary, occupancy(binary.resources, target), problems)


def _shape(dtype: Any, head_dim: Any, head_dim_v: Any, group: Any, precision: Any) -> Shape:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        kind = UnsupportedError if name == "float64" else ShapeError
        raise kind(f"dtype must be one of {', '.join(DTYPES)} for GPU kernels; got {dtype!r}")
    width_v = head_dim if head_dim_v is None else head_dim_v
    for what, value in (("head_dim", head_dim), ("head_dim_v", width_v), ("group", group)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShapeError(f"{what} must be a whole number of at least 1; got {value!r}")
    if precision not in PRECISIONS:
        raise PatternError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    return Shape(name, head_dim, width_v, group, precision)


_WIDTHS = "widths of heads that 8 divides allow it"


def _problems(resources: Resources, shape: Shape, job: BuildJob) -> list[str]:
    found = [f"cannot be launched: {reason}" for reason in misfits(resources, job.target)]
    if resources.slowed:
        found.append(
            f"{resources.spills} bytes of each thread's registers spill to memory, {share_text(resources.local_share)} of a loop's "
            "instructions: "
            "smaller tiles or more warps need fewer"
        )
    if resources.products and shape.matrix_units:
        if not resources.instructions:
            found.append(f"{resources.products} matrix products without a matrix instruction of {job.target.name}")
        if job.config.stages > 1 and job.target.backend == "cuda" and not resources.async_copies:
            inner = "for unit in range(" in job.text
            why = "Triton overlaps innermost loops alone, and a long sum of the score is one" if inner else _WIDTHS
            found.append(f"{job.config.stages} stages, but no load runs beside the arithmetic: {why}")
    return found + list(resources.remarks)
