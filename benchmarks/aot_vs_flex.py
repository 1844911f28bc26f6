"""Our Triton kernels against FlexAttention's by what their loops do, counted in machine code. No GPU needed.

    python benchmarks/aot_vs_flex.py                       # ten patterns, D 64 and 128, sm_90: half an hour on two cores, minutes again
    python benchmarks/aot_vs_flex.py --cases causal blocks --dims 64 --targets sm_80 sm_90
    python benchmarks/aot_vs_flex.py --picks               # also with the tiles that the cost model picks for each pattern

Both are compiled by the same Triton: FlexAttention's from the templates and default configs of the installed torch (``flex_templates.py``),
ours with the tiles of ``sd.build``. bfloat16, 32K tokens, 32 query and 8 key heads. Instructions of the loops are weighed by the tiles
that each kernel visits for the pattern. *serial* and *overlapped* are cycles of an SM where products and everything else wait for each
other, and where the shorter hides behind the longer (:mod:`sparsedsl.gpu.loop_cycles`): a kernel lies between them. Memory, latency
and launches are left out: these rank kernels, they predict no time. On sm_100 products are those of tensor memory, by the shapes that
their descriptors say (:mod:`sparsedsl.gpu.sass`). Ratios are FlexAttention's over ours: above 1, ours needs less.
Beside that: a decode step, and kernels along selected blocks (``aot_others.py``).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure
from aot_cases import CASES, HEADS, KV_HEADS, LENGTH
from aot_kernels import KERNELS, Counted, Ours, flex_kernels, our_kernel
from aot_others import DECODED, decode_records, selected_records
from tqdm import tqdm

from sparsedsl.gpu.configs import default_config, space
from sparsedsl.gpu.costs import ranked, work_of
from sparsedsl.gpu.loop_cycles import products_a_cycle
from sparsedsl.gpu.resources import misfits
from sparsedsl.gpu.settling import settled
from sparsedsl.gpu.targets import TARGETS

__all__ = ["main", "settled_kernel"]

NVIDIA = tuple(name for name, target in TARGETS.items() if target.backend == "cuda")
GROUPS = {"forward": ("forward",), "backward": ("grad_q", "grad_kv")}


def settled_kernel(ours: Ours, kernel: str, target: str) -> Counted:
    """Our kernel as ``sd.build`` has it: lighter than the default where a loop of that would spill."""
    default = default_config(kernel, ours.shape, TARGETS[target])
    return settled(
        kernel, default, TARGETS[target], lambda config: our_kernel(ours, kernel, target, config), lambda found: found.needs
    )[1]


def picked_kernel(ours: Ours, kernel: str, target: str) -> Counted:
    """Our kernel with the tiles that the cost model expects to be fastest for this pattern, of those whose loops do not spill."""
    by_key = kernel == "grad_kv"
    found = TARGETS[target]
    work = work_of(ours.lists((128, 128)))
    candidates = ranked(
        kernel, ours.shape, found, space(kernel, ours.shape, found, work), lambda block: ours.tiles_at(block, by_key)
    )
    for config in candidates[:4]:
        kernel_found = our_kernel(ours, kernel, target, config)
        if not misfits(kernel_found.needs, found) and not kernel_found.needs.slowed:
            return kernel_found
    return settled_kernel(ours, kernel, target)


def measure_case(name: str, head_dim: int, target: str, picks: bool) -> list[dict[str, Any]]:
    """A record a kernel and side."""
    flex = flex_kernels(CASES[name], head_dim, target)
    ours = Ours(CASES[name], head_dim)
    records = []
    for kernel in KERNELS:
        sides = {"flex": flex[kernel], "ours": settled_kernel(ours, kernel, target)}
        if picks:
            sides["picked"] = picked_kernel(ours, kernel, target)
        about = {"case": name, "target": target, "head_dim": head_dim, "kernel": kernel}
        records += [about | {"side": side} | found.record(target, head_dim) for side, found in sides.items()]
    return records


def measure_all(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The records of all cases, in order, by the part of the file they belong to; processes share the work."""
    places = [(target, dim) for target in options.targets for dim in options.dims]
    jobs: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("records", measure_case, (name, dim, target, options.picks)) for target, dim in places for name in options.cases
    ]
    jobs += [
        ("decode", decode_records, (name, dim, target)) for target, dim in places for name in DECODED if name in options.cases
    ]
    jobs += [("selected", selected_records, (dim, target)) for target, dim in places if not options.dense]
    found: dict[int, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(function, *words): number for number, (_, function, words) in enumerate(jobs)}
        try:
            for done in tqdm(as_completed(waiting), total=len(waiting), desc="cases", unit="case"):
                found[waiting[done]] = done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    parts: dict[str, list[dict[str, Any]]] = {"records": [], "decode": [], "selected": []}
    for number, (part, _, _) in enumerate(jobs):
        parts[part] += found[number]
    return parts


# ---- what is compared --------------------------------------------------------------------------------------


