"""Scores as values, and what is made of them: mass, larger blocks, sums and differences, factors, heads joined.

*Scores* are counted by (batch, heads, blocks of queries, blocks of keys), *key scores* by (batch, heads, keys). Scores are either *logits*
(any number; higher is better) or *mass* (at least 0; parts of a whole).
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.expressions import Index, Mask, Score, as_mask, b, h, kv_idx, q_idx
from sparsedsl.lang.table_reads import table
from sparsedsl.program.axes import block_of, in_blocks, join_heads, windows_of
from sparsedsl.program.node import Node, Operand, one_of
from sparsedsl.program.tensors import check_block

__all__ = [
    "Grouped",
    "GroupedKeys",
    "Gumbel",
    "KeyScores",
    "Overlap",
    "Plus",
    "Regroup",
    "Relu",
    "Scaled",
    "Scores",
    "Softmax",
    "Weighted",
    "grouped",
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
        return self.of_row(1)

    def of_row(self, tokens: int) -> Score:
        """The same in an attention whose rows of keys stand for so many tokens each, of which blocks are made."""
        return self[b, h, q_idx // block_of(self.axes[2]), kv_idx // (block_of(self.axes[3]) // tokens)]

    def softmax(self, among: Any = True) -> Softmax:
        """Over the blocks of keys for each row: mass among the blocks with a pair that ``among``, a mask, allows; 0 elsewhere.

        Of windows that overlap, ``kv_idx`` in ``among`` counts windows, since no token has one of its own."""
        return one_of(Softmax(self, as_mask(among, where="softmax(): among")))

    def regroup(self, block: int, how: str = "sum") -> Regroup:
        """Scores of larger blocks: each joins ``block`` neighbouring ones by ``"sum"``, ``"mean"`` or ``"max"``."""
        _check_how("regroup", how)
        block_of(self.axes[3])
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

    def relu(self) -> Relu:
        """Scores below 0 as 0. Zeros tie, and of equal scores a choice takes the earlier block.

        >>> import sparsedsl as sd
        >>> iq, ik = sd.input("iq", "batch index_heads queries index_dim"), sd.input("ik", "batch one keys index_dim")
        >>> weighed = sd.input("w", "batch index_heads queries") * sd.dot(iq, ik).relu()  # the lightning indexer of DSA
        >>> weighed.over_heads("sum").axes
        ('batch', 'one', 'queries', 'keys')
        """
        return one_of(Relu(self))

    def overlap(self, block: int, how: str = "strips") -> Overlap:
        """Mass of windows that overlap as mass of blocks of ``block`` tokens.

        Args:
            block: tokens in a block, a multiple of the stride of the windows.
            how: ``"strips"``: the sum over the windows, each as often as it shares strips of a stride's tokens with the block (NSA);
                ``"max"``: the greatest of the windows that touch the block (InfLLM v2). Blocks that no window touches have mass 0.

        >>> import sparsedsl as sd
        >>> kc = sd.summary(sd.k, 32, stride=16)
        >>> sd.dot(sd.q, kc).softmax(sd.kv_idx * 16 + 32 <= sd.q_idx + 1).over_group("sum").overlap(64).axes
        ('batch', 'kv_heads', 'queries', 'keys/64')
        """
        check_word("overlap(): how", how, ("strips", "max"))
        windows = windows_of(self.axes[3])
        if windows is None or not self.is_mass:
            raise PatternError(
                "overlap() joins mass of windows, as of sd.dot(q, sd.summary(k, 32, stride=16)).softmax(...); got "
                f"{'mass' if self.is_mass else 'logits'} of {self.axes[3]!r}. Blocks side by side are joined by regroup()"
            )
        length, stride = windows
        if check_block("overlap", "block", block) % stride or length % stride:
            raise PatternError(
                f"overlap(): block and the length of the windows, {length}, must be multiples of their stride {stride}; got {block}"
            )
        return one_of(Overlap(self, block, how))

    def _operate(self, operation: Callable[[Any, Any], Any], other: Any, *, swapped: bool) -> Any:
        """Sums and differences of scores, and of scores and numbers, and products with numbers and factors of rows are scores; everything
        else reads the score of the pair that an attention looks at, a logit."""
        if isinstance(other, Scores):
            return _joined(operation, *((other, self) if swapped else (self, other)))
        if isinstance(other, Node) and other.gives == "tensor" and operation is operator.mul:
            return _weighted(self, other)
        if isinstance(other, numbers.Real) and not isinstance(other, bool):
            made = _by_number(self, operation, float(other), swapped)
            if made is not None:
                return made
        return super()._operate(operation, other, swapped=swapped)

    def __neg__(self) -> Scaled:
        return one_of(Scaled(self, -1.0))


def _joined(operation: Callable[[Any, Any], Any], first: Scores, second: Scores) -> Plus:
    """The sum or difference of two scores."""
    if operation not in (operator.add, operator.sub):
        raise PatternError(
            f"scores of blocks are joined by + and - alone, which give scores again; got {first!r} and {second!r}. For logits of pairs "
            "read one of them first: first.as_expression() * second"
        )
    if first.axes[2:] != second.axes[2:]:
        raise PatternError(f"scores of {' '.join(first.axes)!r} and {' '.join(second.axes)!r} cannot be added: blocks differ")
    join_heads("the sum of scores", first.axes[1], second.axes[1])
    return one_of(Plus(first, second if operation is operator.add else one_of(Scaled(second, -1.0))))


def _by_number(scores: Scores, operation: Callable[[Any, Any], Any], number: float, swapped: bool) -> Scaled | None:
    """Scores and a finite number by + - * /; None for other operators."""
    if operation is operator.truediv and number == 0 and not swapped:
        raise PatternError(f"{scores!r} cannot be divided by 0")
    made: tuple[float, float] | None = None
    if operation is operator.add:
        made = 1.0, number
    elif operation is operator.sub:
        made = (-1.0, number) if swapped else (1.0, -number)
    elif operation is operator.mul:
        made = number, 0.0
    elif operation is operator.truediv and not swapped:
        made = 1 / number, 0.0
    if made is None:
        return None
    if not all(map(math.isfinite, made)):
        raise PatternError(f"scores are scaled and moved by finite numbers; got {number!r}")
    return one_of(Scaled(scores, *made))


def _weighted(scores: Scores, by: Node) -> Weighted:
    """Scores times a factor for each row."""
    axes = by.axes
    if len(axes) != 3 or axes[0] != "batch" or axes[2] != scores.axes[2]:
        raise PatternError(
            f"scores are multiplied by a factor for each row, an input with the axes 'batch', heads and {scores.axes[2]!r}; got {by!r} "
            f"with {' '.join(axes)!r}"
        )
    join_heads("the product of scores and factors", scores.axes[1], axes[1])
    return one_of(Weighted(scores, by))


class KeyScores(_Reducible["GroupedKeys"]):
    """One score for every key, at least 0."""

    gives: ClassVar[str] = "key scores"

    @property
    def probing(self) -> int:
        """The last queries of a call that it is made from itself; 0: none."""
        return 0


REDUCTIONS = ("sum", "mean", "max")


def _check_how(function: str, how: str) -> str:
    return check_word(f"{function}(): how", how, REDUCTIONS)


class _OfEach(Scores):
    """Scores made of scores one by one, which are its first argument."""

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Theirs."""
        return self.inputs[0].axes


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(_OfEach):
    """Softmax over the blocks of keys."""

    scores: Scores
    among: Mask
    function: ClassVar[str] = "softmax"
    mass: ClassVar[bool] = True

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
class Relu(_OfEach):
    """Scores below 0 as 0."""

    x: Scores
    function: ClassVar[str] = "rectified"

    @property
    def is_mass(self) -> bool:
        """As before."""
        return self.x.is_mass


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(_OfEach):
    """``factor * scores + offset``."""

    x: Scores
    factor: float = 1.0
    offset: float = 0.0
    function: ClassVar[str] = "scaled"

    @property
    def is_mass(self) -> bool:
        """As before, if parts stay the same parts of their whole."""
        return self.x.is_mass and self.factor > 0 and not self.offset


