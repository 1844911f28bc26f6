"""A config that a kernel can live with: the one that was chosen or, where its kernel does not fit or spills in a loop, one that needs less.

Estimates cannot know what a pattern adds: a table that is read tile by tile takes registers, and shared memory if its reads are pipelined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from sparsedsl.gpu.kernel_config import Config
from sparsedsl.gpu.resources import Resources, misfits
from sparsedsl.gpu.targets import Target

__all__ = ["lighter", "settled"]

Compiled = TypeVar("Compiled")
NARROWEST = 16


def lighter(kernel: str, config: Config) -> Iterator[Config]:
    """Configs that need less than ``config``, the nearest first. The rows of a decode tile are given by the heads of a group.

    >>> [str(one) for one in lighter("forward", Config(128, 64, 8, 2))]
    ['128x64, 8 warps, 1 stages', '128x32, 8 warps, 2 stages', '64x64, 8 warps, 2 stages', '64x32, 8 warps, 2 stages',
     '64x32, 8 warps, 1 stages']
    """
    half_m = config.block_m if kernel == "decode" else max(NARROWEST, config.block_m // 2)
    half_n = max(NARROWEST, config.block_n // 2)
    fewer = max(1, config.stages - 1)
    # In the pass over keys the rows of all products are keys: halved first, they would be too few for the newest instructions.
    halves = (replace(config, block_n=half_n), replace(config, block_m=half_m))
    tries = (
        replace(config, stages=fewer), *(reversed(halves) if kernel == "grad_kv" else halves),
        replace(config, block_m=half_m, block_n=half_n), replace(config, block_m=half_m, block_n=half_n, stages=1),
    )  # fmt: skip
    yield from (one for one in dict.fromkeys(tries) if one != config)


def settled(
    kernel: str, config: Config, target: Target, compiled: Callable[[Config], Compiled], needs: Callable[[Compiled], Resources]
) -> tuple[Config, Compiled]:
    """``config`` if its kernel fits and no loop is slowed by spills; else the first lighter one of which this is true; else of those that
    fit the one whose loops spill least; else ``config``. With what was compiled."""
    found = []
    for one in (config, *lighter(kernel, config)):
        made = compiled(one)
        problems = (bool(misfits(needs(made), target)), needs(made).local_share)
        if not problems[0] and not needs(made).slowed:
            return one, made
        found.append((problems, one, made))
    _, best, made = min(found, key=lambda entry: entry[0])
    return best, made
