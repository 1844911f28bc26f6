"""The parts of the examples that train: a small transformer with any attention, a training loop, Python's own source."""

from __future__ import annotations

import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import sparsedsl as sd


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``(B, S, heads * D)`` -> ``(B, heads, S, D)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: torch.Tensor, first: int = 0, share: float = 1.0) -> torch.Tensor:
    """Rotary positions ``first..`` on the first ``share`` of the numbers of each head, halves paired."""
    dims = int(x.shape[-1] * share) // 2
    angle = torch.arange(first, first + x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(dims) / dims)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x.split([dims, dims, x.shape[-1] - 2 * dims], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Attention(nn.Module):
    """Softmax attention through a pattern, with rotary positions or without any."""

    def __init__(self, width: int, heads: int, pattern: Any, *, positions: bool = True):
        super().__init__()
        self.heads, self.positions = heads, positions
        self.attend = sd.compile(pattern)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)

    def heads_of(self, x: torch.Tensor, rows: int) -> list[torch.Tensor]:
        """q of the last ``rows`` tokens, k and v of all."""
        return [split_heads(part, self.heads) for part in (self.q(x[:, -rows:]), *self.kv(x).chunk(2, -1))]

    def forward(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """``x (B, S, width)`` -> the last ``rows`` rows of the result."""
        q, k, v = self.heads_of(x, rows)
        first = x.shape[1] - rows
        if self.positions:
            q, k = rotate(q, first), rotate(k)
        return self.out(self.attend(q, k, v, q_offset=first).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Pre-norm layers, one for each attention given (called as ``attention(x, rows)``)."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        attentions: Iterable[nn.Module],
        *,
        hidden: int | None = None,
        answers: int | None = None,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.attentions = nn.ModuleList(attentions)
        layers, hidden = len(self.attentions), hidden or 4 * width
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, answers or vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Logits of the last ``rows`` tokens, default all. Nothing reads the last layer elsewhere: it is not computed there."""
        x = self.embedding(tokens)
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            wanted = rows if rows is not None and layer == len(self.mlps) - 1 else x.shape[1]
            x = x[:, -wanted:] + attention(self.norms[2 * layer](x), wanted)
            x = x + mlp(self.norms[2 * layer + 1](x))
        return self.head(self.norms[-1](x))


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(weight.numel() for weight in model.parameters())


def train(model: nn.Module, loss: Callable[[int], torch.Tensor], steps: int, what: str, rate: float = 3e-3) -> float:
    """AdamW on ``loss(step)``: 50 steps of warm-up, then a cosine down to a twentieth. Returns the seconds of processor time.

    Processor time, summed over cores: what the clock says depends on what else the machine does.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.process_time()
    model.train()
    with tqdm(range(steps), desc=what, unit="step", leave=False) as bar:
        for step in bar:
            factor = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.param_groups[0]["lr"] = rate * factor * min(1.0, (step + 1) / 50)
            now = loss(step)
            optimiser.zero_grad()
            now.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            bar.set_postfix_str(f"loss {now.item():.3f}", refresh=False)
    model.eval()
    return time.process_time() - start


def python_source(megabytes: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library's source, to train on and, from other files, to judge by: two uint8 tensors.

    A file's name decides which of the two it goes to, so that the split is the same everywhere; the text is that of this Python.
    """

    def digest(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    folder = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "lib2to3"}
    names = [path.relative_to(folder) for path in folder.rglob("*.py")]
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    read = 0
    for name in sorted(names, key=lambda name: digest(name.as_posix())):
        if read <= megabytes * 1e6 and not left_out & set(name.parts):
            text = (folder / name).read_bytes()
            parts[digest(name.name)[0] < 26].append(text)
            read += len(text)
    train_on, judge_by = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train_on, judge_by


def windows_of(text: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``batch`` pieces of ``length + 1`` bytes from random places."""
    start = torch.randint(0, len(text) - length, (batch, 1), generator=generator)
    return text[start + torch.arange(length + 1)].long()


def next_byte_loss(model: nn.Module, pieces: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each next byte, in nats."""
    return nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: torch.Tensor, length: int, pieces: int, what: str) -> float:
    """Mean loss over ``pieces`` pieces at even distances of the text."""
    starts = torch.linspace(0, len(text) - length - 1, pieces).long()
    total = 0.0
    for start in tqdm(starts.split(8), desc=what, unit="batch", leave=False):
        total += next_byte_loss(model, text[start[:, None] + torch.arange(length + 1)].long()).item() * len(start)
    return total / pieces
