"""Threads that each compute on one core, side by side.

Torch splits every operation over all threads and waits for the slowest: for operations of 50 microseconds the waiting costs as much as
the work, and where another program holds one of the cores a hundred times more. So pieces of work that need nothing of each other run
on threads of their own, each with a single thread inside torch. How many is ``torch.get_num_threads()`` of the caller.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

__all__ = ["on_one_core", "run_all", "share"]

T = TypeVar("T")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _forget() -> None:
    global _lock
    _lock = threading.Lock()
    _pools.clear()


# Threads do not survive a fork.
os.register_at_fork(after_in_child=_forget)


def _alone() -> None:
    """One thread inside torch, for this thread only."""
    torch.get_num_threads()  # torch gives a new thread its number of threads when it first asks: before, not after
    _openmp().limit(limits=1)


def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run the tasks side by side and wait for all; the first error, in their order, is raised.

    Tasks see neither the caller's gradients nor its autocast: they run under ``torch.no_grad()``.

    >>> seen = []
    >>> run_all([lambda: seen.append(torch.get_num_threads()), lambda: seen.append(torch.get_num_threads())])
    >>> seen
    [1, 1]
    """
    count = len(tasks)
    with _lock:
        pool = _pools.get(count)
        if pool is None:
            pool = _pools[count] = ThreadPoolExecutor(count, thread_name_prefix="sparsedsl", initializer=_alone)
    inference = torch.is_inference_mode_enabled()
    futures = [pool.submit(_plainly, task, inference) for task in tasks]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def _plainly(task: Callable[[], None], inference: bool) -> None:
    # Both are switches of a thread; tensors made in inference mode may only be written to in it.
    with torch.inference_mode() if inference else torch.no_grad():
        task()


def on_one_core(work: Callable[[], T]) -> T:
    """The result of ``work``, which a thread of its own computes with a single thread inside torch, under ``torch.no_grad()``.

    >>> on_one_core(torch.get_num_threads)
    1
    """
    found: list[T] = []
    run_all([lambda: found.append(work())])
    return found[0]


def share(work: Iterable[Callable[[], None]], workers: int) -> None:
    """Run pieces of work on ``workers`` threads, each taking the next piece when it is done with its last."""
    pieces, lock = iter(work), threading.Lock()

    def task() -> None:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            piece()

    run_all([task] * workers)
