"""Choices of keys, and of diagonals, for all queries of a head: a flag for each, which any mask may read."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Mask, b, h, kv_idx, q_idx, table
from sparsedsl.lang.numeric import maximum
from sparsedsl.lang.symbols import KV_IDX, Q_IDX, Q_LEN, SCORE
from sparsedsl.program.axes import block_of, join_heads
from sparsedsl.program.node import Node, Operand, nodes_in, one_of
from sparsedsl.program.score_values import KeyScores
from sparsedsl.program.tensors import check_block, check_tensor

__all__ = ["ChosenKeys", "Diagonals", "diagonals", "keys_chosen"]

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
    """Keys, or distances, of the highest scores of a head: so many of them, or the fewest that hold a share of the scores."""

    scores: KeyScores
    count: int | None = None
    share: float | None = None
    inclusive: bool = True
    among: Mask | None = None
    forced: Mask | None = None
    name: str = ""
    function: ClassVar[str] = "keys_chosen"
    gives: ClassVar[str] = "keys"
    if TYPE_CHECKING:  # operators read it as a mask

        def __and__(self, other: Any) -> Mask: ...
        def __rand__(self, other: Any) -> Mask: ...
        def __or__(self, other: Any) -> Mask: ...
        def __ror__(self, other: Any) -> Mask: ...

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Those of the scores."""
        return self.scores.axes

    @property
    def of_distances(self) -> bool:
        """Whether it chooses distances of keys from the query, and not keys."""
        return self.axes[2] == DIAGONALS

    def __getitem__(self, indices: Any) -> Mask:
        """Read as a boolean table at (batch entry, query head, key or distance)."""
        parts = indices if isinstance(indices, tuple) else (indices,)
        if len(parts) != 3:
            raise PatternError(
                f"{self!r} is read with three indices, (batch entry, query head, {self.axes[2]}); got {len(parts)}"
            )
        return table(self.label, dtype=bool)[parts].bind(**{self.label: self})

    def as_expression(self) -> Mask:
        """Whether the key of the pair was chosen, or its distance."""
        if not self.of_distances:
            return self[b, h, kv_idx]
        return (kv_idx <= q_idx) & self[b, h, maximum(q_idx - kv_idx, 0)]


def keys_chosen(
    scores: KeyScores, *, count: int | None = None, share: float | None = None, inclusive: bool = True, among: Any = None,
    forced: Any = None, name: str = "",
) -> ChosenKeys:  # fmt: skip
    """What ``top_k`` and ``top_p`` make of scores of keys; see there."""
    function = "top_k" if share is None else "top_p"
    for word, mask in (("among", among), ("forced", forced)):
        if mask is not None:
            _check_mask(function, word, mask, scores)
    return one_of(ChosenKeys(scores, count, share, inclusive, among, forced, name))


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
