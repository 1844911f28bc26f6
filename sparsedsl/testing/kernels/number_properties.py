"""Numbers against the oracle: outputs, the LSE, gradients, what weights add up to, and rows without keys."""

from __future__ import annotations

from random import Random
from typing import Any

import torch

from sparsedsl.testing.kernels.calling import Call, cotangents, moved, results, with_gradients
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import Fault, expectation
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip, differ, failure
from sparsedsl.testing.kernels.oracle import Problem
from sparsedsl.testing.kernels.values import fill

__all__ = ["NUMBER_PROPERTIES", "needs_gradients", "needs_lse", "needs_pattern", "seen_rows"]

Tensor = torch.Tensor


def needs_lse(kernel: Kernel) -> str:
    """Why a kernel has no LSE to look at."""
    return "" if kernel.lse else "it gives no LSE (lse=True says that it does)"


def needs_gradients(kernel: Kernel) -> str:
    """Why a kernel has no gradients to look at."""
    return "" if kernel.grad != "none" else "it has no gradients (grad='qkv' says that it has)"


def needs_pattern(kernel: Kernel) -> str:
    """Why who sees whom is not known before a call."""
    return "a program chooses what is seen at the call" if kernel.is_program else ""


def seen_rows(kernel: Kernel, problem: Problem) -> Tensor | None:
    """The rows whose numbers count: all, but for those without keys where the kernel declares something of its own for them."""
    if kernel.empty == "zero" or kernel.is_program:
        return None
    return problem.allowed.any(dim=3)


def _numbers(call: Call) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    rows = seen_rows(kernel, problem)
    got = results(kernel, problem)["out"]
    return failure(expectation(kernel, problem).fault("out", got, where=None if rows is None else rows[..., None]))


def _lse(call: Call) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    got = results(kernel, problem)["lse"]
    return failure(expectation(kernel, problem).fault("lse", got, where=seen_rows(kernel, problem)))


# ---- gradients ---------------------------------------------------------------------------------------------


def _gradients(call: Call) -> Failure | None:
    kernel, problem, seed = call.kernel, call.problem, call.case.seed
    rows = seen_rows(kernel, problem)
    if rows is not None and not bool(rows.all()):
        raise Skip(f"rows without keys, of which empty={kernel.empty!r} says nothing about gradients")
    names, asked = moved(problem, kernel.grad), cotangents(kernel, problem, seed)
    whole = with_gradients(kernel, problem, asked, names)
    wanted = expectation(kernel, problem, whole.asked)
    fault = _off(wanted, whole.gradients, "") or _unreached(kernel, problem, whole.gradients)
    if fault:
        return fault
    # one tensor alone that wants a gradient, another in every case
    alone = names[seed % len(names)]
    fault = _off(wanted, with_gradients(kernel, problem, asked, (alone,)).gradients, f"where only {alone} requires a gradient, ")
    if fault or not kernel.deterministic:
        return fault
    again = with_gradients(kernel, problem, asked, names, twice=True).gradients
    for name, value in whole.gradients.items():
        other = again[name]
        place = None if value is None or other is None else differ(value, other)
        if place is not None:
            return Failure(
                "bits", f"{name}{place.tolist()} is another number when backward runs a second time (retain_graph=True)"
            )
    return None


def _off(wanted: Any, found: dict[str, Tensor | None], before: str) -> Failure | None:
    for name, value in found.items():
        if value is None:
            if bool((wanted.values[name].abs() > wanted.allowed(name)).any()):
                return Failure("number", f"{before}no gradient reaches {name[1:]} (None), though it is not 0")
            continue
        fault = wanted.fault(name, value)
        if fault:
            return failure(fault, before)
    return None


def _unreached(kernel: Kernel, problem: Problem, found: dict[str, Tensor | None]) -> Failure | None:
    """Keys that nobody sees must get exactly 0."""
    if kernel.is_program:
        return None
    seen = problem.allowed.any(dim=2)
    case = problem.shape
    unseen = ~seen.unflatten(1, (case.kv_heads, -1)).any(dim=2)
    for name in ("dk", "dv"):
        value = found[name]
        if value is not None and bool((value.cpu()[unseen] != 0).any()):
            return Failure("number", f"{name} of keys that nobody sees is not exactly 0")
    return None


# ---- weights -----------------------------------------------------------------------------------------------


