"""Nodes that move tokens: a sort within segments, its inverse, tensors in the new order, and subsets of tokens."""

from __future__ import annotations

import functools
import numbers
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, as_index, b, h, kv_idx
from sparsedsl.lang.table_reads import table
from sparsedsl.program.axes import HEADS, block_of, join_heads
from sparsedsl.program.node import Node, one_of
from sparsedsl.program.scores import KeyScores, check_key_scores
from sparsedsl.program.tensors import check_block, check_tensor

__all__ = ["Inverse", "Order", "Positions", "Take", "Tokens", "keep_tokens", "segment_sort", "take"]


class Positions(Node):
    """A permutation of the keys, read as an integer table ``[b, h, position]``; no key leaves its segment of so many tokens."""

    gives: ClassVar[str] = "order"
    segment: int

    def __getitem__(self, indices: tuple[Index, Index, Index]) -> Index:
        return table(self.label, bijective=True)[indices].bind(**{self.label: self})


@dataclass(frozen=True, eq=False, repr=False)
class Order(Positions):
    """A sort of the keys within segments."""

    scores: KeyScores
    segment: int
    descending: bool = True
    name: str = ""
    function: ClassVar[str] = "segment_sort"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """One position a key."""
        return self.scores.axes

    def origin(self, index: Any = kv_idx) -> Index:
        """The original position of the token that is now at ``index``."""
        return self[b, h, as_index(index, where="origin(): index")]

    def place(self, index: Any = kv_idx) -> Index:
        """Where the token that was at ``index`` is now."""
        return one_of(Inverse(self))[b, h, as_index(index, where="place(): index")]


@dataclass(frozen=True, eq=False, repr=False)
class Inverse(Positions):
    """For each original position, the place of its token."""

    order: Order
    function: ClassVar[str] = "inverse"

    @property
    def segment(self) -> int:  # type: ignore[override]
        """Of the order."""
        return self.order.segment

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """One place a key."""
        return self.order.axes


def segment_sort(scores: KeyScores, segment: int, *, descending: bool = True, name: str = "") -> Order:
    """Sort keys by score within each segment of ``segment`` tokens: a permutation that moves no token out of its segment.

    Equal scores keep their order. The keys after the last complete segment stay where they are.

    Args:
        scores: one score a key, from :func:`probe` or :func:`smooth`.
        segment: tokens in a segment.
        descending: highest score first.
        name: what reports, choices and text forms call it; default its function, numbered from the second on.

    Source: PBS-Attn (arXiv 2510.21270).

    >>> import sparsedsl as sd
    >>> order = sd.segment_sort(sd.probe(sd.q, sd.k, rows=128, complete=256), 256, name="order")
    >>> order.origin(sd.kv_idx) <= sd.q_idx
    Mask(q_idx >= order[b, h, kv_idx])
    """
    scores = check_key_scores("segment_sort", "scores", scores)
    if not isinstance(descending, bool):
        raise PatternError(f"segment_sort(): descending must be True or False; got {descending!r}")
    if not isinstance(name, str) or (name and not name.isidentifier()):
        raise PatternError(f"segment_sort(): name must be a Python identifier; got {name!r}")
    return one_of(Order(scores, check_block("segment_sort", "segment", segment), descending, name))


@dataclass(frozen=True, eq=False, repr=False)
class Take(Node):
    """The rows of ``x`` in another order."""

    x: Node
    order: Order
    function: ClassVar[str] = "take"
    gives: ClassVar[str] = "tensor"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Those of x; its heads join those of the order."""
        batch, heads, rows, dim = self.x.axes
        return batch, join_heads("take()", self.order.axes[1], heads), rows, dim


def take(x: Node, order: Order) -> Take:
    """``x`` with its tokens in the order ``order``: row ``i`` is row ``order.origin(i)`` of ``x``.

    >>> import sparsedsl as sd
    >>> order = sd.segment_sort(sd.probe(sd.q, sd.k, rows=64), 256)
    >>> sd.take(sd.k, order).axes
    ('batch', 'heads', 'keys', 'head_dim')
    """
    x = check_tensor("take", "x", x, "keys")
    if not isinstance(order, Order):
        raise PatternError(f"take(): order must come from segment_sort(); got {order!r}")
    if block_of(x.axes[2]) != 1 or x.axes[1] not in HEADS:
        raise PatternError(f"take(): x must have one row a key, in heads or kv_heads; got the axes {' '.join(x.axes)!r}")
    return one_of(Take(x, order))


@dataclass(frozen=True, eq=False, repr=False)
class Tokens(Node):
    """A set of tokens for each head, of one size for all heads, in their order."""

    scores: KeyScores
    by: KeyScores
    tail: float | None = None
    cover: float | None = None
    least: int = 0
    always: int = 0
    function: ClassVar[str] = "keep_tokens"
    whole_sequence: ClassVar[bool] = True
    gives: ClassVar[str] = "tokens"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """One flag a key."""
        return self.scores.axes


def keep_tokens(
    scores: KeyScores,
    *,
    tail: float | None = None,
    cover: float | None = None,
    by: KeyScores | None = None,
    least: int = 0,
    always: int = 0,
) -> Tokens:
    """The tokens of each head that matter: the best by ``scores`` and the last ``always`` ones; as many for every head.

    Of the ``n`` keys before the last ``always`` ones, how many are kept follows from ``by``, normalised to sum 1:

    * ``tail``: the least are dropped as long as what is dropped holds less than ``tail``, and the one that reaches it too; nothing is
      dropped where the least key alone reaches it;
    * ``cover``: the best are kept as long as what is kept holds at most ``cover``, and the one that goes beyond it too;

    but at least ``least``. Among equal scores the earlier token is kept.

    Args:
        scores: one score a key and head.
        tail, cover: share of the mass between 0 and 1; exactly one of them.
        by: scores that decide the number; default the mean of ``scores`` over all heads.
        least: tokens kept in any case, beside the last ``always``.
        always: last tokens that are always kept.

    Source: token sparse attention (arXiv 2602.03216), ``tail``; FlexPrefill (arXiv 2502.20766), ``cover``.

    >>> import sparsedsl as sd
    >>> score = sd.probe(sd.q, sd.k, rows=128, causal=True, keep="before")
    >>> sd.keep_tokens(score, tail=0.005, least=1024, always=128).by.axes
    ('batch', 'one', 'keys')
    """
    scores = check_key_scores("keep_tokens", "scores", scores)
    if scores.axes[1] == "kv_heads":
        raise PatternError("keep_tokens(): scores must be counted by query heads or by one head, since queries are dropped too")
    if (tail is None) == (cover is None):
        raise PatternError(f"keep_tokens(): give one of tail and cover; got tail={tail!r}, cover={cover!r}")
    for name, share in (("tail", tail), ("cover", cover)):
        if share is not None and (isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 <= share <= 1):
            raise PatternError(f"keep_tokens(): {name} must be a share between 0 and 1; got {share!r}")
    by = (
        (scores if scores.axes[1] == "one" else scores.over_heads("mean"))
        if by is None
        else check_key_scores("keep_tokens", "by", by)
    )
    if by.axes[1] != "one":
        raise PatternError(f"keep_tokens(): by must be key scores of one head, as from over_heads(); got {by!r}")
    least, always = check_block("keep_tokens", "least", least, 0), check_block("keep_tokens", "always", always, 0)
    tail, cover = (None if share is None else float(share) for share in (tail, cover))
    return one_of(Tokens(scores, by, tail, cover, least, always))
