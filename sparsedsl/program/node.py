"""The nodes of a program: frozen, hashable, and merged: two nodes that say the same are one object."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import operator
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar
from weakref import WeakValueDictionary

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text, reading_text
from sparsedsl.lang.refusals import Unread
from sparsedsl.lang.wrapped import Expression

__all__ = ["Node", "Operand", "nodes_in", "one_of", "reached", "renamed"]

_known: WeakValueDictionary[Any, Node] = WeakValueDictionary()
_looking = threading.Lock()
N = TypeVar("N", bound="Node")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Node(Unread):
    """One step of a program. Made by the functions of :mod:`sparsedsl.program`, which check what they are given.

    ``function``: name of the function that makes such a node. ``gives``: what kind of result it has: tensor, scores, key scores, picks,
    order, tokens, memory or branch. ``axes``: what its result is counted by. Nodes that say the same
    are one object, so dicts find them by identity; :meth:`same_as` compares nodes, while ``==``, as every operator, would be one of what
    is computed at the call.
    """

    function: ClassVar[str]
    gives: ClassVar[str]
    # Field -> word of the function's argument, where they differ.
    words: ClassVar[Mapping[str, str]] = {}
    # Whether it chooses among the tokens of one whole sequence, of which a call passes all.
    whole_sequence: ClassVar[bool] = False

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes of the result, in order; of a branch those of its output."""
        raise TypeError(f"{type(self).__name__} has no axes")

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Argument name -> value, as the function takes them; those at their defaults are left out."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # Expressions and nodes compare into masks, or not at all; nodes at their default are the default itself.
            if value is not field.default and (isinstance(value, (Expression, Node)) or value != field.default):
                found[field.name] = value
        return found

    @functools.cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes whose results it reads, each once, in the order of its arguments; those read as tables inside masks too."""
        found: dict[Node, None] = {}
        for field in dataclasses.fields(self):
            found.update(dict.fromkeys(nodes_in(getattr(self, field.name))))
        return tuple(found)

    @property
    def chooses(self) -> bool:
        """Whether its result is a choice: blocks, keys, an order of the keys, or tokens that are kept."""
        return self.gives in ("selected", "keys", "order", "tokens")

    @functools.cached_property
    def whole_queries(self) -> int:
        """It works on whole blocks of so many queries: a call begins with one."""
        return 1

    @property
    def read(self) -> tuple[Node, ...]:
        """The nodes that its code speaks of: :attr:`inputs`, and the results of :attr:`subprograms`."""
        return (*self.inputs, *self.subprograms)

    @property
    def subprograms(self) -> tuple[Node, ...]:
        """The results of programs that it runs inside, each a graph of its own; none for most."""
        return ()

    @functools.cached_property
    def expressions(self) -> tuple[Expression | Pattern, ...]:
        """Its arguments that are written in indices: a pattern, masks of candidates."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return tuple(value for value in values if isinstance(value, (Expression, Pattern)))

    @functools.cached_property
    def tensors(self) -> tuple[Any, ...]:
        """The tensors bound to tables of its expressions, and of those of its inputs: no text form tells them apart."""
        own = [x for field in dataclasses.fields(self) for x in _bound_in(getattr(self, field.name))]
        return (*own, *(x for node in self.inputs for x in node.tensors))

    @functools.cached_property
    def key(self) -> str:
        """A hash (32 hex digits), the same in every process."""
        words = [self.function, *(f"{name}={_text(value, lambda node: node.key)}" for name, value in self.arguments.items())]
        # What is declared of tables is part of what it says: a monotone table is not any table of the same name.
        tables = {name: spec for part in self.expressions for name, spec in part.tables.items()}
        bound = {name for part in self.expressions for name, value in part.bound.items() if isinstance(value, Node)}
        words += [f"{name} = {spec.declaration()}" for name, spec in sorted(tables.items()) if name not in bound]
        words += [f"heads={part.heads}" for part in self.expressions if part.heads is not None]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]

    @property
    def given_name(self) -> str:
        """The name that its maker gave it, or nothing."""
        return str(getattr(self, "name", None) or "")

    @functools.cached_property
    def label(self) -> str:
        """The name of the table that it is read as inside masks and scores: the name given, else one made of its hash, since a node knows
        no program. What users read calls it by :attr:`sparsedsl.Program.labels`."""
        return self.given_name or f"{self.function}_{self.key[:6]}"

    def code(self, write: Callable[[sympy.Basic], str] = expression_text) -> str:
        """The call that makes this node, with its inputs by their labels, and expressions as ``write`` writes them."""
        words = [
            f"{self.words.get(name, name)}={_text(value, lambda node: node.label, write)}"
            for name, value in self.arguments.items()
        ]
        return f"{self.function}({', '.join(words)})"

    def note(self) -> str:
        """What it says beside its inputs, as arguments: what a picture of the program writes into its box."""
        said = {name: value for name, value in self.arguments.items() if not isinstance(value, (Node, tuple)) and name != "name"}
        return ", ".join(
            f"{self.words.get(name, name)}={expression_text(value.expr) if isinstance(value, Expression) else value}"
            for name, value in said.items()
        )

    def __mul__(self, other: Any) -> Any:
        # Scores know what a factor of rows makes of them.
        return NotImplemented if self.gives == "tensor" and getattr(other, "gives", None) == "scores" else self._unread()

    def same_as(self, other: object) -> bool:
        """Whether ``other`` is this node, told by its text form and the tensors bound in it."""
        return self is other

    # Nodes that say the same are one object.
    __hash__ = object.__hash__

    def _unread(self) -> NoReturn:
        positions = " For positions of queries and keys write sd.q_idx and sd.kv_idx" if self.gives == "tensor" else ""
        raise PatternError(
            f"{self!r} is a node of a program that gives {_GIVES.get(self.gives, self.gives)}; operators have no meaning on it: it is "
            f"computed at the call.{positions}"
        )

    def __reduce__(self) -> Any:
        return _again, (type(self), {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def __bool__(self) -> NoReturn:
        raise PatternError(f"{self!r} has no truth value: it is computed at the call. Join masks with & | ~")

    def _plain_(self) -> str:
        return self.label

    def __repr__(self) -> str:
        """By its name; else as it is written, where nodes without names are called by their functions."""
        inside = nodes_in(tuple(self.arguments.values()))  # also what runs inside
        known = {node.label: node.given_name or node.function for node in (*reached(self), *inside)}
        return f"<{type(self).__name__} {self.given_name or renamed(self.code(reading_text), known)}>"


def renamed(text: str, names: Mapping[str, str]) -> str:
    """``text`` with other names."""
    return _WORD.sub(lambda found: names.get(found[0], found[0]), text)


_WORD = re.compile(r"\b[A-Za-z_]\w*\b")
_GIVES = {
    "tensor": "a tensor",
    "order": "an order of the keys: read it, order.origin(sd.kv_idx)",
    "tokens": "a subset of the tokens: use it in sd.compact()",
    "numbers of heads": "a number for each head: compare it",
    "memory": "a memory: look into it with sd.recall()",
    "branch": "the output of an attention: join branches with sd.joint() or sd.mix()",
}  # fmt: skip


def _both(operation: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """An operator and its reflected form, applied to the expression that a node is read as."""
    return (
        lambda self, other: self._operate(operation, other, swapped=False),
        lambda self, other: self._operate(operation, other, swapped=True),
    )


class Operand(Node):
    """A node that may stand for an expression over the pair that an attention looks at, and joins in its operators."""

    def as_expression(self) -> Mask | Score:
        """The expression."""
        raise TypeError(f"{type(self).__name__} does not say what it stands for")

    def _operate(self, operation: Callable[[Any, Any], Any], other: Any, *, swapped: bool) -> Any:
        own = self.as_expression()
        return operation(other, own) if swapped else operation(own, other)

    __add__, __radd__ = _both(operator.add)
    __sub__, __rsub__ = _both(operator.sub)
    __mul__, __rmul__ = _both(operator.mul)
    __truediv__, __rtruediv__ = _both(operator.truediv)
    __floordiv__, __rfloordiv__ = _both(operator.floordiv)
    __mod__, __rmod__ = _both(operator.mod)
    __pow__, __rpow__ = _both(operator.pow)
    __and__, __rand__ = _both(operator.and_)
    __or__, __ror__ = _both(operator.or_)
    __xor__, __rxor__ = _both(operator.xor)
    __lt__, __gt__ = _both(operator.lt)
    __le__, __ge__ = _both(operator.le)
    __eq__, _ = _both(operator.eq)
    __ne__, _ = _both(operator.ne)
    __hash__ = Node.__hash__

    def __neg__(self) -> Any:
        return -self.as_expression()

    def __abs__(self) -> Any:
        return abs(self.as_expression())

    def __invert__(self) -> Any:
        return ~self.as_expression()

    def _read(self, indices: Any) -> tuple[Any, ...]:
        """Four indices, checked."""
        parts = indices if isinstance(indices, tuple) else (indices,)
        if len(parts) != 4:
            rows, columns = self.axes[2:]
            raise PatternError(
                f"{self!r} is read with four indices, (batch entry, query head, number of {rows}, number of {columns}); got "
                f"{len(parts)}. In a mask or score it stands for the pair by itself: write it without indices"
            )
        return parts


def _again(kind: type[N], values: Mapping[str, Any]) -> N:
    return one_of(kind(**values))


def one_of(node: N) -> N:
    """The one object that stands for what this node says."""
    key = (node.key, *map(id, node.tensors))
    with _looking:  # two objects for one node would not be found in each other's dicts
        return _known.setdefault(key, node)  # type: ignore[return-value]


def reached(*roots: Node) -> Iterator[Node]:
    """These nodes and all that they read, directly or not, each once; what runs inside of others is not followed."""
    waiting, seen = list(roots), set[Node]()
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            waiting += node.inputs


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


def _text(value: Any, name: Any, write: Callable[[sympy.Basic], str] = expression_text) -> str:
    """An argument as Python code."""
    if isinstance(value, Node):
        return name(value)
    if isinstance(value, Pattern):
        return _expression(value, value.written(write).splitlines()[-1], name)
    if isinstance(value, Expression):
        return _expression(value, write(value.expr), name)
    if isinstance(value, tuple):
        return f"({', '.join(_text(part, name, write) for part in value)}{',' * (len(value) == 1)})"
    if isinstance(value, float) and math.isinf(value):
        return f"float('{value}')"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        words = [f"{field.name}={_text(getattr(value, field.name), name, write)}" for field in dataclasses.fields(value)]
        return f"{getattr(value, 'function', type(value).__name__)}({', '.join(words)})"
    return repr(value)


def _expression(value: Any, text: str, name: Any) -> str:
    """Its text; where tables are named by keys, those of nodes are too (labels may be chosen by hand)."""
    nodes = [f"{label}:{name(node)}" for label, node in sorted(value.bound.items()) if isinstance(node, Node)]
    return text if all(word.partition(":")[0] == word.partition(":")[2] for word in nodes) else f"{text} [{', '.join(nodes)}]"
