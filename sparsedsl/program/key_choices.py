"""Choices of keys, and of diagonals, for all queries of a head: a flag for each, which any mask may read; and how far apart two scores of
keys are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask, Score, b, h, kv_idx, q_idx
from sparsedsl.lang.numeric import maximum
from sparsedsl.lang.symbols import KV_IDX, Q_IDX, Q_LEN, SCORE
from sparsedsl.lang.table_reads import table
from sparsedsl.program.axes import base_of, block_of, join_heads
from sparsedsl.program.node import Node, Operand, nodes_in, one_of
from sparsedsl.program.score_values import KeyScores
from sparsedsl.program.tensors import check_block, check_tensor

__all__ = ["ChosenKeys", "Diagonals", "Divergence", "diagonals", "divergence", "keys_chosen"]

DIAGONALS = "diagonals"


@dataclass(frozen=True, eq=False, repr=False)
class Diagonals(KeyScores):
    """The attention that the last queries pay keys at each distance, averaged over them."""

    x: Node
    y: Node
    rows: int
    scale: float | None = None
    function: ClassVar[str] = "diagonals"

    @property
    def probing(self) -> int:
        """Those that probe."""
        return self.rows

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """One number a distance, of which there are as many as keys."""
        return "batch", join_heads("diagonals()", self.x.axes[1], self.y.axes[1]), DIAGONALS


def diagonals(x: Node, y: Node, *, rows: int, scale: float | None = None) -> Diagonals:
    """Mean over the last ``rows`` queries of their causal softmax, by distance: one score for every ``q_idx - kv_idx``.

    What :func:`probe` sums up along keys, summed up along diagonals. A choice by them, ``sd.top_k(sd.diagonals(...), n)``, is of pairs at
    the distances chosen.

    Args:
        x: q or an input like it.
        y: k or an input like it.
        rows: queries that probe, fewer if the call has fewer.
        scale: default ``dim ** -0.5``.

    Source: MInference (arXiv 2407.02490); FlexPrefill (arXiv 2502.20766).

    >>> import sparsedsl as sd
    >>> slashes = sd.top_k(sd.diagonals(sd.q, sd.k, rows=64), 100, forced=sd.q_idx - sd.kv_idx < 10, name="slashes")
    >>> (sd.kv_idx <= sd.q_idx) & slashes
    Mask((kv_idx <= q_idx) & slashes[b, h, maximum(0, q_idx - kv_idx)])
    """
    x, y = check_tensor("diagonals", "x", x, "queries"), check_tensor("diagonals", "y", y, "keys")
    if block_of(x.axes[2]) != 1 or block_of(y.axes[2]) != 1 or x.axes[3] != y.axes[3]:
        raise PatternError("diagonals(): x and y must have one row a token and the same last axis")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf")):
        raise PatternError(f"diagonals(): scale must be a positive number or None for dim ** -0.5; got {scale!r}")
    join_heads("diagonals()", x.axes[1], y.axes[1])
    return one_of(Diagonals(x, y, check_block("diagonals", "rows", rows), None if scale is None else float(scale)))


@dataclass(frozen=True, eq=False, repr=False)
class ChosenKeys(Operand):
    """Keys, or distances, of the highest scores of a head: so many of them, or the fewest that hold a share of the scores; or blocks."""

    scores: KeyScores
    count: int | None = None
    share: float | None = None
    inclusive: bool = True
    among: Mask | None = None
    forced: Mask | None = None
    name: str = ""
    block: int = 1
    function: ClassVar[str] = "keys_chosen"
    gives: ClassVar[str] = "keys"
    if TYPE_CHECKING:  # operators read it as a mask

        def __and__(self, other: Any) -> Mask: ...
        def __rand__(self, other: Any) -> Mask: ...
        def __or__(self, other: Any) -> Mask: ...
        def __ror__(self, other: Any) -> Mask: ...

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Those of the scores, in blocks."""
        *lead, keys = self.scores.axes
        return *lead, keys if self.block == 1 else f"{keys}/{self.block}"

    @property
    def of_distances(self) -> bool:
        """Whether it chooses distances of keys from the query, and not keys."""
        return self.scores.axes[2] == DIAGONALS

    def __getitem__(self, indices: Any) -> Mask:
        """Read as a boolean table at (batch entry, query head, key or distance)."""
        parts = indices if isinstance(indices, tuple) else (indices,)
        if len(parts) != 3:
            raise PatternError(
                f"{self!r} is read with three indices, (batch entry, query head, {self.axes[2]}); got {len(parts)}"
            )
        return table(self.label, dtype=bool)[parts].bind(**{self.label: self})

    def as_expression(self) -> Mask:
        """Whether the key of the pair was chosen, or its distance; of blocks the block of the key, or how many blocks lie between."""
        query, key = q_idx // self.block, kv_idx // self.block
        if not self.of_distances:
            return self[b, h, key]
        return (key <= query) & self[b, h, maximum(query - key, 0)]


