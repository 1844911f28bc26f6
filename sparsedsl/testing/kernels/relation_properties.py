"""Relations between calls: what a row may not see, how a sequence is cut, how keys are parted.

They need little or no reference, so that they see what the evaluator of masks and a kernel get wrong alike.
"""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import torch

from sparsedsl.lang.symbols import KV_IDX, Q_IDX, Q_LEN
from sparsedsl.testing.call_shapes import tensor
from sparsedsl.testing.kernels.calling import Call, Refused, cotangents, moved, reads, reads_lengths, results, with_gradients
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip, differ, failure
from sparsedsl.testing.kernels.number_properties import needs_lse, needs_pattern, seen_rows
from sparsedsl.testing.kernels.oracle import Exact, Problem

__all__ = ["RELATION_PROPERTIES"]

Tensor = torch.Tensor
_STALE = 1e4


# ---- what a row may not see --------------------------------------------------------------------------------


def _causal(call: Call) -> Failure | None:
    """Everything behind a position is replaced; up to it nothing may move, and no gradient may reach behind it."""
    kernel, problem, case = call.kernel, call.problem, call.case
    first = case.q_offset
    last = min(case.kv_len, first + case.q_len) - 1
    kv = torch.arange(case.kv_len)
    later = problem.allowed & (kv > first + torch.arange(case.q_len)[:, None])
    if bool(later.any()):
        raise Skip("the pattern lets a row see later keys")
    if last < max(first, 0):
        raise Skip("no position has both a query and a key in all cases that were tried")
    before = results(kernel, problem)
    for t in sorted({max(first, 0), (max(first, 0) + last) // 2, last}):
        rows, keys = min(t + 1 - first, case.q_len), t + 1
        behind = {}
        for name, kept in (("q", rows), ("k", keys), ("v", keys)):
            x = getattr(problem, name).clone()
            x[:, :, kept:] = (4 * tensor(*x.shape, seed=case.seed + 5)).to(x)[:, :, kept:]
            behind[name] = x
        other = call.changed(**behind)
        fault = _first_rows(call, before, results(kernel, other), other, rows, t)
        if fault is None and kernel.grad != "none":
            fault = _reaching(call, rows, keys, t)
        if fault:
            return fault
    return None


def _first_rows(
    call: Call, before: dict[str, Tensor], after: dict[str, Tensor], other: Problem, rows: int, t: int
) -> Failure | None:
    for name, value in before.items():
        one, two = value[:, :, :rows], after[name][:, :, :rows]
        if not call.kernel.deterministic:
            fault = expectation(call.kernel, other).fault(name, two, part=(slice(None), slice(None), slice(rows)))
            if fault:
                return failure(fault, f"when q, k and v behind position {t} change, ")
            continue
        place = differ(one, two)
        if place is not None:
            where = tuple(place.tolist())
            return Failure(
                "bits",
                f"{name}{list(where)}, at position {where[2] + call.case.q_offset}, changes from {float(one[where]):.9g} to "
                f"{float(two[where]):.9g} when q, k and v behind position {t} change",
            )
    return None


def _reaching(call: Call, rows: int, keys: int, t: int) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    d_out, d_lse = cotangents(kernel, problem, call.case.seed)
    d_out, d_lse = d_out.clone(), None if d_lse is None else d_lse.clone()
    for x in (d_out, d_lse):
        if x is not None:
            x[:, :, rows:] = 0
    found = with_gradients(kernel, problem, (d_out, d_lse), moved(problem, "qkv")).gradients
    for name, kept in (("dq", rows), ("dk", keys), ("dv", keys)):
        x = found[name]
        if x is not None and bool((x[:, :, kept:] != 0).any()):
            return Failure("number", f"gradients of rows up to position {t} reach {name[1:]} behind it")
    return None


def _poison(call: Call) -> Failure | None:
    """Keys that a row does not see hold NaN, infinity and huge numbers (stale finite ones, if the kernel bears no NaN)."""
    kernel, problem, case = call.kernel, call.problem, call.case
    allowed, group = problem.allowed, case.heads // case.kv_heads
    seen = allowed.unflatten(1, (case.kv_heads, group))  # (batch, key heads, group, rows, keys)
    unseen = ~seen.any(dim=3).any(dim=2)
    if bool(allowed.all()):
        raise Skip("every row sees every key in all cases that were tried")
    before = results(kernel, problem)
    poisons = (float("nan"), float("inf"), 1e30) if kernel.poison else (_STALE,)
    key = _hidden(allowed, case.seed)
    some = torch.zeros_like(unseen)
    some[..., key] = True
    for poison in poisons:
        poison = min(poison, torch.finfo(problem.k.dtype).max) if poison == 1e30 else poison
        for where, name in ((unseen, "keys that nobody sees"), (some, f"key {key}")):
            if not bool(where.any()):
                continue
            dirty = call.changed(**{n: _filled(getattr(problem, n), where, poison) for n in "kv"})
            rows = ~(allowed & where.repeat_interleave(group, 1)[:, :, None]).any(dim=3)
            fault = _kept(call, before, dirty, rows, f"{name} hold{'s' if where is some else ''} {poison}")
            if fault:
                return fault
        if kernel.grad != "none" and bool(unseen.any()):
            fault = _kept_gradients(call, unseen, poison)
            if fault:
                return fault
    return None


def _hidden(allowed: Tensor, seed: int) -> int:
    """A key that some row does not see."""
    keys = (~allowed).flatten(0, 2).any(dim=0).nonzero()[:, 0]
    return int(keys[-1 - seed % len(keys)])


def _filled(x: Tensor, where: Tensor, poison: float) -> Tensor:
    return x.masked_fill(where[..., None].to(x.device), poison)


def _kept(call: Call, before: dict[str, Tensor], dirty: Problem, rows: Tensor, when: str) -> Failure | None:
    got = results(call.kernel, dirty)
    wanted = None if call.kernel.deterministic else expectation(call.kernel, call.problem)
    for name, value in before.items():
        where = rows[..., None] if name == "out" else rows
        if wanted is not None:
            fault = wanted.fault(name, got[name], where=where)
            if fault:
                return failure(fault, f"when {when}, ")
            continue
        place = differ(value, got[name], where)
        if place is not None:
            at = tuple(place.tolist())
            kind = "NaN" if bool(torch.isnan(got[name][at])) else "bits"
            return Failure(
                kind,
                f"{name}{list(at)} changes from {float(value[at]):.9g} to {float(got[name][at]):.9g} when {when}, which that row does "
                "not see",
            )
    return None


def _kept_gradients(call: Call, unseen: Tensor, poison: float) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    asked, names = cotangents(kernel, problem, call.case.seed), moved(problem, kernel.grad)
    dirty = call.changed(**{n: _filled(getattr(problem, n), unseen, poison) for n in "kv"})
    one, two = (with_gradients(kernel, x, asked, names).gradients for x in (problem, dirty))
    wanted = None if kernel.deterministic else expectation(kernel, problem, asked)
    for name, value in one.items():
        other = two[name]
        if value is None or other is None:
            continue
        if wanted is not None:
            fault = wanted.fault(name, other)
            if fault:
                return failure(fault, f"when keys that nobody sees hold {poison}, ")
        elif (place := differ(value, other)) is not None:
            return Failure("bits", f"{name}{place.tolist()} changes when keys that nobody sees hold {poison}")
    return None


# ---- cutting -----------------------------------------------------------------------------------------------


def _cannot_cut(kernel: Kernel) -> str:
    if kernel.is_program:
        return "a program's choices depend on the whole call"
    if kernel.offset is not True and reads(kernel, Q_IDX):
        return "it takes no q_offset, so that rows cannot be given alone"
    return "the pattern reads q_len, the end of each call" if reads(kernel, Q_LEN) else ""


def _cut(call: Call) -> Failure | None:
    """Rows in chunks, and token by token, are rows of the whole; also with keys only up to the last row where nobody looks ahead."""
    kernel, problem, case = call.kernel, call.problem, call.case
    if case.q_len < 2:
        raise Skip("one row cannot be cut")
    wanted, seen = expectation(kernel, problem), seen_rows(kernel, problem)
    ahead = problem.allowed & (torch.arange(case.kv_len) > case.q_offset + torch.arange(case.q_len)[:, None])
    growing = not bool(ahead.any()) and not reads_lengths(kernel) and 0 <= case.q_offset <= case.kv_len - case.q_len
    growing = growing and kernel.offset is True
    t = (kernel.tiles or (case.q_len // 2 + 1,))[0]
    chunks = (1, max(t - 1, 1), t, t + 1)[case.seed % 4]
    for plan, length, grows in (("chunks", chunks, False), ("token by token", 1, growing)):
        for start in range(0, case.q_len, length):
            rows = slice(start, min(start + length, case.q_len))
            end = case.q_offset + rows.stop if grows else case.kv_len
            part = call.changed(
                q=problem.q[:, :, rows], k=problem.k[:, :, :end], v=problem.v[:, :, :end], q_offset=case.q_offset + start
            )
            for name, got in results(kernel, part).items():
                where = None if seen is None else seen[:, :, rows]
                where = where[..., None] if where is not None and name == "out" else where
                fault = wanted.fault(name, got, part=(slice(None), slice(None), rows), where=where)
                if fault:
                    return failure(fault, f"{plan}: of rows {rows.start} to {rows.stop - 1} given alone with {end} keys, ")
    return None


def _cannot_merge(kernel: Kernel) -> str:
    if kernel.is_program or kernel.implements.sink is not None:
        return "parts of keys with a sink, or of a program, have no simple merge"
    if kernel.offset is not True and reads(kernel, Q_IDX, KV_IDX):
        return "it takes no q_offset, so that parts of the keys cannot be given alone"
    return needs_lse(kernel) or ("the pattern reads lengths" if reads_lengths(kernel) else "")


def _merge(call: Call) -> Failure | None:
    """Any parts of the keys, each attended to alone, merged by their LSE in float64, are the whole."""
    kernel, problem, case = call.kernel, call.problem, call.case
    wanted, drawn = expectation(kernel, problem), Random(case.seed)
    cuts = sorted({0, case.kv_len, *(drawn.randint(1, case.kv_len) for _ in range(1 + case.seed % 3))})
    if len(cuts) < 3:
        raise Skip("one key cannot be parted")
    outs, levels = [], []
    for start, end in itertools.pairwise(cuts):
        part = call.changed(k=problem.k[:, :, start:end], v=problem.v[:, :, start:end], q_offset=case.q_offset - start)
        if not _renumbered(problem, part, start, end):
            raise Skip("keys of this pattern cannot be numbered anew")
        if kernel.empty != "zero" and not bool(part.allowed.any(dim=3).all()):
            raise Skip("a part has rows without keys")
        try:
            got = results(kernel, part)
        except Refused:
            if part.q_offset < 0:
                raise Skip("the kernel refuses parts that lie behind a row") from None
            raise
        outs.append(got["out"].double().cpu())
        levels.append(got["lse"].double().cpu())
    lse = torch.logsumexp(torch.stack(levels), dim=0)
    weights = torch.exp(torch.stack(levels) - lse.masked_fill(torch.isinf(lse), 0.0))[..., None]
    out = (weights * torch.stack(outs)).sum(dim=0)
    # a part's own roundings are no larger than those of the whole, but for one more of its output
    for name, merged in (("lse", lse), ("out", out)):
        fault = wanted.fault(name, merged, wanted=wanted.values[name])
        if fault:
            return failure(fault, f"keys parted at {cuts[1:-1]} and merged by their LSE: ")
    return None


def _renumbered(problem: Problem, part: Problem, start: int, end: int) -> bool:
    if not torch.equal(problem.allowed[..., start:end], part.allowed):
        return False
    if not problem.pattern.has_score:
        return True
    whole, alone = Exact(problem), Exact(part)
    return torch.equal(torch.where(whole.seen, whole.scores, 0.0)[..., start:end], torch.where(alone.seen, alone.scores, 0.0))


def _rows(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    return {"offset_at_end": drawn.random() < 0.7}


def _plain(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    return {"values": "normal"}


RELATION_PROPERTIES = {
    "CAUS": KernelProperty("CAUS", "nothing up to a position moves with what is behind it", _causal, needs_pattern, _plain, 0.4),
    "POIS": KernelProperty("POIS", "what a row does not see has no effect on it", _poison, needs_pattern, _plain, 0.4),
    "CUT": KernelProperty("CUT", "chunks and single tokens give the rows of the whole", _cut, _cannot_cut, _rows, 0.3),
    "MERGE": KernelProperty("MERGE", "parts of the keys merged by their LSE give the whole", _merge, _cannot_merge, share=0.4),
}
