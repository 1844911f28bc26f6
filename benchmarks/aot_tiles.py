"""Which tiles of our kernels are the best by what their loops do, for a GPU that need not be there: what the default tables come from.

    python benchmarks/aot_tiles.py --targets sm_100                        # every tile of the search space: an hour on two cores
    python benchmarks/aot_tiles.py --targets gfx942 --dims 128 --kernels grad_kv --stages 1

Causal attention as in ``aot_vs_flex.py``, compiled ahead of time and counted. Tiles are ranked by the mean of *serial* and *overlapped*
cycles of an SM (:mod:`sparsedsl.gpu.loop_cycles`), with tiles of the diagonal in their share. Left out: what does not fit, what spills in
a loop, and what would wait for the second-level cache longer than it computes. The table that ``sd.build`` takes is marked.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import measure
from aot_cases import CASES
from aot_kernels import KERNELS, Ours, our_kernel
from tqdm import tqdm

import sparsedsl as sd
from sparsedsl.gpu.configs import Config, default_config, space
from sparsedsl.gpu.costs import cache_bytes_a_cycle, loaded_bytes
from sparsedsl.gpu.resources import misfits, occupancy
from sparsedsl.gpu.targets import TARGETS

__all__ = ["Candidate", "best_first", "main"]


@dataclass(frozen=True)
class Candidate:
    """One compiled tile: cycles of an SM for the case, what keeps it out (empty: nothing), what it takes, and whether it is the default."""

    config: str
    serial: float
    overlapped: float
    refused: str
    registers: int
    blocks: int
    is_default: bool


def best_first(found: list[Candidate]) -> list[Candidate]:
    """Those that may run, the fewest cycles first; then those that are refused."""
    return sorted(found, key=lambda one: (bool(one.refused), one.serial + one.overlapped))


def candidate(kernel: str, target: str, head_dim: int, config: Config) -> Candidate:
    """Compile and count one tile."""
    ours, about = Ours(CASES["causal"], head_dim), TARGETS[target]
    is_default = config == default_config(kernel, ours.shape, about)
    try:
        counted = our_kernel(ours, kernel, target, config)
    except (sd.UnsupportedError, RuntimeError) as error:
        return Candidate(str(config), 0.0, 0.0, str(error)[:60], 0, 0, is_default)
    needs, found = counted.needs, counted.record(target, head_dim)
    waited = loaded_bytes(kernel, ours.shape, config) / cache_bytes_a_cycle(about) * sum(counted.tiles.values())
    refused = next(iter(misfits(needs, about)), "")
    refused = refused or (f"{needs.local_share:.0%} of a loop reads or writes spills" if needs.slowed else "")
    refused = refused or ("waits for its loads" if waited > found["serial"] else "")
    blocks = occupancy(needs, about).blocks
    return Candidate(str(config), found["serial"], found["overlapped"], refused, needs.registers, blocks, is_default)


def table(title: str, found: list[Candidate], most: int) -> str:
    """The best ``most`` and the default; cycles over those of the best."""
    ranked = best_first(found)
    best = ranked[0].serial + ranked[0].overlapped
    rows = []
    for place, one in enumerate(ranked):
        if place < most or one.is_default:
            share = f"{(one.serial + one.overlapped) / best:.3f}"
            cells = [f"{one.config}{' (default)' * one.is_default}", share, f"{one.serial:.3g}", f"{one.overlapped:.3g}"]
            rows.append([*cells, str(one.registers), str(one.blocks), one.refused])
    return measure.markdown([title, "cycles / best", "serial", "overlapped", "registers", "blocks/SM", "left out"], rows)


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with everything that is not given filled in."""
    parser = argparse.ArgumentParser(description="Our tiles, ranked by what their loops do.")
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=["sm_90"], help="default: sm_90")
    add("--dims", nargs="+", type=int, default=[64, 128], metavar="D", help="head dimensions (default 64 128)")
    add("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all that have products")
    add("--stages", nargs="+", type=int, metavar="N", help="pipeline stages, beside the default tile (default: all)")
    add("--most", type=int, default=6, metavar="N", help="rows of a table (default 6)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compile, count, and print a table for each kernel, target and head dimension."""
    options = options_from(arguments)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for target in options.targets:
            for dim in options.dims:
                shape = Ours(CASES["causal"], dim).shape
                for kernel in options.kernels:
                    default = default_config(kernel, shape, TARGETS[target])
                    configs = [
                        config
                        for config in space(kernel, shape, TARGETS[target])
                        if config == default or not options.stages or config.stages in options.stages
                    ]
                    title = f"{kernel}, {target} D {dim}"
                    waiting = [pool.submit(candidate, kernel, target, dim, config) for config in configs]
                    found = [one.result() for one in tqdm(waiting, desc=title, unit="tile")]
                    print(table(title, found, options.most), "\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
