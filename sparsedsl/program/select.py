"""Nodes that choose blocks of keys for blocks of queries. What they choose is a boolean table, usable in any mask."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.expressions import Index, Mask, as_mask, b, h, kv_idx, q_idx, table
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.axes import block_of
from sparsedsl.program.node import Operand, nodes_in, one_of
from sparsedsl.program.scores import Scores, check_scores
from sparsedsl.program.tensors import check_block

__all__ = ["Select", "Threshold", "TopK", "TopP", "choices_in", "threshold", "top_k", "top_p"]


@dataclass(frozen=True, eq=False, repr=False)
class Select(Operand):
    """Base of the choices. ``among``: the pairs that make a block a candidate; None: not known before the mask is.

    ``forced``: pairs that make a block chosen in any case (if it is a candidate).
    """

    scores: Scores
    among: Mask | None = field(default=None, kw_only=True)
    forced: Mask | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    gives: ClassVar[str] = "selected"
    if TYPE_CHECKING:  # operators read it as a mask

        def __and__(self, other: Any) -> Mask: ...
        def __rand__(self, other: Any) -> Mask: ...
        def __or__(self, other: Any) -> Mask: ...
        def __ror__(self, other: Any) -> Mask: ...
        def __xor__(self, other: Any) -> Mask: ...
        def __rxor__(self, other: Any) -> Mask: ...

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Those of the scores."""
        return self.scores.axes

    @functools.cached_property
    def blocks(self) -> tuple[int, int]:
        """Tokens in a block of queries and in a block of keys."""
        return block_of(self.axes[2]), block_of(self.axes[3])

    @functools.cached_property
    def whole_queries(self) -> int:
        """Those of a block."""
        return self.blocks[0]

    @property
    def most(self) -> int | None:
        """How many blocks it chooses at most for a block of queries; None: as many as there are candidates."""
        return None

    def within(self, among: Mask) -> Select:
        """The same choice among these candidates."""
        return one_of(dataclasses.replace(self, among=among))

    def __getitem__(self, indices: tuple[Index, Index, Index, Index]) -> Mask:
        """Read as a boolean table at (batch entry, query head, block of queries, block of keys)."""
        return table(self.label, dtype=bool)[self._read(indices)].bind(**{self.label: self})

    def as_expression(self) -> Mask:
        """Whether the block of the key was chosen for the block of the query."""
        rows, columns = self.blocks
        return self[b, h, q_idx // rows, kv_idx // columns]


def choices_in(mask: Mask) -> dict[str, Select]:
    """Table name -> choice, of all choices that a mask reads."""
    read = mask.tables
    return {name: node for name, node in sorted(mask.bound.items()) if isinstance(node, Select) and name in read}


def _check(function: str, scores: Any, among: Any, forced: Any, name: Any) -> tuple[Scores, Mask | None, Mask | None, str]:
    scores = check_scores(function, scores)
    if among is not None:
        among = as_mask(among, where=f"{function}(): among")
        if nodes_in(among):
            raise PatternError(
                f"{function}(): among must not depend on choices of the program, since candidates are known before them; got {among}"
            )
    if forced is not None:
        forced = as_mask(forced, where=f"{function}(): forced")
    for word, mask in (("among", among), ("forced", forced)):
        if mask is not None and SCORE in mask.expr.free_symbols:
            raise PatternError(f"{function}(): {word} must not depend on sd.score; got {mask}")
    if not isinstance(name, str) or (name and not name.isidentifier()):
        raise PatternError(f"{function}(): name must be a Python identifier; got {name!r}")
    return scores, among, forced, name


@dataclass(frozen=True, eq=False, repr=False)
class TopK(Select):
    """The ``count`` best candidates."""

    count: int
    extra: bool = False
    function: ClassVar[str] = "top_k"

    @property
    def most(self) -> int | None:
        """The count, unless forced blocks come on top of it."""
        return None if self.extra and self.forced is not None else self.count


def top_k(scores: Scores, count: int, *, among: Any = None, forced: Any = None, extra: bool = False, name: str = "") -> TopK:
    """The ``count`` blocks of keys with the highest scores, for every block of queries; fewer where there are fewer candidates.

    Of equal scores the earlier block is taken. No gradient flows through the choice; it flows through weights made of the scores.

    Args:
        scores: from :func:`dot`, :func:`bound`, ...: ``(batch, heads, blocks of queries, blocks of keys)``.
        count: how many.
        among: a static mask: a block is a candidate if it has a pair that the mask allows. Default: the pairs for which the choice decides
            in the mask it stands in, so that what the rest of that mask excludes or allows anyway is never scored.
        forced: a mask: candidates with such a pair are taken first.
        extra: forced blocks do not count.
        name: what reports, choices and text forms call it; default its function, numbered from the second on.

    >>> import sparsedsl as sd
    >>> selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 16, name="selected")
    >>> (sd.kv_idx <= sd.q_idx) & selected
    Mask((kv_idx <= q_idx) & selected[b, h, q_idx, kv_idx // 64])
    """
    scores, among, forced, name = _check("top_k", scores, among, forced, name)
    count, extra = check_block("top_k", "count", count), _flag("top_k", "extra", extra)
    return one_of(TopK(scores, count, extra, among=among, forced=forced, name=name))


def _flag(function: str, word: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise PatternError(f"{function}(): {word} must be True or False; got {value!r}")
    return value


@dataclass(frozen=True, eq=False, repr=False)
class TopP(Select):
    """The best candidates that hold a share of the mass."""

    share: float
    inclusive: bool = True
    unmet: str = "all"
    forced_in_mass: bool = False
    function: ClassVar[str] = "top_p"


def top_p(
    scores: Scores,
    share: float,
    *,
    inclusive: bool = True,
    unmet: str = "all",
    among: Any = None,
    forced: Any = None,
    forced_in_mass: bool = False,
    name: str = "",
) -> TopP:
    """The fewest best candidates that hold ``share`` of the mass of a row. Logits become mass by a softmax over the candidates.

    Args:
        scores: logits or mass.
        share: above 0, at most 1. 1 means all candidates, whatever the next two say: when rounded sums reach 1 is a matter of chance.
        inclusive: the candidate that reaches the share is taken too.
        unmet: where rounding leaves all candidates below the share: take ``"all"`` of them or ``"none"``.
        among: see :func:`top_k`.
        forced: a mask: candidates with such a pair are taken in any case.
        forced_in_mass: their mass counts towards the share (XAttention), else they come on top.
        name: what reports, choices and text forms call it.

    >>> import sparsedsl as sd
    >>> sd.top_p(sd.dot(sd.summary(sd.q, 128), sd.summary(sd.k, 128)), 0.9).blocks
    (128, 128)
    """
    scores, among, forced, name = _check("top_p", scores, among, forced, name)
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
        raise PatternError(f"top_p(): share must be above 0 and at most 1; got {share!r}")
    check_word("top_p(): unmet", unmet, ("all", "none"))
    flags = _flag("top_p", "inclusive", inclusive), _flag("top_p", "forced_in_mass", forced_in_mass)
    return one_of(TopP(scores, float(share), flags[0], unmet, flags[1], among=among, forced=forced, name=name))


@dataclass(frozen=True, eq=False, repr=False)
class Threshold(Select):
    """The candidates with at least some score."""

    least: float
    function: ClassVar[str] = "threshold"


def threshold(scores: Scores, least: float, *, among: Any = None, forced: Any = None, name: str = "") -> Threshold:
    """The candidates whose score is at least ``least``; of mass, its share of the row's candidates.

    >>> import sparsedsl as sd
    >>> sd.threshold(sd.dot(sd.summary(sd.q, 64), sd.summary(sd.k, 64)).softmax(sd.kv_idx <= sd.q_idx), 2e-3).least
    0.002
    """
    scores, among, forced, name = _check("threshold", scores, among, forced, name)
    if isinstance(least, bool) or not isinstance(least, numbers.Real) or least != least:
        raise PatternError(f"threshold(): least must be a number; got {least!r}")
    return one_of(Threshold(scores, float(least), among=among, forced=forced, name=name))
