"""Ahead-of-time builds of every pattern of the library: do the kernels fit, do they spill, do they use matrix instructions? No GPU needed.

    python benchmarks/aot_resources.py               # everything, an hour and a half on two cores
    python benchmarks/aot_resources.py --targets sm_90 --dims 128 --keep      # a part of it, ten minutes; the rest of the file stays
    python benchmarks/aot_resources.py --quick       # six cases, sm_90 and gfx942, D 64: two minutes

Every pattern is built (``sd.build``) for every target and head dimension with the tiles that it chooses, in bf16. Nothing here is a time
of a kernel: the numbers are read from the binaries, and do not depend on the machine. *kernels* counts all that are built; *spill* those
with a loop of whose instructions more than 3 % read or write spilled registers; *without matrix* those that multiply matrices without
an instruction for it; *not launchable* those that need more of something than a block can have; *best matrix* the share of forward and
backward kernels with products that use the newest instruction of the target (warp groups on sm_90, tensor memory on sm_100). Decode tiles
have as few rows as a group has heads, too few for a warp group.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure
from tqdm import tqdm

import sparsedsl as sd
from sparsedsl.gpu.configs import default_config
from sparsedsl.gpu.estimates import has_descriptors
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.gpu.resources import MOST_LOCAL
from sparsedsl.gpu.targets import TARGETS

P = sd.patterns
HEAD_DIMS = (64, 128)
QUICK = ("causal", "causal through descriptors", "sliding_window", "packed", "blocks", "relative_bias")

# Every public name of the library that is an attention pattern, and forms of it that make other kernels.
PATTERNS: dict[str, Callable[[], Any]] = {
    "alibi": lambda: sd.attend(P.causal(), score=P.alibi(8)),
    "alibi of a table": lambda: sd.attend(P.causal(), score=P.alibi()),
    "alibi_window": lambda: P.alibi_window(16, 256),
    "bigbird": lambda: P.bigbird(),
    "block_causal": lambda: P.block_causal(16),
    "block_diffusion": lambda: P.block_diffusion(16),
    "blocks": lambda: P.blocks(),
    "causal": lambda: P.causal(),
    "causal through descriptors": lambda: P.causal(),
    "chunked": lambda: P.causal() & P.chunked(8192),
    "dilated": lambda: P.dilated(64, 4),
    "document_prefix": lambda: P.document_prefix(),
    "documents": lambda: P.documents(),
    "duo_attention": lambda: P.duo_attention(),
    # Of 32 units, as published, a gradient kernel has 120,000 lines of PTX, on which NVIDIA's assembler works for minutes.
    "fire": lambda: sd.attend(P.causal(), score=P.fire()),
    "fox": lambda: sd.attend(P.causal(), score=P.fox()),
    "full": lambda: P.full(),
    "gemma2": lambda: P.gemma2(0),
    "gemma3": lambda: P.gemma3(0),
    "global_tokens": lambda: P.global_tokens(4),
    "gpt_oss": lambda: P.gpt_oss(0),
    "hstu": lambda: P.hstu(P.causal(), 4096),
    "kerple": lambda: sd.attend(P.causal(), score=P.kerple()),
    "llama4": lambda: P.llama4(0),
    "longformer": lambda: P.longformer(),
    "mistral": lambda: P.mistral(),
    "mla": lambda: P.mla(),
    "neighbourhood_2d": lambda: P.neighbourhood_2d(32, 48, (7, 5)),
    "neighbourhood_2d of tiles": lambda: P.neighbourhood_2d(32, 48, 7, order="tiled", tile=(8, 8)),
    "neighbourhood_3d": lambda: P.neighbourhood_3d(8, 16, 16, (3, 5, 5), causal=(True, False, False)),
    "packed": lambda: P.packed(),
    "packed, window": lambda: P.packed(1024),
    "prefix": lambda: P.prefix(128),
    "random_blocks": lambda: P.random_blocks(64, 2, seed=0),
    "relative_bias": lambda: sd.attend(P.causal(), score=P.relative_bias(64)),
    "relu_squared": lambda: P.relu_squared(P.causal()),
    "retained": lambda: P.causal() & P.retained(1024, 128),
    "shared_prefix": lambda: P.shared_prefix(),
    "sigmoid": lambda: P.sigmoid(P.causal(), 4096),
    "sinks": lambda: P.causal() & (P.sliding_window(1024) | P.sinks(4)),
    "sliding_tile": lambda: P.sliding_tile((8, 16, 16), (4, 8, 8), (4, 4, 4)),
    "sliding_window": lambda: P.sliding_window(1024),
    "sliding_window by head": lambda: P.sliding_window(sd.table("window")[sd.h]),
    "softcap": lambda: sd.attend(P.causal(), score=P.softcap(50)),
    "softpick": lambda: P.softpick(P.causal()),
    "ssmax": lambda: sd.attend(P.causal(), score=P.ssmax()),
    "streaming_llm": lambda: P.streaming_llm(),
    "stick_breaking": lambda: P.stick_breaking(),
    "strided": lambda: P.strided(64),
    "strided_fixed": lambda: P.strided_fixed(64, summary=4),
    "t5": lambda: P.t5(decoder=True),
    "t5_bias": lambda: sd.attend(P.full(), score=P.t5_bias()),
    "tree": lambda: P.tree(),
}
# Kernels that can read K and V through tensor descriptors, in the cases whose name says so, where the target has them.
WITH_DESCRIPTORS = ("forward", "decode", "grad_q")
# Ingredients: an index or a slope, not a pattern; programs, whose kernels
# test_selected_build.py and test_scan_build.py build; and what no kernel runs.
NO_PATTERNS = {"alibi_slope", "grid_position", "t5_bucket"} | {
    "based", "csa", "delta_net", "dsa", "gated_delta", "gla", "hca", "hisa", "hsa", "infllm_v2", "kda", "minference", "moba", "nha", "nsa",
    "nsa_published", "pbs", "qsa", "ring_linear", "ssd", "token_sparse", "differential", "h2o", "hils", "hsa_ultralong",
    "landmark", "lightning", "mosa", "quest", "retnet", "rwkv6", "rwkv7", "seer_attention", "snapkv", "vsa", "xattention", "flexprefill",
}  # fmt: skip


def build_one(name: str, target: str, head_dim: int) -> dict[str, Any]:
    """The record of one pattern: every kernel with what it takes, or why it cannot be built."""
    record: dict[str, Any] = {"pattern": name, "target": target, "head_dim": head_dim, "kernels": {}, "problems": []}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aot-resources-") as cache:  # hundreds of MiB over a whole run, if kept
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            configs = descriptor_configs(target, head_dim) if name.endswith("descriptors") else None
            built = sd.build(PATTERNS[name](), target, "bfloat16", head_dim, configs=configs, remarks=target == "sm_90")
        except sd.UnsupportedError as error:
            return record | {"error": str(error), "seconds": time.perf_counter() - start}
    for kernel_name, kernel in built.kernels.items():
        found = kernel.resources.to_json() | {"config": str(kernel.config), "limit": kernel.occupancy.limit}
        record["kernels"][kernel_name] = found | {"blocks": kernel.occupancy.blocks, "occupancy": kernel.occupancy.share}
    return record | {"problems": built.problems, "error": None, "seconds": time.perf_counter() - start}


def descriptor_configs(target: str, head_dim: int) -> dict[str, Any]:
    """The default tiles, read through descriptors; none where the target has no descriptors."""
    shape = Shape("bfloat16", head_dim, head_dim)
    if not has_descriptors(shape, TARGETS[target]):
        return {}
    return {
        kernel: dataclasses.replace(default_config(kernel, shape, TARGETS[target]), descriptors=True)
        for kernel in WITH_DESCRIPTORS
    }


def build_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record a pattern, target and head dimension, in this order; processes share the work."""
    cases = [(name, target, dim) for name in options.patterns for target in options.targets for dim in options.dims]
    found = {}
    # Spawned, not forked: torch and LLVM keep threads.
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(build_one, *case): case for case in cases}
        try:
            for done in tqdm(as_completed(waiting), total=len(waiting), desc="builds", unit="build"):
                found[waiting[done]] = done.result()
        finally:  # after an error or Ctrl-C, do not build the rest first
            pool.shutdown(wait=False, cancel_futures=True)
    return [found[case] for case in cases]