def keys_chosen(
    scores: KeyScores, *, count: int | None = None, share: float | None = None, inclusive: bool = True, among: Any = None,
    forced: Any = None, name: str = "", block: int = 1,
) -> ChosenKeys:  # fmt: skip
    """What ``top_k`` and ``top_p`` make of scores of keys; see there."""
    function = "top_k" if share is None else "top_p"
    if scores.axes[2] not in ("keys", DIAGONALS):
        raise PatternError(
            f"{function}(): {scores!r} says of {scores.axes[2]!r}; choose by scores of keys, and blocks of them by block="
        )
    for word, mask in (("among", among), ("forced", forced)):
        if mask is not None:
            _check_mask(function, word, mask, scores)
    return one_of(ChosenKeys(scores, count, share, inclusive, among, forced, name, check_block(function, "block", block)))


@dataclass(frozen=True, eq=False, repr=False)
class Divergence(Operand):
    """How far apart two scores of keys are, a number a head."""

    x: KeyScores
    y: KeyScores
    function: ClassVar[str] = "divergence"
    gives: ClassVar[str] = "numbers of heads"
    if TYPE_CHECKING:  # comparisons read it as a score

        def __lt__(self, other: Any) -> Mask: ...
        def __le__(self, other: Any) -> Mask: ...
        def __gt__(self, other: Any) -> Mask: ...
        def __ge__(self, other: Any) -> Mask: ...

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Heads join."""
        return "batch", join_heads("divergence()", self.x.axes[1], self.y.axes[1])

    def __getitem__(self, indices: Any) -> Score:
        """Read as a table of numbers at (batch entry, query head)."""
        parts = indices if isinstance(indices, tuple) else (indices,)
        if len(parts) != 2:
            raise PatternError(f"{self!r} is read with two indices, (batch entry, query head); got {len(parts)}")
        return table(self.label, dtype=float)[parts].bind(**{self.label: self})

    def as_expression(self) -> Score:
        """The number of the head."""
        return self[b, h]


def divergence(x: KeyScores, y: KeyScores) -> Divergence:
    """How far apart two scores of keys are, for every head: the Jensen-Shannon distance, 0 to ``log(2) ** 0.5 = 0.83``.

    ``((KL(p || m) + KL(r || m)) / 2) ** 0.5`` with natural logarithms, ``p`` and ``r`` the scores as shares of their sums, ``m`` their
    mean. Compared with a number it is a mask of heads, by which these take one of two strategies: ``near & one | ~near & other``.

    Args:
        x, y: scores of keys, one of them perhaps of blocks, ``sd.probe(..., pooled=128)``: the other is then summed up in these.

    Source: FlexPrefill (arXiv 2502.20766).

    >>> import sparsedsl as sd
    >>> estimate = sd.probe(sd.q, sd.k, rows=128, pooled=128)
    >>> near = sd.divergence(estimate, sd.probe(sd.q, sd.k, rows=128, causal=True)) < 0.1
    >>> sd.attend((sd.kv_idx <= sd.q_idx) & (near | sd.patterns.sliding_window(512))).axes[1]
    'heads'
    """
    for word, scores in (("x", x), ("y", y)):
        if not isinstance(scores, KeyScores) or base_of(scores.axes[2]) != "keys":
            raise PatternError(f"divergence(): {word} must be scores of keys, as from probe(); got {shown(scores)}")
    sizes = {block_of(scores.axes[2]) for scores in (x, y)} - {1}
    if len(sizes) > 1:
        raise PatternError(f"divergence(): x and y are of blocks of different sizes, {x.axes[2]!r} and {y.axes[2]!r}")
    join_heads("divergence()", x.axes[1], y.axes[1])
    return one_of(Divergence(x, y))


def _check_mask(function: str, word: str, mask: Mask, scores: KeyScores) -> None:
    """Of keys it speaks of ``kv_idx`` alone, of distances of ``q_idx - kv_idx`` alone."""
    free, expr = mask.expr.free_symbols, mask.expr
    if nodes_in(mask) or SCORE in free or Q_LEN in free:
        _refused(function, word, mask, "must read positions and tables alone")
    if scores.axes[2] != DIAGONALS:
        if Q_IDX in free:
            _refused(function, word, mask, "says of keys which all queries of a head share, and cannot depend on q_idx")
    elif expr.xreplace({Q_IDX: (q_idx + 1).expr, KV_IDX: (kv_idx + 1).expr}) != expr:
        _refused(function, word, mask, "says of diagonals, and must depend on q_idx - kv_idx alone")


def _refused(function: str, word: str, mask: Mask, why: str) -> NoReturn:
    raise PatternError(f"{function}(): {word} {why}; got {mask}. Put the rest into the mask that the choice stands in")
