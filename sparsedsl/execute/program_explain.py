"""How a program would run, node by node, before anything runs."""

from __future__ import annotations

import html
from dataclasses import dataclass

import sympy

from sparsedsl.analysis.program_report import ProgramAnalysis
from sparsedsl.backends.tiled.whole_blocks import split
from sparsedsl.execute.kernels import FlexKernels, Kernels, TritonKernels
from sparsedsl.lang.expressions import Mask
from sparsedsl.program.branches import Attend, Compact, Joint, Linear, Mix, Recall
from sparsedsl.program.decided import assume
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Order, Take, Tokens
from sparsedsl.program.scores import KeyScores, Scores
from sparsedsl.program.select import Select

__all__ = ["ProgramExplanation", "explain_program"]


@dataclass(frozen=True, eq=False)
class ProgramExplanation:
    """``backend`` and ``reason``: which kernels, and why. ``ways``: node -> how it runs, in words. ``analysis``: what it costs."""

    backend: str
    reason: str
    ways: dict[Node, str]
    analysis: ProgramAnalysis

    def __str__(self) -> str:
        width = max(len(node.label) for node in self.ways)
        lines = [
            f"backend: {self.backend} ({self.reason})",
            *(f"  {node.label:{width}}  {way}" for node, way in self.ways.items()),
        ]
        return "\n".join([*lines, str(self.analysis)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def explain_program(
    program: Program, backend: str, kernels: Kernels | None, reason: str, analysis: ProgramAnalysis
) -> ProgramExplanation:
    """``kernels`` None: the reference."""
    ways = {node: way for node in program.everything if (way := _way(node, kernels)) is not None}
    return ProgramExplanation(backend, reason, ways, analysis)


def _way(node: Node, kernels: Kernels | None) -> str | None:
    if isinstance(node, (Scores, KeyScores, Select, Order, Tokens, Take, Attend, Compact, Linear, Recall, Joint, Mix)):
        if kernels is None:
            return "dense, in plain torch: defines the meaning"
        return _lowered(node, kernels)
    return None


def _lowered(node: Node, kernels: Kernels) -> str:
    torch_way = "torch"
    if isinstance(node, Scores):
        return f"{torch_way}: in blocks, when a choice asks for them; never queries x units at once"
    if isinstance(node, KeyScores):
        return f"{torch_way}: two passes over tiles of keys"
    if isinstance(node, Select):
        rows, columns = node.units
        return f"{torch_way}: lists for every {_few(rows, 'query', 'queries')}, of units of {_few(columns, 'key', 'keys')}"
    if isinstance(node, (Order, Tokens)):
        return f"{torch_way}: a stable sort"
    if isinstance(node, Take):
        return f"{torch_way}: a copy in the new order"
    if isinstance(node, Compact):
        return f"{torch_way}: rows gathered, rows scattered; inside it the program runs on the same kernels"
    if isinstance(node, (Linear, Recall)):
        return {
            FlexKernels: "refused: FlexAttention has no recurrence",
            TritonKernels: "kernels: chunks in parallel, states from chunk to chunk",
        }.get(type(kernels), "torch: chunks in parallel, states from chunk to chunk")
    if isinstance(node, Attend):
        return _attend(node, kernels)
    return f"{torch_way}: the results of its branches, weighed"


def _attend(node: Attend, kernels: Kernels) -> str:
    single = [choice for choice in node.selections if choice.units[0] == 1]
    inner = f"the lowering {kernels.lowering(new_tables=bool(node.pattern.tables))!r}"
    if node.normaliser is not None:
        if kernels.whole_tables:
            return "two passes: LSE of every chunk, then FlexAttention with a bias of queries x chunks (short sequences)"
        return f"{_along(kernels)}, a softmax in every chunk, weights outside"
    if single and not kernels.whole_tables:
        name = next(name for name, bound in node.pattern.mask.bound.items() if bound is single[0])
        always = assume(node.pattern.mask.expr, {name: False})
        beside = "" if always == sympy.false else f", and {inner} for {Mask(always)}; one softmax over both"
        return f"{_along(kernels)}{beside}"
    if node.selections and kernels.whole_tiles:
        rows, columns = node.selections[0].units
        expr = node.pattern.mask.expr
        parts = split(expr, rows, columns)
        if parts is not None:
            rest = "" if parts[1] == sympy.false else f", and {inner} for {Mask(parts[1])}; one softmax over both"
            return f"lists of full tiles of {rows} x {columns} tokens{rest}"
    return f"{inner}" + (", choices as tables" if node.selections else "")


def _along(kernels: Kernels) -> str:
    if isinstance(kernels, TritonKernels):
        return "kernels along lists: adjacent queries share the union of their units"
    return "torch along lists: for every unit of keys the queries that picked it"


def _few(count: int, one: str, many: str) -> str:
    return one if count == 1 else f"{count} {many}"
