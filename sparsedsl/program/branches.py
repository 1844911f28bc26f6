"""Nodes that attend, and nodes that combine what attends: every one gives an output, and most an LSE."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, overload

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang import pattern as static
from sparsedsl.lang.advice import shown, way_in
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.normalisers import SOFTMAX
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.axes import base_of, block_of, windows_of
from sparsedsl.program.decided import assume
from sparsedsl.program.key_choices import ChosenKeys
from sparsedsl.program.node import Node, nodes_in, one_of, reached
from sparsedsl.program.orders import Tokens
from sparsedsl.program.scores import Scores
from sparsedsl.program.select import Choice, choices_in, told_candidates
from sparsedsl.program.sources import PerChunk, Slots
from sparsedsl.program.tensors import OWN, Input, check_tensor, k, q, v

__all__ = [
    "Attend",
    "Branch",
    "Compact",
    "Joint",
    "Mix",
    "Recall",
    "as_branch",
    "attend",
    "check_scale",
    "compact",
    "joint",
    "mix",
    "recall",
]


M = TypeVar("M", Mask, Score)


class Branch(Node):
    """A node with an output of ``(batch, heads, queries, value_dim)``: what :func:`sparsedsl.compile` takes."""

    gives: ClassVar[str] = "branch"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Of the output."""
        return "batch", "heads", "queries", "value_dim"

    @property
    def has_lse(self) -> bool:
        """Whether it is normalised, by a sum whose logarithm it has."""
        return True

    @property
    def weighable(self) -> bool:
        """Whether it has an LSE, by which a joint softmax could weigh it."""
        return self.has_lse

    @property
    def static(self) -> Pattern | None:
        """The pattern of an attention of the call's own q, k and v that chooses nothing: all there is to say of it. Else None."""
        return None


@dataclass(frozen=True, eq=False, repr=False)
class Attend(Branch):
    """Attention over the pairs of a mask that may read choices and orders."""

    pattern: Pattern
    x: Node = q
    y: Node = k
    z: Node = v
    normaliser: PerChunk | None = None
    function: ClassVar[str] = "attend"

    @functools.cached_property
    def selections(self) -> tuple[Choice, ...]:
        """The choices its mask reads."""
        return tuple(choices_in(self.pattern.mask).values())

    @property
    def has_lse(self) -> bool:
        """Where its weights are divided by a sum."""
        return self.pattern.has_lse

    def note(self) -> str:
        """The pattern, as :func:`attend` takes it."""
        return self.code().removeprefix("attend(").removesuffix(")")

    @property
    def static(self) -> Pattern | None:
        """The pattern, unless it chooses or attends to other rows."""
        own = self.x is q and self.y is k and self.z is v and self.normaliser is None
        return self.pattern if own and not nodes_in(self.pattern) else None

    def code(self, write: Callable[[sympy.Basic], str] = expression_text) -> str:
        """As :func:`attend` takes it."""
        words = self.pattern.written(write).splitlines()[-1].removeprefix("attend(").removesuffix(")")
        named = {"q": (self.x, q), "k": (self.y, k), "v": (self.z, v)}
        more = [f"{name}={node.label}" for name, (node, usual) in named.items() if node is not usual]
        if self.normaliser is not None:
            n = self.normaliser
            more.append(f"normaliser=per_chunk({n.selected.label}, {n.weights!r}, scores={n.scores.label}, inner={n.inner!r})")
        return f"attend({', '.join([words, *more])})"