# ---- what is counted ---------------------------------------------------------------------------------------


def kernels_of(records: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Every kernel with its record and name."""
    for record in records:
        for name, kernel in record["kernels"].items():
            yield record, name, kernel


def lacks_matrix(kernel: dict[str, Any]) -> bool:
    """Whether it multiplies without a matrix instruction."""
    return kernel["products"] > 0 and not kernel["instructions"]


def uses_best(record: dict[str, Any], kernel: dict[str, Any]) -> bool:
    """Whether its products run on the newest matrix instruction that the target has."""
    return TARGETS[record["target"]].matrix[0] in kernel["instructions"]


def counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the summary table and the targets say of these records."""
    kernels = list(kernels_of(records))
    wide = [(record, kernel) for record, name, kernel in kernels if kernel["products"] and name != "decode"]
    return {
        "builds": len(records), "failed": sum(record["error"] is not None for record in records), "kernels": len(kernels),
        "spill": sum(kernel["local_share"] > MOST_LOCAL for _, _, kernel in kernels),
        "most_spilled_bytes": max((kernel["spills"] for _, _, kernel in kernels), default=0),
        "without_matrix": sum(lacks_matrix(kernel) for _, _, kernel in kernels),
        "not_launchable": sum(kernel["blocks"] == 0 for _, _, kernel in kernels),
        "best_matrix": sum(uses_best(record, kernel) for record, kernel in wide) / max(1, len(wide)),
    }  # fmt: skip


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals: all is built, fits, spills in no loop, and multiplies on matrix instructions."""
    everything = counts(records)
    found = [
        measure.target("patterns that cannot be built", everything["failed"], at_most=0),
        measure.target("kernels that spill registers in a loop", everything["spill"], at_most=0),
        measure.target("kernels that cannot be launched", everything["not_launchable"], at_most=0),
        measure.target("kernels that multiply without matrix instructions", everything["without_matrix"], at_most=0),
    ]
    hopper = [record for record in records if record["target"] == "sm_90"]
    if hopper:
        share = counts(hopper)["best_matrix"]
        found.append(measure.target("share of kernels with warp-group instructions on sm_90", share, at_least=1.0))
    return found


# ---- text --------------------------------------------------------------------------------------------------


def summary(records: list[dict[str, Any]]) -> str:
    """One row a target and head dimension."""
    header = [
        "target",
        "D",
        "builds",
        "failed",
        "kernels",
        "spill",
        "most bytes",
        "not launchable",
        "without matrix",
        "best matrix",
    ]
    rows = []
    for target, dim in dict.fromkeys((record["target"], record["head_dim"]) for record in records):
        found = counts([record for record in records if (record["target"], record["head_dim"]) == (target, dim)])
        names = ("builds", "failed", "kernels", "spill", "most_spilled_bytes", "not_launchable", "without_matrix")
        rows.append([target, str(dim), *(str(found[name]) for name in names), f"{found['best_matrix']:.0%}"])
    return measure.markdown(header, rows)


def by_kernel(records: list[dict[str, Any]]) -> str:
    """One row a kernel, target and head dimension: tiles, and the range over all patterns of what is taken."""
    header = ["kernel", "target", "D", "tile", "registers", "shared KiB", "blocks/SM", "limited by", "matrix"]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record, name, kernel in kernels_of(records):
        groups.setdefault((name.rstrip("_0123456789"), record["target"], record["head_dim"]), []).append(kernel)
    rows = []
    for (name, target, dim), kernels in sorted(groups.items()):
        row = [name, target, str(dim), "; ".join(dict.fromkeys(kernel["config"] for kernel in kernels))]
        row += [_range(kernel["registers"] for kernel in kernels), _range(kernel["shared_bytes"] // 1024 for kernel in kernels)]
        row += [_range(kernel["blocks"] for kernel in kernels), ", ".join(dict.fromkeys(kernel["limit"] for kernel in kernels))]
        rows.append([*row, ", ".join(dict.fromkeys(name for kernel in kernels for name in kernel["instructions"])) or "-"])
    return measure.markdown(header, rows)


def _range(values: Iterator[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def flags(records: list[dict[str, Any]]) -> str:
    """A line for everything that went wrong, and what was said about it."""
    lines = []
    for record in records:
        where = f"{record['pattern']}, {record['target']}, D {record['head_dim']}"
        if record["error"]:
            lines.append(f"- {where}: cannot be built: {record['error']}")
        lines += [f"- {where}: {problem}" for problem in record["problems"]]
        for name, kernel in record["kernels"].items():
            if kernel["products"] and name != "decode" and not uses_best(record, kernel):
                lines.append(
                    f"- {where}: {name}: {', '.join(kernel['instructions']) or 'none'}, not {TARGETS[record['target']].matrix[0]}"
                )
    return "\n".join(lines) or "Nothing to report."


# ---- from the command line ---------------------------------------------------------------------------------


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with everything that is not given filled in."""
    parser = argparse.ArgumentParser(description="What generated kernels take of a GPU, by pattern and target.")
    add = parser.add_argument
    add("--quick", action="store_true", help="six cases, sm_90 and gfx942, D 64")
    add("--patterns", nargs="+", choices=PATTERNS, metavar="NAME", help=f"default: all; {', '.join(PATTERNS)}")
    add("--targets", nargs="+", choices=TARGETS, help="default: all")
    add("--dims", nargs="+", type=int, metavar="D", help=f"head dimensions (default {', '.join(map(str, HEAD_DIMS))})")
    add("--keep", action="store_true", help="what the file has of other patterns, targets and widths stays, with its commit")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/aot_resources.json)")
    options = parser.parse_args(arguments)
    options.patterns = options.patterns or (QUICK if options.quick else tuple(PATTERNS))
    options.targets = options.targets or (("sm_90", "gfx942") if options.quick else tuple(TARGETS))
    options.dims = options.dims or ((64,) if options.quick else HEAD_DIMS)
    return options


