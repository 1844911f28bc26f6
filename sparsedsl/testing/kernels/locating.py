"""A guess at what is wrong: the first of a list of known faults that gives all of a kernel's numbers.

Each hypothesis is an oracle that makes the fault. One counts only if it explains the case that was found first as well as the smallest one,
where they differ: in the smallest many faults look alike.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator

import torch

from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.kernels.calling import Broken, Refused, changed, cotangents, made, moved, results, with_gradients
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.findings import Failure
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.oracle import Bent, Exact, Gradients, Problem

__all__ = ["guess"]

Tensor = torch.Tensor
_OUT = ("NUM", "MASS", "STRIDE", "CUT", "EMPTY", "FULL", "SHIFT", "PERM", "BATCH", "MERGE")


def guess(kernel: Kernel, name: str, cases: tuple[KernelCase, ...], failed: Failure) -> str:
    """What a kernel does in place of what it should, in words, or ""."""
    if kernel.is_program or failed.kind not in ("number", "NaN", "infinite"):
        return ""
    what = failed.fault.name if failed.fault is not None else "out"
    if name == "LSE" or what == "lse":
        return _first(kernel, tuple(dict.fromkeys(cases)), _lse_faults, "lse")
    if name == "GRAD":
        return _gradient_guess(kernel, cases, what)
    return _first(kernel, tuple(dict.fromkeys(cases)), _out_faults, "out") if name in _OUT else ""


def _first(
    kernel: Kernel, cases: tuple[KernelCase, ...], faults: Callable[[Kernel, Problem], Iterator[tuple[str, Tensor]]], name: str
) -> str:
    """The first hypothesis that explains every case; else the first that explains the smallest."""
    explained: list[list[str]] = []
    for case in cases:
        problem = made(kernel, case).problem
        try:
            got = results(kernel, problem).get(name)
        except (Broken, Refused):
            continue
        if got is None:
            return ""
        wanted = expectation(kernel, problem)
        if wanted.fault(name, got) is None:
            continue
        explained.append([words for words, other in faults(kernel, problem) if _same(wanted.allowed(name), got, other)])
    return _common(explained)


def _common(explained: list[list[str]]) -> str:
    """The first words of the first list that stand in every list, whatever the lengths of its case."""
    known = [{_without_numbers(words) for words in found} for found in explained]
    first = explained[0] if explained else []
    return next((words for words in first if all(_without_numbers(words) in other for other in known)), "")


def _without_numbers(words: str) -> str:
    """Without those numbers that follow from the lengths and widths of a case; sizes of tiles and numbers of heads do not."""
    return re.sub(r"\d+\.\.\d+|D = \d+ in place of \d+|^\d+ keys behind", "#", words)


def _same(allowed: Tensor, got: Tensor, other: Tensor) -> bool:
    """Whether a result is that of a hypothesis, within the tolerance of the right one (twice it: the faulty sum rounds too)."""
    got = got.double().cpu()
    if got.shape != other.shape or bool((torch.isnan(got) != torch.isnan(other)).any()):
        return False
    off = torch.where(torch.isfinite(other), (got - other).abs(), torch.where(got == other, 0.0, math.inf))
    off = torch.where(torch.isnan(other), 0.0, off)
    return bool((off <= 2 * allowed + 1e-3 * other.abs().nan_to_num(0.0, 0.0, 0.0) * (allowed > 0)).all())


# ---- outputs -----------------------------------------------------------------------------------------------


def _out_faults(kernel: Kernel, problem: Problem) -> Iterator[tuple[str, Tensor]]:
    shape = (*problem.q.shape[:3], problem.v.shape[3])
    yield "all of it is 0", torch.zeros(shape, dtype=torch.float64)
    yield "all of it is NaN", torch.full(shape, math.nan, dtype=torch.float64)
    exact = Exact(problem)
    for words, bent, other in _bent(kernel, problem):
        faulty = Exact(other, bent)
        yield words, faulty.out
        emptied = faulty.empty & ~exact.empty
        if bool(emptied.any()):  # a sum of nothing, divided by 0
            yield words, faulty.out.masked_fill(emptied[..., None], math.nan)
    yield from _unscaled_sums(kernel, exact)


def _bent(kernel: Kernel, problem: Problem) -> Iterator[tuple[str, Bent, Problem]]:
    yield from _heads(problem)
    yield from _scales(problem)
    case, tiles = problem.shape, kernel.tiles or (16, 16)
    if problem.pattern.sink is not None:
        yield "the sink is left out", Bent(sink=False), problem
        for words, factor in (("multiplied by the scale", problem.factor), ("divided by ln 2", 1 / math.log(2))):
            yield f"the sink is {words}", Bent(sink_factor=factor), problem
    if problem.pattern.has_score:
        yield "the modification of the score is left out", Bent(score=False), problem
        yield "positions of rows in the score count from the first row, without q_offset", Bent(shift=-problem.q_offset), problem
    yield from _tables(problem)
    for size in dict.fromkeys((tiles[1], 16, 32, 64, 128)):
        last = (case.kv_len - 1) // size * size
        if case.kv_len % size:
            words = f"keys {last}..{case.kv_len - 1}, the last partial tile of {size}, are missing"
            yield words, Bent(keep=_without(last, case.kv_len)), problem
        yield (
            f"keys {last}..{case.kv_len - 1}, the last tile of {size}, are missing",
            Bent(keep=_without(last, case.kv_len)),
            problem,
        )
        for start in range(0, case.kv_len, size) if size == tiles[1] and case.kv_len <= 40 * size else ():
            end = min(start + size, case.kv_len)
            yield (
                f"keys {start}..{end - 1} are missing (tile {start // size} of {size})",
                Bent(keep=_without(start, end)),
                problem,
            )
    ends = {"the last key is missing": case.kv_len - 1, "the first key is missing": 0}
    for words, key in ends.items():
        yield words, Bent(keep=_without(key, key + 1)), problem
    yield "the key at a row's own position is missing", Bent(keep=lambda allowed: allowed & ~_own(case)), problem
    yield from _masks(problem)
    pad = -case.kv_len % tiles[1]
    if pad:
        yield f"{pad} keys behind the last one count, with a logit of 0", Bent(stray=pad), problem


def _heads(problem: Problem) -> Iterator[tuple[str, Bent, Problem]]:
    case = problem.shape
    heads = torch.arange(case.heads)
    if case.kv_heads > 1:
        yield "head h reads key head h % Hk (wanted h // (H / Hk))", Bent(heads=heads % case.kv_heads), problem
        yield "head h reads key head min(h, Hk - 1)", Bent(heads=heads.clamp_max(case.kv_heads - 1)), problem
        for head in range(case.kv_heads):
            yield f"every head reads key head {head}", Bent(heads=torch.full_like(heads, head)), problem


def _scales(problem: Problem) -> Iterator[tuple[str, Bent, Problem]]:
    case = problem.shape
    factor, width, width_v = problem.factor, case.head_dim, case.head_dim_v
    yield "the scale is left out", Bent(factor=1 / factor), problem
    yield "the scale is used twice", Bent(factor=factor), problem
    yield "logits are multiplied by 1 / ln 2 (base 2)", Bent(factor=1 / math.log(2)), problem
    yield "logits are multiplied by ln 2 (base 2)", Bent(factor=math.log(2)), problem
    if width_v != width:
        yield "the scale is that of the width of v", Bent(factor=width_v**-0.5 / factor), problem
    padded = 1 << (width - 1).bit_length()
    for size in dict.fromkeys((padded, max(16, padded), 4 * -(-width // 4), 64, 128)):
        if size != width:
            yield f"the scale is that of D = {size} in place of {width}", Bent(factor=size**-0.5 / factor), problem
    yield "the scale of the call is ignored: it is D ** -0.5", Bent(factor=width**-0.5 / factor), problem


def _tables(problem: Problem) -> Iterator[tuple[str, Bent, Problem]]:
    """Tables whose first entry is read for all of an axis."""
    for name, table in problem.tables.items():
        for axis, size in enumerate(table.shape):
            if 1 < size <= max(problem.shape.batch, problem.shape.heads):
                first = table.narrow(axis, 0, 1).expand(table.shape)
                yield f"{name} is read at 0 along axis {axis}", Bent(), changed(problem, tables={**problem.tables, name: first})


def _masks(problem: Problem) -> Iterator[tuple[str, Bent, Problem]]:
    case = problem.shape
    yield "there is no mask", Bent(keep=torch.ones_like), problem
    positions = {"0 (top-left alignment)": 0, "kv_len - q_len (bottom-right alignment)": case.kv_len - case.q_len}
    for words, offset in positions.items():
        if offset != case.q_offset:
            other = changed(problem, q_offset=offset).allowed
            yield f"rows stand at {words} in the mask", Bent(keep=functools.partial(_instead, other)), problem
    for step, words in ((1, "later"), (-1, "earlier")):
        moved = _shifted(problem, step)
        yield f"the mask is shifted by one key to {words} ones", Bent(keep=functools.partial(_instead, moved)), problem
        yield f"the mask allows one key more at its {words} end", Bent(keep=functools.partial(torch.logical_or, moved)), problem
        end = "earlier" if step > 0 else "later"
        yield f"the mask allows one key less at its {end} end", Bent(keep=functools.partial(torch.logical_and, moved)), problem


def _instead(mask: Tensor, allowed: Tensor) -> Tensor:
    return mask


def _shifted(problem: Problem, step: int) -> Tensor:
    """The mask with the row's position moved against the keys': what (q, k - step) may see.

    At the end where there is no key ``k - step``, what the row ``step`` further sees of ``k``: the same, where a pattern reads no tables.
    """
    found, end = torch.roll(problem.allowed, step, dims=3), 0 if step > 0 else -1
    if problem.pattern.tables:
        found[..., end] = False
    else:
        found[..., end] = changed(problem, q_offset=problem.q_offset + step).allowed[..., end]
    return found


def _without(start: int, end: int) -> Callable[[Tensor], Tensor]:
    def keep(allowed: Tensor) -> Tensor:
        found = allowed.clone()
        found[..., start:end] = False
        return found

    return keep


def _own(case: AttentionCase) -> Tensor:
    return torch.arange(case.kv_len) == torch.arange(case.q_len)[:, None] + case.q_offset


def _unscaled_sums(kernel: Kernel, exact: Exact) -> Iterator[tuple[str, Tensor]]:
    """Sums whose earlier terms are not rescaled as the maximum grows."""
    size = (kernel.tiles or (16, 16))[1]
    scores = exact.scores[..., : exact.keys]
    if exact.keys <= size:
        return
    peaks = torch.stack([part.amax(dim=3) for part in scores.split(size, dim=3)], dim=3).cummax(dim=3).values
    known = peaks.repeat_interleave(size, dim=3)[..., : exact.keys]
    terms = torch.where(exact.seen[..., : exact.keys], torch.exp(scores - known), 0.0)
    plain = torch.exp(scores - exact.peak[..., None])
    v = exact.v[:, :, : exact.keys]
    total, stale = plain.sum(dim=3, keepdim=True), terms.sum(dim=3, keepdim=True)
    yield "the sum of p v is not rescaled when the maximum grows", terms @ v / total
    yield "the sum of p is not rescaled when the maximum grows", plain @ v / stale
    yield "neither sum is rescaled when the maximum grows", terms @ v / stale


# ---- LSE ---------------------------------------------------------------------------------------------------


def _lse_faults(kernel: Kernel, problem: Problem) -> Iterator[tuple[str, Tensor]]:
    exact = Exact(problem)
    yield "the LSE is in base 2", exact.lse / math.log(2)
    yield "the LSE is multiplied by ln 2", exact.lse * math.log(2)
    yield "the maximum is not added to the LSE", exact.lse - exact.peak
    yield "the LSE is the maximum alone", exact.peak.masked_fill(exact.empty, -math.inf)
    yield "the LSE has the other sign", -exact.lse
    yield "the LSE is the sum, without its log", torch.exp(exact.lse)
    for words, bent, other in _bent(kernel, problem):
        yield words, Exact(other, bent).lse


# ---- gradients ---------------------------------------------------------------------------------------------


def _gradient_guess(kernel: Kernel, cases: tuple[KernelCase, ...], what: str) -> str:
    explained: list[list[str]] = []
    for case in dict.fromkeys(cases):
        problem = made(kernel, case).problem
        try:
            found = with_gradients(kernel, problem, cotangents(kernel, problem, case.seed), moved(problem, kernel.grad))
        except (Broken, Refused):
            continue
        wanted = expectation(kernel, problem, found.asked)
        got = found.gradients.get(what)
        if got is None or wanted.fault(what, got) is None:
            continue
        wrong = _gradient_faults(problem, found.asked, what)
        explained.append([words for words, other in wrong if _same(wanted.allowed(what), got, other)])
    return _common(explained)


def _gradient_faults(problem: Problem, asked: tuple[Tensor, Tensor | None], what: str) -> Iterator[tuple[str, Tensor]]:
    exact = Exact(problem)
    right = exact.gradients(*asked)
    value = right.values[what]
    yield f"{what} is 0", torch.zeros_like(value)
    yield f"{what} has the other sign", -value
    if asked[1] is not None:
        yield "the cotangent of the LSE is ignored", exact.gradients(asked[0], None).values[what]
        yield "the cotangent of the LSE has the wrong sign", exact.gradients(asked[0], -asked[1]).values[what]
    if what in ("dq", "dk"):
        yield f"{what} is not multiplied by the scale", value / exact.scale
        yield f"{what} is multiplied by the scale twice", value * exact.scale
    bare = exact.gradients(*asked)
    bare.mean = torch.zeros_like(bare.mean)
    bare.d_scores = exact.weights * (bare.d_weights + (0.0 if asked[1] is None else asked[1].double().cpu()[..., None]))
    yield "the mean of dP (delta, the sum of dO o) is not subtracted", bare.values[what]
    if problem.pattern.has_score:
        plain = exact.gradients(*asked)
        plain.__dict__["d_logits"] = plain.d_scores[..., : exact.keys]
        yield "the slope of the modified score is missing", plain.values[what]
    group = problem.q.shape[1] // problem.k.shape[1]
    if group > 1 and what in ("dk", "dv"):
        for words, offset in (("first", 0), ("last", group - 1)):
            yield f"{what} comes from the {words} head of each group alone", _one_head(exact, right, what, offset)
    for words, bent, other in _scales_and_masks(problem):
        yield words, Exact(other, bent).gradients(*asked).values[what]


def _one_head(exact: Exact, right: Gradients, what: str, offset: int) -> Tensor:
    group = exact.problem.q.shape[1] // exact.problem.k.shape[1]
    if what == "dk":
        whole = right.d_logits.transpose(-1, -2) @ exact.q * exact.scale
    else:
        whole = (exact.weights.transpose(-1, -2) @ right.d_out)[:, :, : exact.keys]
    return whole[:, offset::group]


def _scales_and_masks(problem: Problem) -> Iterator[tuple[str, Bent, Problem]]:
    yield from ((f"in the backward pass, {words}", bent, other) for words, bent, other in _masks(problem))
    yield from ((f"in the backward pass, {words}", bent, other) for words, bent, other in _heads(problem))
