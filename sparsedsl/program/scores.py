"""Nodes that give scores, the cheap numbers a choice is made by: products, bounds, sums along antidiagonals, probes, and scores made
elsewhere. What is made of them stands in :mod:`~sparsedsl.program.score_values`.
"""

from __future__ import annotations

import functools
import numbers
from dataclasses import dataclass
from typing import ClassVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word, shown, way_in
from sparsedsl.program.axes import base_of, block_of, in_blocks, join_heads
from sparsedsl.program.node import Node, nodes_in, one_of
from sparsedsl.program.score_values import (
    Grouped,
    GroupedKeys,
    Gumbel,
    KeyScores,
    Overlap,
    Plus,
    Regroup,
    Relu,
    Scaled,
    Scores,
    Softmax,
    Weighted,
    grouped,
)
from sparsedsl.program.tensors import check_block, check_tensor

__all__ = [
    "Antidiagonal",
    "Bound",
    "Dot",
    "GivenKeyScores",
    "GivenScores",
    "Grouped",
    "GroupedKeys",
    "Gumbel",
    "KeyScores",
    "Overlap",
    "Plus",
    "Probe",
    "Regroup",
    "Relu",
    "Scaled",
    "Scores",
    "Smooth",
    "Softmax",
    "Weighted",
    "antidiagonal",
    "bound",
    "check_key_scores",
    "check_scores",
    "dot",
    "given_key_scores",
    "given_scores",
    "grouped",
    "probe",
    "smooth",
]


def check_scores(function: str, value: object) -> Scores:
    """A node that gives scores."""
    if not isinstance(value, Scores):
        hint = ""
        if any(isinstance(node, Scores) for node in nodes_in(value)):
            hint = (
                ". This is the logit of a pair, for sd.attend(..., score=). Scores stay scores under + and - with scores and numbers, * "
                "and / with numbers, * with an input of factors 'batch heads queries', and .relu() .softmax() .regroup() .over_heads()"
            )
        raise PatternError(
            f"{function}(): scores must come from dot(), bound(), antidiagonal(), given_scores() or what is made of them; "
            f"got {shown(value)}"
            f"{hint or way_in(value)}"
        )
    return value


def check_key_scores(function: str, word: str, value: object) -> KeyScores:
    """A node that gives one score a key."""
    if not isinstance(value, KeyScores) or value.axes[2] != "keys":
        raise PatternError(
            f"{function}(): {word} must be one score a key, as from probe(), smooth() or given_key_scores(); got {shown(value)}"
        )
    return value


