"""A program as a whole: the graph of its nodes, its text form, and what a call must give it."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import networkx as nx
import sympy

from sparsedsl.errors import TableError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text, reading_text
from sparsedsl.lang.symbols import BATCH, INDEX_SYMBOLS
from sparsedsl.lang.tables import TableSpec, table_reads
from sparsedsl.lang.wrapped import Expression
from sparsedsl.program.branches import Branch, Joint, as_branch
from sparsedsl.program.key_choices import ChosenKeys
from sparsedsl.program.node import Node, reached, renamed
from sparsedsl.program.select import Choice
from sparsedsl.program.tensors import OWN, Input

__all__ = ["Program", "as_program"]

N = TypeVar("N", bound=Node)


class Program:
    """The graph behind a node: what :func:`sparsedsl.compile` compiles and :func:`sparsedsl.analyse` looks at.

    >>> import sparsedsl as sd
    >>> program = sd.Program(sd.patterns.hsa(chunk=64, top_k=16))
    >>> [node.function for node in program.order]
    ['input', 'input', 'input', 'dot', 'top_k', 'input', 'input', 'attend']
    >>> sorted(program.inputs)
    ['landmarks', 'retrieval_q']
    """

    def __init__(self, root: Any, *, inside: Program | None = None):
        self.root: Branch = as_branch("Program", root)
        # The program that runs this one inside a node: nodes have the same labels in both.
        self._outer = inside

    @functools.cached_property
    def graph(self) -> nx.DiGraph:
        """Edges lead from a node to those that read its result. What lies inside of :func:`compact` is a graph of its own."""
        graph = nx.DiGraph()
        for node in reached(self.root):
            graph.add_node(node)
            graph.add_edges_from((source, node) for source in node.inputs)
        return graph

    @functools.cached_property
    def order(self) -> tuple[Node, ...]:
        """Every node after those it reads; the same order in every process."""
        return tuple(nx.lexicographical_topological_sort(self.graph, key=lambda node: node.key))

    @functools.cached_property
    def inputs(self) -> dict[str, Input]:
        """Name -> input that calls give beside q, k and v."""
        return dict(sorted((node.name, node) for node in self.nodes(Input) if node not in OWN))

    @functools.cached_property
    def tables(self) -> dict[str, TableSpec]:
        """Name -> declaration of the static tables that masks and scores read."""
        found: dict[str, TableSpec] = {}
        for part in self.expressions:
            found |= {name: spec for name, spec in part.tables.items() if not isinstance(part.bound.get(name), Node)}
        return dict(sorted(found.items()))

    @functools.cached_property
    def bound(self) -> dict[str, Any]:
        """Tables bound at declaration.

        Raises:
            TableError: two parts have different tensors under one name, of which a call would take one.
        """
        found: dict[str, Any] = {}
        for part in self.expressions:
            for name, value in part.bound.items():
                if not isinstance(value, Node) and found.setdefault(name, value) is not value:
                    raise TableError(
                        f"two different tensors are bound to tables called {name!r} in parts of one program; rename one of them"
                    )
        return found

    @functools.cached_property
    def exprs(self) -> tuple[sympy.Basic, ...]:
        """The sympy expressions of all these."""
        return tuple(expr for part in self.expressions for expr in part.exprs)

    @functools.cached_property
    def expressions(self) -> tuple[Expression | Pattern, ...]:
        """Everything in it that is written in indices: patterns, candidates, forced pairs."""
        return tuple(part for node in self.everything for part in node.expressions)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns among these: masks and scores of attentions."""
        return tuple(part for part in self.expressions if isinstance(part, Pattern))

    @property
    def static(self) -> Pattern | None:
        """The pattern of a program that is one attention of the call's q, k and v over a mask that reads tables only; else None."""
        return self.root.static

    @functools.cached_property
    def everything(self) -> tuple[Node, ...]:
        """All nodes, those inside of :func:`compact` included, each after those it reads."""
        found: dict[Node, None] = {}
        for node in self.order:
            for inner in node.subprograms:
                found.update(dict.fromkeys(Program(inner).everything))
            found[node] = None
        return tuple(found)

    @functools.cached_property
    def joined(self) -> frozenset[Node]:
        """Branches that are weighed against each other by their LSE."""
        return frozenset(branch for node in self.order if isinstance(node, Joint) for branch in node.branches)

    def nodes(self, kind: type[N]) -> Iterator[N]:
        """Those of everything that are of a kind, or of a base of kinds."""
        return (node for node in self.everything if isinstance(node, kind))

    @functools.cached_property
    def labels(self) -> Mapping[Node, str]:
        """Node -> what it is called wherever a user reads of it: the name it was given, else its function, numbered from the second on.

        They are numbered in the order of :attr:`everything`, and the same in every process.

        >>> import sparsedsl as sd
        >>> two = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 8, name="short")
        >>> list(sd.Program(two & (sd.kv_idx <= sd.q_idx)).labels.values())
        ['k', 'summary', 'q', 'dot', 'summary_2', 'dot_2', 'short', 'top_k', 'v', 'attend']
        """
        if self._outer is not None:
            return self._outer.labels
        given = [node.given_name for node in self.everything]
        taken = {*INDEX_SYMBOLS, "score", "inf", *(node.label for node in OWN), *self.tables, *given}
        found: dict[Node, str] = {}
        for node, name in zip(self.everything, given, strict=True):
            label = name if name and name not in found.values() else next(_numbered(name or node.function, taken))
            taken.add(label)
            found[node] = label
        return types.MappingProxyType(found)

    def worded(self, text: str, nodes: Iterable[Node] | None = None) -> str:
        """``text``, which calls nodes by their :attr:`~sparsedsl.program.node.Node.label`, with :attr:`labels` instead. ``nodes``: those
        that it may speak of, where two of the program have the same name."""
        return renamed(text, {node.label: self.labels[node] for node in (self.labels if nodes is None else nodes)})

    @functools.cached_property
    def text(self) -> str:
        """The program as Python code, a line a node: what makes it again."""
        return self._written(expression_text)

    def _written(self, write: Callable[[sympy.Basic], str]) -> str:
        specs = [f"{name} = {spec.declaration()}" for name, spec in self.tables.items()]
        nodes = [node for node in self.everything if node not in OWN]
        return "\n".join([*specs, *(f"{self.labels[node]} = {self.worded(node.code(write), node.read)}" for node in nodes)])

    @property
    def key(self) -> str:
        """A hash of the program (32 hex digits), the same in every process."""
        return self.root.key

    @functools.cached_property
    def reads_batch(self) -> bool:
        """Whether a static expression depends on ``b``, or calls bring inputs that do: batch entries cannot be told apart else."""
        if self.inputs:
            return True
        for part in self.expressions:
            nodes = {name for name, value in part.bound.items() if isinstance(value, Node)}
            for expr in part.exprs:
                plain = {read: sympy.Dummy(integer=True) for read in table_reads(expr) if read.spec.name in nodes}
                if BATCH in expr.xreplace(plain).free_symbols:
                    return True
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.root is other.root

    def __hash__(self) -> int:
        return hash(self.root)

    def __reduce__(self) -> Any:
        return Program, (self.root,)

    def _plain_(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from sparsedsl.html_card import card
        from sparsedsl.program.glance import picture_of

        return card("Program", str(self), self.html_facts(), picture_of(self))

    def html_facts(self) -> list[tuple[str, str]]:
        """What a notebook says of it beside its text: names and words."""
        given = [f"{name} ({' x '.join(node.axes)})" for name, node in self.inputs.items()]
        chosen = [self.labels[node] for node in self.order if node.chooses]
        missing = [name for name in self.tables if name not in self.bound]
        facts = [("nodes", f"{len(self.everything):,}")]
        facts += [
            ("inputs beside q, k, v", ", ".join(given)),
            ("chooses", ", ".join(chosen)),
            ("tables to pass", ", ".join(missing)),
        ]
        return [(name, words) for name, words in facts if words]

    def __str__(self) -> str:
        return self._written(reading_text)

    def __repr__(self) -> str:
        return f"<Program {self.labels[self.root]}: {len(self.order)} nodes>"


def _numbered(name: str, taken: Container[str]) -> Iterator[str]:
    """``name``, then ``name_2``, ``name_3``, .., without those that are taken."""
    return (word for word in itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2))) if word not in taken)


def as_program(value: Any) -> Program | None:
    """The program that a value is, or None where it is a static pattern (or nothing of ours)."""
    if isinstance(value, Program):
        return value
    if isinstance(value, (Branch, Choice, ChosenKeys)):
        return Program(value)
    dynamic = isinstance(value, Pattern) or hasattr(value, "bound")
    if dynamic and any(isinstance(bound, Node) for bound in value.bound.values()):
        return Program(value)
    return None
