"""A program made anew, node by node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.lang.wrapped import Expression
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node, one_of

__all__ = ["rebuilt"]


def rebuilt(
    program: Program,
    change: Callable[[Node], Node],
    rewrite: Callable[[Any], Any] = lambda expression: expression,
    known: dict[Node, Node] | None = None,
) -> Program:
    """The program with every node replaced by what ``change`` makes of it, each after those it reads; every expression by ``rewrite``.
    Into ``known``, if given, it writes which node became which."""
    known = {} if known is None else known

    def again(value: Any) -> Any:
        if isinstance(value, Node):
            if value not in known:
                known[value] = one_of(change(parts(value)))
            return known[value]
        if isinstance(value, Pattern):
            sink = None if value.sink is None else again(value.sink)
            return dataclasses.replace(value, mask=again(value.mask), score=again(value.score), sink=sink, causal=False)
        if isinstance(value, Expression):
            return rewrite(_reading(value, again))
        if isinstance(value, tuple):
            return tuple(map(again, value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return parts(value)
        return value

    def parts(value: Any) -> Any:
        return type(value)(**{field.name: again(getattr(value, field.name)) for field in dataclasses.fields(value)})

    return Program(again(program.root))


def _reading(expression: Any, again: Callable[[Any], Any]) -> Any:
    """An expression whose tables are the rebuilt nodes."""
    expr, bound = expression.expr, expression.bound
    for name, value in list(bound.items()):
        node = again(value)
        del bound[name]
        bound[node.label if isinstance(value, Node) else name] = node
        while isinstance(value, Node) and node.label != name:
            # Innermost first: a place in an order may be looked up at a place in the same order.
            reads = [read for read in table_reads(expr) if read.spec.name == name]
            if not reads:
                break
            inner = [r for r in reads if not any(s.spec.name == name for part in r.args for s in table_reads(part))]
            expr = expr.xreplace({r: read_class(dataclasses.replace(r.spec, name=node.label))(*r.args) for r in inner})
    return type(expression)(expr, bound)
