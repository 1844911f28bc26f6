"""What a check of a pattern or a program found: a line a property, and for each that fails a program that shows it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.graph import Program

__all__ = ["FAILS", "HOLDS", "SKIPPED", "LayerReports", "Property", "Report"]

HOLDS, FAILS, SKIPPED = "holds", "FAILS", "not applicable"


@dataclass(frozen=True)
class Property:
    """One property of one pattern.

    ``status``: ``"holds"``, ``"FAILS"`` or ``"not applicable"``; for the latter two ``detail`` says why, and beside the first what the
    prover says.

    >>> import sparsedsl as sd
    >>> [(p.name, p.examples) for p in sd.testing.check(sd.kv_idx <= sd.q_idx, examples=2).properties][:2]
    [('text', 1), ('tile lists', 2)]
    """

    name: str
    meaning: str
    status: str
    examples: int
    detail: str = ""
    snippet: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`sparsedsl.testing.check` found; ``print`` it for a table.

    ``seed``: of the cases; ``check(pattern, seed=...)`` draws them again.

    >>> import sparsedsl as sd
    >>> report = sd.testing.check(sd.attend(sd.kv_idx <= sd.q_idx + 1, causal=True), examples=2, seed=0)
    >>> report.ok, report.exit_code
    (False, 1)
    """

    pattern: Pattern | Program
    properties: tuple[Property, ...]
    seed: int = 0

    @property
    def ok(self) -> bool:
        """Whether no property failed."""
        return all(p.status != FAILS for p in self.properties)

    @property
    def exit_code(self) -> int:
        """0: right; 1: a property failed."""
        return 0 if self.ok else 1

    @property
    def snippet(self) -> str:
        """A program that shows the first failure again; empty if there is none."""
        return next((p.snippet for p in self.properties if p.status == FAILS), "")

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, as ``--json`` prints it."""
        return {
            "pattern": self.pattern.text,
            "ok": self.ok,
            "exit_code": self.exit_code,
            "seed": self.seed,
            "warnings": list(getattr(self.pattern, "warnings", ())),
            "properties": [asdict(p) for p in self.properties],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        lines = [*str(self.pattern).splitlines(), ""]
        lines += [f"  ! {text}" for text in getattr(self.pattern, "warnings", ())]
        width = max(len(p.name) for p in self.properties)
        for p in self.properties:
            verdict = p.status if p.status == SKIPPED else f"{p.status:6}{p.examples:6,} examples"
            lines.append(f"  {p.name:{width}}  {verdict:22}  {p.meaning}")
            if p.detail:
                lines += textwrap.wrap(p.detail, 110, initial_indent=" " * (width + 6), subsequent_indent=" " * (width + 6))
        lines += ["", f"{'right, as far as tried' if self.ok else 'wrong'}; seed {self.seed}"]
        failed = [p for p in self.properties if p.status == FAILS]
        for p in failed:
            lines += ["", f"{p.name} fails; this program shows it:", "", textwrap.indent(p.snippet, "    ").rstrip()]
        return "\n".join(lines)


@dataclass(frozen=True)
class LayerReports:
    """What a check of the patterns in a model found: layers that run the same -> its :class:`Report`. ``print`` it.

    >>> import sparsedsl as sd
    >>> found = sd.testing.check(sd.kv_idx <= sd.q_idx, examples=1, seed=0)
    >>> LayerReports({(0, 2): found}).ok
    True
    """

    reports: Mapping[tuple[int, ...], Report]

    @property
    def ok(self) -> bool:
        """Whether no property of any layer failed."""
        return all(report.ok for report in self.reports.values())

    @property
    def exit_code(self) -> int:
        """0: right; 1: a property failed."""
        return 0 if self.ok else 1

    @property
    def snippet(self) -> str:
        """A program that shows the first failure again; empty if there is none."""
        return next((report.snippet for report in self.reports.values() if not report.ok), "")

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values."""
        layers = [{"layers": list(layers), **report.to_dict()} for layers, report in self.reports.items()]
        return {"ok": self.ok, "exit_code": self.exit_code, "layers": layers}

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        parts = [
            f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}\n{report}" for layers, report in self.reports.items()
        ]
        return "\n\n".join(parts)
