"""What if I change the window of a hybrid after training?

Native hybrid attention reads the last tokens as they are and all tokens before through a few slots, under one softmax: its
window is a number that one may set anew. Two small models learn Python's own source byte by byte, one with a window of 32, one
with a window drawn anew each step. Then each is given every window from none to all, without further training.

    python examples/nha_window.py             trains both on two cores in minutes
    python examples/nha_window.py --quick     a few steps, to see that it runs
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsedsl as sd
from parts.small_model import (
    Attention,
    Transformer,
    held_out_loss,
    next_byte_loss,
    parameters,
    python_source,
    rotate,
    split_heads,
    train,
    windows_of,
)

WIDTH, HEADS, LAYERS = 128, 4, 2
SLOTS, WINDOW = 32, 32
LENGTH, BATCH, STEPS = 256, 8, 300
WINDOWS = (0, 1, 2, 4, 8, 16, 32, 64, 128, None)  # None: all tokens, the slots stay empty
DRAWN = (0, 8, 32, 128, None)


class Hybrid(Attention):
    """The last tokens with rotary positions, those before in slots without any."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, sd.patterns.nha(SLOTS, WINDOW))
        self.gate = nn.Linear(width, heads * SLOTS, bias=False)
        self.window: int | None = WINDOW

    def see(self, window: int | None) -> None:
        """Set the window."""
        self.window, self.attend = window, sd.compile(sd.patterns.nha(SLOTS, window))

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        q, k, v = self.heads_of(x, rows)
        inputs: dict[str, Any] = {}
        if self.window is not None:  # something leaves the window: slots take it in
            inputs["gate"] = split_heads(self.gate(x), self.heads)
        if self.window != 0:
            inputs |= {"q_rope": rotate(q, x.shape[1] - rows), "k_rope": rotate(k)}
        return self.out(self.attend(q, k, v, q_offset=x.shape[1] - rows, **inputs).transpose(1, 2).flatten(2))


def see(model: Transformer, window: int | None) -> None:
    """Set the window of every layer."""
    for attention in model.attentions:
        assert isinstance(attention, Hybrid)
        attention.see(window)


def learn(text: torch.Tensor, drawn: bool, steps: int) -> tuple[Transformer, float]:
    """The trained model, and the seconds of processor time that took."""
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(0)
    model = Transformer(256, WIDTH, (Hybrid(WIDTH, HEADS) for _ in range(LAYERS)))

    def loss(step: int) -> torch.Tensor:
        if drawn:
            see(model, DRAWN[int(torch.randint(len(DRAWN), (), generator=data))])
        return next_byte_loss(model, windows_of(text, BATCH, LENGTH, data))

    return model, train(model, loss, steps, f"train, window {'drawn' if drawn else WINDOW}")


def draw(results: dict[str, dict[str, float]], path: Path) -> None:
    """Loss over window, one line a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, losses in results.items():
        axes.plot(list(losses), list(losses.values()), marker="o", label=f"trained with {name}")
    axes.set(xlabel=f"window at inference, tokens of {LENGTH}", ylabel="held-out loss, nats a byte")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, set windows, print, draw."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="hardly any training")
    parser.add_argument("--picture", type=Path, default=Path("out/nha_window.png"), help="default %(default)s")
    options = parser.parse_args()
    steps, pieces = (2, 2) if options.quick else (STEPS, 64)
    text, unseen = python_source()

    print(f"Held-out loss of {pieces} pieces of {LENGTH} bytes, nats a byte, by the window at inference.")
    print(f"{LAYERS} layers, {SLOTS} slots a head, {steps} steps of {BATCH * LENGTH:,} bytes.\n")
    names = ["all" if window is None else str(window) for window in WINDOWS]
    print(f"{'trained with':14} {'parameters':>10} {'trained in':>11}  window" + "".join(f"{name:>7}" for name in names))
    results: dict[str, dict[str, float]] = {}
    for drawn in (False, True):
        name = "drawn windows" if drawn else f"window {WINDOW}"
        model, seconds = learn(text, drawn, steps)
        results[name] = {}
        for shown, window in zip(names, WINDOWS, strict=True):
            see(model, window)
            results[name][shown] = held_out_loss(model, unseen, LENGTH, pieces, f"{name}, now {shown}")
        cells = "".join(f"{loss:7.3f}" for loss in results[name].values())
        print(f"{name:14} {parameters(model):10,} {seconds:9.0f} s        {cells}", flush=True)
    draw(results, options.picture)
    print(f"\n(trained in: seconds of processor time, all cores together)\npicture: {options.picture}")


if __name__ == "__main__":
    main()
