"""What of a program each rank has to know of the others: rows that all compare by, which are small, and rows that are chosen.

A program whose choices compare queries with one row for each block of keys runs on ranks in three steps: those rows go to all, every rank
chooses for its own queries, and keys and values are sent to those who chose them. What runs along the keys is told states by others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.tables import table_reads
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources, tensors
from sparsedsl.program.axes import base_of, windows_of
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall
from sparsedsl.program.decided import assume
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node, nodes_in
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.relocation import blocks_kept_whole
from sparsedsl.program.rules import Rules
from sparsedsl.program.select import Choice
from sparsedsl.program.tensors import Input

__all__ = ["EXCHANGE_RULES", "Stages", "certain_pattern", "stages_of", "whole_blocks"]


class Reads(NamedTuple):
    """What a node reads of keys. ``rows``: nodes that it reads row by row, of all keys; ``pooled``: nodes of which it makes one row a
    block; ``chosen``: nodes of which it reads the rows that its mask allows; ``state``: it reads what earlier keys left."""

    rows: tuple[Node, ...] = ()
    pooled: tuple[Node, ...] = ()
    chosen: tuple[Node, ...] = ()
    state: bool = False


@dataclass(frozen=True, eq=False)
class Stages:
    """The parts of a program in the order in which ranks run them.

    spread: inputs with a row for each key, or block of keys, that go to all ranks. local: inputs with a row for each key of which others
    get what is made of blocks. pooled: the nodes that make it. recurrent: those that run along the keys. early: attentions to such rows,
    which all ranks have. choices: those that other attentions, ``late``, follow. fetched: inputs whose rows are sent to the ranks that
    chose them. graded: the nodes that gradients reach: what only drives a choice gets none.
    """

    spread: tuple[Input, ...]
    local: tuple[Input, ...]
    pooled: tuple[Node, ...]
    recurrent: tuple[Linear | Recall, ...]
    early: tuple[Attend, ...]
    choices: tuple[Choice, ...]
    late: tuple[Attend, ...]
    fetched: tuple[Input, ...]
    graded: frozenset[Node]


def stages_of(program: Program, given: Set[str] | None = None) -> Stages:
    """The stages of a program. ``given``: inputs that a call gives, of those that have a default; None: all.

    Raises:
        UnsupportedError: a choice depends on more than what blocks are compared by, or goes by an order of all keys.

    >>> import sparsedsl as sd
    >>> found = stages_of(sd.Program(sd.patterns.hsa(chunk=64, top_k=4)))
    >>> [node.name for node in found.spread], [node.name for node in found.fetched]
    (['landmarks'], ['k', 'v'])
    """
    spread, local, fetched = dict[Input, None](), dict[Input, None](), dict[Input, None]()
    pooled, early, late, recurrent = list[Node](), list[Attend](), list[Attend](), list[Any]()
    for node in program.everything:
        if any(windows_of(axis) for axis in node.axes):
            _refuse(program, node, "counts windows of keys, which overlap, so that one may lie on two ranks")
        reads = EXCHANGE_RULES[type(node)](node, program)
        spread.update(dict.fromkeys(_inputs(reads.rows, given)))
        fetched.update(dict.fromkeys(_inputs(reads.chosen, given)))
        for read in _inputs(reads.pooled, given):
            (local if "keys" in read.axes else spread)[read] = None
            pooled += [node] if "keys" in read.axes else []
        recurrent += [node] if reads.state else []
        if isinstance(node, Attend):
            (late if reads.chosen else early).append(node)
    for read in spread:
        if read in tensors.OWN:
            raise UnsupportedError(
                f"{program!r} compares queries with every row of {read.name!r}: all keys would have to go to all ranks. Compare with "
                "blocks of them, sd.summary(sd.k, 64), or with rows made for it, sd.input('index_k', 'batch one keys index_dim'), which "
                "are sent to all ranks"
            )
    choices = {choice: None for node in late for choice in node.selections}
    # What is known to all needs no rows of its own.
    both = {node: None for node in (*local, *fetched) if node not in spread}
    return Stages(
        tuple(spread), tuple(both), tuple(pooled), tuple(recurrent), tuple(early), tuple(choices), tuple(late), tuple(fetched),
        _graded(program),
    )  # fmt: skip


def _graded(program: Program) -> frozenset[Node]:
    waiting, found = [*program.root.inputs, program.root], set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in found and not node.chooses:
            found.add(node)
            waiting += node.inputs
    return frozenset(found)


def _inputs(nodes: tuple[Node, ...], given: Set[str] | None) -> list[Input]:
    """Those of the nodes that a call gives, with rows for keys; of inputs that it leaves out their defaults."""
    found = []
    for node in nodes:
        while isinstance(node, Input) and node.default is not None and given is not None and node.name not in given:
            node = node.default
        if isinstance(node, Input) and any(base_of(axis) == "keys" for axis in node.axes):
            found.append(node)
    return found


def whole_blocks(program: Program) -> tuple[int, int]:
    """Tokens of which a multiple stays together on a rank, and of keys that are sent together: blocks of the program are not cut."""
    queries, keys = blocks_kept_whole(program)
    return math.lcm(*queries, *keys), math.lcm(*keys)


def certain_pattern(program: Program, node: Attend) -> Pattern:
    """What an attention sees where nothing is chosen: a pair that no choice picked is allowed if it is here.

    >>> import sparsedsl as sd
    >>> program = sd.Program(sd.patterns.moba(chunk=64, top_k=3))
    >>> print(certain_pattern(program, program.root).mask)
    (q_idx // 64 == kv_idx // 64) & (kv_idx <= q_idx)
    """
    mask = node.pattern.mask
    others = [read for read in nodes_in(mask) if not isinstance(read, Choice)]
    if others or nodes_in(node.pattern.score):
        _refuse(program, (*others, *nodes_in(node.pattern.score))[0], "is read by a mask or score for each pair of query and key")
    names = {choice.label for choice in node.selections}
    expr = assume(mask.expr, dict.fromkeys(names, False))
    if any(read.spec.name in names for read in table_reads(expr)):
        _refuse(program, node, "reads a choice as a number")
    bound = {name: value for name, value in mask.bound.items() if not isinstance(value, Node)}
    return attend(Mask(expr, bound), heads=node.pattern.heads)


def _refuse(program: Program, node: Node, why: str) -> Any:
    raise UnsupportedError(
        f"{program.labels.get(node, node.label)} {why}: the program cannot run on ranks that hold a part of the tokens each. Keep such "
        "layers on whole sequences, with shards of the heads (DTensors, Shard(1)), or choose by summaries of blocks side by side"
    )


# ---- rules: what a node reads of keys ------------------------------------------------------------------------------------------------


def _by_row(node: Node, program: Program) -> Reads:
    """What it gives for a row of queries it makes of that row."""
    return Reads()


def _summary(node: tensors.Summary, program: Program) -> Reads:
    return Reads(pooled=(node.x,))


def _bound(node: scores.Bound, program: Program) -> Reads:
    return Reads(pooled=(node.y,))


def _dot(node: scores.Dot, program: Program) -> Reads:
    return Reads(rows=(node.y,))


def _given(node: scores.GivenScores | given_blocks.Given, program: Program) -> Any:
    return _refuse(program, node, f"is given by {node.x.label!r}, whose rows are queries and whose columns all keys")


def _top_p(node: select.TopP, program: Program) -> Any:
    return _refuse(program, node, "shares out the mass of the rows of all queries together") if node.over == "map" else Reads()


def _attend(node: Attend, program: Program) -> Reads:
    certain_pattern(program, node)
    keys, values = node.y, node.z
    if keys.axes[2] != "keys":
        return Reads(rows=(keys, values))
    for x in (keys, values):
        if not isinstance(x, Input):
            _refuse(program, node, f"attends to {x.label!r}, which is made of keys one by one")
    return Reads(chosen=(keys, values))


def _all_keys(node: Node, program: Program) -> Any:
    return _refuse(program, node, "goes by all keys of the sequence at once, or by their order")


def _probing(node: Node, program: Program) -> Any:
    return _refuse(program, node, "looks at all keys from some queries")


def _written(node: Linear | sources.Slots, program: Program) -> Reads:
    """Rows of its own rank alone, and states of others."""
    for x in node.inputs:
        if not isinstance(x, Input):
            _refuse(program, node, f"runs along {x.label!r}, which is made of keys one by one")
    return Reads()


def _linear(node: Linear, program: Program) -> Reads:
    return _written(node, program)._replace(state=True)


def _recall(node: Recall, program: Program) -> Reads:
    return Reads(state=True)


def _kept(node: Node, program: Program) -> Any:
    return _refuse(program, node, "compacts tokens that lie on several ranks")


def _noise(node: Node, program: Program) -> Any:
    return _refuse(program, node, "draws numbers by the place of a row in the call")


EXCHANGE_RULES: Rules[Callable[[Any, Program], Any]] = Rules(
    "the exchange between ranks",
    {
        **dict.fromkeys((Input, Joint, Mix, scores.Softmax, scores.Regroup, scores.Plus, scores.Relu), _by_row),
        **dict.fromkeys((scores.Scaled, scores.Weighted, scores.Grouped, select.TopK, select.Threshold), _by_row),
        select.TopP: _top_p,
        tensors.Summary: _summary,
        scores.Bound: _bound,
        scores.Dot: _dot,
        Attend: _attend,
        **dict.fromkeys((scores.GivenScores, given_blocks.Given), _given),
        **dict.fromkeys((scores.Antidiagonal, scores.Probe, key_choices.Diagonals), _probing),
        **dict.fromkeys((scores.Smooth, scores.Overlap, scores.GroupedKeys, scores.GivenKeyScores), _all_keys),
        **dict.fromkeys((key_choices.ChosenKeys, key_choices.Divergence), _all_keys),
        **dict.fromkeys((orders.Order, orders.Inverse, orders.Take), _all_keys),
        **dict.fromkeys((orders.Tokens, Compact), _kept),
        sources.Slots: _written,
        Linear: _linear,
        Recall: _recall,
        scores.Gumbel: _noise,
    },
)
