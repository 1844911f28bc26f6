"""Kernels compiled without a GPU and what is counted in them, for ``aot_vs_flex.py``: ours and FlexAttention's go the same way.

A kernel that was compiled before, by the same Triton, is not compiled again: what was counted lies in the cache folder by a hash of its
source and options.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flex_templates
import measure
from aot_cases import HEADS, KV_HEADS, LENGTH, AotCase

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.residue_classes import residues
from sparsedsl.analysis.tiles import classify
from sparsedsl.codegen.to_triton import triton_source, variant_of
from sparsedsl.gpu import amdgcn, machine_loops, resources, sass
from sparsedsl.gpu.aot import BuildJob, compile_kernel, job_of
from sparsedsl.gpu.configs import Config, Shape, default_config
from sparsedsl.gpu.costs import TileCounts, listed_tiles
from sparsedsl.gpu.loading import triton as load_triton
from sparsedsl.gpu.loop_cycles import cycles
from sparsedsl.gpu.machine_loops import LoopCounts, MatrixCounts
from sparsedsl.gpu.resources import Resources, loops_of, occupancy, resources_of
from sparsedsl.gpu.targets import TARGETS
from sparsedsl.lang.pattern import as_pattern
from sparsedsl.settings import settings

__all__ = ["DTYPE", "KERNELS", "Counted", "Ours", "counted", "flex_job", "flex_kernels", "loops_from", "needs_from", "our_kernel"]

# Kernel -> products for a pair of query and key, in widths of a head.
KERNELS = {"forward": 2, "grad_q": 3, "grad_kv": 4}
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Counted:
    """One kernel of a case: ``loops`` with the tiles of ``block`` that each goes through, over all heads; what it takes of an SM."""

    kernel: str
    config: str
    block: tuple[int, int]
    warps: int
    tiles: Mapping[str, int]
    loops: Mapping[str, LoopCounts]
    needs: Resources

    def record(self, target: str, head_dim: int) -> dict[str, Any]:
        """Counts for each 128 x 128 pairs that are visited, all loops together; cycles of the whole case."""
        pairs = self.block[0] * self.block[1]
        visited = sum(self.tiles.values()) * pairs / 128**2
        useful = KERNELS[self.kernel] * head_dim * pairs
        found = {kind: cycles(loop, self.warps, TARGETS[target]) for kind, loop in self.loops.items()}

        def weighed(of: Callable[[LoopCounts], float]) -> float:
            return sum(self.tiles[kind] * of(loop) for kind, loop in self.loops.items()) / visited

        executed = weighed(lambda loop: loop.products(self.warps))
        loops = {
            kind: {
                "tiles": self.tiles[kind], "issued": loop.issued, "local_share": round(loop.local_share, 4),
                "exponentials_per_pair": round(loop.exponentials * 32 * self.warps / pairs, 3),
                "serial": round(found[kind].serial * 128**2 / pairs), "overlapped": round(found[kind].overlapped * 128**2 / pairs),
            }
            for kind, loop in self.loops.items()
        }  # fmt: skip
        return {
            "config": self.config, "registers": self.needs.registers, "spills": self.needs.spills,
            "blocks_per_sm": occupancy(self.needs, TARGETS[target]).blocks,
            "issue": round(weighed(lambda loop: loop.issued * self.warps)),
            "special": round(weighed(lambda loop: loop.special * self.warps)),
            "multiply_add": round(weighed(lambda loop: loop.multiply_add * self.warps)),
            "integer": round(weighed(lambda loop: loop.integer * self.warps)),
            "local": round(weighed(lambda loop: loop.local * self.warps)),
            "executed_over_useful": round(executed * visited / (useful * sum(self.tiles.values())), 3),
            "serial": sum(self.tiles[kind] * one.serial for kind, one in found.items()),
            "overlapped": sum(self.tiles[kind] * one.overlapped for kind, one in found.items()),
            "issue_of_case": sum(self.tiles[kind] * loop.issued * self.warps for kind, loop in self.loops.items()),
            "loops": loops,
        }  # fmt: skip


# ---- compiled and counted ----------------------------------------------------------------------------------


def counted(job: BuildJob) -> dict[str, Any]:
    """Loops of a kernel, and what it takes of an SM (``needs``), as JSON data."""
    words = [job.text, job.kernel, sorted(job.signature.items()), sorted(job.constants.items()), dataclasses.astuple(job.config)]
    key = json.dumps([*words, job.fp_fusion, job.target.name, load_triton().__version__, _counter()])
    path = settings().cache / "aot_counts" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    compiled = compile_kernel(job)
    loops = [dataclasses.asdict(loop) for loop in loops_of(compiled)]
    found = {"loops": loops, "needs": dataclasses.asdict(resources_of(compiled))}
    path.parent.mkdir(parents=True, exist_ok=True)
    measure.write_json(path, found)
    return found


@functools.cache
def _counter() -> str:
    """What counts: another one counts anew."""
    return hashlib.sha256("".join(map(inspect.getsource, (amdgcn, machine_loops, resources, sass))).encode()).hexdigest()


def loops_from(found: Mapping[str, Any]) -> list[LoopCounts]:
    """The loops out of what :func:`counted` gives."""
    kinds = [
        [MatrixCounts(tuple(one["shape"]), one["warps"], one["from_shared"], one["count"]) for one in loop["matrix"]]
        for loop in found["loops"]
    ]
    return [LoopCounts(**loop | {"matrix": tuple(kind)}) for loop, kind in zip(found["loops"], kinds, strict=True)]


def needs_from(found: Mapping[str, Any]) -> Resources:
    """What the kernel takes of an SM, out of what :func:`counted` gives."""
    needs = found["needs"]
    return Resources(**needs | {"instructions": tuple(map(tuple, needs["instructions"])), "remarks": tuple(needs["remarks"])})


# ---- ours --------------------------------------------------------------------------------------------------


class Ours:
    """Our pattern of a case: its source, and the tiles that its kernels visit."""

    def __init__(self, case: AotCase, head_dim: int) -> None:
        self.pattern, self.head_dim = as_pattern(case.declare()), head_dim
        self.tables = {**self.pattern.bound, **case.tables()}
        self.source = triton_source(self.pattern, variant_of(self.pattern, head_dim=head_dim))
        self.shape = Shape(DTYPE, head_dim, head_dim, HEADS // KV_HEADS)
        self.tiles_at = functools.cache(self._tiles_at)
        within = residues(self.pattern)
        self.mask, self.step = (self.pattern.mask.expr, 1) if within is None else (within.pattern.mask.expr, within.step)
        self.lists = functools.cache(self._lists)

    def _lists(self, block: tuple[int, int]) -> BlockLists:
        length = LENGTH // self.step
        return classify(self.mask, Domain(length, length, heads=HEADS, tables=self.tables), block)

    def _tiles_at(self, block: tuple[int, int], by_key: bool = False) -> TileCounts:
        return listed_tiles(self.lists(block), batch=self.step, heads=HEADS, by_key=by_key)


def our_kernel(ours: Ours, kernel: str, target: str, config: Config | None = None) -> Counted:
    """A kernel of ours with a config, by default the one that ``sd.build`` takes."""
    config = config or default_config(kernel, ours.shape, TARGETS[target])
    found = counted(job_of(ours.source, ours.source.kernel(kernel), ours.shape, config, TARGETS[target]))
    tiles = ours.tiles_at((config.block_m, config.block_n))
    loops = loops_from(found)
    names: tuple[str, ...] = ("full", "partial")
    if len(loops) == 1:  # the source of a mask without one kind has no loop for it
        names = ("partial",) if tiles.partial else ("full",)
    if len(loops) != len(names):
        raise RuntimeError(
            f"{kernel}, {config}, {target}: {len(loops)} loops with products, where full and partial tiles have one each"
        )
    counts = {"full": tiles.full, "partial": tiles.partial}
    block = (config.block_m, config.block_n)
    return Counted(
        kernel, str(config), block, config.warps, counts, dict(zip(names, loops, strict=True)), needs_from(found),
    )  # fmt: skip


# ---- FlexAttention's ---------------------------------------------------------------------------------------


def flex_job(written: flex_templates.FlexKernel, target: str) -> BuildJob:
    """What there is to compile of a kernel of FlexAttention's; its tiles are constants in its text."""
    config = Config(0, 0, written.warps, written.stages)
    return BuildJob(written.text, written.name, dict(written.signature), {}, config, True, TARGETS[target])


