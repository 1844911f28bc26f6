"""A converted model trains under FSDP2 as it does in one process: two processes, gloo."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

import sparsedsl as sd
from tests.models.families import build, tokens

WORLD = 2


def converted() -> tuple[Any, Any]:
    """A small model with one layer turned into NHA, the same in every process."""
    model = build("llama")
    torch.manual_seed(3)
    handle = sd.models.convert(model, {1: sd.models.NHA}, backend="tiled")
    return model.train(), handle


def stepped(model: Any, rows: torch.Tensor) -> list[float]:
    """Losses of three steps of plain gradient descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(3):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def worker(rank: int, port: int, folder: str) -> None:
    """Half of the batch, in a process of its own; rank 0 writes what it found."""
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    try:
        model, handle = converted()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        losses = torch.tensor(stepped(model, tokens(2, 24)[rank : rank + 1]), dtype=torch.float64)
        dist.all_reduce(losses)
        whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
        assert all(parameter.grad is None for parameter in handle.new_parameters())
        if rank == 0:
            torch.save((losses / WORLD, whole), Path(folder) / "found.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_a_converted_model_trains_under_fsdp2_as_in_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(worker, (port, str(tmp_path)), nprocs=WORLD)
    losses, weights = torch.load(tmp_path / "found.pt")
    model, _ = converted()
    torch.testing.assert_close(losses, torch.tensor(stepped(model, tokens(2, 24)), dtype=torch.float64), atol=1e-4, rtol=0)
    assert any("sd_layer" in name for name in weights)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=1e-3, msg=name)