@overload
def attend(
    mask: Any, score: Any = None, *, sink: Any = None, scale: float | None = None, heads: int | None = None, causal: bool = False,
    q: Node = q, k: Node = k, v: Node = v, normaliser: PerChunk,
) -> Attend: ...  # fmt: skip
@overload
def attend(
    mask: Any, score: Any = None, *, sink: Any = None, scale: float | None = None, heads: int | None = None, causal: bool = False,
    q: Node = q, k: Node = k, v: Node = v, normaliser: str | None = None,
) -> Pattern | Attend: ...  # fmt: skip
def attend(
    mask: Any,
    score: Any = None,
    *,
    sink: Any = None,
    scale: float | None = None,
    heads: int | None = None,
    causal: bool = False,
    q: Node = q,
    k: Node = k,
    v: Node = v,
    normaliser: PerChunk | str | None = None,
) -> Pattern | Attend:
    """Attention over the pairs that ``mask`` allows, by default with a softmax.

    Args:
        mask: a :class:`Mask`, ``True`` for full attention, or a choice such as :func:`top_k`; masks and choices combine with ``& | ~``.
        score: the logit after modification, an expression in ``sd.score`` over indices, lengths and tables.
        sink: an extra logit over ``b`` and ``h`` (number, expression, or learned table read) that takes part in the softmax with a
            value of zero, as in GPT-OSS; ``0.0`` gives softmax-plus-one.
        scale: factor on ``q @ k``; default ``head_dim ** -0.5``.
        heads: the number of query heads it is written for; None takes what its parts say, as ``alibi(8)`` does, else any number.
        causal: claims that no query sees a later position, to which :func:`sparsedsl.testing.check` holds it; nothing else changes.
        q, k, v: nodes to attend with in place of the call's own: reordered keys, summaries (``kv_idx`` then counts blocks), inputs. A
            choice in the mask is then that of the block which the tokens of a row lie in.
        normaliser: how scores become weights. None or ``"softmax"``: one softmax over all. ``"pointwise"``: the score *is* the weight of
            its pair, which may have any sign, and nothing is divided: ``out = sum_j score_j v_j``. ``"stick_breaking"``: the nearest key
            takes ``sigmoid(score)`` of what is left after those with a higher number. :func:`per_chunk`: a softmax for each chunk. The
            first and the last have an LSE; the others have none, so that :func:`mix` adds them and :func:`joint` refuses.

    Returns:
        A :class:`~sparsedsl.Pattern` where everything is static, else a node. :func:`sparsedsl.compile` takes both.

    A choice that was declared without ``among`` gets its candidates here: the blocks with a pair for which it decides whether the pair
    attends. What the rest of the mask excludes, or allows in any case, is never scored.

    Raises:
        PatternError: when the mask depends on ``score``, the sink on a position, the scale is not a positive number, or nodes do not fit.
        UnsupportedError: a normaliser that nothing can work out tile by tile, such as entmax.

    >>> import sparsedsl as sd
    >>> sd.attend(sd.kv_idx <= sd.q_idx, score=sd.tanh(sd.score / 30) * 30)
    <Pattern attend(kv_idx <= q_idx, score=30*tanh(score / 30))>
    >>> sd.attend(sd.kv_idx <= sd.q_idx, score=sd.sigmoid(sd.score - 3), normaliser="pointwise")
    <Pattern attend(kv_idx <= q_idx, score=sigmoid(score - 3), normaliser='pointwise')>
    >>> causal, own = sd.kv_idx <= sd.q_idx, sd.q_idx // 512 == sd.kv_idx // 512
    >>> moba = sd.attend(causal & (own | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 512)), 2)))
    >>> print(moba.selections[0].among)  # blocks that are over: the own one attends in any case
    (kv_idx <= q_idx) & (q_idx // 512 != kv_idx // 512)
    """
    rule, name = (
        (normaliser, SOFTMAX) if isinstance(normaliser, PerChunk) else (None, SOFTMAX if normaliser is None else normaliser)
    )
    pattern = static.attend(mask, score, sink=sink, scale=scale, heads=heads, causal=causal, normaliser=name)
    own = Attend.x, Attend.y, Attend.z
    if not nodes_in(pattern) and all(map(operator.is_, (q, k, v), own)) and rule is None:
        return pattern
    q, k, v = (
        check_tensor("attend", "q", q, "queries"),
        check_tensor("attend", "k", k, "keys"),
        check_tensor("attend", "v", v, "keys"),
    )
    if q.axes[1:3] != ("heads", "queries") or k.axes[:3] != v.axes[:3] or k.axes[1] not in ("heads", "kv_heads"):
        raise PatternError(
            f"attend(): q must be counted by heads and queries, k and v alike by heads or kv_heads and by keys; got "
            f"{' '.join(q.axes)!r}, {' '.join(k.axes)!r}, {' '.join(v.axes)!r}"
        )
    if q.axes[3] != k.axes[3]:
        raise PatternError(f"attend(): q and k must have the same last axis; got {q.axes[3]!r} and {k.axes[3]!r}")
    if rule is not None and k.axes[2] != "keys":
        raise PatternError(
            f"attend(): per_chunk looks into chunks of keys one by one; the rows of k are {k.axes[2]!r}. Attend to them in one softmax, "
            "without a normaliser"
        )
    pattern = of_rows(pattern, k.axes[2])
    pattern, rule = with_candidates(pattern, rule, k.axes[2])
    if rule is not None:
        _check_normaliser(pattern, rule)
    return one_of(Attend(pattern, q, k, v, rule))


def _tokens_of(axis: str) -> int:
    return 1 if windows_of(axis) or base_of(axis) != "keys" else block_of(axis)


def of_rows(pattern: Pattern, axis: str) -> Pattern:
    """The pattern of an attention over rows of ``axis``: choices and scores of the pair are read at the block that its tokens lie in."""
    if axis == "keys":
        return pattern
    return replace(pattern, mask=_read_at(pattern.mask, axis), score=_read_at(pattern.score, axis))


