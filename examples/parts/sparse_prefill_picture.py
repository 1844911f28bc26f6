"""The picture of gemma_sparse_prefill.py: quality over density, and what attention takes by length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"full": "black", "PBS": "tab:blue", "TSA": "tab:orange", "TSA + PBS": "tab:green", "full, torch's own": "tab:grey"}


def draw(rows: list[dict[str, Any]], times: dict[str, dict[int, list[float]]], tokens: int, path: Path) -> None:
    """Perplexity and needles over density, one line a method; processor seconds of the full layers' attention by length.

    ``rows``: method, density, loss, after, within (right answers, right digits, answers); the first is full attention. ``times``: method ->
    length -> [prompt, attention, wall] in seconds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, needles, clock = figure.subplots(1, 3)
    full = rows[0]
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        some = sorted((row for row in rows if row["method"] in (method, "full")), key=lambda row: row["density"])
        density = [100 * row["density"] for row in some]
        style = {"color": COLOURS.get(method), "marker": "o", "markersize": 4}
        loss.plot(density, [100 * math.expm1(row["loss"] - full["loss"]) for row in some], label=method, **style)
        digits = [100 * row["after"][1] / (row["after"][2] * 5) for row in some]
        needles.plot(density, digits, label=method, **style)
    loss.axhspan(-1, 1, color="black", alpha=0.08, linewidth=0)
    loss.set(
        xlabel="% of causal pairs",
        ylabel="perplexity after the prompt, % above full",
        title=f"prompts of {tokens:,} tokens",
    )
    needles.set(
        xlabel="% of causal pairs", ylabel="digits of hidden numbers right, %", ylim=(-3, 103), title="asked after the prompt"
    )
    for method, by_length in times.items():
        seconds = [part for _, part, _ in by_length.values()]
        clock.plot(list(by_length), seconds, label=method, color=COLOURS.get(method), marker="o", markersize=4)
    clock.set_xscale("log", base=2)
    clock.set_yscale("log")
    lengths = list(times["full"])
    clock.set_xticks(lengths, [f"{length:,}" for length in lengths])
    clock.set(xlabel="tokens of the prompt", ylabel="processor seconds, attention of three layers", title="choosing included")
    for axes in (loss, needles, clock):
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