def flex_kernels(case: AotCase, head_dim: int, target: str) -> dict[str, Counted]:
    """FlexAttention's kernels of a case, with torch's default configs: one of its kernels makes all gradients."""
    shape = flex_templates.FlexShape(DTYPE, HEADS, KV_HEADS, LENGTH, LENGTH, head_dim)
    arch = TARGETS[target].arch
    assert isinstance(arch, int)
    pattern = as_pattern(case.declare())
    domain = Domain(LENGTH, LENGTH, heads=HEADS, tables={**pattern.bound, **case.tables()})
    lists = listed_tiles(classify(pattern.mask.expr, domain, shape.block), batch=1, heads=HEADS)
    found = {}
    for written in (
        flex_templates.forward(case.flex, shape, divmod(arch, 10)),
        flex_templates.backward(case.flex, shape, divmod(arch, 10)),
    ):
        got = counted(flex_job(written, target))
        options, loops = written.options, loops_from(got)
        if written.name == "flex_attention":
            blocks = {"forward": (options["BLOCK_M"], options["BLOCK_N"])}
        else:
            blocks = {"grad_q": (options["BLOCK_M2"], options["BLOCK_N2"]), "grad_kv": (options["BLOCK_M1"], options["BLOCK_N1"])}
        if len(loops) != 2 * len(blocks):
            raise RuntimeError(
                f"FlexAttention's {written.name}, {target}: {len(loops)} loops with products, not {2 * len(blocks)}"
            )
        # Gradients of queries need fewer products than those of keys; which part of the kernel comes first is the compiler's choice.
        halves = sorted((loops[:2], loops[2:]), key=lambda half: half[0].products(written.warps)) if len(blocks) == 2 else [loops]
        for (kernel, block), (partial, full) in zip(blocks.items(), halves, strict=True):
            parts = shape.block**2 // (block[0] * block[1])
            found[kernel] = Counted(
                kernel, f"{block[0]}x{block[1]}, {written.warps} warps, {written.stages} stages", block, written.warps,
                {"full": lists.full * parts, "partial": lists.partial * parts}, {"full": full, "partial": partial}, needs_from(got),
            )  # fmt: skip
    return found
