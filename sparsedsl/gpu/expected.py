"""Configs without a device: the cost model names a handful, they are compiled for the target, and what they really take decides.

Input: a generated source, its shape, a target, the tiles of a call. Output: an :class:`Expected` a kernel. Nothing is run or remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sparsedsl.codegen.to_triton import KernelSource, TritonSource
from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.aot import compile_kernels, job_of
from sparsedsl.gpu.configs import Config, Shape, Work, default_config, space
from sparsedsl.gpu.costs import Held, TileCounts, ranked, seconds
from sparsedsl.gpu.resources import Resources, misfits, occupancy
from sparsedsl.gpu.targets import Target
from sparsedsl.plain_values import Reported

__all__ = ["HANDFUL", "Expected", "expected_config"]

# Candidates that are compiled, beside the default: each takes about a second.
HANDFUL = 4


@dataclass(frozen=True)
class Expected(Reported):
    """``config``: the choice; ``seconds``: expected of a launch; ``resources``: of the compiled kernel; ``source``: how it was chosen, and
    ``refused``: candidates that cannot run, with the reason."""

    kernel: str
    config: Config
    seconds: float
    resources: Resources
    source: str
    refused: tuple[tuple[Config, str], ...]


def expected_config(
    source: TritonSource,
    kernel: KernelSource,
    shape: Shape,
    target: Target,
    work: Work,
    tiles_at: Callable[[tuple[int, int]], TileCounts],
    *,
    compiled: Callable[[Config], Resources] | None = None,
) -> Expected:
    """The config that is expected to be the fastest on ``target``, of those that the compiler makes without trouble.

    ``tiles_at``: what is scheduled at a tile size (queries, keys). ``compiled``: resources of a candidate; compiles it by default.
    :class:`~sparsedsl.errors.UnsupportedError` if not even the default can be compiled and launched.
    """
    take = compiled or (lambda config: _compiled(source, kernel, shape, target, config))
    default = default_config(kernel.name, shape, target)
    found: dict[Config, Resources] = {}
    refused: list[tuple[Config, str]] = []
    for config in _handful(kernel.name, shape, target, work, default, tiles_at):
        try:
            resources = take(config)
        except UnsupportedError as error:
            refused.append((config, str(error)))
            continue
        if problems := misfits(resources, target):
            refused.append((config, "; ".join(problems)))
        else:
            found[config] = resources
    if not found:
        raise UnsupportedError(f"no config of kernel {kernel.name!r} can be launched on {target.name}: {refused[0][1]}")

    def held(config: Config) -> Held:
        return Held(max(1, occupancy(found[config], target).blocks), found[config].local_share)

    best = next(iter(ranked(kernel.name, shape, target, found, tiles_at, held)))
    took = seconds(kernel.name, shape, target, best, tiles_at((best.block_m, best.block_n)), held(best))
    words = f"cost model and resources of {len(found)} compiled candidates, not measured"
    return Expected(kernel.name, best, took, found[best], words, tuple(refused))


def _handful(
    kernel: str, shape: Shape, target: Target, work: Work, default: Config, tiles_at: Callable[[tuple[int, int]], TileCounts]
) -> Iterable[Config]:
    """The default, and the cost model's favourites by the estimates, no two of which differ in stages only."""
    if kernel in ("delta", "merge"):
        return (default,)
    chosen, seen = [default], {(default.block_m, default.block_n, default.warps)}
    for config in ranked(kernel, shape, target, space(kernel, shape, target, work), tiles_at):
        if len(chosen) > HANDFUL:
            break
        if (sides := (config.block_m, config.block_n, config.warps)) not in seen:
            seen.add(sides)
            chosen.append(config)
    return chosen


def _compiled(source: TritonSource, kernel: KernelSource, shape: Shape, target: Target, config: Config) -> Resources:
    (binary,) = compile_kernels([job_of(source, kernel, shape, config, target)])
    return binary.resources
