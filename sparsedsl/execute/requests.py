"""The pieces of work of a program, as backends are asked for them: before anything runs, and by ``explain``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy

from sparsedsl.execute.mask_split import MaskSplit, split_node
from sparsedsl.lang.expressions import Mask
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources, tensors
from sparsedsl.program.axes import base_of, rows_on
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall, blocks_of_keys
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.runtime.request import CallFacts, Request

__all__ = ["facts_of", "parts_of", "requests_of"]


def facts_of(call: ProgramCall, lse: bool) -> CallFacts:
    """The plain facts of a checked call."""
    return CallFacts.of(call.q, call.k, call.v, grad=call.needs_grad, lse=lse)


@functools.lru_cache(maxsize=1024)
def parts_of(node: Attend, whole_tables: bool) -> MaskSplit:
    """How the mask of an attention is split. ``whole_tables``: choices are handed over as tables, so that there is nothing to split. They
    are where there is no LSE, by which results along lists join."""
    if (whole_tables or not node.has_lse) and node.normaliser is None:
        return MaskSplit(node.pattern.mask.expr)
    return split_node(node)


def requests_of(
    program: Program, facts: CallFacts, *, whole_tables: bool = False, sizes: Mapping[str, int] | None = None
) -> dict[Node, list[Request]]:
    """Node -> what it asks of a backend, for every node that asks anything.

    ``facts``: of the call; ``lse``: whether that of the whole is wanted. ``sizes``: of axes with names of their own, where known.
    """
    weighed: set[Node] = {branch for node in program.everything if isinstance(node, Joint) for branch in node.branches}
    weighed |= {program.root} if facts.lse else set()
    for node in reversed(program.everything):  # what runs inside of a node that is weighed is weighed
        weighed |= set(node.subprograms) if node in weighed else set()
    found = {}
    for node in program.everything:
        requests = REQUEST_RULES[type(node)](node, _Asked(facts, node in weighed, whole_tables, sizes or {}))
        if requests:
            found[node] = requests
    return found


@dataclass(frozen=True)
class _Asked:
    """What is asked for: facts of the call, whether the LSE of the node is read, whether choices are handed over as tables, and the sizes
    of axes with names of their own."""

    facts: CallFacts
    lse: bool
    whole_tables: bool
    sizes: Mapping[str, int]


def _nothing(node: Node, asked: _Asked) -> list[Request]:
    """Its rule asks no backend."""
    return []


def _slots(node: Recall, asked: _Asked) -> list[Request]:
    return [Request("slots", replace(asked.facts, lse=True), slots=_size(node.memory.gate.axes[3], 1))]


def _linear(node: Linear, asked: _Asked) -> list[Request]:
    """Features and the sum of weights change the widths, and the type, of what is scanned."""
    facts = replace(asked.facts, lse=True)
    width = facts.head_dim
    if node.features == "taylor":
        facts = replace(facts, head_dim=1 + width + width * (width + 1) // 2)
    if node.normalised is not None:
        facts = replace(facts, head_dim_v=facts.head_dim_v + 1)
    if (node.features or node.normalised) and facts.dtype != "float64":
        facts = replace(facts, dtype="float32")
    return [Request("linear", facts, form=node.form)]


def _attention(node: Attend, asked: _Asked) -> list[Request]:
    facts = _own_facts(node, asked.facts, asked.lse, asked.sizes)
    return _of_attention(node, parts_of(node, asked.whole_tables), facts)


def _of_attention(node: Attend, parts: MaskSplit, facts: CallFacts) -> list[Request]:
    found = []
    both = parts.selected != sympy.false
    if parts.static != sympy.false or not both:
        sink = None if both else node.pattern.sink
        pattern = replace(node.pattern, mask=Mask(parts.static, node.pattern.mask.bound), sink=sink, causal=False)
        own = facts if not both else replace(facts, lse=True)
        found.append(Request("attention", own, pattern, new_tables=bool(pattern.tables)))
    if both:
        per_block = node.normaliser is not None
        own = replace(facts, lse=not per_block)
        block = math.gcd(*(choice.blocks[1] // blocks_of_keys(node) for choice in parts.choices))
        found.append(
            Request("selected", own, mask=parts.selected, score=node.pattern.score.expr, block=block, per_block=per_block)
        )
    return found


def _own_facts(node: Attend, facts: CallFacts, lse: bool, sizes: Mapping[str, int]) -> CallFacts:
    """Of attention over other rows than the call's own: their number and widths, as far as their axes tell."""
    known = {"head_dim": facts.head_dim, "value_dim": facts.head_dim_v, "keys": facts.kv_len, "heads": facts.heads}
    known |= {"kv_heads": facts.kv_heads, **sizes}
    keys = known.get(base_of(node.y.axes[2]), facts.kv_len)
    return replace(
        facts,
        lse=lse,
        kv_heads=_size(node.y.axes[1], facts.kv_heads, known),
        kv_len=rows_on(node.y.axes[2], keys),
        head_dim=_size(node.x.axes[3], facts.head_dim, known),
        head_dim_v=_size(node.z.axes[3], facts.head_dim_v, known),
    )


def _size(axis: str, otherwise: int, known: Mapping[str, Any] | None = None) -> int:
    return int(axis) if axis.isdecimal() else (known or {}).get(axis, otherwise)


REQUEST_RULES: Rules[Callable[[Any, _Asked], list[Request]]] = Rules(
    "the requests to backends",
    {
        **dict.fromkeys((tensors.Input, tensors.Summary, sources.Slots), _nothing),
        **dict.fromkeys((scores.Dot, scores.Bound, scores.Antidiagonal, scores.Softmax, scores.Regroup), _nothing),
        **dict.fromkeys((scores.Plus, scores.Gumbel, scores.Grouped, scores.GroupedKeys, scores.Probe, scores.Smooth), _nothing),
        **dict.fromkeys((scores.Relu, scores.Scaled, scores.Weighted, scores.Overlap, scores.GivenScores), _nothing),
        **dict.fromkeys((scores.GivenKeyScores, given_blocks.Given, key_choices.Diagonals, key_choices.ChosenKeys), _nothing),
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _nothing),
        **dict.fromkeys((orders.Order, orders.Inverse, orders.Take, orders.Tokens), _nothing),
        **dict.fromkeys((Joint, Mix, Compact), _nothing),
        Attend: _attention,
        Recall: _slots,
        Linear: _linear,
    },
)
