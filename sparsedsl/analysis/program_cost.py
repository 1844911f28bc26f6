"""What each node of a program costs in a call of given lengths: a rule for every kind of node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.analysis.totals import counted_rows
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.plain_values import Reported
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources
from sparsedsl.program.axes import base_of, rows_on
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall, blocks_of_keys
from sparsedsl.program.decided import assume, possible
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.scores import Antidiagonal, Bound, Dot, Probe
from sparsedsl.program.select import Select, choices_in
from sparsedsl.program.tensors import Input, Summary

__all__ = ["ATTENDING", "CHOOSING", "COST_RULES", "MOVING", "CostStep", "Lengths", "steps_of"]

BLOCK = (128, 128)
CHOOSING, MOVING, ATTENDING = "choosing", "moving", "attending"
FLOAT32 = 4  # bytes
CHUNK = 64  # tokens whose keys meet each other, where decays or write rules are those of the data


@dataclass(frozen=True)
class CostStep(Reported):
    """What one node costs: FLOPs (a multiply-add counts as two) and bytes it reads and writes.

    ``kind``: choosing, moving or attending. ``pairs``: of an attention, pairs of query and key that it attends to at most, all batch
    entries and heads; None for other nodes.
    """

    node: Node
    kind: str
    flops: int
    bytes: int
    pairs: int | None = None


@dataclass(frozen=True)
class Lengths:
    """A call: ``known``, axis -> size; ``domain``, index ranges and static tables; ``item``, bytes of an element of q, k and v.

    An axis of unknown size is taken as the head dimension if its name ends in ``dim``, else as the number of key/value heads.
    """

    known: Mapping[str, int]
    domain: Domain
    item: int

    def of(self, axis: str) -> int:
        """Rows of one axis."""
        if axis.isdecimal():
            return int(axis)
        base = base_of(axis)
        size = self.known.get(base, self.known["head_dim"] if base.endswith("dim") else self.known["kv_heads"])
        return rows_on(axis, size)

    def count(self, *axes: str) -> int:
        """Elements of a tensor with these axes."""
        product = 1
        for axis in axes:
            product *= self.of(axis)
        return product

    def bytes(self, *nodes: Node) -> int:
        """Of the tensors that these nodes give."""
        return sum(self.count(*node.axes) for node in nodes) * self.item


def steps_of(program: Program, lengths: Lengths) -> tuple[CostStep, ...]:
    """What the nodes cost, each after those it reads; those that cost nothing to speak of are left out."""
    steps = (COST_RULES[type(node)](node, lengths) for node in program.everything)
    return tuple(step for step in steps if step is not None)


# ---- choosing ------------------------------------------------------------------------------------------------------------------


def _nothing(node: Node, lengths: Lengths) -> None:
    """A few operations an element of what others make: not counted, as the softmax of an attention is not."""


def _summary(node: Summary, lengths: Lengths) -> CostStep:
    return CostStep(node, CHOOSING, lengths.count(*node.x.axes), lengths.bytes(node.x))


def _products(node: Dot | Bound | Antidiagonal, lengths: Lengths, each: int = 1) -> CostStep:
    """``each``: dot products for one score. Of all rows with all blocks: how many are candidates is not known here."""
    flops = 2 * lengths.count(*node.axes, node.x.axes[3]) * each
    return CostStep(node, CHOOSING, flops, lengths.bytes(node.x, node.y))


def _bound(node: Bound, lengths: Lengths) -> CostStep:
    """With the lowest and with the highest entries of a block."""
    return _products(node, lengths, 2)


def _antidiagonal(node: Antidiagonal, lengths: Lengths) -> CostStep:
    return _products(node, lengths, node.block * node.block // node.stride)


def _probe(node: Probe, lengths: Lengths) -> CostStep:
    """Two passes over the keys."""
    pairs = lengths.count("batch", node.axes[1], "keys") * min(node.rows, lengths.of("queries"))
    return CostStep(node, CHOOSING, 4 * pairs * lengths.of(node.x.axes[3]), 2 * lengths.bytes(node.y))


def _diagonals(node: key_choices.Diagonals, lengths: Lengths) -> CostStep:
    """One pass over the keys, and a sum of every pair."""
    pairs = lengths.count("batch", node.axes[1], "keys") * min(node.rows, lengths.of("queries"))
    return CostStep(node, CHOOSING, pairs * (2 * lengths.of(node.x.axes[3]) + 1), lengths.bytes(node.y))


def _select(node: Select, lengths: Lengths) -> CostStep:
    """One comparison a block; out come lists."""
    rows = lengths.count(*node.axes[:3])
    return CostStep(node, CHOOSING, lengths.count(*node.axes), FLOAT32 * rows * (node.most or 1))


# ---- moving --------------------------------------------------------------------------------------------------------------------


def _take(node: orders.Take, lengths: Lengths) -> CostStep:
    return CostStep(node, MOVING, 0, 2 * lengths.bytes(node))


def _compact(node: Compact, lengths: Lengths) -> CostStep:
    """Rows of q, k, v are read and written on the way in, rows of the output on the way out; what is inside has steps of its own."""
    rows = lengths.count("batch", "heads", "keys")
    return CostStep(node, MOVING, 0, 2 * rows * (2 * lengths.of("head_dim") + 2 * lengths.of("value_dim")) * lengths.item)


# ---- attending -----------------------------------------------------------------------------------------------------------------


def _attend(node: Attend, lengths: Lengths) -> CostStep:
    pairs = _pairs(node, lengths)
    width = lengths.of(node.y.axes[3]) + lengths.of(node.z.axes[3])
    return CostStep(node, ATTENDING, 2 * pairs * width, 2 * lengths.bytes(node.x, node.y), pairs)


def _linear(node: Linear, lengths: Lengths) -> CostStep:
    """A state is read and written once a token; by the delta rule read for its keys too, and keys meet within chunks of ``CHUNK``."""
    gates = [gate for gate in (node.gate, node.beta, node.write, node.erase, node.along) if gate is not None]
    heads = max(lengths.of(axis) for axis in ("heads", "value_heads", *(gate.axes[1] for gate in gates)))
    width, width_v = lengths.of(node.y.axes[3]), lengths.of(node.z.axes[3]) + (node.normalised is not None)
    width = 1 + width + width * (width + 1) // 2 if node.features == "taylor" else width
    each = 4 * width * width_v
    if node.form:
        each += 2 * CHUNK * (width + width_v)
    if node.beta is not None or node.erase is not None:
        each += 2 * width * width_v + CHUNK * (4 * width + 2 * width_v) + CHUNK * CHUNK // 3
    each *= 1 if node.along is None else 2  # two rows a token
    read = lengths.bytes(*gates) + 3 * lengths.count("batch", "keys") * heads * width * lengths.item
    return CostStep(node, ATTENDING, lengths.count("batch", "queries") * heads * each, read)


def _recall(node: Recall, lengths: Lengths) -> CostStep:
    gate = node.memory.gate
    rows = lengths.of(gate.axes[3]) * (lengths.of("head_dim") + lengths.of("value_dim"))
    tokens = lengths.count("batch", "heads", "queries") + lengths.count("batch", "kv_heads", "keys")
    read = lengths.bytes(gate) + 2 * lengths.count("batch", "kv_heads", "keys", "head_dim") * lengths.item
    return CostStep(node, ATTENDING, 2 * rows * tokens, read)


def _combined(node: Joint | Mix, lengths: Lengths) -> CostStep:
    return CostStep(node, ATTENDING, 2 * lengths.count(*node.axes), 2 * lengths.bytes(node))


COST_RULES: Rules[Callable[[Any, Lengths], CostStep | None]] = Rules(
    "the cost",
    {
        **dict.fromkeys((Input, orders.Order, orders.Inverse, orders.Tokens), _nothing),
        **dict.fromkeys((scores.Softmax, scores.Regroup, scores.Plus, scores.Gumbel, scores.Grouped), _nothing),
        **dict.fromkeys((scores.GroupedKeys, scores.Smooth), _nothing),
        **dict.fromkeys((scores.Relu, scores.Scaled, scores.Weighted, scores.Overlap, scores.GivenScores), _nothing),
        **dict.fromkeys((scores.GivenKeyScores, given_blocks.Given, key_choices.ChosenKeys, key_choices.Divergence), _nothing),
        sources.Slots: _nothing,  # part of what recall() costs
        Summary: _summary,
        Dot: _products,
        Bound: _bound,
        Antidiagonal: _antidiagonal,
        Probe: _probe,
        key_choices.Diagonals: _diagonals,
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _select),
        orders.Take: _take,
        Compact: _compact,
        Attend: _attend,
        Linear: _linear,
        Recall: _recall,
        **dict.fromkeys((Joint, Mix), _combined),
    },
)


# ---- pairs -----------------------------------------------------------------------------------------------------------------------


def _pairs(node: Attend, lengths: Lengths) -> int:
    """Pairs that attend at most: all that any choice could allow; or those that attend where nothing is chosen, and the chosen ones."""
    domain = lengths.domain
    if node.y.axes[2] != "keys":
        domain = Domain(domain.rows, lengths.of(node.y.axes[2]), domain.q_offset, domain.batch, domain.heads, domain.tables)
    mask = node.pattern.mask
    choices = choices_in(mask)
    most = _count(possible(mask), domain)
    if any(choice.most is None for choice in choices.values()) or not choices:
        return most
    without = Mask(assume(mask.expr, dict.fromkeys(choices, False)), mask.bound)
    rows = domain.batch * domain.heads * domain.rows
    chosen = sum((choice.most or 0) * (choice.blocks[1] // blocks_of_keys(node)) * rows for choice in choices.values())
    return min(most, _count(possible(without), domain) + chosen)


def _count(static: Mask, domain: Domain) -> int:
    """Pairs that a mask allows which reads no node, all batch entries and heads."""
    mask = static.expr
    if mask == sympy.false:
        return 0
    with torch.no_grad():
        lists = classify(mask, domain, BLOCK)
        rows = counted_rows(mask, domain, lists)
    groups = (domain.batch if BATCH in mask.free_symbols else 1) * (domain.heads if HEAD in mask.free_symbols else 1)
    return int(rows.allowed * domain.batch * domain.heads // groups)
