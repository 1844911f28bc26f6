"""Several processes that are ranks of one group, on one machine: what tests run on each of them."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["assert_refused", "numbers", "run_on_ranks"]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_on_ranks(world: int, run: Callable[[int], None], folder: Path, *, seconds: float = 500.0) -> None:
    """``run(rank)`` in as many processes, joined by gloo; fails with what one of them says, or after so many seconds."""
    # Forked: a process that imports everything anew takes longer than all that is tested.
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    ranks = [context.Process(target=_process, args=(rank, world, run, str(folder), failures)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + seconds
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < end:
        # What waits for one that has failed would wait for ever.
        end = min(end, time.monotonic() + 20) if any(rank.exitcode not in (None, 0) for rank in ranks) else end
        time.sleep(0.05)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    told = []
    while not failures.empty():
        told.append(failures.get())
    codes = [rank.exitcode for rank in ranks]
    assert codes == [0] * world, "\n".join([f"exit statuses {codes}, -9 for killed", *told])


def _process(rank: int, world: int, run: Callable[[int], None], folder: str, failures: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        run(rank)
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None


def assert_refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing refused: {words}")