def ratios(
    records: Sequence[dict[str, Any]], case: str, target: str, dim: int, kernels: Iterable[str], side: str
) -> dict[str, float]:
    """FlexAttention's cycles and issue slots over ours, of these kernels together."""
    chosen = [r for r in records if (r["case"], r["target"], r["head_dim"]) == (case, target, dim) and r["kernel"] in kernels]

    def total(of: str, which: str) -> float:
        return float(sum(record[of] for record in chosen if record["side"] == which))

    return {of: total(of, "flex") / total(of, side) for of in ("serial", "overlapped", "issue_of_case")}


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals, for sm_90."""
    records = [record for record in records if record["target"] == "sm_90"]
    keys = list(dict.fromkeys((record["case"], record["head_dim"]) for record in records))
    found = []
    for group, kernels in GROUPS.items():
        for of in ("serial", "overlapped"):
            got = [ratios(records, case, "sm_90", dim, kernels, "ours")[of] for case, dim in keys]
            if got:
                found.append(measure.target(f"{group}, {of}: lowest ratio", min(got), at_least=1.0))
                found.append(measure.target(f"{group}, {of}: geometric mean", measure.geometric_mean(got), at_least=1.15))
    for record in records:
        if (record["case"], record["kernel"], record["side"]) == ("causal", "forward", "ours"):
            dim, full = record["head_dim"], record["loops"]["full"]
            products = 2 * dim * 128**2 / products_a_cycle(TARGETS["sm_90"])
            if dim == 128:
                found.append(
                    measure.target("causal forward D 128: serial over the tensor core's", full["serial"] / products, at_most=1.45)
                )
            else:
                best = max(products, 128**2 / 16)
                found.append(
                    measure.target(f"causal forward D {dim}: serial over what is longest", full["serial"] / best, at_most=1.6)
                )
    return found


def table(records: list[dict[str, Any]], target: str, side: str = "ours") -> str:
    """A row a case: ratios ``serial ... overlapped (issue slots)`` of each kernel and head dimension."""
    chosen = [record for record in records if record["target"] == target]
    dims = list(dict.fromkeys(record["head_dim"] for record in chosen))
    rows = []
    for case in dict.fromkeys(record["case"] for record in chosen):
        row = [case]
        for dim in dims:
            for kernel in KERNELS:
                got = ratios(chosen, case, target, dim, (kernel,), side)
                row.append(f"{got['serial']:.2f} ... {got['overlapped']:.2f} ({got['issue_of_case']:.2f})")
        rows.append(row)
    names = {"forward": "forward", "grad_q": "dQ", "grad_kv": "dK, dV"}
    return measure.markdown([f"{target}, {side}", *(f"{names[kernel]} D {dim}" for dim in dims for kernel in KERNELS)], rows)


def decode_table(records: list[dict[str, Any]]) -> str:
    """A row a case: keys read over keys seen, and instructions for each 1,024 keys."""
    rows = []
    for mine, other in zip(records[::2], records[1::2], strict=True):
        row = [f"{mine['target']} D {mine['head_dim']}", mine["case"], f"{mine['keys_seen']:.0f}"]
        row += [f"{side['keys_read'] / side['keys_seen']:.2f}, {side['issue']:,}" for side in (mine, other)]
        rows.append(row)
    header = ["a decode step", "pattern", "keys seen", "ours: keys read / seen, instructions", "flex"]
    return measure.markdown(header, rows)


def selected_table(records: list[dict[str, Any]]) -> str:
    """A row a kernel: cycles for as many pairs of a tile over those of a dense tile of ours."""
    rows = []
    for one in records:
        row = [
            f"{one['target']} D {one['head_dim']}",
            one["kernel"],
            f"{one['pack']} heads{', weighted' * one['weighted']}",
            one["config"],
        ]
        row += [f"{one[of] / one[f'dense_{of}']:.2f}" for of in ("serial", "overlapped")]
        rows.append([*row, str(one["executed_over_useful"]), str(one["exponentials_per_pair"])])
    header = [
        "along 64-key blocks",
        "kernel",
        "side by side",
        "tile",
        "serial / dense",
        "overlapped / dense",
        "executed / useful",
        "EX2 / pair",
    ]
    return measure.markdown(header, rows)


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with everything that is not given filled in."""
    parser = argparse.ArgumentParser(description="Our kernels against FlexAttention's, by instructions.")
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=f"default: all; {', '.join(CASES)}")
    add("--targets", nargs="+", choices=NVIDIA, default=["sm_90"], help="default: sm_90")
    add("--dims", nargs="+", type=int, default=[64, 128], metavar="D", help="head dimensions (default 64 128)")
    add("--dense", action="store_true", help="no kernels along selected blocks")
    add("--picks", action="store_true", help="also with the tiles that the cost model picks")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/aot_vs_flex.json)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Compile, count, write the results, print the tables and how the goals were met; 0 however they were met."""
    import torch
    import triton

    options = options_from(arguments)
    parts = measure_all(options)
    records = parts["records"]
    facts = {"torch": torch.__version__, "triton": triton.__version__, "commit": measure.machine()["commit"]}
    settings = {
        "cases": options.cases,
        "targets": options.targets,
        "dims": options.dims,
        "tokens": LENGTH,
        "heads": [HEADS, KV_HEADS],
    }
    path = options.out or measure.RESULTS / "aot_vs_flex.json"
    targets = checks(records)
    # The numbers are those of the compiler, so the file is not named by the machine.
    measure.write_json(path, {"benchmark": "aot_vs_flex", "machine": facts, "settings": settings, **parts, "targets": targets})
    for target in options.targets:
        print(table(records, target), "\n")
        if options.picks:
            print(table(records, target, "picked"), "\n")
    for text, part in ((decode_table, "decode"), (selected_table, "selected")):
        if parts[part]:
            print(text(parts[part]), "\n")
    print(measure.verdicts(targets))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
