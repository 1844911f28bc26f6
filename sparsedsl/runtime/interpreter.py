"""Evaluate a program node by node: each node once, by the rule that a table has for its kind.

The dense meaning and the lowering each have a table of their own, and nothing else of this in common: what one computes is no part of what
the other computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsedsl.program.node import Node
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["Evaluation", "Rule"]

# What a node gives: rule(evaluation, node).
Rule = Callable[[Any, Any], Any]


class Evaluation:
    """One evaluation of a program: node -> value."""

    def __init__(self, rules: Mapping[type[Node], Rule], call: ProgramCall):
        self.rules = rules
        self.call = call
        self.domain = call.domain
        self.values: dict[Node, Any] = {}

    def value(self, node: Node) -> Any:
        """What a node gives."""
        if node not in self.values:
            self.values[node] = self.rules[type(node)](self, node)
        return self.values[node]
