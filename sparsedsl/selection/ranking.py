"""Top-k: each row picks the k blocks of the greatest scores. Tiles of rows x blocks go by; what is kept is a row's best so far."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparsedsl.errors import PatternError
from sparsedsl.selection.candidates import Candidates, PairRule, TableRule
from sparsedsl.selection.choosing import Choose, Rule
from sparsedsl.selection.chunking import cut
from sparsedsl.selection.scores import ScoreSource, TensorScores
from sparsedsl.selection.selected_blocks import KnownScores, SelectedBlocks
from sparsedsl.selection.stable_topk import ascending, best, lists_of_rows

__all__ = ["top_k"]

Tensor = torch.Tensor


@torch.no_grad()
def top_k(
    source: ScoreSource,
    k: int,
    candidates: Candidates | None = None,
    *,
    forced: PairRule | None = None,
    forced_extra: int | None = None,
    kv_block: int = 1,
    q_block: int = 1,
    first: int = 0,
    choose: Choose | None = None,
) -> SelectedBlocks:
    """The ``k`` blocks of the greatest scores of each row, ascending; all of them where there are fewer; nothing where there is none.

    Of equal scores the lower block number wins. A score of -inf is no candidate; NaN counts as infinity, so that it shows. Scratch memory
    does not grow with rows x blocks.

    Args:
        source: scores ``(B, Hs, R, U)``.
        k: at least 1.
        candidates: what each row may choose; None: everything.
        forced: a rule ``(rows (r,), blocks (u,)) -> bool`` that broadcasts to ``(B, Hs, r, u)``: blocks picked whatever their score, within
            the limits of ``candidates``, whether or not ``candidates.allowed`` has them. Without ``forced_extra`` they are counted within
            k and come first; of more than k the lowest stay.
        forced_extra: forced blocks come on top of the k, and this is how many a row has at most; of more the lowest stay.
        kv_block, q_block, first: what the lists say of themselves (:class:`~sparsedsl.selection.selected_blocks.SelectedBlocks`).

        choose: a backend's own way, which gives the same.

    Returns:
        Lists of width ``min(k, U)``, or ``min(k, U) + min(forced_extra, U)``.

    Raises:
        PatternError: k is below 1, or ``forced_extra`` without ``forced`` or below 0.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> scores = TensorScores(torch.tensor([[[[1.0, 7.0, 7.0, 3.0], [4.0, 5.0, 6.0, 7.0]]]]))
    >>> top_k(scores, 2, Candidates(end=torch.tensor([4, 1]))).indices
    tensor([[[[ 1,  2],
              [ 0, -1]]]], dtype=torch.int32)
    """
    if k < 1:
        raise PatternError(f"top_k: k is {k}; wanted 1 or more blocks")
    if forced_extra is not None and (forced is None or forced_extra < 0):
        raise PatternError(
            f"top_k: forced_extra is {forced_extra} with forced {forced}; wanted a rule and how many blocks it names at most"
        )
    candidates = candidates or Candidates()
    batch, heads, rows, blocks = source.shape
    width = min(k, blocks) + min(forced_extra or 0, blocks)
    rule = Rule("top_k", min(k, blocks), extra=forced_extra is not None, scores=True)
    own = None if choose is None else functools.partial(choose, rule=rule, width=width)
    if own is not None and (forced_extra is None or forced_extra >= blocks):
        whole = own(source, candidates, forced, rows=slice(0, rows), start=0)
        if whole is not None:
            lists, found, values = whole
            known = None if values is None else KnownScores(source, values)
            return SelectedBlocks(lists, found, q_block=q_block, kv_block=kv_block, blocks=blocks, first=first, scores=known)
    r, u = source.tile(3)
    indices = torch.full((batch, heads, rows, width), -1, dtype=torch.int32, device=source.device)
    counts = torch.zeros((batch, heads, rows), dtype=torch.int32, device=source.device)
    for some in cut(0, rows, r):
        low, high = candidates.span(some, blocks)
        if high - low <= u and source.device.type == "cpu":  # elsewhere nothing is read back
            part = _at_once(source, candidates, some, slice(low, high), k, forced, forced_extra, width, own)
            if part is not None:
                indices[:, :, some], counts[:, :, some] = part
                continue
        ranks = [_Ranking(k)] if forced_extra is None else [_Ranking(k), _Ranking(forced_extra)]
        for tile in cut(low, high, u):
            scores = candidates.scored(source, some, tile)
            if forced is not None:
                named = candidates.within(forced, some, tile, scores)
                most = torch.finfo(scores.dtype).max
                scores.nan_to_num_(nan=most, posinf=most, neginf=float("-inf"))  # nothing comes before what is forced
                scores.masked_fill_(named, float("inf" if forced_extra is None else "-inf"))
                if forced_extra is not None:
                    ranks[1].add(torch.zeros_like(scores).masked_fill_(~named, float("-inf")), tile.start)
            ranks[0].add(scores, tile.start)
        if any(rank.blocks is not None for rank in ranks):
            chosen = torch.cat([rank.blocks for rank in ranks if rank.blocks is not None], dim=-1)
            values = torch.cat([rank.values for rank in ranks if rank.values is not None], dim=-1)
            lists, counts[:, :, some] = ascending(chosen, values != float("-inf"))
            indices[:, :, some, : lists.shape[-1]] = lists
    return SelectedBlocks(indices, counts, q_block=q_block, kv_block=kv_block, blocks=blocks, first=first)


def _at_once(
    source: ScoreSource, candidates: Candidates, rows: slice, blocks: slice, k: int, forced: PairRule | None, forced_extra: int | None,
    width: int, choose: Any,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Lists and counts of some rows, all of whose candidates lie in ``blocks``; None where there is none, or too many are forced."""
    if blocks.start >= blocks.stop:
        return None
    scores, extra = candidates.scored(source, rows, blocks), None
    if forced is not None:
        named = candidates.within(forced, rows, blocks, scores)
        if forced_extra is not None:
            extra = named.sum(-1, dtype=torch.int32)
            if int(extra.max()) > forced_extra:
                return None
    if choose is not None:
        rule = None if forced is None else TableRule(named)
        found = choose(TensorScores(scores), Candidates(), rule, rows=slice(0, scores.shape[2]), start=blocks.start)
        if found is not None:
            return found[0], found[1]
    if forced is not None:
        most = torch.finfo(scores.dtype).max
        scores.nan_to_num_(nan=most, posinf=most, neginf=float("-inf"))  # nothing comes before what is forced
        scores.masked_fill_(named, float("inf"))
    return lists_of_rows(scores, k, width, blocks.start, extra)


class _Ranking:
    """The best ``k`` of the tiles that went by, left to right: descending, equal ones by block number."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values: Tensor | None = None
        self.blocks: Tensor | None = None

    def add(self, scores: Tensor, start: int) -> None:
        """The next tile of the same rows: ``scores (B, H, r, u)`` of the blocks from ``start`` on."""
        values, places = best(scores, self.k)
        blocks = places + start
        if self.values is not None and self.blocks is not None:
            # What was there comes first, and its blocks are lower: equal scores stay in the order of their blocks.
            values, order = best(torch.cat([self.values, values], dim=-1), self.k)
            blocks = torch.cat([self.blocks, blocks], dim=-1).gather(-1, order)
        self.values, self.blocks = values, blocks
