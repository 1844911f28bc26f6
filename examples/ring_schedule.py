"""What do I lose, and save, when four layers of five are linear?

Ring-style models give one layer in five full attention, the others a state of constant size. Three small models learn Python's
own source byte by byte: all layers full, four linear for one full, all linear. Then what each must remember of a context, and
what one more token costs in attention.

    python examples/ring_schedule.py             trains all three on two cores in minutes
    python examples/ring_schedule.py --quick     a few steps, to see that it runs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

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
    train,
    windows_of,
)

WIDTH, HEADS, LAYERS = 128, 4, 5
SHARE = 0.5  # of each head gets rotary positions, in layers of both kinds
LENGTH, BATCH, STEPS = 256, 4, 400
CONTEXTS = (1024, 4096, 16_384, 65_536)


class Layer(Attention):
    """q and k normalised, then half rotated; :meth:`one_token` is the attention of a decoding step and what it remembers."""

    def __init__(self, layer: int, pattern: object):
        super().__init__(WIDTH, HEADS, pattern)
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)

    def attended(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """``(B, rows, WIDTH)``, heads side by side."""
        q, k, v = self.heads_of(x, rows)
        first = x.shape[1] - rows
        q, k = rotate(self.q_norm(q), first, SHARE), rotate(self.k_norm(k), 0, SHARE)
        return self.attend(q, k, v, q_offset=first).transpose(1, 2).flatten(2)


class Full(Layer):
    """Every token before, by softmax. It remembers the keys and values of all."""

    def __init__(self, layer: int):
        super().__init__(layer, sd.patterns.causal())

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        return self.out(self.attended(x, rows))

    def one_token(self, context: int) -> tuple[Callable[[], object], int]:
        """A decoding step after ``context`` tokens, and the bytes it reads."""
        k, v = torch.randn(2, 1, HEADS, context, WIDTH // HEADS)
        return lambda: self.attend(k[:, :, :1], k, v, q_offset=context - 1), k.nbytes + v.nbytes


class Linear(Layer):
    """A state that fades at its own rate in each head; normalised in one group a head, then gated."""

    def __init__(self, layer: int):
        super().__init__(layer, sd.patterns.ring_linear(sd.decay_table(HEADS, layer, LAYERS)))
        self.gate, self.norm = nn.Linear(WIDTH, WIDTH, bias=False), nn.RMSNorm(WIDTH // HEADS)

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        normed = self.norm(self.attended(x, rows).unflatten(2, (HEADS, -1))).flatten(2)
        return self.out(normed * self.gate(x[:, -rows:]).sigmoid())

    def one_token(self, context: int) -> tuple[Callable[[], object], int]:
        """A decoding step, and the bytes of the state: the same after any number of tokens."""
        prompt = torch.randn(1, HEADS, 64, WIDTH // HEADS)
        _, state = self.attend(prompt, prompt, prompt, return_state=True)
        token = prompt[:, :, :1]
        return lambda: self.attend(token, token, token, state=state, return_state=True), state.nbytes


SCHEDULES: dict[str, Callable[[], dict[int, Full | Linear]]] = {
    "all full": lambda: sd.schedule(LAYERS, 1, full=lambda layer: Full(layer), other=lambda layer: Linear(layer)),
    "4 linear : 1 full": lambda: sd.schedule(LAYERS, 5, full=lambda layer: Full(layer), other=lambda layer: Linear(layer)),
    "all linear": lambda: {layer: Linear(layer) for layer in range(LAYERS)},
}


def learn(name: str, text: torch.Tensor, steps: int) -> tuple[Transformer, float]:
    """The trained model, and the seconds of processor time that took."""
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(0)  # the same text for every model
    model = Transformer(256, WIDTH, SCHEDULES[name]().values())
    return model, train(model, lambda step: next_byte_loss(model, windows_of(text, BATCH, LENGTH, data)), steps, f"train {name}")


@torch.no_grad()
def decoding(name: str, context: int, calls: int) -> tuple[float, int]:
    """The attention of one more token in all layers: least milliseconds of processor time in ``calls``, bytes remembered."""
    steps, remembered = zip(*(layer.one_token(context) for layer in SCHEDULES[name]().values()), strict=True)
    times = []
    for _ in range(calls + 1):
        start = time.process_time()
        for step in steps:
            step()
        times.append(time.process_time() - start)
    return 1e3 * min(times[1:]), sum(remembered)


def memory(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.0f} KiB"


def draw(losses: dict[str, float], costs: dict[str, dict[int, tuple[float, int]]], path: Path) -> None:
    """Loss as bars; memory and time of a decoding step over the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    bars = left.bar(list(losses), list(losses.values()), color=["C0", "C1", "C2"])
    left.bar_label(bars, fmt="%.3f")
    left.set(title="held-out loss, nats a byte")
    left.tick_params(axis="x", labelsize=8)
    for name, by_context in costs.items():
        middle.plot(list(by_context), [size / 2**20 for _, size in by_context.values()], marker="o", label=name)
        right.plot(list(by_context), [milliseconds for milliseconds, _ in by_context.values()], marker="o", label=name)
    for axes, title in ((middle, "remembered, MiB"), (right, "attention of one more token, ms")):
        axes.set(title=title, xlabel="context, tokens", xscale="log", yscale="log")
        axes.set_xticks(CONTEXTS, [f"{context // 1024}K" for context in CONTEXTS])
        axes.minorticks_off()
    middle.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, measure decoding, print, draw."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="hardly any training")
    parser.add_argument("--picture", type=Path, default=Path("out/ring_schedule.png"), help="default %(default)s")
    options = parser.parse_args()
    steps, pieces, calls = (2, 2, 2) if options.quick else (STEPS, 64, 50)
    text, unseen = python_source()

    print(f"{LAYERS} layers, {steps} steps of {BATCH * LENGTH:,} bytes, held-out loss of {pieces} pieces, nats a byte.")
    print(
        f"One more token after a context, {HEADS} heads of {WIDTH // HEADS}: milliseconds in attention, and what is remembered.\n"
    )
    heads = "".join(f"{f'after {context:,}':>22}" for context in CONTEXTS)
    print(f"{'layers':18} {'parameters':>10} {'trained in':>11} {'loss':>7}{heads}")
    losses: dict[str, float] = {}
    costs: dict[str, dict[int, tuple[float, int]]] = {}
    for name in SCHEDULES:
        model, seconds = learn(name, text, steps)
        losses[name] = held_out_loss(model, unseen, LENGTH, pieces, f"{name}: held-out loss")
        costs[name] = {context: decoding(name, context, calls) for context in CONTEXTS}
        cells = "".join(f"{time_:9.2f} ms {memory(size):>9}" for time_, size in costs[name].values())
        print(f"{name:18} {parameters(model):10,} {seconds:9.0f} s {losses[name]:7.3f} {cells}", flush=True)
    draw(losses, costs, options.picture)
    print(f"\n(trained in, milliseconds: processor time, all cores together)\npicture: {options.picture}")


if __name__ == "__main__":
    main()
