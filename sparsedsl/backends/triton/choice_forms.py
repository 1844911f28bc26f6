"""Which choices one Triton kernel makes: what it is told of scores, and why torch makes the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsedsl.analysis.key_intervals import intervals
from sparsedsl.backends.triton.launching import in_tiles
from sparsedsl.codegen.to_triton import DTYPES, WIDEST
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.tables import table_reads
from sparsedsl.program import scores as nodes
from sparsedsl.program.node import Node
from sparsedsl.program.select import Select, TopK
from sparsedsl.runtime.request import CallFacts
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores
from sparsedsl.selection.derived_scores import RegroupedScores, SoftmaxScores
from sparsedsl.selection.scores import DotScores, ScoreSource

__all__ = ["Form", "LeftToTorch", "check_sizes", "form_of", "why_torch"]

# Of a list that is kept in registers.
LONGEST = 256


class LeftToTorch(Exception):
    """Why torch makes a choice."""


@dataclass(frozen=True)
class _Step:
    """One step from products to scores, the last one first: "regroup" and "group" take ``size`` together, a softmax those ``among``."""

    kind: str
    size: int = 1
    how: str = "sum"
    among: Mask | None = None


@dataclass(frozen=True)
class Form:
    """``group`` heads and ``size`` landmarks make a score: their sum, or the greatest; ``means`` of which steps it is."""

    group: int = 1
    size: int = 1
    greatest: bool = False
    means: frozenset[str] = frozenset()
    softmax: bool = False
    bound: bool = False


def _of_steps(steps: list[_Step]) -> Form:
    """The form that steps have; raises ``LeftToTorch``."""
    *made, products = steps
    if products.kind not in ("dot", "bound"):
        raise LeftToTorch(f"scores are made of {products.kind}")
    softmax = bool(made) and made[-1].kind == "softmax"
    made = made[:-1] if softmax else made
    kinds = [step.kind for step in made]
    if "softmax" in kinds:
        raise LeftToTorch("a softmax is taken over scores that are reduced before")
    if len(set(kinds)) < len(kinds):
        raise LeftToTorch("scores are reduced several times in the same way")
    several = [step for step in made if step.size > 1]
    if len({step.how == "max" for step in several}) > 1:
        raise LeftToTorch("a maximum and a sum are taken, one of the other")
    sizes = {step.kind: step.size for step in made}
    means = frozenset(step.kind for step in several if step.how == "mean")
    greatest = any(step.how == "max" for step in several)
    return Form(sizes.get("group", 1), sizes.get("regroup", 1), greatest, means, softmax, products.kind == "bound")


def form_of(source: ScoreSource) -> Form:
    """What the kernel is told of scores.

    Raises:
        LeftToTorch: it cannot make them.
    """
    return _of_steps(_steps_of(source))


def _steps_of(source: ScoreSource) -> list[_Step]:
    match source:
        case RegroupedScores():
            return [_Step("regroup", source.size, source.how), *_steps_of(source.source)]
        case GroupedScores():
            return [_Step("group", source.source.shape[1] // source.heads_out, source.how), *_steps_of(source.source)]
        case SoftmaxScores():
            return [_Step("softmax"), *_steps_of(source.source)]
        case DotScores():
            return [_Step("dot")]
        case BoundScores():
            return [_Step("bound")]
    return [_Step(type(source).__name__)]


def _other(node: Node) -> tuple[_Step, Node | None]:
    kind = type(node).__name__
    return _Step({"Plus": "sums", "Gumbel": "noise"}.get(kind, kind.lower())), None


# Kinds of scores that the kernel makes -> a step, and what it is taken of. How many heads a group has is not known before a call.
_STEPS: dict[type[Node], Callable[[Any], tuple[_Step, Node | None]]] = {
    nodes.Regroup: lambda node: (_Step("regroup", node.block, node.how), node.scores),
    nodes.Grouped: lambda node: (_Step("group", 2, node.how), node.x),
    nodes.Softmax: lambda node: (_Step("softmax", among=node.among), node.scores),
    nodes.Dot: lambda node: (_Step("dot"), None),
    nodes.Bound: lambda node: (_Step("bound"), None),
}


def _steps_of_node(node: Node) -> list[_Step]:
    steps: list[_Step] = []
    below: Node | None = node
    while below is not None:
        step, below = _STEPS.get(type(below), _other)(below)
        steps.append(step)
    return steps


def why_torch(node: Select, facts: CallFacts) -> str | None:
    """Why the choice of a node is not made by the kernel, as far as this is known before a call; None: it is."""
    try:
        if not isinstance(node, TopK):
            raise LeftToTorch("the kernel knows top_k alone")
        check_sizes(facts.dtype, facts.head_dim, min(node.count, in_tiles(facts.kv_len, node.blocks[1])))
        steps = _steps_of_node(node.scores)
        _of_steps(steps)
        masks = [("candidates", node.among), ("forced blocks", node.forced), *(("candidates", step.among) for step in steps)]
        for what, mask in masks:
            reads = set() if mask is None else {read.spec.name for read in table_reads(mask.expr)}
            if mask is not None and (
                intervals(mask.expr) is None or any(isinstance(mask.bound.get(name), Node) for name in reads)
            ):
                raise LeftToTorch(f"{what} are no ranges of keys")
    except LeftToTorch as reason:
        return str(reason)
    return None


def check_sizes(dtype: str, width: int, k: int) -> None:
    """That the kernel has rows of a type and a width, and lists of a length; LeftToTorch otherwise."""
    if dtype not in DTYPES:
        raise LeftToTorch(f"the kernel has no {dtype}")
    if width > WIDEST:
        raise LeftToTorch(f"rows are {width} wide; the kernel has {WIDEST}")
    if k > LONGEST:
        raise LeftToTorch(f"lists are {k} blocks long; the kernel holds {LONGEST}")
