"""Does a model trained at 512 tokens find a needle in 64K?

Four models differ in one layer, the one that looks back: it picks chunks by score (HSA), attends to everything without
positions or with rotary ones, or sees a window. Same size, same data, same steps; below that layer all have the same window of
8. Prints and draws how many needles each finds, from 512 to 65,536 tokens.

    python examples/hsa_needle.py             trains all four on two cores in minutes
    python examples/hsa_needle.py --quick     a few steps, to see that it runs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import sparsedsl as sd
from parts.needle_task import QUESTION, SYMBOLS, VOCABULARY, needles
from parts.small_model import Attention, Transformer, parameters, split_heads, train

WIDTH, HEADS = 64, 4
NEAR = 8  # window of the layer below
CHUNK, TOP_K = 16, 4
WINDOW = 128  # what the window-only model sees: twice the tokens that HSA picks
WIDER = 304  # MLPs of the models without landmarks, in place of 256: all four then have the same size
LENGTH = 512  # of training
# Steps by length (tokens, needles, rows, steps): short ones first, where the two layers find each other sooner.
LESSONS = ((64, 8, 64, 900), (128, 16, 32, 300), (LENGTH, 32, 16, 300))
SPARSE_FROM = 0.9  # of the steps: all chunks before, TOP_K chunks after


class SelectedChunks(Attention):
    """HSA: a query picks chunks by its score against each chunk's landmark, a learned summary of the tokens; no positions."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, sd.patterns.hsa(CHUNK, LENGTH // CHUNK))
        self.retrieval, self.mark = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.matters = nn.Linear(width, width, bias=False)  # which parts of which tokens go into the landmark

    def pick(self, count: int) -> None:
        """From now on, pick ``count`` chunks."""
        self.attend = sd.compile(sd.patterns.hsa(CHUNK, count))

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        q, k, v = self.heads_of(x, rows)
        whole = x.shape[1] // CHUNK * CHUNK
        summed = (self.mark(x) * self.matters(x).sigmoid())[:, :whole].unflatten(1, (-1, CHUNK)).mean(2)
        landmarks = split_heads(4 * summed, self.heads)  # a needle is one token of 16: its share should not be small
        asked = split_heads(self.retrieval(x[:, -rows:]), self.heads)
        chosen = self.attend(q, k, v, retrieval_q=asked, landmarks=landmarks, q_offset=x.shape[1] - rows)
        return self.out(chosen.transpose(1, 2).flatten(2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "HSA": lambda: SelectedChunks(WIDTH, HEADS),
    "full, no positions": lambda: Attention(WIDTH, HEADS, sd.patterns.causal(), positions=False),
    "full, rotary": lambda: Attention(WIDTH, HEADS, sd.patterns.causal()),
    f"window {WINDOW}": lambda: Attention(WIDTH, HEADS, sd.patterns.sliding_window(WINDOW)),
}


# Keys a question is compared with, by length; for HSA the landmarks, and then the keys of the picked chunks.
READS: dict[str, Callable[[int], int]] = {
    "HSA": lambda length: length // CHUNK + TOP_K * CHUNK,
    "full, no positions": lambda length: length,
    "full, rotary": lambda length: length,
    f"window {WINDOW}": lambda length: WINDOW,
}


def learn(name: str, share: float) -> tuple[Transformer, float]:
    """The trained model and the seconds of processor time that took. ``share`` scales the steps."""
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(0)  # the same sequences for every model
    near, far = Attention(WIDTH, HEADS, sd.patterns.sliding_window(NEAR)), MODELS[name]()
    hidden = 4 * WIDTH if isinstance(far, SelectedChunks) else WIDER
    model = Transformer(VOCABULARY, WIDTH, (near, far), hidden=hidden, answers=SYMBOLS)
    plan = [lesson[:3] for lesson in LESSONS for _ in range(max(2, int(lesson[3] * share)))]

    def loss(step: int) -> torch.Tensor:
        if isinstance(far, SelectedChunks) and step == int(SPARSE_FROM * len(plan)):
            far.pick(TOP_K)
        length, count, rows = plan[step]
        tokens, answers = needles(rows, length, count, data)
        return nn.functional.cross_entropy(answer(model, tokens, count).flatten(0, 1), answers.flatten())

    return model, train(model, loss, len(plan), f"train {name}", rate=6e-3)


def answer(model: Transformer, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Logits ``(B, count, SYMBOLS)`` at the key of each question, the last token of the two."""
    return model(tokens, rows=QUESTION * count)[:, QUESTION - 1 :: QUESTION]


@torch.no_grad()
def accuracy(model: Transformer, length: int, count: int, rows: int, what: str) -> float:
    """Share of ``rows * count`` questions answered right at a length."""
    data = torch.Generator().manual_seed(length)  # not those of training, the same for every model
    right = 0
    for _ in tqdm(range(rows), desc=f"{what}: {length} tokens", unit="text", leave=False):
        tokens, answers = needles(1, length, count, data)
        right += int((answer(model, tokens, count).argmax(-1) == answers).sum())
    return right / (rows * count)


def draw(results: dict[str, dict[int, float]], path: Path) -> None:
    """Accuracy over length, one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), style in zip(results.items(), ("o-", "x--", "s-", "d-"), strict=False):
        axes.plot(list(points), [100 * share for share in points.values()], style, label=name)
    axes.axvline(LENGTH, color="grey", linestyle=":", linewidth=1)
    axes.text(LENGTH, 103, " trained here", color="grey", fontsize=8)
    axes.set_xscale("log", base=2)
    lengths = list(next(iter(results.values())))
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(xlabel="tokens", ylabel="needles found, %", ylim=(-3, 110))
    axes.legend(frameon=False, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, ask, print, draw."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="hardly any training, up to 2,048 tokens")
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME", help=f"of {list(MODELS)}"
    )
    parser.add_argument("--picture", type=Path, default=Path("out/hsa_needle.png"), help="default %(default)s")
    options = parser.parse_args()
    lengths = [LENGTH, 4 * LENGTH] if options.quick else [LENGTH * times for times in (1, 4, 16, 64, 128)]
    count, rows = (8, 2) if options.quick else (8, 32)

    print(f"Needles found of {count * rows}, %, {count} in each text; trained at up to {LENGTH} tokens.")
    print(f"Chance is {100 / SYMBOLS:.1f} %.\n")
    print(f"{'looks back by':20} {'parameters':>10} {'trained in':>11}" + "".join(f"{n:9,}" for n in lengths) + "   keys read")
    results: dict[str, dict[int, float]] = {}
    for name in options.models:
        model, seconds = learn(name, 0.005 if options.quick else 1.0)
        results[name] = {length: accuracy(model, length, count, rows, name) for length in lengths}
        cells = "".join(f"{100 * share:9.1f}" for share in results[name].values())
        print(f"{name:20} {parameters(model):10,} {seconds:9.0f} s{cells} {READS[name](lengths[-1]):11,}", flush=True)
    draw(results, options.picture)
    print("\n(trained in: seconds of processor time, all cores together; keys read: landmarks counted, of the longest text)")
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
