"""How a program would run, node by node, before anything runs."""

from __future__ import annotations

import html
from dataclasses import dataclass

from sparsedsl.analysis.program_report import ProgramAnalysis
from sparsedsl.execute.kernels import Kernels
from sparsedsl.execute.ways import way_of
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node

__all__ = ["ProgramExplanation", "explain_program"]


@dataclass(frozen=True, eq=False)
class ProgramExplanation:
    """``backend`` and ``reason``: which kernels, and why. ``ways``: node -> how it runs, in words. ``analysis``: what it costs."""

    backend: str
    reason: str
    ways: dict[Node, str]
    analysis: ProgramAnalysis

    def __str__(self) -> str:
        program = self.analysis.program
        width = max(len(program.labels[node]) for node in self.ways)
        lines = [
            f"backend: {self.backend} ({self.reason})",
            *(f"  {program.labels[node]:{width}}  {program.worded(way)}" for node, way in self.ways.items()),
        ]
        return "\n".join([*lines, str(self.analysis)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def explain_program(
    program: Program, backend: str, kernels: Kernels | None, reason: str, analysis: ProgramAnalysis
) -> ProgramExplanation:
    """``kernels`` None: the reference."""
    ways = {node: way for node in program.everything if (way := way_of(node, kernels)) is not None}
    return ProgramExplanation(backend, reason, ways, analysis)
