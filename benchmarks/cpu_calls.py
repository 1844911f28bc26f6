"""Part ``calls`` of ``cpu.py``: what a call takes beside its compiled passes. One head, one thread, sizes at which passes do little.

*ours* is the whole call of backend ``cpp``, checks included; the goal is for what is left of it without the passes, which are timed
where Python calls them (``passes_s`` in the record; what ctypes does with arguments counts as pass). *SDPA* is one of the same size.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from cpu_record import Job, Part, Record, judge, new_record
from measure import median
from torch.nn.functional import scaled_dot_product_attention

import sparsedsl as sd
from sparsedsl import patterns
from sparsedsl.backends.cpp import libraries

__all__ = ["CALLS"]

CALLS_A_ROUND = 200
WORKS = {
    "pattern": "call: window 8", "pattern_step": "step: window 8", "program": "call: window 8 or top 2 of 4",
    "program_step": "step: window 8 or top 2 of 4",
}  # fmt: skip
# Goals, in microseconds.
GOALS = {"pattern": 60.0, "pattern_step": 60.0, "program": 150.0, "program_step": 150.0}
CALLBACKS = ("ends", "mask", "score", "slope", "gains", "sink")  # of a pattern: passes call them by address


class _Watched:
    """A compiled function with a clock around it."""

    seconds = 0.0  # of all of them
    seen = 0

    def __init__(self, function: Any) -> None:
        self.__dict__["function"] = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["function"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["function"], name, value)  # types of arguments and results

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*arguments)
        _Watched.seconds += time.perf_counter() - start
        _Watched.seen += 1
        return result


class _Library:
    """A library whose passes are watched."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)
        if name in CALLBACKS:
            return function
        watched = _Watched(function)
        setattr(self, name, watched)  # as ctypes does: the same object the next time
        return watched


@functools.cache
def watch_libraries() -> None:
    """From here on, in this process; what was loaded before is not seen."""
    load = libraries.library
    libraries.library = lambda *words: _Library(load(*words))  # type: ignore[assignment]


def measure_calls(job: Job) -> Iterator[Record]:
    """One record."""
    watch_libraries()
    torch.set_num_threads(1)
    window = patterns.sliding_window(8)
    top = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2)
    declared: Any = window if job.work.startswith("pattern") else sd.attend(patterns.causal() & (window | top))
    step = job.work.endswith("step")
    q, k, v = (torch.randn(1, 1, job.length, job.dim).to(getattr(torch, job.dtype)) for _ in range(3))
    q, offset = (q[:, :, -1:].contiguous(), job.length - 1) if step else (q, 0)
    ours = functools.partial(sd.compile(declared, backend="cpp"), q, k, v, q_offset=offset)
    dense = functools.partial(scaled_dot_product_attention, q, k, v, is_causal=not step)
    totals, passes, theirs = list[float](), list[float](), list[float]()
    with torch.no_grad():
        ours()
        dense()
        for _ in range(job.rounds):
            _Watched.seconds, _Watched.seen = 0.0, 0
            totals.append(_seconds_a_call(ours))
            passes.append(_Watched.seconds / CALLS_A_ROUND)
            if not _Watched.seen:
                raise RuntimeError("no compiled pass was seen: how backend cpp calls them has changed")
            theirs.append(_seconds_a_call(dense))
    record = new_record(job, WORKS[job.work])
    record["median"] = {"ours": median(totals), "sdpa": median(theirs)}
    record |= {"best": {"ours": min(totals), "sdpa": min(theirs)}, "rounds": {"ours": job.rounds}, "passes_s": median(passes)}
    record["beside_passes_s"] = median(total - inside for total, inside in zip(totals, passes, strict=True))
    judge(record, "us beside passes", record["beside_passes_s"] * 1e6, at_most=GOALS[job.work])
    yield record


def _seconds_a_call(call: Any) -> float:
    start = time.perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return (time.perf_counter() - start) / CALLS_A_ROUND


CALLS = Part(
    works=WORKS, measure=measure_calls, lengths=(16,), quick_lengths=(16,), quick=tuple(WORKS), dims=(16,), rounds=15,
)  # fmt: skip