def _read_at(part: M, axis: str) -> M:
    known: dict[Any, Any] = {}
    for node in nodes_in(part):
        if isinstance(node, ChosenKeys):
            raise PatternError(f"attend(): {node!r} says of keys whether they are chosen, and the rows of k are {axis!r}")
        if not isinstance(node, (Choice, Scores)):
            continue
        own, tokens = node.as_expression(), _tokens_of(axis)
        reads = table_reads(own.expr)
        if not part.expr.has(*reads):
            continue
        size = block_of(node.axes[3])
        if windows_of(axis) or size % tokens:
            raise PatternError(
                f"attend(): its keys have a row for {axis!r}, and {node!r} says blocks of {size} keys: a row must lie in one of them. Use "
                f"blocks of a multiple of a row's tokens, or read it by hand, with four indices"
            )
        known |= dict(zip(reads, table_reads(node.of_row(tokens).expr), strict=True))
    return type(part)(part.expr.xreplace(known), part.bound) if known else part


def with_candidates(pattern: Pattern, normaliser: PerChunk | None, axis: str) -> tuple[Pattern, PerChunk | None]:
    """The pattern with every choice told its candidates, where it was declared without. ``axis``: that ``kv_idx`` counts."""
    beside = () if normaliser is None else (normaliser.selected,)
    mask, told = told_candidates(pattern.mask, _tokens_of(axis), beside)
    if normaliser is not None and normaliser.selected in told:
        normaliser = replace(normaliser, selected=told[normaliser.selected])
    return replace(pattern, mask=mask), normaliser


def _check_normaliser(pattern: Pattern, normaliser: PerChunk) -> None:
    if pattern.sink is not None:
        raise PatternError("attend(): a sink has no place in a softmax per chunk; use per_chunk(..., weights='softmax1')")
    read = next((name for name, node in pattern.mask.bound.items() if node is normaliser.selected), None)
    if read is None:
        raise PatternError(
            f"attend(): the blocks selected for the normaliser, {normaliser.selected!r}, do not stand in the mask {pattern.mask}"
        )
    off = assume(pattern.mask.expr, {read: False})
    if off != sympy.false:
        raise PatternError(
            f"attend(): with per_chunk every pair must lie in a picked chunk; the mask {pattern.mask} allows pairs without: {off}. "
            "Attend to those in a branch of its own and use joint() or mix()"
        )


# ---- other sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Recall(Branch):
    """Softmax over the slots that each query sees."""

    memory: Slots
    x: Node = q
    scale: float | None = None
    function: ClassVar[str] = "recall"
    words: ClassVar[Mapping[str, str]] = {"x": "q"}


def check_scale(function: str, scale: Any) -> float | None:
    """A positive number, or None."""
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 < float(scale) < float("inf"):
        raise PatternError(f"{function}(): scale must be a positive number or None for head_dim ** -0.5; got {scale!r}")
    return float(scale)


def _check_queries(function: str, x: Node) -> Node:
    x = check_tensor(function, "q", x, "queries")
    if x.axes[1:3] != ("heads", "queries"):
        raise PatternError(f"{function}(): q must be counted by heads and queries; got {' '.join(x.axes)!r}")
    return x


def recall(memory: Slots, *, q: Node = q, scale: float | None = None) -> Recall:
    """Softmax attention over the slots of a memory, as they are when the query looks.

    >>> import sparsedsl as sd
    >>> memory = sd.slots(sd.input("gate", "batch kv_heads keys 64"), delay=32, temperature=8)
    >>> sd.joint(sd.recall(memory), sd.patterns.sliding_window(32)).has_lse
    True
    """
    if not isinstance(memory, Slots):
        raise PatternError(f"recall(): memory must come from slots(); got {memory!r}")
    return one_of(Recall(memory, _check_queries("recall", q), check_scale("recall", scale)))


# ---- combinations -----------------------------------------------------------------------------------------------------------


