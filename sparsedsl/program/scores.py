"""Nodes that give scores, the cheap numbers a choice is made by.

*Scores* are counted by (batch, heads, blocks of queries, blocks of keys), *key scores* by (batch, heads, keys). Scores are either *logits*
(any number; higher is better) or *mass* (at least 0; parts of a whole).
"""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word, shown, way_in
from sparsedsl.lang.expressions import Index, Mask, Score, as_mask, b, h, kv_idx, q_idx, table
from sparsedsl.program.axes import block_of, in_blocks, join_heads
from sparsedsl.program.node import Node, Operand, nodes_in, one_of
from sparsedsl.program.tensors import check_block, check_tensor

__all__ = [
    "Antidiagonal",
    "Bound",
    "Dot",
    "Grouped",
    "Gumbel",
    "KeyScores",
    "Plus",
    "Probe",
    "Regroup",
    "Scores",
    "Smooth",
    "Softmax",
    "antidiagonal",
    "bound",
    "dot",
    "probe",
    "smooth",
]


G = TypeVar("G")


class _Reducible(Node, Generic[G]):
    """What scores and key scores have in common: their heads can be joined, which gives a ``G``."""

    def over_group(self, how: str = "sum") -> G:
        """Query heads of a key/value group as one: ``"sum"``, ``"mean"`` or ``"max"``; heads becomes kv_heads.

        >>> import sparsedsl as sd
        >>> sd.dot(sd.q, sd.summary(sd.k, 64)).over_group("sum").axes
        ('batch', 'kv_heads', 'queries', 'keys/64')
        """
        if self.axes[1] != "heads":
            raise PatternError(f"over_group(): {self!r} has no query heads to join; its axes are {' '.join(self.axes)!r}")
        return cast(G, grouped(self, "kv_heads", how))

    def over_heads(self, how: str = "mean") -> G:
        """All heads as one: ``"sum"``, ``"mean"`` or ``"max"``."""
        return cast(G, grouped(self, "one", how))


