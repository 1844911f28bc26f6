"""What must hold of kernels on packed sequences and on pages: every sequence gives what it gives alone, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import torch

from sparsedsl.lang.symbols import BATCH
from sparsedsl.testing.kernels.calling import Call, call_packed, call_paged, reads
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip, differ, failure
from sparsedsl.testing.kernels.number_properties import seen_rows
from sparsedsl.testing.kernels.oracle import Problem
from sparsedsl.testing.kernels.packing import PAGED, VARLEN, Part, cut_pages

__all__ = ["PACKED_PROPERTIES"]

Tensor = torch.Tensor


def _lengths(case_len: int, count: int, drawn: Random, empty: int | None) -> list[int]:
    """Lengths of up to ``case_len``, of which one is 0."""
    found = [drawn.choice((case_len, case_len, max(case_len - 1, 1), 1, drawn.randint(1, case_len))) for _ in range(count)]
    if empty is not None:
        found[empty] = 0
    return found


def _parts(problem: Problem, q_lens: list[int], kv_lens: list[int]) -> list[Part]:
    """The first rows and keys of every entry."""
    return [
        Part(problem.q[i, :, :rows], problem.k[i, :, :keys], problem.v[i, :, :keys])
        for i, (rows, keys) in enumerate(zip(q_lens, kv_lens, strict=True))
    ]


def _alone(kernel: Kernel, problem: Problem, part: Part) -> Problem:
    """The call of one sequence."""
    offset = part.k.shape[1] - part.q.shape[1] if kernel.offset == "last" else problem.q_offset
    return Problem(problem.pattern, part.q[None], part.k[None], part.v[None], problem.tables, offset, problem.scale)


def _off(kernel: Kernel, problem: Problem, part: Part, out: Tensor, lse: Tensor | None, before: str) -> Failure | None:
    """Whether what a sequence gives among others is what it must give alone."""
    if part.q.shape[1] == 0:
        return None
    if part.k.shape[1] == 0:
        return _keyless(kernel, problem, out, before)
    alone = _alone(kernel, problem, part)
    wanted, rows = expectation(kernel, alone), seen_rows(kernel, alone)
    for name, got in (("out", out), ("lse", lse)):
        if got is not None:
            where = rows[..., None] if rows is not None and name == "out" else rows
            fault = wanted.fault(name, got[None], where=where)
            if fault:
                return failure(fault, before)
    return None


def _keyless(kernel: Kernel, problem: Problem, out: Tensor, before: str) -> Failure | None:
    """A sequence without keys has rows of 0, as declared."""
    if kernel.empty != "zero" or not bool((out != 0).any()):
        return None
    place = (out != 0).nonzero()[0].tolist()
    return Failure("number", f"{before}out{place} is {float(out[tuple(place)]):.6g}, wanted 0: the sequence has no keys")


def _sequences(call: Call) -> Iterator[tuple[list[int], list[int]]]:
    """Lengths of queries and of keys: uneven ones, and such that the first, the last or one in the middle is empty."""
    kernel, case, drawn = call.kernel, call.case, Random(call.case.seed)
    places = [None, 0, case.batch - 1, case.batch // 2] if kernel.lengths in (None, "square") else [None]
    for empty in dict.fromkeys(places):
        if kernel.lengths not in (None, "square"):
            yield [case.q_len] * case.batch, [case.kv_len] * case.batch
            continue
        q_lens = _lengths(case.q_len, case.batch, drawn, empty)
        if kernel.lengths == "square":
            yield q_lens, list(q_lens)
        else:
            yield q_lens, _lengths(case.kv_len, case.batch, drawn, empty)
            if empty is not None and kernel.empty != "refuse":
                yield _lengths(case.q_len, case.batch, drawn, None), _lengths(case.kv_len, case.batch, drawn, empty)


def _varlen(call: Call) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    if call.case.batch < 2:
        raise Skip("one sequence has no neighbour")
    for q_lens, kv_lens in _sequences(call):
        if not sum(q_lens) or not sum(kv_lens):
            continue
        parts = _parts(problem, q_lens, kv_lens)
        before = f"in sequences of {q_lens} queries and {kv_lens} keys, "
        found = call_packed(kernel, problem, parts, guard=call.case.seed)
        for number, (part, (out, lse)) in enumerate(zip(parts, found, strict=True)):
            fault = _off(kernel, problem, part, out, lse, f"{before}sequence {number}: ")
            if fault:
                return fault
    return None


def _paged(call: Call) -> Failure | None:
    kernel, case, problem = call.kernel, call.case, call.problem
    drawn = Random(case.seed)
    shared = case.batch > 1 and case.seed % 2 == 0
    if shared:  # a prompt that two entries have in common
        k, v = problem.k.clone(), problem.v.clone()
        k[1], v[1] = k[0], v[0]
        problem = replace(problem, k=k, v=v)
    lengths = _lengths(case.kv_len, case.batch, drawn, None) if kernel.lengths is None else [case.kv_len] * case.batch
    parts = _parts(problem, [case.q_len] * case.batch, lengths)
    first: list[Any] = []
    for size in kernel.page_sizes:
        both = shared and min(lengths[:2]) >= size
        for seed in (case.seed, case.seed + 1):
            pages = cut_pages(parts, size, seed=seed, poison=kernel.poison, shared=both)
            before = f"in pages of {size}, with {lengths} keys and the table {pages.table.tolist()}, "
            found = call_paged(kernel, problem, parts, pages)
            for number, (part, (out, lse)) in enumerate(zip(parts, found, strict=True)):
                fault = _off(kernel, problem, part, out, lse, f"{before}entry {number}: ")
                if fault:
                    return fault
                if kernel.deterministic and seed != case.seed:
                    place = differ(first[number], out)
                    if place is not None:
                        return Failure("bits", f"{before}out{[number, *place.tolist()]} depends on which pages hold the keys")
            first = [out for out, _ in found]
    return None


def _unfit(packing: str, what: str) -> Any:
    def why(kernel: Kernel) -> str:
        if kernel.packing != packing:
            return f"it takes no {what}"
        if kernel.tables or reads(kernel, BATCH):
            return "the pattern reads tables, or which entry of the batch it is: it says something else of a sequence alone"
        return ""

    return why


def _wish(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    return {"memory": "packed", "batch": drawn.choice((2, 3, 3, 4))}


PACKED_PROPERTIES = {
    "VARLEN": KernelProperty(
        "VARLEN", "each packed sequence gives what it gives alone, empty neighbours or not", _varlen,
        unfit=_unfit(VARLEN, "packed sequences (cu_seqlens)"), wish=_wish, share=0.4,
    ),
    "PAGE": KernelProperty(
        "PAGE", "the same whichever pages hold the keys, and whatever stands where nobody's keys are", _paged,
        unfit=_unfit(PAGED, "pages (block_table)"), wish=_wish, share=0.4,
    ),
}  # fmt: skip