@dataclass(frozen=True, eq=False, repr=False)
class Dot(Scores):
    """Scaled dot products of rows of ``x`` with rows of ``y``."""

    x: Node
    y: Node
    scale: float | None = None
    function: ClassVar[str] = "dot"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Heads join."""
        return "batch", join_heads("dot()", self.x.axes[1], self.y.axes[1]), self.x.axes[2], self.y.axes[2]


def dot(x: Node, y: Node, *, scale: float | None = None) -> Dot:
    """Dot products of rows that stand for queries with rows that stand for keys, times ``scale``: logits.

    Args:
        x: ``(batch, heads, queries or blocks of them, dim)``.
        y: ``(batch, heads, keys or blocks of them, dim)``.
        scale: default ``dim ** -0.5``.

    >>> import sparsedsl as sd
    >>> sd.dot(sd.q, sd.summary(sd.k, 64)).axes  # mean keys of chunks, as in MoBA
    ('batch', 'heads', 'queries', 'keys/64')
    """
    x, y = check_tensor("dot", "x", x, "queries"), check_tensor("dot", "y", y, "keys")
    if x.axes[3] != y.axes[3]:
        raise PatternError(f"dot(): x and y must have the same last axis; got {x.axes[3]!r} and {y.axes[3]!r}")
    join_heads("dot()", x.axes[1], y.axes[1])
    return one_of(Dot(x, y, None if scale is None else _positive("dot", scale)))


def _positive(function: str, scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 < float(scale) < float("inf"):
        raise PatternError(f"{function}(): scale must be a positive number or None for dim ** -0.5; got {scale!r}")
    return float(scale)


@dataclass(frozen=True, eq=False, repr=False)
class Bound(Scores):
    """Upper bounds of the logits of a query in a block of keys."""

    x: Node
    y: Node
    block: int
    scale: float | None = None
    function: ClassVar[str] = "bound"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """``keys`` becomes ``keys/block``."""
        return (
            "batch",
            join_heads("bound()", self.x.axes[1], self.y.axes[1]),
            self.x.axes[2],
            in_blocks(self.y.axes[2], self.block),
        )


def bound(x: Node, y: Node, block: int, *, scale: float | None = None) -> Bound:
    """No key of a block has a higher logit: ``sum_d max(x_d low_d, x_d high_d)`` with the smallest and largest entries of its keys.

    Source: Quest, Tang et al. 2024 (arXiv 2406.10774).

    >>> import sparsedsl as sd
    >>> sd.bound(sd.q, sd.k, 16).axes
    ('batch', 'heads', 'queries', 'keys/16')
    """
    x, y = check_tensor("bound", "x", x, "queries"), check_tensor("bound", "y", y, "keys")
    if x.axes[3] != y.axes[3]:
        raise PatternError(f"bound(): x and y must have the same last axis; got {x.axes[3]!r} and {y.axes[3]!r}")
    block_of(y.axes[2])
    join_heads("bound()", x.axes[1], y.axes[1])
    scale = None if scale is None else _positive("bound", scale)
    return one_of(Bound(x, y, check_block("bound", "block", block), scale))


@dataclass(frozen=True, eq=False, repr=False)
class Antidiagonal(Scores):
    """Mass of blocks, estimated from sums along antidiagonals."""

    x: Node
    y: Node
    stride: int
    block: int
    function: ClassVar[str] = "antidiagonal"
    mass: ClassVar[bool] = True

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """In blocks."""
        heads = join_heads("antidiagonal()", self.x.axes[1], self.y.axes[1])
        return "batch", heads, in_blocks(self.x.axes[2], self.block), in_blocks(self.y.axes[2], self.block)

    @functools.cached_property
    def whole_queries(self) -> int:
        """Those of a block."""
        return self.block


def antidiagonal(x: Node, y: Node, stride: int, block: int) -> Antidiagonal:
    """Mass of each pair of blocks: a causal softmax over sums of logits along antidiagonals of ``stride`` tokens, summed in a block.

    Source: XAttention, Xu et al. 2025 (arXiv 2503.16428).

    Args:
        x: q or an input like it.
        y: k or an input like it.
        stride: tokens in an antidiagonal; divides ``block``.
        block: tokens in a block, of queries and of keys.

    >>> import sparsedsl as sd
    >>> sd.antidiagonal(sd.q, sd.k, stride=16, block=128).axes
    ('batch', 'heads', 'queries/128', 'keys/128')
    """
    x, y = check_tensor("antidiagonal", "x", x, "queries"), check_tensor("antidiagonal", "y", y, "keys")
    if block_of(x.axes[2]) != 1 or block_of(y.axes[2]) != 1 or x.axes[3] != y.axes[3]:
        raise PatternError("antidiagonal(): x and y must have one row a token and the same last axis")
    if check_block("antidiagonal", "block", block) % check_block("antidiagonal", "stride", stride):
        raise PatternError(f"antidiagonal(): stride must divide block, which is {block}; got {stride}")
    join_heads("antidiagonal()", x.axes[1], y.axes[1])
    return one_of(Antidiagonal(x, y, stride, block))


@dataclass(frozen=True, eq=False, repr=False)
class Probe(KeyScores):
    """The attention that the last queries pay each key, averaged over them."""

    x: Node
    y: Node
    rows: int
    causal: bool = False
    complete: int = 1
    keep: str = "all"
    scale: float | None = None
    pooled: int | None = None
    function: ClassVar[str] = "probe"

    @property
    def probing(self) -> int:
        """Those that probe."""
        return self.rows

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """One number a key, or a block of keys."""
        keys = self.y.axes[2] if self.pooled is None else in_blocks(self.y.axes[2], self.pooled)
        return "batch", join_heads("probe()", self.x.axes[1], self.y.axes[1]), keys


def probe(
    x: Node, y: Node, *, rows: int, causal: bool = False, complete: int = 1, keep: str = "all", scale: float | None = None,
    pooled: int | None = None,
) -> Probe:  # fmt: skip
    """Mean over the last ``rows`` queries of the call of their softmax over the keys: one score a key.

    Two passes over the keys; the rows x keys matrix is never held.

    Args:
        x: q or an input like it.
        y: k or an input like it.
        rows: queries that probe, fewer if the call has fewer.
        causal: a probing query does not look at later keys.
        complete: keys after the last multiple of this are left out of the softmax, and score 0.
        keep: ``"all"`` keys are scored, or only those ``"before"`` the probing rows; later ones take part in the softmax, and score 0.
        scale: default ``dim ** -0.5``.
        pooled: only an estimate, of blocks of so many keys: the softmax of the mean of the probing queries over the mean keys of blocks, a
            ragged last one of those that it has. For :func:`divergence`; with none of the words above but ``rows`` and ``scale``.

    Source: PBS-Attn (arXiv 2510.21270) with ``complete=segment``; token sparse attention (arXiv 2602.03216) with ``causal=True,
    keep="before"``.

    >>> import sparsedsl as sd
    >>> sd.probe(sd.q, sd.k, rows=128, causal=True, keep="before").axes
    ('batch', 'heads', 'keys')
    """
    x, y = check_tensor("probe", "x", x, "queries"), check_tensor("probe", "y", y, "keys")
    if block_of(x.axes[2]) != 1 or block_of(y.axes[2]) != 1 or x.axes[3] != y.axes[3]:
        raise PatternError("probe(): x and y must have one row a token and the same last axis")
    if not isinstance(causal, bool):
        raise PatternError(f"probe(): causal must be True or False; got {causal!r}")
    check_word("probe(): keep", keep, ("all", "before"))
    rows, complete = check_block("probe", "rows", rows), check_block("probe", "complete", complete)
    scale = None if scale is None else _positive("probe", scale)
    join_heads("probe()", x.axes[1], y.axes[1])
    if pooled is not None and (causal or complete != 1 or keep != "all"):
        raise PatternError("probe(): an estimate from means, pooled=, is of all blocks: leave causal, complete and keep out")
    pooled = None if pooled is None else check_block("probe", "pooled", pooled)
    return one_of(Probe(x, y, rows, causal, complete, keep, scale, pooled))


@dataclass(frozen=True, eq=False, repr=False)
class Smooth(KeyScores):
    """Key scores joined with their neighbours."""

    x: KeyScores
    pool: int
    how: str = "mean"
    function: ClassVar[str] = "smooth"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Unchanged."""
        return self.x.axes