class Scores(_Reducible["Grouped"], Operand):
    """Scores of blocks of keys for blocks of queries. Usable in the score of an attention: ``sd.score + scores``."""

    gives: ClassVar[str] = "scores"
    mass: ClassVar[bool] = False

    @property
    def is_mass(self) -> bool:
        """Whether the numbers are parts of a whole, and not logits."""
        return self.mass

    def __getitem__(self, indices: tuple[Index, Index, Index, Index]) -> Score:
        """Read as a float table at (batch entry, query head, block of queries, block of keys)."""
        return table(self.label, dtype=float, learned=True)[self._read(indices)].bind(**{self.label: self})

    def as_expression(self) -> Score:
        """The score of the pair that an attention looks at."""
        return self[b, h, q_idx // block_of(self.axes[2]), kv_idx // block_of(self.axes[3])]

    def softmax(self, among: Any = True) -> Softmax:
        """Over the blocks of keys for each row: mass among the blocks with a pair that ``among``, a mask, allows; 0 elsewhere."""
        return one_of(Softmax(self, as_mask(among, where="softmax(): among")))

    def regroup(self, block: int, how: str = "sum") -> Regroup:
        """Scores of larger blocks: each joins ``block`` neighbouring ones by ``"sum"``, ``"mean"`` or ``"max"``."""
        _check_how("regroup", how)
        return one_of(Regroup(self, check_block("regroup", "block", block, 2), how))

    def gumbel(self, seed: Node) -> Gumbel:
        """With Gumbel noise: the ``k`` greatest are a sample, without replacement, from the softmax of the logits.

        For choices in training: choose by ``scores.gumbel(seed)`` and weigh by ``scores``. The same seed draws the same noise, however
        a call is cut.

        Args:
            seed: an input of one whole number: ``sd.input("seed", "1")``.

        >>> import sparsedsl as sd
        >>> scores = sd.dot(sd.q, sd.summary(sd.k, 64))
        >>> selected = sd.top_k(scores.gumbel(sd.input("seed", "1")), 16)
        >>> sd.per_chunk(selected, scores=scores).weights
        'softmax'
        """
        if not isinstance(seed, Node) or seed.axes != ("1",):
            raise PatternError(f"gumbel(): seed must be an input of one number, with the axes '1'; got {seed!r}")
        if self.is_mass:
            raise PatternError(f"gumbel(): noise is added to logits; {self!r} is mass")
        return one_of(Gumbel(self, seed))

    def _operate(self, operation: Callable[[Any, Any], Any], other: Any, *, swapped: bool) -> Any:
        """``+`` joins scores to scores; everything else reads the score of the pair that an attention looks at, a logit."""
        if not isinstance(other, Scores):
            return super()._operate(operation, other, swapped=swapped)
        if operation is not operator.add:
            raise PatternError(
                f"scores of blocks are joined by + alone, which gives scores again; got {self!r} and {other!r}. For logits of pairs "
                "read one of them first: first.as_expression() - second"
            )
        if other.axes[2:] != self.axes[2:]:
            raise PatternError(f"scores of {' '.join(self.axes)!r} and {' '.join(other.axes)!r} cannot be added: blocks differ")
        join_heads("the sum of scores", self.axes[1], other.axes[1])
        return one_of(Plus(other, self) if swapped else Plus(self, other))


class KeyScores(_Reducible["GroupedKeys"]):
    """One score for every key, at least 0."""

    gives: ClassVar[str] = "key scores"


REDUCTIONS = ("sum", "mean", "max")


def _check_how(function: str, how: str) -> str:
    return check_word(f"{function}(): how", how, REDUCTIONS)


def check_scores(function: str, value: object) -> Scores:
    """A node that gives scores."""
    if not isinstance(value, Scores):
        hint = ""
        if any(isinstance(node, Scores) for node in nodes_in(value)):
            hint = (
                ". Arithmetic on scores gives the logit of a pair, for sd.attend(..., score=); scores that are chosen by take a factor as "
                "dot(..., scale=), and + joins two of them"
            )
        raise PatternError(
            f"{function}(): scores must come from dot(), bound(), antidiagonal() or what is made of them; got {shown(value)}"
            f"{hint or way_in(value)}"
        )
    return value


def check_key_scores(function: str, word: str, value: object) -> KeyScores:
    """A node that gives one score a key."""
    if not isinstance(value, KeyScores):
        raise PatternError(f"{function}(): {word} must be one score a key, as from probe() or smooth(); got {shown(value)}")
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
class Softmax(Scores):
    """Softmax over the blocks of keys."""

    scores: Scores
    among: Mask
    function: ClassVar[str] = "softmax"
    mass: ClassVar[bool] = True

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Unchanged."""
        return self.scores.axes

    @functools.cached_property
    def whole_queries(self) -> int:
        """Those of a block."""
        return block_of(self.axes[2])


@dataclass(frozen=True, eq=False, repr=False)
class Regroup(Scores):
    """Scores of larger blocks of keys."""

    scores: Scores
    block: int
    how: str = "sum"
    function: ClassVar[str] = "regroup"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """``keys/16`` becomes ``keys/64`` for 4."""
        *lead, blocks = self.scores.axes
        return *lead, in_blocks(blocks, self.block)

    @property
    def is_mass(self) -> bool:
        """As before, unless it is no sum."""
        return self.scores.is_mass and self.how == "sum"


@dataclass(frozen=True, eq=False, repr=False)
class Plus(Scores):
    """The sum of two scores: a bias, or noise for the choice alone."""

    first: Scores
    second: Scores
    function: ClassVar[str] = "plus"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Heads join."""
        return "batch", join_heads("plus()", self.first.axes[1], self.second.axes[1]), *self.first.axes[2:]


@dataclass(frozen=True, eq=False, repr=False)
class Gumbel(Scores):
    """Logits with Gumbel noise."""

    scores: Scores
    seed: Node
    function: ClassVar[str] = "gumbel"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Unchanged."""
        return self.scores.axes


@dataclass(frozen=True, eq=False, repr=False)
class Grouped(Scores):
    """Scores with heads joined."""

    x: Scores
    heads: str
    how: str
    function: ClassVar[str] = "grouped"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """With other heads."""
        return "batch", self.heads, *self.x.axes[2:]

    @property
    def is_mass(self) -> bool:
        """As before: of a maximum too, whose parts are compared with their own total."""
        return self.x.is_mass


@dataclass(frozen=True, eq=False, repr=False)
class GroupedKeys(KeyScores):
    """Key scores with heads joined."""

    x: KeyScores
    heads: str
    how: str
    function: ClassVar[str] = "grouped"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """With other heads."""
        return "batch", self.heads, *self.x.axes[2:]


def grouped(x: Any, heads: str, how: str) -> Grouped | GroupedKeys:
    """Scores or key scores with their heads joined to ``kv_heads`` or ``one``: see ``over_group`` and ``over_heads``."""
    _check_how("over_group" if heads == "kv_heads" else "over_heads", how)
    return one_of(Grouped(x, heads, how)) if isinstance(x, Scores) else one_of(GroupedKeys(x, heads, how))


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
    function: ClassVar[str] = "probe"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """One number a key."""
        return "batch", join_heads("probe()", self.x.axes[1], self.y.axes[1]), self.y.axes[2]


def probe(
    x: Node, y: Node, *, rows: int, causal: bool = False, complete: int = 1, keep: str = "all", scale: float | None = None
) -> Probe:
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
    return one_of(Probe(x, y, rows, causal, complete, keep, scale))


@dataclass(frozen=True, eq=False, repr=False)
class Smooth(KeyScores):
    """Key scores averaged with their neighbours."""

    x: KeyScores
    pool: int
    function: ClassVar[str] = "smooth"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Unchanged."""
        return self.x.axes


def smooth(x: KeyScores, pool: int) -> Smooth:
    """Each key's score as the mean of ``pool`` neighbours; beyond the ends there are zeros, which count.

    >>> import sparsedsl as sd
    >>> sd.smooth(sd.probe(sd.q, sd.k, rows=128), 7).pool
    7
    """
    x = check_key_scores("smooth", "x", x)
    if check_block("smooth", "pool", pool) % 2 == 0:
        raise PatternError(f"smooth(): pool must be odd, so that the key itself is in the middle; got {pool}")
    return one_of(Smooth(x, pool))
