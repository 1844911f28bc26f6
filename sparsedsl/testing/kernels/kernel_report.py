"""What a check of a kernel found: a line a property, and for each that fails a sentence, the smallest case and a program that shows it."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import Fault
from sparsedsl.testing.kernels.kernel_case import KernelCase

__all__ = ["FAILS", "HOLDS", "NOT_RUN", "SKIPPED", "KernelFinding", "KernelReport"]

HOLDS, FAILS, SKIPPED, NOT_RUN = "holds", "FAILS", "not applicable", "not run"
_WIDTH = 118


@dataclass(frozen=True)
class KernelFinding:
    """What one property says of a kernel.

    ``status``: "holds", "FAILS", "not applicable" or "not run". ``examples``: cases that it held on. ``detail``: why, or the failure as a
    sentence. Of a failure also its ``kind``, the smallest ``case``, ``guess`` at the fault, the ``fault`` (place, numbers), the cases that
    were tried until it was found (``found_after``), and ``snippet``, a program that shows it. ``same_as``: a property before it that fails
    on the very case, in the numbers of a plain call: what is said of that one says it all.

    >>> KernelFinding("LSE", "so is the LSE", "not applicable", detail="it gives no LSE").status
    'not applicable'
    """

    name: str
    meaning: str
    status: str
    examples: int = 0
    detail: str = ""
    kind: str = ""
    case: KernelCase | None = None
    guess: str = ""
    fault: Fault | None = None
    found_after: int = 0
    snippet: str = ""
    same_as: str = ""


@dataclass(frozen=True)
class KernelReport:
    """What :func:`sparsedsl.testing.check` found of a kernel: ``print`` it, ask ``.ok``, run ``.snippet``.

    ``warnings``: what is wrong outside the declared limits. ``seed``: of the cases; ``check(kernel, seed=...)`` draws them again.

    >>> import torch, sparsedsl as sd
    >>> def mine(q, k, v):
    ...     return torch.softmax(q @ k.mT, -1) @ v
    >>> report = sd.testing.check(sd.testing.Kernel(mine, implements=sd.kv_idx >= 0, group=1, dtypes="float32"), examples=5, seed=0)
    >>> report.ok, report.exit_code
    (False, 1)
    >>> print(report.failures[0].guess)
    the scale is left out
    """

    kernel: Kernel
    findings: tuple[KernelFinding, ...]
    seed: int
    warnings: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        """Whether no property failed, and at least one held."""
        return not self.failures and any(p.status == HOLDS for p in self.findings)

    @property
    def failures(self) -> tuple[KernelFinding, ...]:
        """The properties that fail."""
        return tuple(p for p in self.findings if p.status == FAILS)

    @property
    def causes(self) -> tuple[KernelFinding, ...]:
        """The failures that say something of their own: not those that compare with numbers which are wrong in a plain call too."""
        return tuple(p for p in self.failures if not p.same_as)

    @property
    def exit_code(self) -> int:
        """0: right; 1: a property failed; 2: nothing could be run."""
        return 1 if self.failures else 0 if self.ok else 2

    @property
    def snippet(self) -> str:
        """A program that shows the first failure again; empty if there is none."""
        return next((p.snippet for p in self.causes), "")

    @property
    def report(self) -> str:
        """The report as text."""
        return str(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, as ``--json`` prints it."""
        findings = [
            {
                **{name: getattr(p, name) for name in ("name", "meaning", "status", "examples", "detail")},
                **({"failure": _failure(p)} if p.status == FAILS else {}),
            }
            for p in self.findings
        ]
        return {
            "kernel": self.kernel.name,
            "implements": str(self.kernel.implements.text),
            "declared": {name: str(value) for name, value in self.kernel.given.items()},
            "ok": self.ok,
            "exit_code": self.exit_code,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "warnings": list(self.warnings),
            "properties": findings,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        kernel, width = self.kernel, max((len(p.name) for p in self.findings), default=0)
        lines = [f"{kernel.name} implements", *textwrap.indent(str(kernel.implements), "  ").splitlines()]
        given = kernel.given.items()
        words = ", ".join(f"{name}={value!r}" for name, value in given if name not in ("name", "refuses"))
        lines += textwrap.wrap(f"declared: {words or 'no limits'}", _WIDTH, subsequent_indent="  ") + [""]
        for p in self.findings:
            count = p.examples if p.status in (HOLDS, FAILS) else ""
            lines.append(f"  {p.name:{width}}  {p.status:14}  {count:>5}  {p.meaning}")
            if p.same_as:
                lines.append(" " * (width + 6) + f"as {p.same_as} does on the same case: see there")
            if p.status in (SKIPPED, NOT_RUN):
                lines += textwrap.wrap(
                    f"because {p.detail}", _WIDTH - 6, initial_indent=" " * (width + 6), subsequent_indent=" " * (width + 6)
                )
        lines += [line for text in self.warnings for line in ("", *textwrap.wrap(f"warning: {text}", _WIDTH))]
        for p in self.causes:
            lines += ["", *_told(p)]
        verdict = "right, as far as tried" if self.ok else "wrong" if self.failures else "nothing could be run"
        lines += ["", *textwrap.wrap(f"{verdict}{self._unreached()}; seed {self.seed}", _WIDTH)]
        return "\n".join(lines)

    def _unreached(self) -> str:
        names = [p.name for p in self.findings if p.status == NOT_RUN]
        return f"; not reached: {', '.join(names)}" if names and (self.ok or self.failures) else ""


def _told(p: KernelFinding) -> list[str]:
    lines = textwrap.wrap(f"{p.name} FAILS: {p.detail}", _WIDTH, subsequent_indent="  ")
    if p.guess:
        lines += textwrap.wrap(f"It is what one gets if {p.guess}.", _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += textwrap.wrap(f"smallest case: {p.case!r}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [*lines, "  this program shows it:", "", textwrap.indent(p.snippet, "    ").rstrip()]


def _failure(p: KernelFinding) -> dict[str, Any]:
    fault = None if p.fault is None else {k: v for k, v in asdict(p.fault).items() if k != "what"}
    if fault:
        fault = {name: str(x) if isinstance(x, float) and not abs(x) < float("inf") else x for name, x in fault.items()}
    case = None if p.case is None else asdict(p.case)
    found = {"kind": p.kind, "guess": p.guess, "element": fault, "case": case, "found_after": p.found_after, "program": p.snippet}
    if p.same_as:
        found["same_as"] = p.same_as
    return found