def kept(path: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a file that these do not replace, and these; by target and head dimension, in the order of the script."""
    old = json.loads(path.read_text())["records"] if path.exists() else []
    found = {(one["target"], one["head_dim"], one["pattern"]): one for one in (*old, *records)}
    targets, patterns = list(TARGETS), list(PATTERNS)
    places = sorted(
        (patterns.index(name), targets.index(target), dim)
        for target, dim, name in found
        if name in patterns and target in targets
    )
    return [found[targets[target], dim, patterns[name]] for name, target, dim in places]


def main(arguments: list[str] | None = None) -> int:
    """Build, write the results, print the tables and how the targets were met; 0 however they were met."""
    options = options_from(arguments)
    facts = measure.machine()
    records = [record | {"commit": facts["commit"]} for record in build_all(options)]
    import triton

    facts |= {"triton": triton.__version__, "load_average_end": measure.load()}
    # The numbers are those of the compiler, so the file is not named by the machine.
    path = options.out or measure.RESULTS / "aot_resources.json"
    if options.keep:
        records = kept(path, records)
    targets = checks(records)
    settings: dict[str, Any] = {"quick": options.quick}
    for key, of in (("patterns", "pattern"), ("targets", "target"), ("dims", "head_dim")):
        settings[key] = list(dict.fromkeys(record[of] for record in records))
    content = {"benchmark": "aot_resources", "machine": facts, "settings": settings}
    measure.write_json(path, content | {"records": records, "targets": targets})
    print(f"Ahead-of-time builds, bf16, Triton {facts['triton']}. {measure.describe(facts)}\n")
    print(summary(records), by_kernel(records), flags(records), measure.verdicts(targets), sep="\n\n")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
