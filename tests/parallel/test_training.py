"""Context parallel beside what else training does: compiled functions, checkpoints, FSDP2, DDP and shards of heads, each as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from tests.parallel.ranks import assert_refused, numbers, run_on_ranks

LENGTH, HEADS, WIDTH, BAR = 112, 4, 8, 1e-11
LAYERS: dict[str, Any] = {
    "near": sd.patterns.sliding_window(20),
    "chosen": sd.patterns.moba(chunk=8, top_k=3),
    "whole": sd.attend(kv_idx <= q_idx, score=sd.patterns.alibi(HEADS)),
    "scanned": sd.patterns.ring_linear([0.9, 0.8, 0.99, 0.95]),
}


class Layer(nn.Module):
    """Attention of a pattern between two products, tensors with heads last."""

    def __init__(self, pattern: Any) -> None:
        super().__init__()
        self.qkv, self.out = (nn.Linear(WIDTH, n * WIDTH, dtype=torch.float64) for n in (3, 1))
        self.attn = sd.compile(pattern, backend="tiled", layout="bshd")

    def forward(self, x: torch.Tensor, cp: Any = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)
        return x + self.out(self.attn(q, k, v, cp=cp).flatten(2))


class Model(nn.Module):
    """A window, a choice, full attention, and a state."""

    def __init__(self, *, kept: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers, self.kept = nn.ModuleDict({name: Layer(pattern) for name, pattern in LAYERS.items()}), kept

    def forward(self, x: torch.Tensor, cps: Any = None) -> torch.Tensor:
        for name, layer in self.layers.items():
            cp = None if cps is None else cps[name]
            x = layer(x, cp) if self.kept else checkpoint(layer, x, cp, use_reentrant=False)
        return x


def whole(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What one process makes of all batch entries and tokens, and the gradients of the sum of its squares."""
    model = Model()
    out = model(x)
    (out**2).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(model: nn.Module, want: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    """``factor``: what means over ranks leave out."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert set(found) == set(want)
    for name, grad in found.items():
        got = grad.full_tensor() if isinstance(grad, DTensor) else grad
        assert got is not None
        torch.testing.assert_close(got * factor, want[name], atol=BAR, rtol=BAR, msg=lambda text, name=name: f"{name}: {text}")


def run(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    plan = sd.parallel.plan(LAYERS, LENGTH, 2, heads=HEADS, granule=8, chunk=8)
    cps = {name: plan.on(mesh["cp"], name) for name in LAYERS}
    batch = numbers(2, LENGTH, WIDTH, seed=1)
    out, want = whole(batch)
    entry = batch[mesh.get_local_rank("dp")][None]
    mine = plan.shard(entry, 1, mesh["cp"])
    shown = plan.shard(out[mesh.get_local_rank("dp")][None], 1, mesh["cp"])
    for way in (replicated, sharded, checkpointed):
        model = way(mesh)
        found = model(mine, cps)
        torch.testing.assert_close(found.detach(), shown, atol=BAR, rtol=BAR)
        (found**2).sum().backward()
        # DDP and FSDP take means over all ranks.
        assert_gradients(model, want, 1.0 if way is checkpointed else 4.0)
    compiled(mine, cps)
    heads_sharded()


def replicated(mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(Model())


def sharded(mesh: DeviceMesh) -> nn.Module:
    """Parameters in shards along "cp", copies along "dp"."""
    model = Model()
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Summed(nn.Module):
    """Gradients of parameters summed by hand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad) and None)

    def forward(self, *given: Any) -> Any:
        return self.module(*given)


def checkpointed(mesh: DeviceMesh) -> nn.Module:
    return Summed(Model(kept=False))


def compiled(x: torch.Tensor, cps: Any) -> None:
    """A graph ends before what ranks do together, and another begins behind; one graph for all is refused by torch."""
    layer = Model().layers["chosen"]
    once = torch.compile(layer, backend="eager")(x, cps["chosen"])
    torch.testing.assert_close(once, layer(x, cps["chosen"]), atol=BAR, rtol=BAR)
    want, got = (torch.autograd.grad((out**2).sum(), list(layer.parameters())) for out in (layer(x, cps["chosen"]), once))
    torch.testing.assert_close(got, want, atol=BAR, rtol=BAR)
    q = k = v = layer.qkv(x).unflatten(2, (3, HEADS, -1))[:, :, 0]
    whole_graph = torch.compile(lambda q, k, v: layer.attn(q * 2, k, v, cp=cps["chosen"]), backend="eager", fullgraph=True)
    assert_refused(RuntimeError, "disable", lambda: whole_graph(q, k, v))


def heads_sharded() -> None:
    """Heads along one dimension of the mesh, tokens along the other: the call knows which heads it has."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "cp"))
    group, place = mesh["cp"], mesh.get_local_rank("heads")
    plan = sd.parallel.plan(LAYERS, LENGTH, 2, heads=HEADS, granule=8, chunk=8)
    for name, pattern in LAYERS.items():
        qkv = [numbers(1, HEADS, LENGTH, WIDTH, seed=seed).requires_grad_() for seed in range(3)]
        out, cp = sd.attention(*qkv, pattern, backend="reference"), plan.on(group, name)
        want = [out.detach(), *torch.autograd.grad((out**2).sum(), qkv)]
        own = slice(2 * place, 2 * place + 2)
        want = [plan.shard(x[:, own], 2, group) for x in want]
        mine = [plan.shard(x.detach()[:, own], 2, group).requires_grad_() for x in qkv]
        words: dict[str, Any] = {"head_offset": 2 * place, "heads": HEADS}
        by_hand = sd.attention(*mine, pattern, backend="tiled", cp=cp, **words)
        shards = [DTensor.from_local(x, mesh["heads"], [Shard(1)]) for x in mine]
        by_torch = sd.attention(*shards, pattern, backend="tiled", cp=cp)
        assert isinstance(by_torch, DTensor) and by_torch.shape[1] == HEADS
        for found in (by_hand, by_torch.to_local()):
            got = [found, *torch.autograd.grad((found**2).sum(), mine)]
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.detach(), b, atol=BAR, rtol=BAR)


def test_four_ranks_train_as_one_process(tmp_path: Path) -> None:
    run_on_ranks(4, run, tmp_path)