@dataclass(frozen=True, eq=False, repr=False)
class Weighted(Scores):
    """Scores times a factor for each row."""

    x: Scores
    by: Node
    function: ClassVar[str] = "weighted"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Heads join."""
        return "batch", join_heads("weighted()", self.x.axes[1], self.by.axes[1]), *self.x.axes[2:]


@dataclass(frozen=True, eq=False, repr=False)
class Overlap(Scores):
    """Mass of windows that overlap, as mass of blocks."""

    x: Scores
    block: int
    how: str = "strips"
    function: ClassVar[str] = "overlap"
    mass: ClassVar[bool] = True

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """``keys/32+16`` becomes ``keys/64`` for 64."""
        return *self.x.axes[:3], f"keys/{self.block}" if self.block > 1 else "keys"


@dataclass(frozen=True, eq=False, repr=False)
class Gumbel(_OfEach):
    """Logits with Gumbel noise."""

    scores: Scores
    seed: Node
    function: ClassVar[str] = "gumbel"


@dataclass(frozen=True, eq=False, repr=False)
class _HeadsJoined(Node):
    """What is counted by heads, with these joined."""

    x: Any
    heads: str
    how: str

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """With other heads."""
        return "batch", self.heads, *self.x.axes[2:]


class Grouped(_HeadsJoined, Scores):
    """Scores with heads joined."""

    function: ClassVar[str] = "grouped"

    @property
    def is_mass(self) -> bool:
        """As before: of a maximum too, whose parts are compared with their own total."""
        return bool(self.x.is_mass)


class GroupedKeys(_HeadsJoined, KeyScores):
    """Key scores with heads joined."""

    function: ClassVar[str] = "grouped"


def grouped(x: Any, heads: str, how: str) -> Grouped | GroupedKeys:
    """Scores or key scores with their heads joined to ``kv_heads`` or ``one``: see ``over_group`` and ``over_heads``."""
    _check_how("over_group" if heads == "kv_heads" else "over_heads", how)
    return one_of(Grouped(x, heads, how)) if isinstance(x, Scores) else one_of(GroupedKeys(x, heads, how))
