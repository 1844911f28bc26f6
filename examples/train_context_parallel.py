"""Does training with the tokens on four ranks give the losses and gradients of one process?

A byte model with a window layer, a MoBA layer, a full layer and a linear one (RetNet) reads Python's own source. Each of four processes
holds a quarter of the tokens of every sequence, as one plan for the four layers places them, and is sent the keys that its queries see,
or the states before its tokens. The first process trains the same model on whole sequences beside it, and compares.

    python examples/train_context_parallel.py             starts four processes by itself; two minutes on two cores
    python examples/train_context_parallel.py --quick     a few steps, to see that it runs
    torchrun --standalone --nproc-per-node 4 examples/train_context_parallel.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy

import sparsedsl as sd
from parts.small_model import python_source

RANKS, WIDTH, HEADS, RATE = 4, 64, 4, 2e-3
LAYERS: dict[str, Any] = {
    "window": sd.patterns.sliding_window(64),
    "moba": sd.patterns.moba(chunk=32, top_k=3),
    "full": sd.patterns.causal(),
    "retnet": sd.patterns.retnet(HEADS),
}


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions of ``x (B, S, heads, D)``; ``angles (S, 1, D / 2)``."""
    a, b = x.chunk(2, 3)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], 3)


class Layer(nn.Module):
    """Attention through a pattern with rotary positions, then a product each token has for itself."""

    def __init__(self, pattern: Any):
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.attn = sd.compile(pattern, backend="tiled", layout="bshd")

    def forward(self, x: torch.Tensor, angles: torch.Tensor, cp: Any) -> torch.Tensor:
        """``x (B, rows of this rank, WIDTH)``; ``angles``: of the positions of these rows."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, HEADS, -1)).unbind(2)
        q, k = (rotated(x, angles) for x in (q, k))
        x = x + self.out(self.attn(q, k, v, cp=cp).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """One layer of each kind over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
        self.layers = nn.ModuleDict({name: Layer(pattern) for name, pattern in LAYERS.items()})

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, cps: dict[str, Any]) -> torch.Tensor:
        """The sum over these tokens."""
        dims = WIDTH // HEADS // 2
        angles = positions[:, None, None] * 10_000.0 ** (-torch.arange(dims, dtype=torch.float64) / dims)
        x = self.embedding(tokens)
        for name, layer in self.layers.items():
            x = layer(x, angles, cps.get(name))
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), reduction="sum")


def furthest(a: Any, b: Any) -> float:
    """How far two gradients lie apart at most, by the largest number in them."""
    return float((a - b).abs().max() / b.abs().max())


def trained(source: torch.Tensor, quick: bool) -> None:
    """What each process does."""
    length, batch, steps = (512, 1, 2) if quick else (4096, 2, 20)
    rank, group = dist.get_rank(), dist.group.WORLD
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model, alone = Model(), Model()
    alone.load_state_dict(model.state_dict())
    plan = sd.parallel.plan(LAYERS, length, RANKS, heads=HEADS, granule=32, chunk=32)
    cps = {name: plan.on(group, name) for name in LAYERS}
    optimisers = [torch.optim.AdamW(each.parameters(), lr=RATE) for each in (model, alone)]
    if not rank:
        print(f"{plan}\n")
    for step in range(steps):
        first = torch.randint(source.numel() - length, (batch,), generator=torch.Generator().manual_seed(step))
        text = torch.stack([source[at : at + length + 1] for at in first.tolist()])
        tokens, labels = text[:, :-1], text[:, 1:]
        mine, answers = (plan.shard(x, 1, group) for x in (tokens, labels))
        loss = model.loss(mine, answers, plan.rows(rank), cps) / tokens.numel()
        optimisers[0].zero_grad()
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        for parameter in model.parameters():  # each rank has the part of its own tokens
            dist.all_reduce(parameter.grad)
        if not rank:
            whole = alone.loss(tokens, labels, torch.arange(length), {}) / tokens.numel()
            optimisers[1].zero_grad()
            whole.backward()
            apart = max(furthest(a.grad, b.grad) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
            print(f"step {step:2}: loss {total:.6f} on ranks, {whole:.6f} in one process; gradients differ by {apart:.1e}")
            if apart > 1e-9 or abs(float(total - whole.detach())) > 1e-9:
                raise SystemExit("the ranks do not train as one process does")
            optimisers[1].step()
        optimisers[0].step()
    rows = plan.rows(rank)
    keys = torch.tensor([[int((~torch.isin(cps[name].last_keys, rows)).sum()) for name in LAYERS]])
    of_all = [torch.empty_like(keys) for _ in range(RANKS)]
    dist.all_gather(of_all, keys)
    if not rank:
        print(f"\nkeys of others that a rank is sent for a layer, of {length} (a ring sends {length - length // RANKS}):")
        for name, most in zip(LAYERS, torch.cat(of_all).max(0).values.tolist(), strict=True):
            print(f"  {name:<8}{most:>6}")


def started(rank: int, folder: str, source: torch.Tensor, quick: bool) -> None:
    """One of the processes that this one starts; ``torchrun`` starts them otherwise."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    trained(source, quick)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps on short sequences")
    quick = parser.parse_args().quick
    source = python_source(megabytes=0.5)[0].long()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        trained(source, quick)
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(started, (folder, source, quick), RANKS, start_method="fork")


if __name__ == "__main__":
    main()
