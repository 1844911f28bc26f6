"""Programs in the layers of a model: when one runs, and what the layer adds to it.

A layer has a scale from its configuration, sometimes a soft cap and sink logits. Input: a program and the layer's own pattern. Output: the
program with these in every place that says nothing of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sparsedsl.errors import TableError, UnsupportedError
from sparsedsl.lang.expressions import Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH
from sparsedsl.lang.tables import TableRead, TableSpec, read_class
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources, tensors
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Mix, Recall
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node, one_of, reached
from sparsedsl.program.rebuilding import rebuilt
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules

__all__ = [
    "FIT_RULES",
    "ROW",
    "SINK_RULES",
    "check_program",
    "fitted",
    "is_for_prefill",
    "told_rows",
]

ROW = TableSpec("hf_row", values_in=(0, 2**31 - 1))  # hf_row[b]: which row of the batch a sequence is from


@functools.lru_cache(maxsize=256)
def is_for_prefill(program: Program) -> bool:
    """Whether it chooses by later queries: it then means something for a whole prompt only, and no part of one."""
    return LATER_QUERIES in reasons(program)


def check_program(program: Program, index: int | str, native: Pattern, provided: frozenset[str]) -> None:
    """Refuse what no call of a layer could give: inputs, tables beside those ``provided``, sink logits without one place for them."""
    missing = [name for name, node in program.inputs.items() if node.default is None]
    if missing:
        raise UnsupportedError(
            f"layer {index}: the program reads the input{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}, which the layer does "
            "not compute. Give it a program over q, k and v, or call sd.compile(program) in an attention module of your own"
        )
    free = sorted(set(program.tables) - set(program.bound) - provided)
    if free:
        raise TableError(
            f"layer {index}: nothing binds the table{'s' if len(free) > 1 else ''} {', '.join(free)} of the program; bind where it is "
            f"read: mask.bind({free[0]}=tensor)"
        )
    if native.sink is not None and not _has_sink(program):
        _with_sink(program.root, native.sink, index)


def fitted(program: Program, index: int | str, native: Pattern, scale: float | None, head_dim: int) -> Program:
    """The program as a layer runs it.

    ``scale`` for dot products of q without a scale of their own, those that choose included; the soft cap of ``native`` for attentions that
    leave logits as they are; its sink logits for a program without any.
    """
    own = head_dim**-0.5
    layer = _Layer(index, native, None if scale is None or scale == own else float(scale), own)
    fitting = rebuilt(program, lambda node: FIT_RULES[type(node)](node, layer)) if layer.adds else program
    if native.sink is None or _has_sink(program):
        return fitting
    return Program(_with_sink(fitting.root, native.sink, index))


def _has_sink(program: Program) -> bool:
    return any(pattern.sink is not None for pattern in program.patterns)


# ---- rules: a node as a layer runs it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A layer: its native pattern, its scale where it is not the usual one (else None), and the usual one."""

    index: int | str
    native: Pattern
    scale: float | None
    usual: float

    @property
    def adds(self) -> bool:
        """Whether it has anything that programs do not know of by themselves."""
        return self.scale is not None or self.native.has_score


def _as_it_is(node: Node, layer: _Layer) -> Node:
    return node


def _attend(node: Attend, layer: _Layer) -> Attend:
    pattern = node.pattern
    score = pattern.score if pattern.has_score else layer.native.score
    scale = layer.scale if pattern.scale is None else pattern.scale
    return dataclasses.replace(node, pattern=dataclasses.replace(pattern, score=score, scale=scale, causal=False))


def _products(node: Any, layer: _Layer) -> Any:
    """Products of queries, ``node.x``, are scaled as the layer's own if those are its queries and the node says nothing."""
    if layer.scale is None or node.scale is not None or not _is_query(node.x):
        return node
    return dataclasses.replace(node, scale=layer.scale)


def _antidiagonal(node: scores.Antidiagonal, layer: _Layer) -> Node:
    if layer.scale is not None:
        raise UnsupportedError(
            f"layer {layer.index} multiplies q @ k by {layer.scale:.6g}, and antidiagonal() knows {layer.usual:.6g} (head_dim ** -0.5) "
            "only; choose by dot(), bound() or probe(), or leave this layer native"
        )
    return node


