"""Nodes that choose blocks of keys for blocks of queries. What they choose is a boolean table, usable in any mask."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, overload

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.expressions import Index, Mask, as_mask, b, h, kv_idx, kv_len, q_idx
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, SCORE
from sparsedsl.lang.table_reads import table
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.program.axes import block_of
from sparsedsl.program.decided import pairs_decided_by
from sparsedsl.program.key_choices import ChosenKeys, keys_chosen
from sparsedsl.program.node import Operand, nodes_in, one_of
from sparsedsl.program.score_values import KeyScores
from sparsedsl.program.scores import Scores, check_scores
from sparsedsl.program.tensors import check_block

__all__ = ["Choice", "Select", "Threshold", "TopK", "TopP", "choices_in", "threshold", "told_candidates", "top_k", "top_p"]


@dataclass(frozen=True, eq=False, repr=False)
class Choice(Operand):
    """Base of what says which blocks of keys belong to which blocks of queries: chosen by scores, or given."""

    gives: ClassVar[str] = "selected"
    if TYPE_CHECKING:  # operators read it as a mask

        def __and__(self, other: Any) -> Mask: ...
        def __rand__(self, other: Any) -> Mask: ...
        def __or__(self, other: Any) -> Mask: ...
        def __ror__(self, other: Any) -> Mask: ...
        def __xor__(self, other: Any) -> Mask: ...
        def __rxor__(self, other: Any) -> Mask: ...

    @functools.cached_property
    def blocks(self) -> tuple[int, int]:
        """Tokens in a block of queries and in a block of keys."""
        return block_of(self.axes[2]), block_of(self.axes[3])

    @functools.cached_property
    def whole_queries(self) -> int:
        """Those of a block."""
        return self.blocks[0]

    @property
    def candidates(self) -> Mask | None:
        """The pairs that make a block a candidate, where they are known."""
        return None

    @property
    def most(self) -> int | None:
        """How many blocks it chooses at most for a block of queries; None: as many as there are candidates."""
        return None

    def __getitem__(self, indices: tuple[Index, Index, Index, Index]) -> Mask:
        """Read as a boolean table at (batch entry, query head, block of queries, block of keys)."""
        return table(self.label, dtype=bool)[self._read(indices)].bind(**{self.label: self})

    def as_expression(self) -> Mask:
        """Whether the block of the key was chosen for the block of the query."""
        return self.of_row(1)

    def of_row(self, tokens: int) -> Mask:
        """The same in an attention whose rows of keys stand for so many tokens each, of which blocks are made."""
        rows, columns = self.blocks
        return self[b, h, q_idx // rows, kv_idx // (columns // tokens)]


@dataclass(frozen=True, eq=False, repr=False)
class Select(Choice):
    """Base of the choices by scores. ``among``: the pairs that make a block a candidate; None: not known before the mask is.

    ``forced``: pairs that make a block chosen in any case (if it is a candidate).
    """

    scores: Scores
    among: Mask | None = field(default=None, kw_only=True)
    forced: Mask | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Those of the scores."""
        return self.scores.axes

    @property
    def candidates(self) -> Mask | None:
        """As declared, or derived from the mask it stands in."""
        return self.among

    def within(self, among: Mask) -> Select:
        """The same choice among these candidates."""
        return one_of(dataclasses.replace(self, among=among))


def choices_in(mask: Mask) -> dict[str, Choice]:
    """Table name -> choice, of all choices that a mask reads."""
    read = mask.tables
    return {name: node for name, node in sorted(mask.bound.items()) if isinstance(node, Choice) and name in read}


def told_candidates(mask: Mask, tokens: int = 1, beside: Iterable[Choice] = ()) -> tuple[Mask, dict[Choice, Select]]:
    """The mask with every choice told its candidates, where it was declared without: the blocks with a pair for which it decides; and
    which choice became which.

    ``tokens``: those that ``kv_idx`` in the mask counts by; choices count single ones. ``beside``: choices that the mask was declared
    with and no longer reads, as it is false without them: they have no candidates.
    """
    told: dict[Choice, Select] = {}
    choices = choices_in(mask)
    choices |= {label: node for label, node in mask.bound.items() if any(node is one for one in beside) and label not in choices}
    for label, node in choices.items():
        if isinstance(node, Select) and node.among is None:
            added, removed = pairs_decided_by(mask, label)
            told[node] = node.within(_of_tokens(added | removed, tokens))
            mask = _renamed(mask, label, told[node])
    return mask, told


