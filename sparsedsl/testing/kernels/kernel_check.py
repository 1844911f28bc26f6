"""Every property of the kit on one kernel: cases drawn, failures shrunk and explained."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from random import SystemRandom
from typing import Any

import torch

from sparsedsl.check_defaults import ASKED
from sparsedsl.errors import ArgumentError, CallWarning, SparseDSLError, UnsupportedError
from sparsedsl.lang.advice import meant, shown
from sparsedsl.testing.counterexamples import Counterexample
from sparsedsl.testing.kernels.beyond_limits import outside
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.drawing import cases
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.kernel_report import FAILS, KernelReport
from sparsedsl.testing.kernels.kernel_snippets import kernel_snippet
from sparsedsl.testing.kernels.memory_properties import MEMORY_PROPERTIES
from sparsedsl.testing.kernels.number_properties import NUMBER_PROPERTIES
from sparsedsl.testing.kernels.order_properties import ORDER_PROPERTIES
from sparsedsl.testing.kernels.packed_properties import PACKED_PROPERTIES
from sparsedsl.testing.kernels.property_search import LEAST, PropertySearch, run_case
from sparsedsl.testing.kernels.relation_properties import RELATION_PROPERTIES
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
# Cases that must hold before the next property has its turn, if not one. Plain numbers get more: wrong ones show in whatever compares.
_AT_FIRST = {"PURE": 2, "REPEAT": 2, "STATE": 2, "NUM": LEAST, "LSE": LEAST}
# Seconds to look for a smaller case of one failure.
_SHRINKING = 20.0
# Plain calls held against exact numbers. What compares with these on the way to something else, as GUARD and FULL do, fails with them.
_CAUSES = ("NUM", "LSE", "GRAD")


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
    whole = chosen.seconds if seconds is None else seconds
    searches = [PropertySearch(kernel, KERNEL_PROPERTIES[name], examples, seed) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CallWarning)
        with Progress(len(names), str(kernel.name), unit="properties", shown=progress) as told:
            _look(searches, began + whole, stop_at_first, told)
            failing = {s.of.name: s.of for s in searches if s.of.name in _CAUSES and s.has_fault}
            findings = tuple(s.finding(failing, min(whole / 2, _SHRINKING), locate, told) for s in searches)
        said = outside(kernel) if only is None and not any(p.status == FAILS for p in findings) else ()
    return KernelReport(kernel, findings, seed, said, time.monotonic() - began)


def _look(searches: list[PropertySearch], until: float, stop_at_first: bool, told: Progress) -> None:
    """First a case or a few of every property, then the rest: cheap cases of every kind of fault come before the dear ones of any, and time
    that runs out is missing to all alike.
    """
    left = len(searches)
    for search, last in [(s, False) for s in searches] + [(s, True) for s in searches]:
        now = time.monotonic()
        search.look(told, now + (until - now) / left if last else until, None if last else _AT_FIRST.get(search.of.name, 1))
        left -= last
        told.update(last)
        if stop_at_first and search.failed is not None:
            for other in searches:
                other.stopped = "the check ended at the first property that fails"
            return


def _chosen(only: Any) -> tuple[str, ...]:
    if only is None:
        return tuple(KERNEL_PROPERTIES)
    names = (only,) if isinstance(only, str) else tuple(only)
    for name in names:
        if name not in KERNEL_PROPERTIES:
            known = ", ".join(KERNEL_PROPERTIES)
            raise ArgumentError(
                f"check: only must name properties of {known}; got {name!r}{meant(str(name).upper(), KERNEL_PROPERTIES)}"
            )
    return tuple(name for name in KERNEL_PROPERTIES if name in names)


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UnsupportedError(
            f"Kernel(devices=...): {device!r} cannot be used here ({first}); leave it out, or run on a machine that has it"
        ) from None


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
        for one in (case,) if case is not None else tuple(cases(kernel, of, LEAST, 0)):
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
