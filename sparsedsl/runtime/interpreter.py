"""Evaluate a program node by node: each node once, by the rule that a table has for its kind.

The dense meaning and the lowering each have a table of their own, and nothing else of this in common: what one computes is no part of what
the other computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["Evaluation", "Rules", "check_rules", "complete", "kinds_of_nodes"]

Rules = dict[type[Node], Callable[[Any, Any], Any]]
"""Kind of node -> what a node of it gives: ``rule(evaluation, node)``."""


class Evaluation:
    """One evaluation of a program: node -> value."""

    def __init__(self, rules: Rules, call: ProgramCall):
        self.rules = rules
        self.call = call
        self.domain = call.domain
        self.values: dict[Node, Any] = {}

    def value(self, node: Node) -> Any:
        """What a node gives."""
        if node not in self.values:
            self.values[node] = self.rules[type(node)](self, node)
        return self.values[node]


def kinds_of_nodes() -> set[type[Node]]:
    """Every kind of node that the language has; bases that no function makes are no kinds."""

    def below(kind: type[Node]) -> Iterator[type[Node]]:
        for part in kind.__subclasses__():
            yield part
            yield from below(part)

    return {kind for kind in below(Node) if "function" in vars(kind) and kind.__module__.startswith("sparsedsl.program.")}


def complete(what: str, rules: Rules) -> Rules:
    """The rules of ``what``, if there is one for every kind of node.

    Raises:
        TypeError: a kind has none. This is found when the module is imported, and not when somebody calls such a program.
    """
    missing = sorted(kind.__name__ for kind in kinds_of_nodes() - rules.keys())
    if missing:
        raise TypeError(
            f"{what} has no rule for {', '.join(missing)}: write one, or one that raises UnsupportedError and says why"
        )
    return rules


def check_rules(program: Program, tables: Mapping[str, Rules]) -> None:
    """Whether every node of a program has a rule in each of the tables, ``name -> table``.

    Raises:
        UnsupportedError: a node has none.
    """
    for node in program.everything:
        for what, rules in tables.items():
            if type(node) not in rules:
                raise UnsupportedError(
                    f"{node!r}: {what} has no rule for nodes of the kind {type(node).__name__}. Use the nodes of sparsedsl.program; a kind "
                    "of your own needs a rule in both tables"
                )
