"""Tables of rules: an interpretation of programs is one rule for every kind of node, and is whole or does not exist.

What a program means, costs, proves, remembers or looks like is worked out node by node. Each such interpretation holds its rules in one
:class:`Rules`, so that a kind of node that somebody adds is either understood by all of them or refused by name: nothing falls through to
the last branch of a chain of ``isinstance``. What is a fact of the node itself is an attribute of its class instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from sparsedsl.errors import UnsupportedError
from sparsedsl.program import (
    branches,
    given_blocks,
    key_choices,
    orders,
    recurrences,
    score_values,
    scores,
    select,
    sources,
    tensors,
)
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node

__all__ = ["Rules", "check_rules", "kinds_of_nodes"]

R = TypeVar("R")

# A kind of node is known once its module is imported: these are all that there are.
_WHERE = (branches, given_blocks, key_choices, orders, recurrences, score_values, scores, select, sources, tensors)
_MODULES = {module.__name__ for module in _WHERE}


def kinds_of_nodes(base: type[Node] = Node) -> set[type[Node]]:
    """Every kind of node that the language has, or that derives from ``base``; bases that no function makes are no kinds."""

    def below(kind: type[Node]) -> Iterator[type[Node]]:
        yield kind
        for part in kind.__subclasses__():
            yield from below(part)

    return {kind for kind in below(base) if "function" in vars(kind) and kind.__module__ in _MODULES}


class Rules(dict[type[Node], R]):
    """Kind of node -> its rule, for every kind of node that derives from ``base``.

    ``interpretation``: what the rules say of a node, for messages: ``"the cost"``.

    Raises:
        TypeError: a kind has no rule. This is found when the module of the table is imported, and not when somebody calls such a program.
        UnsupportedError: a kind that is not of the language is looked up, and nobody has given a rule for it.
    """

    def __init__(self, interpretation: str, rules: Mapping[type[Node], R], base: type[Node] = Node):
        missing = sorted(kind.__name__ for kind in kinds_of_nodes(base) - rules.keys())
        if missing:
            raise TypeError(
                f"{interpretation} has no rule for {', '.join(missing)}: write one, or one that raises UnsupportedError and says why"
            )
        super().__init__(rules)
        self.interpretation = interpretation

    def __missing__(self, kind: type[Node]) -> NoReturn:
        raise UnsupportedError(
            f"{self.interpretation} has no rule for nodes of the kind {kind.__name__}. Use the nodes of sparsedsl.program, or give this "
            "table a rule for a kind of your own"
        )


def check_rules(program: Program, *tables: Rules[Any]) -> None:
    """Whether every node of a program has a rule in each of the tables.

    Raises:
        UnsupportedError: a node has none.
    """
    for node in program.everything:
        for rules in tables:
            rules[type(node)]
