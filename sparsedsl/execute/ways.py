"""How each kind of node runs, in words: a rule for every kind. What backends are asked about is told by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from sparsedsl.backends.registry import AUTO, BACKENDS, named
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.tables import table_reads
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources, tensors
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.select import Select
from sparsedsl.runtime.request import CallFacts, Request

__all__ = ["WAY_RULES", "way_of"]

Work = list[tuple[Request, str]]
"""What a node asks of backends, and the name of the backend that does each piece."""


def way_of(node: Node, work: Work, backend: str, facts: CallFacts) -> str | None:
    """How a node runs in a call of these facts for ``backend``; None for nodes that run as part of others, or not at all."""
    way = WAY_RULES[type(node)](node, work)
    return f"{way}: {_made_by(node, backend, facts)}" if isinstance(node, Select) else way


# ---- rules -----------------------------------------------------------------------------------------------------------------------


def _words(text: str | None) -> Callable[[Any, Work], str | None]:
    return lambda node, work: text


# `Dispatch.chooser` is asked at the call, when the compiler may be through.
_CHOOSING = "C++ on a CPU with a compiler (auto and cpp), else torch"


def _select(node: Select, work: Work) -> str:
    rows, columns = node.blocks
    return f"lists for every {_few(rows, 'query', 'queries')}, of blocks of {_few(columns, 'key', 'keys')}"


def _made_by(node: Select, backend: str, facts: CallFacts) -> str:
    """Who makes a choice, of those that a call asks in this order."""
    asked = BACKENDS.values() if backend == AUTO else (named(backend),)
    found = (one.choice(node, facts, by_name=backend != AUTO) for one in asked)
    return next(filter(None, found), _CHOOSING)


def _given(node: given_blocks.Given, work: Work) -> str:
    what = "a bitmap as lists" if node.is_bitmap else "lists, checked and put in order"
    return (
        f"torch: {what} of blocks of {_few(node.blocks[1], 'key', 'keys')} for every {_few(node.blocks[0], 'query', 'queries')}"
    )


def _few(count: int, one: str, many: str) -> str:
    return one if count == 1 else f"{count} {many}"


def _recurrent(node: Linear | Recall, work: Work) -> str:
    return "; ".join(named(backend).way(request) for request, backend in work)


def _attend(node: Attend, work: Work) -> str:
    found = []
    for request, backend in work:
        way = named(backend).way(request)
        if request.work == "selected":
            count = sum(choice.blocks[0] == 1 for choice in node.selections)
            way += f" (of {count} choices, joined)" if count > 1 else ""
            found.append(f"{way}, a softmax in every block, weights outside" if request.per_block else way)
        elif request.pattern is not None:
            mask = request.pattern.mask.expr
            found.append(way if len(work) == 1 and mask == sympy.true else f"{way}: {Mask(mask)}{_tables(node, mask)}")
    return "; one softmax over both: ".join(found)


def _tables(node: Attend, mask: Any) -> str:
    """What is said of a mask that reads choices: they are tables in it."""
    names = {read.spec.name for read in table_reads(mask)}
    read = [choice for choice in node.selections if choice.label in names]
    few = any(choice.blocks[0] == 1 for choice in read)
    return (", choices as tables" if read else "") + (", of some queries at a time" if few else "")


_SCORES = _words("in blocks, when a choice asks for them, by what makes the choice; never queries x blocks at once")

WAY_RULES: Rules[Callable[[Any, Work], str | None]] = Rules(
    "the explanation",
    {
        **dict.fromkeys((tensors.Input, tensors.Summary, sources.Slots), _words(None)),
        **dict.fromkeys((scores.Dot, scores.Bound, scores.Antidiagonal, scores.Softmax, scores.Regroup), _SCORES),
        **dict.fromkeys((scores.Plus, scores.Gumbel, scores.Grouped), _SCORES),
        **dict.fromkeys((scores.Relu, scores.Scaled, scores.Weighted, scores.Overlap), _SCORES),
        **dict.fromkeys((scores.GivenScores, scores.GivenKeyScores), _words(None)),
        given_blocks.Given: _given,
        scores.Probe: _words(f"two passes over tiles of keys: {_CHOOSING}"),
        key_choices.Diagonals: _words("torch: the softmax of a few probing rows at a time, summed along diagonals"),
        key_choices.ChosenKeys: _words("torch: a stable sort of each head; a table of flags in the mask"),
        key_choices.Divergence: _words("torch: a sum over the keys of each head"),
        scores.Smooth: _words("torch: neighbours joined"),
        scores.GroupedKeys: _words("torch: heads joined"),
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _select),
        **dict.fromkeys((orders.Order, orders.Tokens), _words("torch: a stable sort")),
        orders.Inverse: _words("torch: a scatter of the places"),
        orders.Take: _words(
            "read in the new order where that is pooled or attended to in C++ (auto and cpp on a CPU); else a copy"
        ),
        Attend: _attend,
        Compact: _words(
            "a mask inside: rows are read and written where they lie in C++ (auto and cpp on a CPU); else gathered and scattered by torch, "
            "and the program inside runs on the same backends"
        ),
        **dict.fromkeys((Linear, Recall), _recurrent),
        **dict.fromkeys((Joint, Mix), _words("torch: the results of its branches, weighed")),
    },
)