def _is_query(x: Node) -> bool:
    """Whether the rows are made of the layer's own queries and of nothing else: a layer gives no inputs, so that their defaults stand."""
    return all(node is tensors.q for node in reached(x) if not node.inputs)


FIT_RULES: Rules[Callable[[Any, _Layer], Node]] = Rules(
    "what a layer adds to a program",
    {
        Attend: _attend,
        **dict.fromkeys((scores.Dot, scores.Bound, scores.Probe, key_choices.Diagonals, Recall, Linear), _products),
        scores.Antidiagonal: _antidiagonal,
        **dict.fromkeys((tensors.Input, tensors.Summary, sources.Slots, Joint, Mix, Compact), _as_it_is),
        **dict.fromkeys((scores.Softmax, scores.Regroup, scores.Plus, scores.Gumbel, scores.Grouped), _as_it_is),
        **dict.fromkeys((scores.GroupedKeys, scores.Smooth), _as_it_is),
        **dict.fromkeys((scores.Relu, scores.Scaled, scores.Weighted, scores.Overlap, scores.GivenScores), _as_it_is),
        **dict.fromkeys((scores.GivenKeyScores, given_blocks.Given, key_choices.ChosenKeys, key_choices.Divergence), _as_it_is),
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _as_it_is),
        **dict.fromkeys((orders.Take, orders.Order, orders.Inverse, orders.Tokens), _as_it_is),
    },
)


# ---- rules: a branch with the layer's sink logits in its softmax, once -------------------------------------------------------------


def _with_sink(branch: Branch, sink: Score, index: int | str) -> Branch:
    return one_of(SINK_RULES[type(branch)](branch, sink, index))


def _sink_of_attend(branch: Attend, sink: Score, index: int | str) -> Branch:
    if branch.normaliser is not None or not branch.pattern.has_lse:
        return _no_softmax(branch, sink, index)
    pattern = branch.pattern
    return dataclasses.replace(branch, pattern=dataclasses.replace(pattern, sink=sink, causal=False))


def _sink_inside(branch: Compact, sink: Score, index: int | str) -> Branch:
    return dataclasses.replace(branch, inside=_with_sink(branch.inside, sink, index))


def _sink_of_the_first(branch: Joint, sink: Score, index: int | str) -> Branch:
    first, *others = branch.branches
    return dataclasses.replace(branch, branches=(_with_sink(first, sink, index), *others))


def _no_softmax(branch: Branch, sink: Score, index: int | str) -> NoReturn:
    raise UnsupportedError(
        f"layer {index} has sink logits, and the program no single softmax that they could enter: say where, "
        "sd.attend(..., sink=sd.models.sinks[sd.h]), or leave this layer native"
    )


SINK_RULES: Rules[Callable[[Any, Score, int | str], Branch]] = Rules(
    "the sink logits of a layer",
    {
        Attend: _sink_of_attend,
        Compact: _sink_inside,
        Joint: _sink_of_the_first,
        **dict.fromkeys((Linear, Mix, Recall), _no_softmax),
    },
    base=Branch,
)


# ---- a program on some rows of a batch ------------------------------------------------------------------------------------------------


def told_rows(program: Program) -> Program:
    """The program with ``hf_row[b]``, which calls give, for ``b``: sequences from some rows of a batch are told apart as these rows are."""
    return rebuilt(program, lambda node: node, _with_rows)


def _with_rows(expression: Any) -> Any:
    chosen = {name for name, value in expression.bound.items() if isinstance(value, Node)}

    def moved(expr: Any) -> Any:
        if expr == BATCH:
            return read_class(ROW)(BATCH)
        if BATCH not in expr.free_symbols:
            return expr
        if isinstance(expr, TableRead) and expr.spec.name in chosen:  # made by the same call: its first index is that of the call
            return expr.func(expr.args[0], *map(moved, expr.args[1:]))
        return expr.func(*map(moved, expr.args))

    return type(expression)(moved(expression.expr), expression.bound)