def smooth(x: KeyScores, pool: int, how: str = "mean") -> Smooth:
    """Each key's score as the ``"mean"`` of ``pool`` neighbours, or their ``"max"``; beyond the ends there are zeros, which count.

    >>> import sparsedsl as sd
    >>> sd.smooth(sd.probe(sd.q, sd.k, rows=128), 7).pool
    7
    """
    x = check_key_scores("smooth", "x", x)
    if check_block("smooth", "pool", pool) % 2 == 0:
        raise PatternError(f"smooth(): pool must be odd, so that the key itself is in the middle; got {pool}")
    return one_of(Smooth(x, pool, check_word("smooth(): how", how, ("mean", "max"))))


@dataclass(frozen=True, eq=False, repr=False)
class GivenScores(Scores):
    """Scores that a call is given."""

    x: Node
    function: ClassVar[str] = "given_scores"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Of the input."""
        return self.x.axes


def given_scores(x: Node) -> GivenScores:
    """Scores that were made elsewhere, logits: a gate that was trained for them, another kernel.

    Args:
        x: an input ``(batch, heads, queries or blocks of them, keys or blocks of them)``. -inf is no candidate; a call may leave an
            incomplete last block of keys out.

    Scores given for blocks of queries are known to all of these.

    >>> import sparsedsl as sd
    >>> gate = sd.given_scores(sd.input("gate", "batch kv_heads queries keys/64"))
    >>> sd.threshold(gate.softmax(sd.kv_idx <= sd.q_idx), 2e-3).blocks  # as SeerAttention chooses
    (1, 64)
    """
    axes = x.axes if isinstance(x, Node) and x.gives == "tensor" else ()
    if len(axes) != 4 or axes[0] != "batch" or [base_of(axis) for axis in axes[2:]] != ["queries", "keys"]:
        raise PatternError(
            f"given_scores(): x must be an input with the axes 'batch', heads, queries, keys, or blocks of these; got {shown(x)}"
            + (f" with {' '.join(axes)!r}" if axes else "")
        )
    block_of(axes[3])
    return one_of(GivenScores(x))


@dataclass(frozen=True, eq=False, repr=False)
class GivenKeyScores(KeyScores):
    """One score a key that a call is given."""

    x: Node
    function: ClassVar[str] = "given_key_scores"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Of the input."""
        return self.x.axes


def given_key_scores(x: Node) -> GivenKeyScores:
    """One score for every key that was made elsewhere: votes of an earlier call, a router.

    Args:
        x: an input ``(batch, heads, keys)`` of numbers of at least 0, which is checked at the call.

    What they were made from is not known: of a sort by them the report says UNKNOWN of causality. A choice by them, :func:`keep_tokens` or
    :func:`top_k`, compares all keys of a call with each other, later ones too, and says so.

    >>> import sparsedsl as sd
    >>> votes = sd.given_key_scores(sd.input("votes", "batch heads keys"))
    >>> sd.compact(sd.keep_tokens(votes, tail=0.1), sd.kv_idx <= sd.q_idx).tokens.tail
    0.1
    """
    axes = x.axes if isinstance(x, Node) and x.gives == "tensor" else ()
    if len(axes) != 3 or axes[0] != "batch" or axes[2] != "keys":
        raise PatternError(
            f"given_key_scores(): x must be an input with the axes 'batch', heads, keys; got {shown(x)}"
            + (f" with {' '.join(axes)!r}" if axes else "")
        )
    return one_of(GivenKeyScores(x))
