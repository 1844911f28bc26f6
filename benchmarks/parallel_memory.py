"""Memory of each rank in one call with ``cp=``, by length and number of ranks, beside what the plan says is sent and held.

    python benchmarks/parallel_memory.py                           # 32K and 128K tokens on 1, 2 and 4 ranks of this machine, minutes
    python benchmarks/parallel_memory.py --lengths 8192 --worlds 2

Ranks are processes on gloo. *peak* is the growth of the resident memory at its highest during one call, results included, of the rank that
takes the most, after a short call; *keys* are the keys and values that its queries see, own ones included, and *sent* those that come from
others, both as the plan counts them (``plan.bytes``); *all* are the keys and values of the whole, which an all-gather would hold. 8 heads
of queries on 2 of keys, 64 wide, float32. One rank is a call without ``cp=``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from measure import bytes_text, length_text
from torch.multiprocessing import get_context
from tqdm import tqdm

import sparsedsl as sd

HEADS, KV_HEADS, WIDTH = 8, 2, 64
PATTERNS: dict[str, Any] = {
    "causal": sd.patterns.causal(),
    "window": sd.patterns.sliding_window(1024),
    "moba": sd.patterns.moba(chunk=512, top_k=3),
    "retnet": sd.patterns.retnet(HEADS),
}
WARM = 4096  # tokens of the call before: libraries loaded, threads started


def drawn(plan: sd.parallel.TokenPlan, rank: int) -> list[torch.Tensor]:
    """q, k and v of a rank's rows, the gradient of its output, and nothing of others."""
    rows = plan.rows(rank).numel()
    return [torch.randn(1, heads, rows, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def call(attn: Any, cp: Any, tensors: list[torch.Tensor], train: bool) -> Any:
    """One call, with gradients where it trains."""
    *qkv, grad_out = tensors
    with torch.set_grad_enabled(train):
        leaves = [x.detach().requires_grad_(train) for x in qkv]
        out = attn(*leaves, cp=cp)
        return out, torch.autograd.grad(out, leaves, grad_out) if train else ()


def ranked(rank: int, world: int, folder: str, name: str, length: int, told: Any) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    attn = sd.compile(PATTERNS[name], backend="tiled")
    found: dict[str, Any] = {"rank": rank}
    for train in (False, True):
        for tokens in (min(WARM, length), length):
            plan = sd.parallel.plan({name: PATTERNS[name]}, tokens, world, chunk=512)
            cp = None if world == 1 else plan.on(dist.group.WORLD, name)
            tensors = drawn(plan, rank)
            dist.barrier()
            peak = measure.peak_bytes(functools.partial(call, attn, cp, tensors, train))
        found["train" if train else "forward"] = peak
        had = plan.keys(rank, name) if cp is None else cp.last_keys
        found["keys"] = had.numel()
        found["came"] = int((~torch.isin(had, plan.rows(rank))).sum())
    told.put(found)
    dist.destroy_process_group()


def measured(name: str, length: int, world: int) -> dict[str, Any]:
    """One length on so many ranks: of each number that of the rank which takes the most."""
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        told = context.SimpleQueue()
        ranks = [context.Process(target=ranked, args=(rank, world, folder, name, length, told)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{name}, {length} tokens on {world} ranks: a rank failed")
    each = [told.get() for _ in ranks]
    row = KV_HEADS * 2 * WIDTH * 4
    plan = sd.parallel.plan({name: PATTERNS[name]}, length, world, chunk=512)
    record: dict[str, Any] = {"pattern": name, "tokens": length, "world": world, "all": length * row}
    record |= {what: max(one[what] for one in each) for what in ("forward", "train")}
    record |= {"keys": row * max(one["keys"] for one in each), "came": row * max(one["came"] for one in each)}
    record["planned"] = plan.bytes(name, kv_heads=KV_HEADS, head_dim=WIDTH, itemsize=4)
    record["results"] = 4 * HEADS * WIDTH * -(-length // world)
    return record


def table(records: list[dict[str, Any]]) -> str:
    """The Markdown table."""
    names = ("forward", "train", "keys", "came", "planned", "all")
    rows = [
        [one["pattern"], length_text(one["tokens"]), str(one["world"]), *(bytes_text(one[name]) for name in names)]
        for one in records
    ]
    header = ["pattern", "tokens", "ranks", "peak, forward", "peak, gradients", "keys", "sent", "sent in any case", "all"]
    return measure.markdown(header, rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write what was found, print it."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--patterns", nargs="+", choices=tuple(PATTERNS), default=list(PATTERNS), help="default: all")
    add("--lengths", nargs="+", type=int, default=[1 << 15, 1 << 17], help="tokens (default: 32K and 128K)")
    add("--worlds", nargs="+", type=int, default=[1, 2, 4], help="default: 1, 2 and 4")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/parallel_memory_<machine>.json)")
    options = parser.parse_args(arguments)
    facts = measure.machine()
    cases = [(name, length, world) for name in options.patterns for length in options.lengths for world in options.worlds]
    records = [measured(*case) for case in tqdm(cases, desc="ranks", unit="case")]
    # Static patterns are sent what the plan says, to a key.
    targets = [
        measure.target(f"{one['pattern']}, {one['tokens']}, {one['world']} ranks: sent", one["came"], at_most=one["planned"])
        for one in records
        if one["pattern"] != "moba"
    ]
    facts["load_average_end"] = measure.load()
    path = options.out or measure.result_path("parallel_memory", facts)
    settings = {key: getattr(options, key) for key in ("patterns", "lengths", "worlds")}
    content = {"benchmark": "parallel_memory", "machine": facts, "settings": settings}
    measure.write_json(path, content | {"records": records, "targets": targets})
    print(f"Memory of the rank that takes the most. {measure.describe(facts)}\n\n{table(records)}\n\n{measure.verdicts(targets)}")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