def _mass(call: Call) -> Failure | None:
    """v of ones gives what the weights add up to; v that says which key it is gives the weights, and 0 where nothing is seen."""
    kernel, problem, case = call.kernel, call.problem, call.case
    for values in ("ones", "one-hot"):
        v = problem.v.clone()
        v.copy_(fill((tuple(v.shape),) * 3, 1.0, values, case.seed, v.dtype)[2])
        held = call.changed(v=v)
        rows = seen_rows(kernel, held)
        got = results(kernel, held)["out"]
        before = "the weights do not add up: with every v 1, " if values == "ones" else "with v one-hot, "
        fault = expectation(kernel, held).fault("out", got, where=None if rows is None else rows[..., None])
        if fault:
            return failure(fault, before)
        if values == "one-hot":
            wrong = _stray(held, got)
            if wrong:
                return wrong
    return None


def _stray(problem: Problem, got: Tensor) -> Failure | None:
    """Channels that stand for no key that a row sees must be exactly 0."""
    case = problem.shape
    channels = torch.arange(case.kv_len)[:, None] % case.head_dim_v == torch.arange(case.head_dim_v)
    seen = problem.allowed.double() @ channels.double() > 0
    rows = problem.allowed.any(dim=3, keepdim=True)
    wrong = ((got.cpu() != 0) & ~seen & rows).nonzero()
    if not len(wrong):
        return None
    place = tuple(wrong[0].tolist())
    value = float(got[place])
    fault = Fault("number", "out", place, value, 0.0, float("inf"), len(wrong), got.numel())
    return Failure(
        "number", f"a masked key has a weight: with v one-hot, out{list(place)} is {value:.9g}, wanted exactly 0", fault
    )


# ---- rows without keys -------------------------------------------------------------------------------------


def _empty(call: Call) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    empty = ~problem.allowed.any(dim=3)
    if not bool(empty.any()):
        raise Skip("every row sees a key in all cases that were tried")
    got = results(kernel, problem)
    if kernel.empty == "refuse":
        return Failure("number", "a call with rows without keys is answered, though empty='refuse' says that it raises")
    wanted = 0.0 if kernel.empty == "zero" else float("nan")
    place = differ(got["out"].cpu(), torch.full_like(got["out"].cpu(), wanted), empty[..., None])
    if place is not None:
        return Failure(
            "number",
            f"out{place.tolist()} of a row without keys is {float(got['out'][tuple(place.tolist())]):.9g}, wanted {wanted}",
        )
    if kernel.empty == "nan":
        return None
    if kernel.lse:
        fault = expectation(kernel, problem).fault("lse", got["lse"], where=empty)
        if fault:
            return failure(fault, "of a row without keys, ")
    return None if kernel.grad == "none" else _empty_gradients(call, empty)


def _empty_gradients(call: Call, empty: Tensor) -> Failure | None:
    kernel, problem = call.kernel, call.problem
    found = with_gradients(kernel, problem, cotangents(kernel, problem, call.case.seed), moved(problem, kernel.grad)).gradients
    for name, value in found.items():
        if value is not None and not bool(torch.isfinite(value).all()):
            return Failure("NaN", f"{name} is not finite where a row sees no key")
    dq = found["dq"]
    if dq is not None and bool((dq.cpu()[empty] != 0).any()):
        return Failure("number", "dq of a row without keys is not exactly 0")
    return None


def _emptied(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    """Cases in which a row may see nothing: before the first key, more rows than keys, far behind the last key."""
    if kernel.offset is True:
        return {"q_offset": drawn.choice((-1, -1, -2, "2N")), "q_len": drawn.choice((2, 2, 3, 5))}
    return {"q_len": drawn.choice((2, 3, 5)), "kv_len": drawn.choice((1, 2))}


NUMBER_PROPERTIES = {
    "NUM": KernelProperty("NUM", "out is that of attention in float64, element by element", _numbers),
    "LSE": KernelProperty("LSE", "so is the LSE, over (batch, heads, rows), in float32 or wider", _lse, needs_lse, share=0.6),
    "EMPTY": KernelProperty(
        "EMPTY", "rows without keys give what is declared, and no NaN anywhere", _empty, needs_pattern, _emptied, 0.4
    ),
    "MASS": KernelProperty("MASS", "weights add up to 1, and are exactly 0 where masked", _mass, needs_pattern, share=0.4),
    "GRAD": KernelProperty(
        "GRAD", "gradients of out and LSE, also where one tensor alone wants them", _gradients, needs_gradients, share=0.6
    ),
}
