"""Every property of the kit on one kernel: cases drawn, failures shrunk and explained."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import SystemRandom
from typing import Any

import torch

from sparsedsl.check_defaults import ASKED
from sparsedsl.errors import ArgumentError, CallWarning, SparseDSLError, UnsupportedError
from sparsedsl.lang.advice import meant, shown
from sparsedsl.testing.counterexamples import Counterexample
from sparsedsl.testing.kernels.beyond_limits import outside
from sparsedsl.testing.kernels.calling import Broken, Call, Refused, made
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.drawing import cases
from sparsedsl.testing.kernels.expected_results import Ambiguous
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.kernel_report import FAILS, HOLDS, NOT_RUN, SKIPPED, KernelFinding, KernelReport
from sparsedsl.testing.kernels.kernel_snippets import kernel_snippet
from sparsedsl.testing.kernels.limits import outside_positions
from sparsedsl.testing.kernels.locating import guess
from sparsedsl.testing.kernels.memory_properties import MEMORY_PROPERTIES
from sparsedsl.testing.kernels.number_properties import NUMBER_PROPERTIES
from sparsedsl.testing.kernels.order_properties import ORDER_PROPERTIES
from sparsedsl.testing.kernels.packed_properties import PACKED_PROPERTIES
from sparsedsl.testing.kernels.relation_properties import RELATION_PROPERTIES
from sparsedsl.testing.kernels.shrinking import shrunk
from sparsedsl.testing.progress import Progress

__all__ = ["BUDGETS", "KERNEL_PROPERTIES", "assert_kernel", "check_kernel"]

# A kernel that remembers calls or gives other numbers each time would fail anywhere: that is asked first. Then from cheap to dear.
_ORDER = (
    "PURE", "REPEAT", "STATE", "NUM", "LSE", "EMPTY", "MASS", "POIS", "CAUS", "GRAD", "STRIDE", "CUT", "MERGE", "BATCH", "PERM",
    "SHIFT", "GUARD", "FULL", "VARLEN", "PAGE",
)  # fmt: skip
_ALL = {**NUMBER_PROPERTIES, **RELATION_PROPERTIES, **ORDER_PROPERTIES, **MEMORY_PROPERTIES, **PACKED_PROPERTIES}
KERNEL_PROPERTIES: Mapping[str, KernelProperty] = {name: _ALL[name] for name in _ORDER}


@dataclass(frozen=True)
class _Budget:
    examples: int
    seconds: float


BUDGETS = {"quick": _Budget(25, 20.0), "default": _Budget(100, 120.0), "deep": _Budget(1000, 3600.0)}
_LEAST = 4
# Plain calls held against exact numbers. What compares with these on the way to something else, as GUARD and FULL do, fails with them.
_CAUSES = ("NUM", "LSE", "GRAD")
_WITNESSES = 3


def check_kernel(
    kernel: Kernel,
    *,
    examples: int | None = None,
    seed: int | None = None,
    budget: str = "default",
    seconds: float | None = None,
    only: Any = None,
    stop_at_first: bool = False,
    progress: bool = False,
    locate: bool = True,
) -> KernelReport:
    """Run the properties of the kit on a kernel; see :func:`sparsedsl.testing.check`.

    Args:
        kernel: what is tested, and what it claims.
        examples: cases of the cheapest property; dear ones get a share. None: as the budget says.
        seed: of the cases; None: a new one, which the report names.
        budget: ``"quick"`` (25 examples, 20 s), ``"default"`` (100, 2 min) or ``"deep"`` (1,000, an hour).
        seconds: after which properties are given no new cases; None: as the budget says.
        only: the name of a property, or several.
        stop_at_first: whether the properties behind the first that fails are left out.
        progress: show a bar.
        locate: whether to guess what is wrong.
    """
    chosen = BUDGETS.get(budget)
    if chosen is None:
        raise ArgumentError(f"check: budget must be one of {', '.join(BUDGETS)}; got {budget!r}")
    examples, seed = ASKED.now.examples or examples, seed if ASKED.now.seed is None else ASKED.now.seed
    examples = chosen.examples if examples is None else examples
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise SparseDSLError(f"examples must be a whole number of at least 1; got {examples!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise SparseDSLError(f"seed must be a whole number or None; got {shown(seed)}")
    names = _chosen(only)
    for device in kernel.devices:
        _check_device(device)
    seed = SystemRandom().randrange(10**6) if seed is None else seed
    began = time.monotonic()
    until = began + (chosen.seconds if seconds is None else seconds)
    findings: list[KernelFinding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CallWarning)
        with Progress(len(names), str(kernel.name), unit="properties", shown=progress) as told:
            for place, name in enumerate(names):
                left = (until - time.monotonic()) / (len(names) - place)
                search = _Search(
                    examples, seed, left, locate, told, tuple(p.name for p in findings if p.name in _CAUSES and p.fault)
                )
                findings.append(_finding(kernel, KERNEL_PROPERTIES[name], search))
                told.update()
                if stop_at_first and findings[-1].status == FAILS:
                    break
        said = outside(kernel) if only is None and not any(p.status == FAILS for p in findings) else ()
    return KernelReport(kernel, tuple(findings), seed, said, time.monotonic() - began)


def _chosen(only: Any) -> tuple[str, ...]:
    if only is None:
        return tuple(KERNEL_PROPERTIES)
    names = (only,) if isinstance(only, str) else tuple(only)
    for name in names:
        if name not in KERNEL_PROPERTIES:
            known = ", ".join(KERNEL_PROPERTIES)
            raise ArgumentError(f"check: only must name properties of {known}; got {name!r}{meant(name, KERNEL_PROPERTIES)}")
    return tuple(name for name in KERNEL_PROPERTIES if name in names)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UnsupportedError(
            f"Kernel(devices=...): {device!r} cannot be used here ({first}); leave it out, or run on a machine that has it"
        ) from None


@dataclass(frozen=True)
class _Search:
    """How a property is looked at. ``known``: properties of plain numbers that failed before."""

    examples: int
    seed: int
    seconds: float
    locate: bool
    told: Progress
    known: tuple[str, ...]


def _finding(kernel: Kernel, of: KernelProperty, search: _Search) -> KernelFinding:
    unfit = of.unfit(kernel)
    if unfit:
        return KernelFinding(of.name, of.meaning, SKIPPED, detail=unfit)
    until, held, tried = time.monotonic() + search.seconds, 0, 0
    why = "no case fits the declared limits"
    refused: tuple[KernelCase, Failure, int] | None = None
    for case in cases(kernel, of, max(_LEAST, round(of.share * search.examples)), search.seed):
        if tried and time.monotonic() > until:
            break
        tried += 1
        search.told.say(f"{of.name}, case {tried}")
        try:
            found = run_case(kernel, of, case)
        except Skip as skip:
            why = str(skip)
            continue
        if found is None:
            held += 1
        elif found.kind == "refused":
            refused = refused or (case, found, tried)
        else:
            cause = _cause(kernel, of, case, found, search.known)
            if cause:
                return KernelFinding(
                    of.name, of.meaning, FAILS, held, found.what, found.kind, case, same_as=cause, fault=found.fault
                )
            search.told.say(f"{of.name} failed; looking for a smaller case")
            return _failed(kernel, of, case, found, held, tried, search.locate)
    if refused is not None and held:
        return _failed(kernel, of, refused[0], refused[1], held, refused[2], search.locate)
    if held:
        return KernelFinding(of.name, of.meaning, HOLDS, held)
    if refused is not None:
        return KernelFinding(of.name, of.meaning, NOT_RUN, detail=f"it refuses every case: {refused[1].what}")
    late = tried and time.monotonic() > until
    return KernelFinding(of.name, of.meaning, NOT_RUN if late else SKIPPED, detail="there was no time left" if late else why)


def _cause(kernel: Kernel, of: KernelProperty, case: KernelCase, found: Failure, known: tuple[str, ...]) -> str:
    """The property that fails on the very case, in the numbers of a plain call, of which ``of`` then says nothing new; or ""."""
    if of.name in _CAUSES or found.fault is None:
        return ""
    for name in known:
        try:
            plain = run_case(kernel, KERNEL_PROPERTIES[name], case)
        except Skip:
            continue
        if plain is not None and plain.fault is not None:
            return name
    return ""


def run_case(kernel: Kernel, of: KernelProperty, case: KernelCase, tables: Mapping[str, Any] | None = None) -> Failure | None:
    """One property on one case. A refusal is a failure, but where rows stand before the first key or empty rows are refused."""
    call = made(kernel, case, tables=tables)
    try:
        return of.run(call)
    except Ambiguous as why:
        raise Skip(str(why)) from None
    except Broken as broken:
        return Failure(broken.kind, f"{kernel.name} {broken.what}" if broken.kind == "raised" else broken.what)
    except Refused as refusal:
        if kernel.empty == "refuse" and _has_empty_rows(call):
            if of.name == "EMPTY":
                return None
            raise Skip("the kernel refuses rows without keys, as declared") from None
        if outside_positions(case):
            raise Skip("the kernel refuses rows before the first key") from None
        what = (
            f"{kernel.name} refuses a call inside its declared limits: {refusal}. If it is right to, declare that: {_limit(case)}"
        )
        return Failure("refused", what)


def _has_empty_rows(call: Call) -> bool:
    return not call.kernel.is_program and not bool(call.problem.allowed.any(dim=3).all())


def _limit(case: KernelCase) -> str:
    return (
        f"lengths= (here M={case.q_len}, N={case.kv_len}), head_dims= ({case.head_dim}, {case.head_dim_v}), "
        f"group= ({case.heads // case.kv_heads}), dtypes= ({case.dtype}), empty='refuse'"
    )


def _failed(
    kernel: Kernel, of: KernelProperty, case: KernelCase, found: Failure, held: int, tried: int, locate: bool
) -> KernelFinding:
    def again(other: KernelCase) -> Failure | None:
        try:
            return run_case(kernel, of, other)
        except Skip:
            return None

    small, failed = shrunk(kernel, case, found, again)
    # What a guess bends is a call of entries that are all as long.
    locate = locate and of.name not in PACKED_PROPERTIES
    idea = guess(kernel, of.name, (small, case, *_others(kernel, of, failed, again)), failed) if locate else ""
    snippet = kernel_snippet(kernel, of.name, small)
    return KernelFinding(
        of.name, of.meaning, FAILS, held, failed.what, failed.kind, small, idea, failed.fault, tried, snippet
    )  # fmt: skip


def _others(
    kernel: Kernel, of: KernelProperty, failed: Failure, run: Callable[[KernelCase], Failure | None]
) -> Iterator[KernelCase]:
    """A few more cases that fail in the same way: a guess must explain them too."""
    fail = (
        case for case in cases(kernel, of, 6 * _WITNESSES, 1) if (found := run(case)) is not None and found.kind == failed.kind
    )
    yield from itertools.islice(fail, _WITNESSES)


def assert_kernel(kernel: Kernel, case: KernelCase | None = None, *, only: Any = None, **tables: Any) -> tuple[str, ...]:
    """Properties of a kernel hold on one case; what a report's program calls.

    Args:
        kernel: what is tested.
        case: the call; None: a small one of every property, by a fixed seed.
        only: the name of a property, or several; None: all.
        tables: values for tables of the pattern, in place of drawn ones.

    Returns:
        The names of the properties that were looked at: others say nothing about this kernel or this case.

    Raises:
        Counterexample: one fails.

    >>> import torch, sparsedsl as sd
    >>> def mine(q, k, v):
    ...     return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
    >>> kernel = sd.testing.Kernel(mine, implements=sd.kv_idx >= 0, group=1)
    >>> assert_kernel(kernel, sd.testing.KernelCase(q_len=3, kv_len=5), only=("NUM", "MASS"))
    ('NUM', 'MASS')
    """
    if not isinstance(kernel, Kernel):
        raise ArgumentError(f"assert_kernel wants a sd.testing.Kernel; got {shown(kernel)}")
    looked = []
    for name in _chosen(only):
        of = KERNEL_PROPERTIES[name]
        if of.unfit(kernel):
            continue
        for one in (case,) if case is not None else tuple(cases(kernel, of, _LEAST, 0)):
            try:
                found = run_case(kernel, of, one, tables)
            except Skip:
                continue
            if name not in looked:
                looked.append(name)
            if found is not None:
                raise kernel_counterexample(kernel, name, one, found, tables)
    return tuple(looked)


def kernel_counterexample(
    kernel: Kernel, name: str, case: KernelCase, found: Failure, tables: Mapping[str, Any]
) -> Counterexample:
    """The error that a failed assertion raises."""
    error = Counterexample(f"{kernel.name}: {name} fails on {case!r}: {found.what}")
    error.snippet = kernel_snippet(kernel, name, case, dict(tables))
    error.args = (f"{error.what}\n\nTo see it again, run:\n\n{error.snippet}",)
    return error
