"""How each kind of node would run on the kernels of a backend, in words: a rule for every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from sparsedsl.analysis.spans import spans
from sparsedsl.backends.tiled.whole_blocks import split
from sparsedsl.execute.kernels import FlexKernels, Kernels, TritonKernels
from sparsedsl.execute.mask_split import split_node
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.tables import table_reads
from sparsedsl.program import orders, scores, select, sources, tensors
from sparsedsl.program.branches import Attend, Compact, Joint, Linear, Mix, Recall
from sparsedsl.program.node import Node
from sparsedsl.program.rules import Rules
from sparsedsl.program.select import Select

__all__ = ["WAY_RULES", "way_of"]


def way_of(node: Node, kernels: Kernels | None) -> str | None:
    """How a node runs; ``kernels`` None: by the reference. None for nodes that run as part of others, or not at all."""
    rule = WAY_RULES[type(node)]
    if rule is _part_of_others:
        return None
    return "dense, in plain torch: defines the meaning" if kernels is None else rule(node, kernels)


# ---- rules -----------------------------------------------------------------------------------------------------------------------


def _part_of_others(node: Node, kernels: Kernels) -> str:
    return ""


def _scores(node: scores.Scores, kernels: Kernels) -> str:
    return "torch: in blocks, when a choice asks for them; never queries x units at once"


def _probe(node: scores.Probe, kernels: Kernels) -> str:
    return "torch: two passes over tiles of keys"


def _smooth(node: scores.Smooth, kernels: Kernels) -> str:
    return "torch: means of neighbours"


def _grouped_keys(node: scores.GroupedKeys, kernels: Kernels) -> str:
    return "torch: heads joined"


def _select(node: Select, kernels: Kernels) -> str:
    rows, columns = node.units
    return f"torch: lists for every {_few(rows, 'query', 'queries')}, of units of {_few(columns, 'key', 'keys')}"


def _sort(node: orders.Order | orders.Tokens, kernels: Kernels) -> str:
    return "torch: a stable sort"


def _inverse(node: orders.Inverse, kernels: Kernels) -> str:
    return "torch: a scatter of the places"


def _take(node: orders.Take, kernels: Kernels) -> str:
    return "torch: a copy in the new order"


def _compact(node: Compact, kernels: Kernels) -> str:
    return "torch: rows gathered, rows scattered; inside it the program runs on the same kernels"


def _recurrent(node: Linear | Recall, kernels: Kernels) -> str:
    return {
        FlexKernels: "refused: FlexAttention has no recurrence",
        TritonKernels: "kernels: chunks in parallel, states from chunk to chunk",
    }.get(type(kernels), "torch: chunks in parallel, states from chunk to chunk")


def _combined(node: Joint | Mix, kernels: Kernels) -> str:
    return "torch: the results of its branches, weighed"


def _attend(node: Attend, kernels: Kernels) -> str:
    single = [choice for choice in node.selections if choice.units[0] == 1]
    inner = f"the lowering {kernels.lowering(new_tables=bool(node.pattern.tables))!r}"
    if node.normaliser is not None:
        if kernels.whole_tables:
            return "two passes: LSE of every chunk, then FlexAttention with a bias of queries x chunks (short sequences)"
        return f"{_along(kernels, node)}, a softmax in every chunk, weights outside"
    if single and not kernels.whole_tables:
        cut = split_node(node)
        static = f"{inner} for {Mask(cut.static)}" + _tables(node, cut.static)
        if cut.selected == sympy.false:
            return static
        several = f" of {len(cut.choices)} choices, joined" if len(cut.choices) > 1 else ""
        return f"{_along(kernels, node)}{several}" + (
            "" if cut.static == sympy.false else f", and {static}; one softmax over both"
        )
    if node.selections and kernels.whole_tiles:
        rows, columns = node.selections[0].units
        expr = node.pattern.mask.expr
        parts = split(expr, rows, columns)
        if parts is not None:
            rest = "" if parts[1] == sympy.false else f", and {inner} for {Mask(parts[1])}; one softmax over both"
            return f"lists of full tiles of {rows} x {columns} tokens{rest}"
    return inner + _tables(node, node.pattern.mask.expr)


def _tables(node: Attend, mask: Any) -> str:
    """What is said of a mask that reads choices: they are tables in it."""
    names = {read.spec.name for read in table_reads(mask)}
    read = [choice for choice in node.selections if choice.label in names]
    few = any(choice.units[0] == 1 for choice in read)
    return (", choices as tables" if read else "") + (", of some queries at a time" if few else "")


def _along(kernels: Kernels, node: Attend) -> str:
    if isinstance(kernels, TritonKernels):
        parts = split_node(node)
        plain = not node.pattern.has_score and not parts.symbols and spans(parts.selected) is not None
        printed = "" if plain else ", mask and score printed into them"
        return f"kernels along lists: adjacent queries share the union of their units{printed}"
    return "torch along lists: for every unit of keys the queries that picked it"


def _few(count: int, one: str, many: str) -> str:
    return one if count == 1 else f"{count} {many}"


WAY_RULES: Rules[Callable[[Any, Kernels], str]] = Rules(
    "the explanation",
    {
        **dict.fromkeys((tensors.Input, tensors.Summary, sources.Slots), _part_of_others),
        **dict.fromkeys((scores.Dot, scores.Bound, scores.Antidiagonal, scores.Softmax, scores.Regroup), _scores),
        **dict.fromkeys((scores.Plus, scores.Gumbel, scores.Grouped), _scores),
        scores.Probe: _probe,
        scores.Smooth: _smooth,
        scores.GroupedKeys: _grouped_keys,
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _select),
        **dict.fromkeys((orders.Order, orders.Tokens), _sort),
        orders.Inverse: _inverse,
        orders.Take: _take,
        Attend: _attend,
        Compact: _compact,
        **dict.fromkeys((Linear, Recall), _recurrent),
        **dict.fromkeys((Joint, Mix), _combined),
    },
)
