"""What a program does beside computing from the past: the reasons why a use of it may be wrong."""

from __future__ import annotations

from collections.abc import Iterator

from sparsedsl.program.axes import unit_of
from sparsedsl.program.branches import Linear, Recall
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Order, Tokens
from sparsedsl.program.scores import Antidiagonal, Probe
from sparsedsl.program.select import Select

__all__ = ["KEEPS_STATE", "LATER_QUERIES", "effects", "reasons"]

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
        for effect, why in _effects(node):
            found.setdefault(effect, []).append(f"{node.label}: {why}")
    return found


def effects(program: Program) -> frozenset[str]:
    """The effects of a program: ``"selection reads later queries"``, ``"keeps state"``."""
    return frozenset(reasons(program))


def _effects(node: Node) -> Iterator[tuple[str, str]]:
    if isinstance(node, (Order, Tokens)):
        for probe in _sources(node, Probe):
            yield LATER_QUERIES, f"decided by the last {probe.rows} queries of the call"  # type: ignore[attr-defined]
    if isinstance(node, Select) and unit_of(node.axes[2]) > 1:
        what = "antidiagonal sums" if _sources(node, Antidiagonal) else "scores"
        yield LATER_QUERIES, f"one choice for {unit_of(node.axes[2])} queries, by {what} of all of them"
    if isinstance(node, (Linear, Recall)):
        yield KEEPS_STATE, "what it has read is kept from call to call"


def _sources(node: Node, kind: type[Node]) -> list[Node]:
    """The nodes of a kind that a node's result is made of."""
    found, waiting, seen = [], list(node.inputs), set[Node]()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        found += [source] if isinstance(source, kind) else []
        waiting += source.inputs
    return found