def as_branch(function: str, value: Any) -> Branch:
    """A branch; patterns and masks become plain attention."""
    if isinstance(value, Branch):
        return value
    if isinstance(value, Pattern):
        pattern, _ = with_candidates(value, None, k.axes[2])
        return one_of(Attend(pattern))
    if isinstance(value, (Mask, Choice, ChosenKeys, bool, Score)):
        made = attend(True, score=value) if isinstance(value, Score) else attend(value)
        return as_branch(function, made)
    raise PatternError(
        f"{function}() joins attentions: patterns, masks, or what attend(), recall(), ... give; got {shown(value)}{way_in(value)}"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Joint(Branch):
    """One softmax over all branches."""

    branches: tuple[Branch, ...]
    function: ClassVar[str] = "joint"

    def code(self, write: Callable[[sympy.Basic], str] = expression_text) -> str:
        """As :func:`joint` takes it."""
        return f"joint({', '.join(branch.label for branch in self.branches)})"


def joint(*branches: Any) -> Joint:
    """One softmax over the logits of all branches: each weighs ``exp(lse_branch - lse)``.

    Branches that share pairs count them twice.

    Args:
        branches: two or more patterns, masks or nodes that have an LSE.

    >>> import sparsedsl as sd
    >>> both = sd.joint(sd.patterns.sliding_window(32), sd.patterns.sinks(4) & (sd.q_idx - sd.kv_idx >= 32))
    >>> len(both.branches)
    2
    """
    parts = tuple(as_branch("joint", branch) for branch in branches)
    if len(parts) < 2:
        raise PatternError(f"joint() wants two branches or more; got {len(parts)}")
    for part in parts:
        if not part.weighable:
            raise PatternError(f"joint(): {part!r} has no softmax and so no weight in one; add it with mix()")
    return one_of(Joint(parts))


@dataclass(frozen=True, eq=False, repr=False)
class Mix(Branch):
    """Weighted sum of branches, each normalised by itself."""

    branches: tuple[Branch, ...]
    weights: Node
    function: ClassVar[str] = "mix"

    @property
    def has_lse(self) -> bool:
        """Each branch is normalised by itself."""
        return False

    def code(self, write: Callable[[sympy.Basic], str] = expression_text) -> str:
        """As :func:`mix` takes it."""
        return f"mix({', '.join(branch.label for branch in self.branches)}, weights={self.weights.label})"


def mix(*branches: Any, weights: Node) -> Mix:
    """``sum_i weights[..., i] out_i``: gates are inputs, used as they are.

    Args:
        branches: patterns, masks or nodes.
        weights: an input ``(batch, heads, queries, number of branches)``.

    >>> import sparsedsl as sd
    >>> gate = sd.input("gate", "batch heads queries 2")
    >>> sd.mix(sd.patterns.sliding_window(512), sd.linear([0.9] * 4), weights=gate).has_lse
    False
    """
    parts = tuple(as_branch("mix", branch) for branch in branches)
    if not parts:
        raise PatternError("mix() wants at least one branch")
    if not isinstance(weights, Input) or weights.axes != ("batch", "heads", "queries", str(len(parts))):
        raise PatternError(
            f"mix(): weights must be an input with the axes 'batch heads queries {len(parts)}'; got {weights!r}"
            + (f" with {' '.join(weights.axes)!r}" if isinstance(weights, Node) else "")
        )
    return one_of(Mix(parts, weights))


@dataclass(frozen=True, eq=False, repr=False)
class Compact(Branch):
    """A program over a subset of the tokens of each head."""

    tokens: Tokens
    inside: Branch
    function: ClassVar[str] = "compact"

    @property
    def weighable(self) -> bool:
        """As what runs inside."""
        return self.inside.weighable

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The tokens, and q, k, v to take them from: what is inside reads the rows that were taken."""
        return self.tokens, q, k, v

    @property
    def subprograms(self) -> tuple[Node, ...]:
        """What runs on the kept tokens."""
        return (self.inside,)


def compact(tokens: Tokens, inside: Any) -> Compact:
    """Run ``inside`` on the kept tokens of each head as if there were no others, and put its rows back; other rows are 0.

    Inside, ``q_idx`` and ``kv_idx`` count kept tokens; as these are in order, a causal mask inside is causal outside.

    Args:
        tokens: from :func:`keep_tokens`.
        inside: a pattern, a mask or a node over q, k and v alone. An input with a default is that default there, made of the kept tokens: a
            call gives none for it.

    >>> import sparsedsl as sd
    >>> score = sd.probe(sd.q, sd.k, rows=128, causal=True, keep="before")
    >>> sd.compact(sd.keep_tokens(score, tail=0.005, always=128), sd.kv_idx <= sd.q_idx).tokens.always
    128
    """
    if not isinstance(tokens, Tokens):
        raise PatternError(f"compact(): tokens must come from keep_tokens(); got {tokens!r}")
    branch = as_branch("compact", inside)
    for node in reached(branch):
        if isinstance(node, Input) and node not in OWN and node.default is None:
            raise PatternError(
                f"compact(): what is inside may use q, k and v; it reads the input {node.name!r}, whose rows are not taken. Make it of "
                f"these: sd.input({node.name!r}, ..., default=sd.summary(sd.k, 64)), say, or the summary itself"
            )
    return one_of(Compact(tokens, branch))


def blocks_of_keys(branch: Attend) -> int:
    """Tokens in a row of the keys it attends to, of which choices say blocks; of windows, of which they say none, 1."""
    return _tokens_of(branch.y.axes[2])


def reads_scores(pattern: Pattern) -> list[Scores]:
    """The scores of the program that its logits read as tables."""
    return [node for node in nodes_in(pattern.score) if isinstance(node, Scores)]
