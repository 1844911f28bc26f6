"""Part ``memory`` of ``cpu.py``: growth of the resident memory at its highest during one call, results included, in a process that has made
a short call before. 8 heads of queries on 2 of keys, 64 wide; *ours* is backend ``cpp``, *SDPA* dense (beside causal attention only).
``result`` in a record is what the output and the gradients take of it, ``seconds`` the time of the one call. A million tokens
(``--works window --lengths 1048576``) take 12 GiB.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import measure
import torch
from cases import CASES
from cpu_record import Job, Part, Record, new_record
from cpu_systems import PROGRAM_SHAPE, PROGRAMS, dense, inputs_of

import sparsedsl as sd

__all__ = ["MEMORY"]

WORKS = {"causal": "memory: causal", "window": "memory: window 1024", "moba": "memory: MoBA, 3 of 512", "quest": "memory: Quest"}
WARM = 2048  # tokens of the call before: libraries loaded, threads started


def measure_memory(job: Job) -> Iterator[Record]:
    """Two records: forward, and one forward and backward."""
    declared: Any = (
        CASES[job.work].declare() if job.work in CASES else PROGRAMS[job.work].program(PROGRAM_SHAPE.heads, job.length)
    )
    tensors: list[torch.Tensor] = [*inputs_of(job)]
    q, k, v = tensors
    tensors.append(torch.ones_like(q))  # the gradient of the output
    for train in (False, True):
        record = new_record(job, WORKS[job.work], unit="bytes") | {"train": train, "seconds": {}}
        record["result"] = q.nbytes + train * (q.nbytes + k.nbytes + v.nbytes)
        rivals = {"ours": sd.compile(declared, backend="cpp")} | ({"sdpa": dense} if job.work == "causal" else {})
        for name, run in rivals.items():
            _call(run, [t[:, :, :WARM] for t in tensors], train)
            start = time.perf_counter()
            record["median"][name] = measure.peak_bytes(functools.partial(_call, run, tensors, train))
            record["seconds"][name] = time.perf_counter() - start
        yield record


def _call(run: Any, tensors: list[torch.Tensor], train: bool) -> Any:
    *qkv, grad_out = tensors
    with torch.set_grad_enabled(train):
        leaves = [t.detach().requires_grad_(train) for t in qkv]
        out = run(*leaves)
        return out, torch.autograd.grad(out, leaves, grad_out) if train else ()


MEMORY = Part(works=WORKS, measure=measure_memory, lengths=(32768,), quick_lengths=(4096,), quick=("window", "moba"))
