"""Entries of a batch, heads and keys that are put in another order, given alone, or moved by one vector."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch

from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX
from sparsedsl.testing.call_shapes import tensor
from sparsedsl.testing.kernels.calling import Call, changed, reads, results
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip, differ, failure
from sparsedsl.testing.kernels.number_properties import needs_pattern, seen_rows
from sparsedsl.testing.kernels.oracle import Problem

__all__ = ["ORDER_PROPERTIES"]


def _batch(call: Call) -> Failure | None:
    """An entry alone gives what it gives among others; NaN in a neighbour has no effect on it."""
    kernel, problem, case = call.kernel, call.problem, call.case
    if case.batch < 2:
        raise Skip("one entry has no neighbour")
    whole, chosen = results(kernel, problem), case.seed % case.batch
    wanted = expectation(kernel, problem)
    alone = {n: getattr(problem, n)[chosen : chosen + 1] for n in "qkv"}
    if not reads(kernel, BATCH) and not kernel.is_program:
        for name, got in results(kernel, call.changed(**alone)).items():
            place = differ(whole[name][chosen : chosen + 1], got) if kernel.batch_invariant else None
            if place is not None:
                return Failure("bits", f"{name} of entry {chosen} is other bits alone than among {case.batch} entries")
            fault = wanted.fault(name, got, part=slice(chosen, chosen + 1))
            if fault:
                return failure(fault, f"entry {chosen} alone: ")
    if kernel.is_program or case.memory == "expanded":
        return None
    others = torch.arange(case.batch) != chosen
    dirty = {n: getattr(problem, n).masked_fill(others[:, None, None, None].to(problem.q.device), float("nan")) for n in "qkv"}
    for name, got in results(kernel, call.changed(**dirty)).items():
        one, two = whole[name][chosen], got[chosen]
        if kernel.deterministic and differ(one, two) is not None:
            return Failure("bits", f"{name} of entry {chosen} changes when its neighbours hold NaN")
        fault = wanted.fault(name, two, part=chosen)
        if fault:
            return failure(fault, f"entry {chosen} beside neighbours of NaN: ")
    return None


def _order(call: Call) -> Failure | None:
    """Entries, heads and (where all see all) keys in another order, and key heads written out, as far as the pattern ignores them."""
    kernel, problem, case = call.kernel, call.problem, call.case
    wanted, drawn = expectation(kernel, problem), torch.Generator().manual_seed(case.seed)
    done = False
    for what, other, part in _orders(kernel, problem, drawn):
        done = True
        got = results(kernel, other)
        for name, value in got.items():
            fault = wanted.fault(name, value, part=part)
            if fault:
                return failure(fault, f"{what}: ")
    if not done:
        raise Skip("nothing to put in another order in all cases that were tried")
    return None


def _orders(kernel: Kernel, problem: Problem, drawn: torch.Generator) -> Iterator[tuple[str, Problem, Any]]:
    case = problem.shape
    q, k, v = problem.q, problem.k, problem.v
    if case.batch > 1 and not reads(kernel, BATCH):
        order = torch.randperm(case.batch, generator=drawn)
        yield "batch entries in another order", changed(problem, q=q[order], k=k[order], v=v[order]), order
    group = case.heads // case.kv_heads
    if case.heads > 1 and not reads(kernel, HEAD):
        kv_order = torch.randperm(case.kv_heads, generator=drawn)
        order = torch.cat([torch.randperm(group, generator=drawn) + group * int(head) for head in kv_order])
        yield "heads in another order", changed(problem, q=q[:, order], k=k[:, kv_order], v=v[:, kv_order]), (slice(None), order)
    if case.kv_len > 1 and not reads(kernel, KV_IDX):
        order = torch.randperm(case.kv_len, generator=drawn)
        yield "keys in another order", changed(problem, k=k[:, :, order], v=v[:, :, order]), ...
    if group > 1 and (kernel.group is None or 1 in kernel.group):
        copied = (x.repeat_interleave(group, 1) for x in (k, v))
        yield "key heads written out", changed(problem, k=next(copied), v=next(copied)), ...


def _shift(call: Call) -> Failure | None:
    """One vector added to every key moves the LSE and not the output; twice the scale and half of q are the same call."""
    kernel, problem, case = call.kernel, call.problem, call.case
    rows = seen_rows(kernel, problem)
    if kernel.scale and case.dtype != "float16":
        half = call.changed(q=problem.q / 2, scale=2 * problem.factor)
        wanted = expectation(kernel, problem)
        for name, got in results(kernel, half).items():
            where = rows[..., None] if rows is not None and name == "out" else rows
            fault = wanted.fault(name, got, where=where)
            if fault:
                return failure(fault, "with twice the scale and half of q, ")
    w = tensor(case.head_dim, seed=case.seed).mul(4).round().div(4).to(problem.q)
    k = problem.k.mul(4).round().div(4).clamp(-8, 8)  # sums of these are exact in every dtype
    q = problem.q.mul(4).round().div(4).clamp(-8, 8)
    one, two = call.changed(q=q, k=k), call.changed(q=q, k=k + w)
    given = [results(kernel, x) for x in (one, two)]
    wanted, other = expectation(kernel, one), expectation(kernel, two)
    moves = problem.factor * (q.double().cpu() @ w.double().cpu())
    for name in given[0]:
        where = rows[..., None] if rows is not None and name == "out" else rows
        for words, expected, results_of in (("", wanted, given[0]), ("with one vector added to all keys, ", other, given[1])):
            fault = expected.fault(name, results_of[name], where=where)
            if fault is not None and fault.kind != "number":  # of which no difference can be made
                return failure(fault, words)
        added = moves if name == "lse" else 0.0
        off = (given[1][name].double().cpu() - given[0][name].double().cpu() - added).abs()
        off = torch.where(torch.isfinite(wanted.values[name]), off, 0.0)
        if where is not None:
            off = torch.where(where, off, 0.0)
        excess = off / (wanted.allowed(name) + other.allowed(name))
        if float(excess.max()) > 1:
            return Failure("number", f"{name} is off by {float(off.max()):.3g} when one vector is added to all keys")
    return None


def _several(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    return {"batch": drawn.choice((2, 2, 3))}


def _plain(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    return {"values": "normal", "batch": drawn.choice((1, 2))}


def _no_scores(kernel: Kernel) -> str:
    changed_scores = not kernel.is_program and (kernel.implements.has_score or kernel.implements.sink is not None)
    return needs_pattern(kernel) or ("scores are modified" if changed_scores else "")


ORDER_PROPERTIES = {
    "BATCH": KernelProperty("BATCH", "an entry does not depend on those beside it", _batch, wish=_several, share=0.2),
    "PERM": KernelProperty("PERM", "entries, heads and keys may come in another order", _order, needs_pattern, _plain, 0.3),
    "SHIFT": KernelProperty("SHIFT", "a vector added to all keys moves the LSE alone", _shift, _no_scores, _plain, 0.2),
}
