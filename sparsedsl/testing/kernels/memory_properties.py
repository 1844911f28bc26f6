"""What a call does to memory, and what it remembers: guards, layouts, inputs, dirty allocations, repetition, calls in between."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import torch

from sparsedsl.testing.kernels.arena import GUARDS, LAYOUTS, place
from sparsedsl.testing.kernels.calling import Broken, Call, Refused, Results, cotangents, made, moved, results, with_gradients
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip, differ, failure
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.limits import fits
from sparsedsl.testing.kernels.number_properties import seen_rows
from sparsedsl.testing.kernels.packing import PAGED
from sparsedsl.torch_private import DispatchMode

__all__ = ["MEMORY_PROPERTIES"]

Tensor = torch.Tensor
_TIMES = 5
# Cases have fewer entries in a batch than this.
_UNUSED = 5
# Layouts that a kernel may refuse.
_RARE = ("every second", "expanded", "padded", "odd")


def _off(call: Call, got: Results, before: str) -> Failure | None:
    """Whether results are those of the oracle."""
    wanted, rows = expectation(call.kernel, call.problem), seen_rows(call.kernel, call.problem)
    for name, x in got.items():
        where = rows[..., None] if rows is not None and name == "out" else rows
        fault = wanted.fault(name, x, where=where)
        if fault:
            return failure(fault, before)
    return None


# ---- guards and layouts ------------------------------------------------------------------------------------


def _guards(call: Call) -> Failure | None:
    """The result is the same whatever lies around the inputs, and what lies around them stays as it was."""
    kernel, case = call.kernel, call.case
    first: Results = {}
    for number, content in enumerate(GUARDS):
        held = made(kernel, case, guard=number, tables=call.problem.tables)
        got = results(kernel, held.problem)
        if kernel.grad != "none":
            names = moved(held.problem, kernel.grad)
            found = with_gradients(kernel, held.problem, cotangents(kernel, held.problem, case.seed), names).gradients
            got |= {name: x for name, x in found.items() if x is not None}
        for name, placed in held.placed.items():
            if not placed.guards_hold:
                return Failure("memory", f"writes outside {name}: the bytes around it are others after the call")
        first = first or got
        for name, value in got.items():
            place_ = differ(first[name], value) if kernel.deterministic else None
            if place_ is not None:
                return Failure(
                    "memory", f"{name}{place_.tolist()} depends on what lies around the inputs ({GUARDS[0]}, then {content})"
                )
        fault = None if kernel.deterministic and number else _off(held, {n: x for n, x in got.items() if n in ("out", "lse")}, "")
        if fault:
            return fault
    return None


def _strides(call: Call) -> Failure | None:
    """The same numbers in every layout, cotangents too."""
    kernel, case, refusals = call.kernel, call.case, []
    for memory in LAYOUTS:
        held = made(kernel, replace(case, memory=memory), tables=call.problem.tables)
        before = f"with q, k and v in memory as {memory!r} ({LAYOUTS[memory]}), "
        try:
            fault = _off(held, results(kernel, held.problem), before)
            if fault is None and kernel.grad != "none" and seen_rows(kernel, held.problem) is None:
                fault = _strided_gradients(held, memory, before)
        except Refused as refusal:
            if memory not in _RARE:
                raise
            refusals.append(f"{memory}: {refusal}")
            continue
        except Broken as broken:
            return Failure(broken.kind, before + broken.what)
        if fault:
            return fault
    return None


def _strided_gradients(held: Call, memory: str, before: str) -> Failure | None:
    kernel, problem = held.kernel, held.problem
    d_out, d_lse = cotangents(kernel, problem, held.case.seed)
    d_out = place(d_out.cpu(), memory, turned=kernel.layout == "bshd").tensor.to(d_out.device)
    found = with_gradients(kernel, problem, (d_out, d_lse), moved(problem, "qkv"))
    wanted = expectation(kernel, problem, found.asked)
    for name, x in found.gradients.items():
        fault = None if x is None else wanted.fault(name, x)
        if fault:
            return failure(fault, before + "and the cotangent alike, ")
    return None


def _pure(call: Call) -> Failure | None:
    """Inputs and tables are the same bytes after a call, and results do not lie in them."""
    kernel, problem = call.kernel, call.problem
    found = [results(kernel, problem)]
    if kernel.grad != "none":
        found.append(
            with_gradients(kernel, problem, cotangents(kernel, problem, call.case.seed), moved(problem, kernel.grad)).results
        )
    for name, placed in call.placed.items():
        if not placed.unchanged:
            return Failure("memory", f"{name} is changed by the call")
        mine = placed.buffer.untyped_storage().data_ptr()
        for got in found:
            for result, x in got.items():
                if x.numel() and x.untyped_storage().data_ptr() == mine:
                    return Failure("memory", f"{result} lies in the memory of {name}: whoever changes one changes the other")
    return None


class _Dirty(DispatchMode):
    """New memory that nobody filled holds this number."""

    _EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self, content: float):
        super().__init__()
        self.content = content

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self._EMPTY and isinstance(found, Tensor):
            whole = not found.is_floating_point()
            found.fill_(1 << 20 if whole and found.dtype.itemsize > 2 else (1 if whole else self.content))
        return found


def _full(call: Call) -> Failure | None:
    """Every element of the results is written: outputs and scratch that torch.empty gives hold NaN, then 0.37."""
    for content in (float("nan"), 0.37):
        with _Dirty(content):
            got = results(call.kernel, call.problem)
        fault = _off(call, got, f"where new memory holds {content}, ")
        if fault:
            return fault
    return None


# ---- again, and in between ---------------------------------------------------------------------------------


def _repeat(call: Call) -> Failure | None:
    """The same call gives the same bits; a kernel that does not claim that is still right every time, and spreads little."""
    kernel, problem = call.kernel, call.problem
    asked, names = cotangents(kernel, problem, call.case.seed), moved(problem, kernel.grad)
    first: Results = {}
    for number in range(_TIMES):
        got = results(kernel, problem)
        if names and number < 2:
            found = with_gradients(kernel, problem, asked, names).gradients
            got |= {name: x for name, x in found.items() if x is not None}
        held = [torch.full((1 + 37 * number,), 0.37)]  # what was allocated in between lies where scratch lay
        first = first or got
        for name, value in got.items():
            where = differ(first[name], value)
            if where is None:
                continue
            at = tuple(where.tolist())
            if kernel.deterministic:
                one, two = float(first[name][at]), float(value[at])
                return Failure(
                    "bits", f"{name}{list(at)} is {one:.9g} in the first call and {two:.9g} in call {number + 1} of the same"
                )
            fault = _spread(call, name, first[name], value)
            if fault:
                return fault
        del held
    return None


def _spread(call: Call, name: str, one: Tensor, two: Tensor) -> Failure | None:
    asked = cotangents(call.kernel, call.problem, call.case.seed) if name[0] == "d" else None
    wanted = expectation(call.kernel, call.problem, asked)
    off = (one.double().cpu() - two.double().cpu()).abs() / wanted.allowed(name)
    if float(off.max()) > 0.25:
        return Failure(
            "number", f"{name} spreads by {float(off.max()):.3g} of the tolerance from call to call; at most 0.25 is allowed"
        )
    return None


def _state(call: Call) -> Failure | None:
    """A, B, A, with B of another scale, shape, values or dtype: both A are the same, and every B is right."""
    kernel, case = call.kernel, call.case
    first = results(kernel, call.problem)
    if _off(call, first, ""):
        raise Skip("numbers are wrong without calls in between, which NUM and LSE show")
    for what, between in _between(kernel, case):
        other = made(kernel, between)
        try:
            fault = _off(other, results(kernel, other.problem), f"after a call that differs in {what} alone, ")
        except Refused:
            continue
        if fault and _wrong_anyway(kernel, between):
            raise Skip("numbers are wrong without calls before them, which NUM and LSE show")
        if fault:
            return fault
        again = results(kernel, call.problem)
        for name, value in first.items():
            if kernel.deterministic and differ(value, again[name]) is not None:
                return Failure("bits", f"{name} is another after a call in between that differs in {what}")
        fault = _off(call, again, f"after a call in between that differs in {what}, ")
        if fault:
            return fault
    return None


def _wrong_anyway(kernel: Kernel, case: KernelCase) -> bool:
    """Whether such a call is wrong where nothing like it was called before: of a batch that no other case has."""
    fresh = replace(case, batch=case.batch + _UNUSED)
    if not fits(kernel, fresh):
        return False
    call = made(kernel, fresh)
    try:
        return _off(call, results(kernel, call.problem), "") is not None
    except (Refused, Broken):
        return True


def _between(kernel: Kernel, case: KernelCase) -> list[tuple[str, KernelCase]]:
    factor = case.scale or getattr(kernel.implements, "scale", None) or case.head_dim**-0.5
    others = [
        ("scale", replace(case, scale=2.0 * factor)),
        ("values", replace(case, values="low" if case.values != "low" else "normal", seed=case.seed + 1)),
        ("q_offset", replace(case, q_offset=case.q_offset + 1)),
        ("kv_len", replace(case, kv_len=case.kv_len + 1)),
        ("q_len", replace(case, q_len=case.q_len + 1)),
        *(("dtype", replace(case, dtype=name)) for name in kernel.dtypes if name != case.dtype),
    ]
    return [(what, other) for what, other in others if fits(kernel, other)]


def _several(kernel: Kernel, drawn: Random) -> dict[str, Any]:
    return {"memory": "packed"}


def _sole(call: Call) -> None:
    if call.case.device != "cpu":
        raise Skip("new memory is filled on the CPU only")


def _full_on_cpu(call: Call) -> Failure | None:
    _sole(call)
    return _full(call)


def _own_tensors(kernel: Kernel) -> str:
    """Why a kernel says nothing about where its inputs lie."""
    return f"its inputs are packed anew for every call: {'PAGE' if kernel.packing == PAGED else 'VARLEN'} looks at these" * bool(
        kernel.packing
    )


_SMALL = ({"kv_len": 2}, {"q_len": 2, "kv_len": 6, "offset_at_end": True})
MEMORY_PROPERTIES = {
    "PURE": KernelProperty(
        "PURE",
        "inputs are left as they are, results lie elsewhere",
        _pure,
        unfit=_own_tensors,
        share=0.2,
        first=({}, {"head_dim": 2}),
    ),
    "REPEAT": KernelProperty("REPEAT", "the same call gives the same bits, five times", _repeat, share=0.2, first=_SMALL),
    "STATE": KernelProperty("STATE", "calls in between change nothing", _state, wish=_several, share=0.2, first=_SMALL),
    "STRIDE": KernelProperty(
        "STRIDE",
        "every layout of q, k, v and cotangents gives the same",
        _strides,
        unfit=_own_tensors,
        wish=_several,
        share=0.2,
    ),
    "GUARD": KernelProperty(
        "GUARD", "nothing outside the inputs is read or written", _guards, unfit=_own_tensors, wish=_several, share=0.2
    ),
    "FULL": KernelProperty("FULL", "every element of the results is written", _full_on_cpu, wish=_several, share=0.2),
}
