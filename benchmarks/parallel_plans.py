"""Plans for many devices: how even they are and what they send, by pattern, world size and way of placing tokens.

    python benchmarks/parallel_plans.py                      # 1M tokens on 8 and 64 ranks, a minute or two
    python benchmarks/parallel_plans.py --tokens 16777216 --chunk 16384

For each way: *imbalance*, most / mean pairs of a rank, and *received*, the keys that the rank which gets the most is sent, over those that
a ring sends it. *first* is the plan with nothing remembered (imports are done, the pattern is declared), *again* the plan made once more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measure
import torch
from measure import length_text, time_text
from tqdm import tqdm

import sparsedsl as sd
from sparsedsl import h, kv_idx, patterns, q_idx

WAYS = ("contiguous", "zigzag", "longest_first runs of 1")
# Seconds of a plan: at 1M tokens, of block-sparse masks, at 16M.
LIMIT_S, SPARSE_LIMIT_S, LONG_LIMIT_S = 2.0, 4.0, 30.0
# How far a plan may lie above the best column, in imbalance and in bytes.
NEAR = 1.05


def skewed_documents(length: int) -> torch.Tensor:
    """Document of each token, int32: a few long ones among many short ones, the same for every run, by a Pareto law of exponent 1.1."""
    generator = torch.Generator().manual_seed(0)
    sizes = (length / 256 * torch.rand(4096, generator=generator, dtype=torch.float64).pow(-1 / 1.1)).long().clamp(1, length // 3)
    return torch.bucketize(torch.arange(length), sizes.cumsum(0), right=True).to(torch.int32)


def block_table(length: int) -> torch.Tensor:
    """Which pairs of blocks of 1,024 attend, bool: 5 % at random, and the diagonal."""
    blocks = -(-length // 1024)
    generator = torch.Generator().manual_seed(0)
    return (torch.rand((blocks, blocks), generator=generator) < 0.05) | torch.eye(blocks, dtype=torch.bool)


def head_windows(length: int) -> torch.Tensor:
    """Windows of eight heads, each twice the one before; 1K to 128K at a million tokens."""
    return (length >> torch.arange(10, 2, -1)).clamp(min=1)


DOC, KEEP, WINDOW = sd.table("doc", monotone=True), sd.table("keep", dtype=bool), sd.table("window")
CAUSAL = patterns.causal()
CASES: Mapping[str, tuple[Any, Callable[[int], dict[str, torch.Tensor]]]] = {
    "causal": (CAUSAL, lambda length: {}),
    "window": (CAUSAL & (q_idx - kv_idx < 4096), lambda length: {}),
    "documents": (CAUSAL & (DOC[q_idx] == DOC[kv_idx]), lambda length: {"doc": skewed_documents(length)}),
    "per_head": (CAUSAL & (q_idx - kv_idx < WINDOW[h]), lambda length: {"window": head_windows(length)}),
    "block_sparse": (CAUSAL & KEEP[q_idx // 1024, kv_idx // 1024], lambda length: {"keep": block_table(length)}),
}


def measured(name: str, world: int, options: argparse.Namespace) -> dict[str, Any]:
    """One plan."""
    mask, tables_of = CASES[name]
    tables: dict[str, Any] = dict(tables_of(options.tokens))

    def make() -> Any:
        return sd.parallel.plan(mask, options.tokens, world, chunk=options.chunk, granule=options.granule, **tables)

    sd.clear_caches()
    first = measure.seconds(make)
    again = [measure.seconds(make) for _ in range(options.rounds)]
    plan = make()
    ring = max(1, options.tokens - options.tokens // world)
    told = {way: {"imbalance": uneven, "received": keys / ring} for way, (uneven, keys) in plan.tried.items()}
    planned = {"method": plan.method, "imbalance": plan.imbalance, "received": plan.received / ring}
    record = {"pattern": name, "world": world, "tokens": options.tokens, "chunk": plan.chunk, "granule": plan.granule}
    record |= {"first_s": first, "again_s": measure.median(again), "plan": planned, "ways": told}
    return record | {"load_average": measure.load()}


def checks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every plan beside the best column, in each of the two numbers by itself, and how long it took beside the limit."""
    found = []
    for record in records:
        about = {"pattern": record["pattern"], "world": record["world"]}
        columns = [record["ways"][way] for way in WAYS]
        for what in ("imbalance", "received"):
            limit = NEAR * min(column[what] for column in columns)
            found.append(
                about | {"what": what, "got": record["plan"][what], "limit": limit, "pass": record["plan"][what] <= limit}
            )
        if record["tokens"] in (1 << 20, 1 << 24):
            at_1m = SPARSE_LIMIT_S if record["pattern"] == "block_sparse" else LIMIT_S
            limit = at_1m if record["tokens"] == 1 << 20 else LONG_LIMIT_S
            found.append(about | {"what": "seconds", "got": record["first_s"], "limit": limit, "pass": record["first_s"] < limit})
    return found


def table(records: list[dict[str, Any]]) -> str:
    """The Markdown table: imbalance / received, of every way and of the plan."""
    rows = []
    for record in records:
        cells = [
            f"{one['imbalance']:.2f} / {one['received']:.3g}" for one in (*(record["ways"][way] for way in WAYS), record["plan"])
        ]
        rows.append([record["pattern"], str(record["world"]), *cells, record["plan"]["method"], time_text(record["first_s"])])
    return measure.markdown(["pattern", "ranks", "contiguous", "zigzag", "longest first", "plan", "how", "first"], rows)


def main(arguments: list[str] | None = None) -> int:
    """Make the plans, write what was found, print it."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--patterns", nargs="+", choices=tuple(CASES), default=list(CASES), help="default: all")
    add("--tokens", type=int, default=1 << 20, help="default: a million")
    add("--worlds", nargs="+", type=int, default=[8, 64], help="default: 8 and 64")
    add("--chunk", type=int, default=2048, help="tokens that stay together (default 2048)")
    add("--granule", type=int, default=128, help="keys that are sent together (default 128)")
    add("--rounds", type=int, default=3, help="repetitions behind each median (default 3)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/parallel_plans_<machine>.json)")
    options = parser.parse_args(arguments)
    facts = measure.machine()
    cases = [(name, world) for name in options.patterns for world in options.worlds]
    records = [measured(name, world, options) for name, world in tqdm(cases, desc="plans", unit="plan")]
    targets = checks(records)
    facts["load_average_end"] = measure.load()
    path = options.out or measure.result_path("parallel_plans", facts)
    settings = {key: getattr(options, key) for key in ("tokens", "worlds", "chunk", "granule", "rounds")}
    content = {"benchmark": "parallel_plans", "machine": facts, "settings": settings}
    measure.write_json(path, content | {"records": records, "targets": targets})
    print(f"Plans for {length_text(options.tokens)} tokens: imbalance / received over a ring's. {measure.describe(facts)}\n")
    print(table(records))
    print()
    for target in targets:
        verdict = "pass" if target["pass"] else "MISS"
        where = f"{target['pattern']} on {target['world']} ranks, {target['what']}"
        print(f"{verdict}: {where}: {target['got']:.3g}, limit {target['limit']:.3g}")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