def _of_tokens(mask: Mask, tokens: int) -> Mask:
    """A mask over rows that stand for so many tokens each, over tokens."""
    if tokens == 1:
        return mask
    meant = {KV_IDX: (kv_idx // tokens).expr, KV_LEN: ((kv_len + (tokens - 1)) // tokens).expr}
    return Mask(mask.expr.xreplace(meant), mask.bound)


def _renamed(mask: Mask, label: str, node: Choice) -> Mask:
    """``mask`` reading ``node`` where it read the table ``label``."""
    reads = [read for read in table_reads(mask.expr) if read.spec.name == label]
    specs = {read: read_class(dataclasses.replace(read.spec, name=node.label))(*read.args) for read in reads}
    bound = mask.bound
    del bound[label]
    bound[node.label] = node
    return Mask(mask.expr.xreplace(specs), bound)


def _check_words(function: str, among: Any, forced: Any, name: Any) -> tuple[Mask | None, Mask | None, str]:
    """Masks as masks, and a name that can be one."""
    if among is not None:
        among = as_mask(among, where=f"{function}(): among")
    if forced is not None:
        forced = as_mask(forced, where=f"{function}(): forced")
    if not isinstance(name, str) or (name and not name.isidentifier()):
        raise PatternError(f"{function}(): name must be a Python identifier; got {name!r}")
    return among, forced, name


def _check(function: str, scores: Any, among: Any, forced: Any, name: Any) -> tuple[Scores, Mask | None, Mask | None, str]:
    scores = check_scores(function, scores)
    block_of(scores.axes[3])  # of windows nothing is chosen: which of them a token lies in is not one
    among, forced, name = _check_words(function, among, forced, name)
    if among is not None:
        others = [node for node in nodes_in(among) if not isinstance(node, Choice)]
        if others:
            raise PatternError(
                f"{function}(): among may read tables and choices of blocks, and of what else a program computes nothing; it reads "
                f"{others[0]!r}. Make a choice of it, or put it into the mask that the choice stands in"
            )
        among, _ = told_candidates(among)
    for word, mask in (("among", among), ("forced", forced)):
        if mask is not None and SCORE in mask.expr.free_symbols:
            raise PatternError(f"{function}(): {word} must not depend on sd.score; got {mask}")
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


@overload
def top_k(
    scores: Scores, count: int, *, among: Any = None, forced: Any = None, extra: bool = False, name: str = "", block: int = 1
) -> TopK: ...  # fmt: skip
@overload
def top_k(
    scores: KeyScores, count: int, *, among: Any = None, forced: Any = None, extra: bool = False, name: str = "", block: int = 1
) -> ChosenKeys: ...  # fmt: skip
def top_k(
    scores: Any, count: int, *, among: Any = None, forced: Any = None, extra: bool = False, name: str = "", block: int = 1
) -> TopK | ChosenKeys:
    """The ``count`` blocks of keys with the highest scores, for every block of queries; fewer where there are fewer candidates.

    Of key scores, as :func:`~sparsedsl.probe` and :func:`~sparsedsl.diagonals` give them, the keys or distances that all queries of a head
    see; ``among`` and ``forced`` then speak of ``kv_idx``, or of ``q_idx - kv_idx``, alone, and without ``among`` all keys are candidates.

    Of equal scores the earlier block is taken. No gradient flows through the choice; it flows through weights made of the scores.

    Args:
        scores: from :func:`dot`, :func:`bound`, ...: ``(batch, heads, blocks of queries, blocks of keys)``.
        count: how many.
        among: a mask: a block is a candidate if it has a pair that the mask allows. It may read other choices: blocks within blocks that
            were chosen before. Default: the pairs for which the choice decides in the mask it stands in, so that what the rest of that
            mask excludes or allows anyway is never scored.
        forced: a mask: candidates with such a pair are taken first.
        extra: forced blocks do not count.
        name: what reports, choices and text forms call it; default its function, numbered from the second on.
        block: of key scores: blocks of so many keys, or distances, are chosen, by the sums of their scores.

    >>> import sparsedsl as sd
    >>> selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 16, name="selected")
    >>> (sd.kv_idx <= sd.q_idx) & selected
    Mask((kv_idx <= q_idx) & selected[b, h, q_idx, kv_idx // 64])
    """
    if isinstance(scores, KeyScores):
        among, forced, name = _check_words("top_k", among, forced, name)
        if _flag("top_k", "extra", extra):
            raise PatternError("top_k(): forced keys count among those chosen; leave extra out, and raise count by as many")
        count = check_block("top_k", "count", count)
        return keys_chosen(scores, count=count, among=among, forced=forced, name=name, block=block)
    _check_one("top_k", block)
    scores, among, forced, name = _check("top_k", scores, among, forced, name)
    count, extra = check_block("top_k", "count", count), _flag("top_k", "extra", extra)
    return one_of(TopK(scores, count, extra, among=among, forced=forced, name=name))


def _check_one(function: str, block: Any) -> None:
    if block != 1:
        raise PatternError(
            f"{function}(): block is of scores of keys; of these scores, choose blocks by regroup(); got {block!r}"
        )


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
    over: str = "row"
    function: ClassVar[str] = "top_p"

    @property
    def whole_sequence(self) -> bool:  # type: ignore[override]
        """Of the map all rows are compared."""
        return self.over == "map"


@overload
def top_p(
    scores: Scores, share: float, *, inclusive: bool = True, unmet: str = "all", among: Any = None, forced: Any = None,
    forced_in_mass: bool = False, name: str = "", over: str = "row", block: int = 1,
) -> TopP: ...  # fmt: skip
@overload
def top_p(
    scores: KeyScores, share: float, *, inclusive: bool = True, unmet: str = "all", among: Any = None, forced: Any = None,
    forced_in_mass: bool = False, name: str = "", over: str = "row", block: int = 1,
) -> ChosenKeys: ...  # fmt: skip
def top_p(
    scores: Any, share: float, *, inclusive: bool = True, unmet: str = "all", among: Any = None, forced: Any = None,
    forced_in_mass: bool = False, name: str = "", over: str = "row", block: int = 1,
) -> TopP | ChosenKeys:  # fmt: skip
    """The fewest best candidates that hold ``share`` of the mass of a row. Logits become mass by a softmax over the candidates.

    Of key scores the fewest keys, or distances, that hold it of a head, with ``among`` and ``forced`` as of :func:`top_k`.

    Args:
        scores: logits or mass.
        share: above 0, at most 1. 1 means all candidates, whatever the next two say: when rounded sums reach 1 is a matter of chance.
        inclusive: the candidate that reaches the share is taken too.
        unmet: where rounding leaves all candidates below the share: take ``"all"`` of them or ``"none"``.
        among: see :func:`top_k`.
        forced: a mask: candidates with such a pair are taken in any case.
        forced_in_mass: their mass counts towards the share (XAttention), else they come on top.
        name: what reports, choices and text forms call it.
        over: the share is of the mass of each ``"row"``, or of all rows of a head together, its ``"map"``: the greatest of these are taken
            wherever they lie (FlexPrefill). The map is held, and wants a whole sequence.
        block: of key scores: blocks of so many keys, or distances. If ``n`` single ones hold the share, ``n // block + 1`` blocks are
            chosen, the forced ones and then those with the greatest sums (FlexPrefill).

    >>> import sparsedsl as sd
    >>> sd.top_p(sd.dot(sd.summary(sd.q, 128), sd.summary(sd.k, 128)), 0.9).blocks
    (128, 128)
    """
    of_keys = isinstance(scores, KeyScores)
    if of_keys:
        among, forced, name = _check_words("top_p", among, forced, name)
    else:
        scores, among, forced, name = _check("top_p", scores, among, forced, name)
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
        raise PatternError(f"top_p(): share must be above 0 and at most 1; got {share!r}")
    check_word("top_p(): unmet", unmet, ("all", "none"))
    check_word("top_p(): over", over, ("row", "map"))
    flags = _flag("top_p", "inclusive", inclusive), _flag("top_p", "forced_in_mass", forced_in_mass)
    if of_keys:
        if flags[1] or unmet != "all" or over != "row":
            raise PatternError(
                "top_p(): of keys, forced ones come on top of the share, and an unmet share takes all; leave both out, and over too"
            )
        return keys_chosen(scores, share=float(share), inclusive=flags[0], among=among, forced=forced, name=name, block=block)
    _check_one("top_p", block)
    if over == "map" and flags[1]:
        raise PatternError("top_p(): forced blocks come on top of the share of a map; leave forced_in_mass out")
    return one_of(TopP(scores, float(share), flags[0], unmet, flags[1], over, among=among, forced=forced, name=name))


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
