"""The best of a row, in a declared order: by score, equal scores by place."""

from __future__ import annotations

import torch

from sparsedsl.selection.chunking import PIECES

__all__ = ["ascending", "best", "compacted", "lists_of_rows"]

Tensor = torch.Tensor


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` greatest along the last dimension (all, if there are fewer): values and places, descending, equal ones by place. NaN counts
    as infinity.

    ``torch.topk`` alone leaves open which of equal values it takes. The k best lie in the k groups of the greatest maxima: an element
    outside is preceded by k maxima, equal ones included as groups are consecutive.

    >>> best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
    (tensor([3., 3.]), tensor([1, 2]))
    """
    size, group = scores.shape[-1], PIECES.now.group
    groups = size // group
    if groups <= k or 2 * (k * group + groups) > size:
        return _best_of_few(scores, min(k, size))
    whole = groups * group
    tops = scores[..., :whole].unflatten(-1, (groups, group)).amax(-1)
    chosen = _best_of_few(tops, k)[1].sort(dim=-1).values
    members = (chosen[..., None] * group + torch.arange(group, device=scores.device)).flatten(-2)
    if whole < size:
        tail = torch.arange(whole, size, device=scores.device).expand(*members.shape[:-1], -1)
        members = torch.cat([members, tail], dim=-1)
    values, places = _best_of_few(scores.gather(-1, members), k)
    return values, members.gather(-1, places)


def _best_of_few(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`best` without groups: float32 values and their places make one integer each, which no two elements share."""
    inf = float("inf")
    known = scores.nan_to_num(nan=inf, posinf=inf, neginf=-inf)
    if scores.dtype != torch.float32 or k == 0:
        places = torch.sort(known, dim=-1, descending=True, stable=True).indices[..., :k]
        return scores.gather(-1, places), places
    bits = (known + 0.0).view(torch.int32)  # -0.0 equals 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the floats are
    backwards = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = (bits.long() << 32) | backwards
    places = scores.shape[-1] - 1 - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return scores.gather(-1, places), places


def lists_of_rows(scores: Tensor, k: int, width: int, start: int, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` best blocks of each row of ``scores (B, H, R, U)`` as ascending lists ``(B, H, R, width)`` int32, -1 after the end, and how
    many each has, ``(B, H, R)`` int32. ``start``: number of the first block. ``extra (B|1, H|1, R)``: how many more than k a row may have.

    >>> scores = torch.tensor([[[[1.0, 3.0, 3.0, 2.0], [-float("inf"), 5.0, -float("inf"), 0.0]]]])
    >>> lists_of_rows(scores, 2, 3, 10)
    (tensor([[[[11, 12, -1],
              [11, 13, -1]]]], dtype=torch.int32), tensor([[[2, 2]]], dtype=torch.int32))
    """
    most = k if extra is None else k + int(extra.max() if extra.numel() else 0)
    values, places = best(scores, most)
    valid = values != float("-inf")
    if extra is not None:
        valid &= torch.arange(values.shape[-1], device=scores.device) < (k + extra)[..., None]
    lists, counts = ascending(places + start, valid)
    return torch.nn.functional.pad(lists, (0, width - lists.shape[-1]), value=-1), counts


def ascending(blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in ascending order as int32, those that are not valid as -1 at the end; and how many are valid.

    >>> ascending(torch.tensor([5, 2, 9]), torch.tensor([True, True, False]))
    (tensor([ 2,  5, -1], dtype=torch.int32), tensor(2, dtype=torch.int32))
    """
    last = torch.iinfo(torch.int32).max
    ordered = blocks.to(torch.int32).masked_fill(~valid, last).sort(dim=-1).values
    return ordered.masked_fill(ordered == last, -1), valid.sum(-1, dtype=torch.int32)


def compacted(table: Tensor, width: int) -> Tensor:
    """The places of the true ones along the last dimension, ascending, as int32 ``(..., width)``: -1 after the end, cut at ``width``.

    >>> compacted(torch.tensor([[False, True, True], [False, False, True]]), 2)
    tensor([[ 1,  2],
            [ 2, -1]], dtype=torch.int32)
    """
    lead, size = table.shape[:-1], table.shape[-1]
    slot = table.cumsum(-1, dtype=torch.int32) - 1
    slot = slot.masked_fill(~table | (slot >= width), width).long()  # one more slot for what is not wanted
    lists = torch.full((*lead, width + 1), -1, dtype=torch.int32, device=table.device)
    places = torch.arange(size, dtype=torch.int32, device=table.device).expand(*lead, -1)
    return lists.scatter_(-1, slot, places)[..., :width]
