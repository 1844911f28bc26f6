"""The nodes of a program: frozen, hashable, and merged: two nodes that say the same are one object."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, TypeVar
from weakref import WeakValueDictionary

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Expression
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text

__all__ = ["Node", "nodes_in", "one_of"]

_known: WeakValueDictionary[Any, Node] = WeakValueDictionary()
N = TypeVar("N", bound="Node")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One step of a program. Made by the functions of :mod:`sparsedsl.program`, which check what they are given.

    ``function``: name of the function that makes such a node. ``gives``: what kind of result it has: tensor, scores, key scores, picks,
    order, tokens, memory or branch. ``axes``: what its result is counted by. Equality and hash go by
    :attr:`key`, a hash of the node's text form and those of its inputs.
    """

    function: ClassVar[str]
    gives: ClassVar[str]
    # Field -> word of the function's argument, where they differ.
    words: ClassVar[Mapping[str, str]] = {}

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the result, in order; of a branch those of its output."""
        raise TypeError(f"{type(self).__name__} has no axes")

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Argument name -> value, as the function takes them; those at their defaults are left out."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # An expression compares into a mask, and is never a default.
            if isinstance(value, Expression) or field.default is dataclasses.MISSING or value != field.default:
                found[field.name] = value
        return found

    @functools.cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose results it reads, each once, in the order of its arguments; those read as tables inside masks too."""
        found: dict[Node, None] = {}
        for field in dataclasses.fields(self):
            found.update(dict.fromkeys(nodes_in(getattr(self, field.name))))
        return tuple(found)

    @functools.cached_property
    def tensors(self) -> tuple[Any, ...]:
        """The tensors bound to tables of its expressions, and of those of its inputs: no text form tells them apart."""
        own = [x for field in dataclasses.fields(self) for x in _bound_in(getattr(self, field.name))]
        return (*own, *(x for node in self.inputs for x in node.tensors))

    @functools.cached_property
    def key(self) -> str:
        """A hash (32 hex digits), the same in every process."""
        words = [self.function, *(f"{name}={_text(value, lambda node: node.key)}" for name, value in self.arguments.items())]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]

    @functools.cached_property
    def label(self) -> str:
        """The variable it stands under in text forms, and the name of the table it is read as inside masks and scores."""
        name = getattr(self, "name", None)
        return str(name) if name else f"{self.function}_{self.key[:6]}"

    def code(self) -> str:
        """The call that makes this node, with its inputs by their labels."""
        words = [
            f"{self.words.get(name, name)}={_text(value, lambda node: node.label)}" for name, value in self.arguments.items()
        ]
        return f"{self.function}({', '.join(words)})"

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Node) and self.key == other.key and list(map(id, self.tensors)) == list(map(id, other.tensors))

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return _again, (type(self), {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def __bool__(self) -> NoReturn:
        raise PatternError(f"{self!r} has no truth value: it is computed at the call. Join masks with & | ~")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}>"


def _again(kind: type[N], values: Mapping[str, Any]) -> N:
    return one_of(kind(**values))


def one_of(node: N) -> N:
    """The one object that stands for what this node says."""
    return _known.setdefault((node.key, *map(id, node.tensors)), node)  # type: ignore[return-value]


def nodes_in(value: Any) -> list[Node]:
    """The nodes an argument holds, directly or as the tables of its expressions."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, (Expression, Pattern)):
        read = value.tables
        return [node for name, node in sorted(value.bound.items()) if isinstance(node, Node) and name in read]
    if isinstance(value, tuple):
        return [node for part in value for node in nodes_in(part)]
    if dataclasses.is_dataclass(value):
        return [node for field in dataclasses.fields(value) for node in nodes_in(getattr(value, field.name))]
    return []


def _bound_in(value: Any) -> list[Any]:
    """The tensors bound to tables of an argument."""
    if isinstance(value, (Expression, Pattern)):
        return [x for _, x in sorted(value.bound.items()) if not isinstance(x, Node)]
    return [x for part in value for x in _bound_in(part)] if isinstance(value, tuple) else []


def _text(value: Any, name: Any) -> str:
    """An argument as Python code."""
    if isinstance(value, Node):
        return name(value)
    if isinstance(value, Pattern):
        return _expression(value, value.text.splitlines()[-1], name)
    if isinstance(value, Expression):
        return _expression(value, expression_text(value.expr), name)
    if isinstance(value, tuple):
        return f"({', '.join(_text(part, name) for part in value)}{',' * (len(value) == 1)})"
    if isinstance(value, float) and math.isinf(value):
        return f"float('{value}')"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        words = [f"{field.name}={_text(getattr(value, field.name), name)}" for field in dataclasses.fields(value)]
        return f"{getattr(value, 'function', type(value).__name__)}({', '.join(words)})"
    return repr(value)


def _expression(value: Any, text: str, name: Any) -> str:
    """Its text; where tables are named by keys, those of nodes are too (labels may be chosen by hand)."""
    nodes = [f"{label}:{name(node)}" for label, node in sorted(value.bound.items()) if isinstance(node, Node)]
    return text if all(word.partition(":")[0] == word.partition(":")[2] for word in nodes) else f"{text} [{', '.join(nodes)}]"
