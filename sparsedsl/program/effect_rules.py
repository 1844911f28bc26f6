"""What a program does beside computing from the past: the reasons why a use of it may be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources, tensors
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node, reached
from sparsedsl.program.orders import Order, Tokens
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.select import Select

__all__ = ["EFFECT_RULES", "KEEPS_STATE", "LATER_QUERIES", "effects", "reasons"]

LATER_QUERIES = "selection reads later queries"
KEEPS_STATE = "keeps state"


def reasons(program: Program) -> dict[str, list[str]]:
    """Effect -> what brings it about, in words.

    >>> import sparsedsl as sd
    >>> list(reasons(sd.Program(sd.patterns.token_sparse())))
    ['selection reads later queries']
    """
    found: dict[str, list[str]] = {}
    for node in program.everything:
        for effect, why in EFFECT_RULES[type(node)](node):
            found.setdefault(effect, []).append(f"{program.labels[node]}: {why}")
    return found


def effects(program: Program) -> frozenset[str]:
    """The effects of a program: ``"selection reads later queries"``, ``"keeps state"``."""
    return frozenset(reasons(program))


# ---- rules: the effects of one node, wherever it stands, each with its reason -----------------------------------------------------

Effects = Iterator[tuple[str, str]]


def _none(node: Node) -> Effects:
    return iter(())


def _by_probes(node: Node) -> Effects:
    """What is decided by scores of keys is decided by the queries that probed them."""
    for probe in reached(node):
        if isinstance(probe, scores.KeyScores) and probe.probing:
            yield LATER_QUERIES, f"decided by the last {probe.probing} queries of the call"


def _by_all_keys(node: Tokens | key_choices.ChosenKeys | key_choices.Divergence) -> Effects:
    """One decision for all queries of a head, by the scores of all its keys: those after a query count as well, whoever scored them."""
    yield from list(_by_probes(node)) or [(LATER_QUERIES, "all keys of the call are compared with each other, later ones too")]


def _for_blocks(node: Select) -> Effects:
    """One choice for several queries is made by all of them, and so by queries after the first."""
    queries = node.blocks[0]
    if node.whole_sequence:
        yield LATER_QUERIES, "the blocks of all rows are compared with each other"
    elif queries > 1:
        what = "antidiagonal sums" if any(isinstance(source, scores.Antidiagonal) for source in reached(node)) else "scores"
        yield LATER_QUERIES, f"one choice for {queries} queries, by {what} of all of them"


def _state(node: Linear | Recall) -> Effects:
    yield KEEPS_STATE, "what it has read is kept from call to call"


EFFECT_RULES: Rules[Callable[[Any], Effects]] = Rules(
    "the effects",
    {
        **dict.fromkeys((tensors.Input, tensors.Summary, orders.Take, orders.Inverse, sources.Slots), _none),
        **dict.fromkeys((scores.Dot, scores.Bound, scores.Antidiagonal, scores.Softmax, scores.Regroup, scores.Plus), _none),
        **dict.fromkeys((scores.Gumbel, scores.Grouped, scores.Probe, scores.Smooth, scores.GroupedKeys), _none),
        **dict.fromkeys((scores.Relu, scores.Scaled, scores.Weighted, scores.Overlap, scores.GivenScores), _none),
        **dict.fromkeys((scores.GivenKeyScores, given_blocks.Given), _none),
        key_choices.Diagonals: _none,
        Order: _by_probes,
        **dict.fromkeys((Tokens, key_choices.ChosenKeys, key_choices.Divergence), _by_all_keys),
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _for_blocks),
        **dict.fromkeys((Linear, Recall), _state),
        **dict.fromkeys((Attend, Joint, Mix, Compact), _none),
    },
)
