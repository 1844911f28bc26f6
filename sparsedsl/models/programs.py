"""Programs in the layers of a model: when one runs, and what the layer adds to it.

A layer has a scale from its configuration, sometimes a soft cap and sink logits. Input: a program and the layer's own pattern. Output: the
program with these in every place that says nothing of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from sparsedsl.errors import TableError, UnsupportedError
from sparsedsl.lang.expressions import Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.lang.wrapped import Expression
from sparsedsl.models.derived import PROVIDED
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Linear, Recall
from sparsedsl.program.effects import LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node, one_of
from sparsedsl.program.scores import Antidiagonal, Bound, Dot, Probe
from sparsedsl.program.tensors import Summary, q

__all__ = ["check_program", "fitted", "is_for_prefill"]


@functools.lru_cache(maxsize=256)
def is_for_prefill(program: Program) -> bool:
    """Whether it chooses by later queries: it then means something for a whole prompt only, and no part of one."""
    return LATER_QUERIES in reasons(program)


def check_program(program: Program, index: int, native: Pattern) -> None:
    """Refuse what no call of a layer could give: inputs, tables, sink logits without one place for them."""
    missing = [name for name, node in program.inputs.items() if node.default is None]
    if missing:
        raise UnsupportedError(
            f"layer {index}: the program reads the input{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}, which the layer does "
            "not compute. Give it a program over q, k and v, or call sd.compile(program) in an attention module of your own"
        )
    free = sorted(set(program.tables) - set(program.bound) - PROVIDED)
    if free:
        raise TableError(
            f"layer {index}: nothing binds the table{'s' if len(free) > 1 else ''} {', '.join(free)} of the program; bind where it is "
            f"read: mask.bind({free[0]}=tensor)"
        )
    if native.sink is not None and not _has_sink(program):
        _with_sink(program.root, native.sink, index)


def fitted(program: Program, index: int, native: Pattern, scale: float | None, head_dim: int) -> Program:
    """The program as a layer runs it.

    ``scale`` for dot products of q without a scale of their own, those that choose included; the soft cap of ``native`` for attentions that
    leave logits as they are; its sink logits for a program without any.
    """
    own = head_dim**-0.5
    scale = None if scale is None or scale == own else float(scale)

    def fit(node: Node) -> Node:
        if scale is not None and isinstance(node, Antidiagonal):
            raise UnsupportedError(
                f"layer {index} multiplies q @ k by {scale:.6g}, and antidiagonal() knows {own:.6g} (head_dim ** -0.5) only; choose by "
                "dot(), bound() or probe(), or leave this layer native"
            )
        if isinstance(node, Attend):
            pattern = node.pattern
            score = pattern.score if pattern.has_score else native.score
            kept = scale if pattern.scale is None else pattern.scale
            return dataclasses.replace(node, pattern=Pattern(pattern.mask, score, pattern.sink, kept))
        if (
            isinstance(node, (Dot, Bound, Probe, Recall, Linear))
            and node.scale is None
            and scale is not None
            and _is_query(node.x)
        ):
            return dataclasses.replace(node, scale=scale)
        return node

    fitting = program if scale is None and not native.has_score else rebuilt(program, fit)
    if native.sink is None or _has_sink(program):
        return fitting
    return Program(_with_sink(fitting.root, native.sink, index))


def _has_sink(program: Program) -> bool:
    return any(isinstance(node, Attend) and node.pattern.sink is not None for node in program.everything)


def _is_query(x: Node) -> bool:
    """Whether the rows are those of the layer's own queries, or means of them."""
    return x is q or (isinstance(x, Summary) and _is_query(x.x))


def _with_sink(branch: Branch, sink: Score, index: int) -> Branch:
    """The branch with the layer's sink logits in its softmax, once."""
    match branch:
        case Attend(normaliser=None, pattern=pattern):
            made: Branch = dataclasses.replace(branch, pattern=Pattern(pattern.mask, pattern.score, sink, pattern.scale))
        case Compact():
            made = dataclasses.replace(branch, inside=_with_sink(branch.inside, sink, index))
        case Joint(branches=(first, *others)):
            made = dataclasses.replace(branch, branches=(_with_sink(first, sink, index), *others))
        case _:
            raise UnsupportedError(
                f"layer {index} has sink logits, and the program no single softmax that they could enter: say where, "
                "sd.attend(..., sink=sd.models.sinks[sd.h]), or leave this layer native"
            )
    return one_of(made)


def rebuilt(program: Program, change: Callable[[Node], Node]) -> Program:
    """The program with every node replaced by what ``change`` makes of it, each after those it reads."""
    known: dict[Node, Node] = {}

    def again(value: Any) -> Any:
        if isinstance(value, Node):
            if value not in known:
                known[value] = one_of(change(parts(value)))
            return known[value]
        if isinstance(value, Pattern):
            sink = None if value.sink is None else again(value.sink)
            return Pattern(again(value.mask), again(value.score), sink, value.scale)
        if isinstance(value, Expression):
            return _reading(value, again)
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
