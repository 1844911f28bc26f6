"""Which full-attention layers of a real model can do with less, and with what, within one percent of its perplexity?

    python examples/gemma_search.py             some minutes on two free cores
    python examples/gemma_search.py --quick     a minute, once the weights are cached

Gemma 3 270M has 15 layers that see 512 tokens and 3 that see everything. The search puts each candidate into each of the three alone and
measures how far the model's predictions move (KL), solves a knapsack for the assignment of least FLOPs, and checks it by true runs until
the perplexity of the calibration text is within the bound and no single change is cheaper. Text and code of the standard library; then the
result is judged on text that the search has not seen. ``--resume`` keeps what was measured in a file and goes on from it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sparsedsl as sd
from parts import gemma
from sparsedsl import kv_idx, q_idx

# ---- edit here ------------------------------------------------------------------------------------------

causal = kv_idx <= q_idx
first = kv_idx < 4  # the first tokens, which every layer of a pretrained model leans on


def near(window: int) -> Any:
    """The last tokens, the query's own included."""
    return q_idx - kv_idx < window


CANDIDATES: dict[str, Any] = {
    "window 256": causal & (near(256) | first),
    "window 512": causal & (near(512) | first),
    "stripes": causal & (near(128) | first | ((q_idx // 32 - kv_idx // 32) % 4 == 0)),
    "moba": sd.patterns.moba(64, 4),
    "pages": sd.attend(causal & (near(64) | first | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 12))),
}
BOUND = sd.models.Perplexity(1.01)
WARM_UP = 0.5  # of each text: what comes before is not judged, since the candidates see most of it

# ---------------------------------------------------------------------------------------------------------


def real_rows(tokenizer: Any, count: int, tokens: int, skip: int = 0) -> torch.Tensor:
    """Token ids (count, tokens): Python's language reference and modules of its library in turn, from ``skip`` rows on."""
    code = "\n\n".join(inspect.getsource(module) for module in (argparse, inspect, ast))
    begin = torch.tensor([tokenizer.bos_token_id])
    sources = [tokenizer(text, return_tensors="pt").input_ids[0] for text in (gemma.real_text(), code)]
    rows = []
    for number in range(skip, skip + count):
        source, at = sources[number % 2], number // 2 * (tokens - 1) + 1
        rows.append(torch.cat([begin, source[at : at + tokens - 1]]))
    if any(len(row) < tokens for row in rows):
        raise SystemExit(f"the text is too short for {count} rows of {tokens} tokens; ask for fewer")
    return torch.stack(rows)


def perplexity(model: Any, rows: torch.Tensor, start: int, what: str) -> float:
    """Of the tokens after position ``start`` of every row."""
    losses = []
    for row in tqdm(rows, desc=what, unit="text", leave=False):
        hidden, _ = gemma.prefill(model, row[None], what)
        losses.append(torch.tensor(gemma.perplexity(model, hidden, row[None], start, what)).log())
    return float(torch.stack(losses).mean().exp())


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one text of 512 tokens, two candidates, no held-out text")
    add("--tokens", type=int, help="tokens of a text (default 1024)")
    add("--rows", type=int, help="texts (default 2)")
    add("--positions", type=int, help="judged positions of each (default 128)")
    add("--held-out", type=int, help="texts the result is judged on (default 2)")
    add("--layers", type=int, nargs="*", help="default: those with full attention")
    add("--resume", type=Path, help="JSON file to keep evaluations in and go on from")
    add("--picture", type=Path, default=Path("out/gemma_search.png"), help="default %(default)s")
    add("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    usual = {"tokens": 1024, "rows": 2, "positions": 128, "held_out": 2}
    quick = {"tokens": 512, "rows": 1, "positions": 64, "held_out": 0}
    for name in usual:
        if getattr(options, name) is None:
            setattr(options, name, (quick if options.quick else usual)[name])
    return options


def main(arguments: list[str] | None = None) -> int:
    """Search, print, draw, judge on other text."""
    options = options_from(arguments)
    began, load = time.perf_counter(), os.getloadavg()[0]
    model, tokenizer = gemma.load()
    native = sd.models.native_patterns(model)
    layers = options.layers or [index for index, pattern in native.items() if pattern == sd.attend(causal)]
    rows = real_rows(tokenizer, options.rows, options.tokens)
    print(
        f"Layers {layers} of {len(native)}; {options.rows} texts of {options.tokens:,} tokens; {torch.get_num_threads()} threads"
    )
    candidates = dict(list(CANDIDATES.items())[:2]) if options.quick else CANDIDATES
    report = sd.models.search(
        model,
        candidates,
        rows,
        bound=BOUND,
        cost="flops",
        layers=layers,
        warm_up=int(WARM_UP * options.tokens),
        positions=options.positions,
        resume=options.resume,
    )
    print(f"\n{report}\n")
    report.plot_pareto(options.picture)
    report.save(options.picture.with_suffix(".json"))
    print(f"picture: {options.picture}; report, to be loaded and applied: {options.picture.with_suffix('.json')}")
    unseen: list[float] = []
    if options.held_out:
        rows, start = real_rows(tokenizer, options.held_out, options.tokens, skip=options.rows), int(WARM_UP * options.tokens)
        unseen.append(perplexity(model, rows, start, "held-out text, native"))
        with report.apply(model):
            unseen.append(perplexity(model, rows, start, "held-out text, assignment"))
        print(f"held-out text: perplexity {unseen[1]:.3f}, native {unseen[0]:.3f}: {unseen[1] / unseen[0] - 1:+.2%}")
    seconds, loads = time.perf_counter() - began, [load, os.getloadavg()[0]]
    print(f"{seconds:.0f} s in all; load of the machine {loads[0]:.1f} at the start, {loads[1]:.1f} at the end")
    if options.out:
        save(
            options,
            report,
            unseen,
            {"threads": torch.get_num_threads(), "torch": torch.__version__, "load": loads, "seconds": seconds},
        )
    return 0


def save(options: argparse.Namespace, report: sd.models.SearchReport, unseen: list[float], machine: dict[str, Any]) -> None:
    """The numbers, a line a record."""
    words = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    result = {
        "settings": words,
        "machine": machine,
        "candidates": [[name, candidate.text] for name, candidate in report.candidates.items()],
        "assignment": {str(layer): name for layer, name in report.assignment.items()},
        "cost": {"flops": report.cost, "native": report.native_cost, "length": report.length},
        "perplexity": {"chosen": report.perplexity, "native": report.native_perplexity, "error": report.measured.change_error},
        "kl": {"chosen": report.kl, "error": report.measured.kl_error},
        "retrieval": None
        if report.probe is None
        else [report.probe.distance, report.probe.native.right, report.probe.chosen.right],
        "held_out": unseen,
        "singles": [[layer, name, one.kl, one.ratio] for layer, row in report.singles.items() for name, one in row.items()],
        "tried": [
            [list(one.assignment.values()), one.cost, one.measured.kl, one.measured.ratio, one.holds] for one in report.tried
        ],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
    options.out.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


if __name__ == "__main__":
    import sys

    sys.exit(main())
