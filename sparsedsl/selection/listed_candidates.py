"""The best among blocks that lists name: a choice within a choice. Work follows the lists; other blocks are never scored."""

from __future__ import annotations

import torch

from sparsedsl.selection.candidates import Candidates, PairRule
from sparsedsl.selection.chunking import cut, rows_at_once
from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.scores import ScoreSource
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.stable_topk import ascending, best

__all__ = ["top_k_listed"]

Tensor = torch.Tensor


@torch.no_grad()
def top_k_listed(
    source: ScoreSource,
    k: int,
    lists: SelectedBlocks,
    candidates: Candidates,
    *,
    forced: PairRule | None = None,
    extra: bool = False,
) -> SelectedBlocks:
    """The ``k`` best of the blocks that ``lists`` names for each row and ``candidates`` allows; ties and order are as of
    :func:`~sparsedsl.selection.ranking.top_k`.

    Args:
        source: scores ``(B, Hs, R, U)`` that can be asked for at places.
        lists: of blocks of the same size, for the same rows; their heads divide Hs.
        candidates, forced: as there, within what is listed. ``extra``: forced blocks come on top of the k.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> named = torch.tensor([[[[0, 3, 4]]]], dtype=torch.int32)
    >>> lists = SelectedBlocks(named, named.new_tensor([[[3]]]), q_block=1, kv_block=1, blocks=5)
    >>> top_k_listed(TensorScores(torch.tensor([[[[1.0, 9.0, 9.0, 3.0, 2.0]]]])), 2, lists, Candidates()).indices
    tensor([[[[3, 4]]]], dtype=torch.int32)
    """
    batch, heads, rows, blocks = source.shape
    listed = lists.indices.shape[3]
    most = min(k, listed) + (listed if extra else 0)
    indices = torch.full((batch, heads, rows, min(most, listed)), -1, dtype=torch.int32, device=source.device)
    counts = torch.zeros((batch, heads, rows), dtype=torch.int32, device=source.device)
    if not blocks or not listed:
        return SelectedBlocks(indices, counts, lists.q_block, lists.kv_block, blocks, lists.first)
    every = slice(0, blocks)
    for some in cut(0, rows, rows_at_once((source.pair_bytes + 32 * batch * heads) * listed + 8 * batch * heads * blocks)):
        named = lists.indices[:, :, some]
        places = named.clamp(0, blocks - 1)
        scores = source.narrowed(some, every).at(places)
        there = repeat_kv((named >= 0) & (named < blocks), heads).expand(scores.shape)
        allowed = candidates.at(places, some, every, heads)
        there = there if allowed is None else there & allowed
        first = None if forced is None else Candidates(allowed=forced).at(places, some, every, heads)
        largest = torch.finfo(scores.dtype).max
        scores = scores.nan_to_num(nan=largest, posinf=largest, neginf=float("-inf"))  # nothing comes before what is forced
        wanted = torch.full((), k, device=source.device)
        if first is not None:
            first = (first & there).expand(scores.shape)
            scores = scores.masked_fill(first, float("inf"))
            wanted = wanted + first.sum(-1, keepdim=True) if extra else wanted
        values, columns = best(scores.masked_fill(~there, float("-inf")), indices.shape[3])
        rank = torch.arange(values.shape[3], device=source.device)
        blocks_of = repeat_kv(places, heads).expand(scores.shape).gather(3, columns)
        indices[:, :, some], counts[:, :, some] = ascending(blocks_of, (values != float("-inf")) & (rank < wanted))
    return SelectedBlocks(indices, counts, lists.q_block, lists.kv_block, blocks, lists.first)
