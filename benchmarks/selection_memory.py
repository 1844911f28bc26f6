"""Choosing the best chunks of each token: time, and memory over inputs and outputs.

    python benchmarks/selection_memory.py                      # top-16 of 16,384 chunks for 64K queries, and gradients
    python benchmarks/selection_memory.py --queries 4096 --chunks 1024 --every

One head, head_dim 64, float32, one thread, in a process of its own. The candidates of a query are the chunks that ended before it, as many
tokens to a chunk as queries / chunks gives; with ``--every`` all chunks. For each step: *seconds*; *peak*, the growth of resident memory at
its highest; *over*, what remains of that without the results of the step (lists and counts, scores, gradients). *dense* is what all
scores at once would take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import measure
from measure import MIB

LIMIT = 256 * MIB


def child(queries: int, chunks: int, k: int, every: bool) -> None:
    """Measure in this process, and print what was found."""
    import torch

    from sparsedsl.selection.candidates import Candidates
    from sparsedsl.selection.ranking import top_k
    from sparsedsl.selection.scores import DotScores
    from sparsedsl.selection.scores_at_blocks import selected_scores

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 1, n, 64, generator=generator).requires_grad_() for n in (queries, chunks))
    source = DotScores(a, b, 0.125)
    size = max(1, queries // chunks)
    candidates = None if every else Candidates(end=torch.arange(queries) // size)
    # Libraries load before anything is counted.
    warm = DotScores(torch.zeros(1, 1, 64, 64).requires_grad_(), torch.zeros(1, 1, 64, 64).requires_grad_())
    selected_scores(warm, top_k(warm, 2)).sum().backward()

    done: dict[str, Any] = {}

    def choose() -> None:
        selected = done["selected"] = top_k(source, k, candidates, kv_block=size)
        done["top_k"] = [selected.indices, selected.counts]

    def score() -> None:
        done["selected_scores"] = [selected_scores(source, done["selected"])]

    def back() -> None:
        (scores,) = done["selected_scores"]
        done["backward"] = list(torch.autograd.grad(scores, (a, b), torch.ones_like(scores)))

    steps = {}
    for name, action in (("top_k", choose), ("selected_scores", score), ("backward", back)):
        start = time.perf_counter()
        peak = measure.peak_bytes(action)
        seconds = time.perf_counter() - start
        held = sum(x.nbytes for x in done[name])
        steps[name] = {"seconds": seconds, "peak_bytes": peak, "over_bytes": max(0, peak - held)}
    print(json.dumps({"steps": steps, "dense_bytes": 4 * queries * chunks}))


def main(arguments: list[str] | None = None) -> int:
    """Measure in a new process, write what it found, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=65536)
    parser.add_argument("--chunks", type=int, default=16384)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--every", action="store_true", help="all chunks are candidates of all queries")
    parser.add_argument("--out", type=Path, help="default: results/selection_memory_<machine>.json")
    options = parser.parse_args(arguments)
    facts = measure.machine()
    sizes = [str(n) for n in (options.queries, options.chunks, options.k, int(options.every))]
    found, death = measure.run_child([__file__, "--child", *sizes])
    if death is not None:
        print(death)
        return 1
    settings = {"queries": options.queries, "chunks": options.chunks, "k": options.k, "every": options.every}
    path = options.out or measure.result_path("selection_memory", facts)
    measure.write_json(path, {"benchmark": "selection_memory", "machine": facts, "settings": settings, "records": [found]})
    print(f"Top-{options.k} of {options.chunks:,} chunks for {options.queries:,} queries. {measure.describe(facts)}\n")
    rows = [
        [name, measure.time_text(step["seconds"]), *(f"{step[key] / MIB:.0f} MiB" for key in ("peak_bytes", "over_bytes"))]
        for name, step in found["steps"].items()
    ]
    print(measure.markdown(["step", "seconds", "peak", "over"], rows))
    most = max(step["over_bytes"] for step in found["steps"].values())
    print(f"\n{'pass' if most <= LIMIT else 'MISS'}: {most / MIB:.0f} MiB over inputs and outputs, target {LIMIT // MIB} MiB")
    print(f"all scores at once: {found['dense_bytes'] / MIB:,.0f} MiB")
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        queries, chunks, k, every = map(int, sys.argv[2:])
        child(queries, chunks, k, bool(every))
    else:
        sys.exit(main())
