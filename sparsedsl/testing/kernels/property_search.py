"""One property on its cases, a few at a time: a check comes round to every property before any has had all of its cases."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from sparsedsl.testing.kernels.calling import Broken, Call, Refused, made
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.drawing import cases
from sparsedsl.testing.kernels.expected_results import Ambiguous
from sparsedsl.testing.kernels.findings import Failure, KernelProperty, Skip
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.kernel_report import FAILS, HOLDS, NOT_RUN, SKIPPED, KernelFinding
from sparsedsl.testing.kernels.kernel_snippets import kernel_snippet
from sparsedsl.testing.kernels.limits import near, outside_positions
from sparsedsl.testing.kernels.locating import guess
from sparsedsl.testing.kernels.packed_properties import PACKED_PROPERTIES
from sparsedsl.testing.kernels.shrinking import shrunk
from sparsedsl.testing.progress import Progress

__all__ = ["LATE", "LEAST", "PropertySearch", "run_case"]

# Cases of a property, however few examples are asked for.
LEAST = 4
LATE = "there was no time left"
_WITNESSES = 3
# Keys that a case is given more, to tell faults apart which look alike in one tile: the last partial tile is another one for every usual
# size of tiles.
_MORE_KEYS = 16 + 32 + 64 + 128
# Kinds of failure in what is compared with numbers.
_NUMBERS = ("number", "NaN", "infinite")


class PropertySearch:
    """What a property has found so far: ``look`` tries more cases, ``finding`` says it all.

    ``failed``: the case that fails, and how. ``stopped``: why no more cases are tried, "" while they are.
    """

    def __init__(self, kernel: Kernel, of: KernelProperty, examples: int, seed: int):
        self.kernel, self.of = kernel, of
        self.unfit = of.unfit(kernel)
        self.failed: tuple[KernelCase, Failure] | None = None
        self.stopped = ""
        self._cases = iter(()) if self.unfit else cases(kernel, of, max(LEAST, round(of.share * examples)), seed)
        self._held = self._tried = self._found_after = 0
        self._skip = "no case fits the declared limits"
        self._refused: tuple[KernelCase, Failure] | None = None

    @property
    def has_fault(self) -> bool:
        """Whether it fails by a number."""
        return self.failed is not None and self.failed[1].fault is not None

    def look(self, told: Progress, until: float, enough: int | None = None) -> None:
        """Try cases until one fails, until ``enough`` hold, or until that time; a refusal is a failure only if other calls are answered."""
        self.stopped = ""
        while self.failed is None and (enough is None or self._held < enough):
            case = next(self._cases, None)
            if case is None:
                break
            if time.monotonic() > until:
                self.stopped = LATE
                return
            self._try(case, told)
        if self.failed is None and self._refused is not None and self._held:
            self.failed = self._refused

    def _try(self, case: KernelCase, told: Progress) -> None:
        self._tried += 1
        told.say(f"{self.of.name}, case {self._tried}")
        try:
            found = run_case(self.kernel, self.of, case)
        except Skip as skip:
            self._skip = str(skip)
            return
        if found is None:
            self._held += 1
            return
        if found.kind == "refused":
            if self._refused is None:
                self._refused, self._found_after = (case, found), self._tried
        else:
            self.failed, self._found_after = (case, found), self._tried

    def finding(self, failing: Mapping[str, KernelProperty], seconds: float, locate: bool, told: Progress) -> KernelFinding:
        """What there is to report; of a failure the smallest case.

        ``failing``: properties of plain numbers that fail. ``seconds``: to look for a smaller case. ``locate``: whether to guess.
        """
        name, meaning = self.of.name, self.of.meaning
        if self.unfit:
            return KernelFinding(name, meaning, SKIPPED, detail=self.unfit)
        if self.failed is not None:
            case, found = self.failed
            cause = self._cause(case, found, failing)
            if cause:
                return KernelFinding(
                    name, meaning, FAILS, self._held, found.what, found.kind, case, same_as=cause, fault=found.fault
                )
            told.say(f"{name} failed; looking for a smaller case")
            return self._smallest(case, found, seconds, locate)
        if self._held:
            return KernelFinding(name, meaning, HOLDS, self._held)
        if self._refused is not None:
            return KernelFinding(name, meaning, NOT_RUN, detail=f"it refuses every case: {self._refused[1].what}")
        return KernelFinding(name, meaning, NOT_RUN if self.stopped else SKIPPED, detail=self.stopped or self._skip)

    def _cause(self, case: KernelCase, found: Failure, failing: Mapping[str, KernelProperty]) -> str:
        """The property that fails on the very case, in the numbers of a plain call, so that this one says nothing new; or ""."""
        if self.of.name in failing or found.fault is None:
            return ""
        for name, of in failing.items():
            try:
                plain = run_case(self.kernel, of, case)
            except Skip:
                continue
            if plain is not None and plain.fault is not None:
                return name
        return ""

    def _smallest(self, case: KernelCase, found: Failure, seconds: float, locate: bool) -> KernelFinding:
        kernel, of = self.kernel, self.of

        def again(other: KernelCase) -> Failure | None:
            try:
                return run_case(kernel, of, other)
            except Skip:
                return None

        small, failed = shrunk(kernel, case, found, again, seconds=seconds)
        # What a guess bends is a call of entries that are all as long.
        locate = locate and of.name not in PACKED_PROPERTIES
        idea = guess(kernel, of.name, (small, case, *_others(kernel, of, small, failed, again)), failed) if locate else ""
        snippet = kernel_snippet(kernel, of.name, small)
        return KernelFinding(
            of.name,
            of.meaning,
            FAILS,
            self._held,
            failed.what,
            failed.kind,
            small,
            idea,
            failed.fault,
            self._found_after,
            snippet,
        )


def _others(
    kernel: Kernel, of: KernelProperty, small: KernelCase, failed: Failure, run: Callable[[KernelCase], Failure | None]
) -> Iterator[KernelCase]:
    """The smallest case with more keys, and a few more cases, as far as they fail in the same way: a guess must explain them too."""
    kinds = _NUMBERS if failed.kind in _NUMBERS else (failed.kind,)
    more = 2 * kernel.tiles[1] if kernel.tiles else _MORE_KEYS
    longer = near(kernel, asdict(small) | {"kv_len": small.kv_len + more, "q_offset": small.q_offset + more})
    found = (case for case in cases(kernel, of, 6 * _WITNESSES, 1) if _fails(run, case, kinds))
    yield from itertools.islice(found, _WITNESSES)
    if longer is not None and _fails(run, longer, kinds):
        yield longer


def _fails(run: Callable[[KernelCase], Failure | None], case: KernelCase, kinds: tuple[str, ...]) -> bool:
    found = run(case)
    return found is not None and found.kind in kinds


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
