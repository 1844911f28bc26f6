"""Several choices of one query as one list of blocks, with bits that say which choice picked which block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsedsl.selection.gather import repeat_kv
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["joined_lists"]

Tensor = torch.Tensor


def joined_lists(choices: Sequence[SelectedBlocks], keys: int, wanted: Sequence[bool]) -> tuple[SelectedBlocks, Tensor]:
    """One ascending list a query of all blocks that some choice picked, and bits ``(B|1, Hs, Sq, W)`` int32: bit i for choice i.

    Blocks have as many keys as the greatest size that divides those of all choices; Hs is the least number of heads that all of
    theirs divide. ``keys``: in all. ``wanted``: of each value of the bits, from 0, whether a block with it is listed; empty: any is.

    >>> def lists(*rows, block):
    ...     indices = torch.tensor([[rows]], dtype=torch.int32)
    ...     return SelectedBlocks(indices, (indices >= 0).sum(-1, dtype=torch.int32), q_block=1, kv_block=block, blocks=8 // block)
    >>> blocks, members = joined_lists([lists([0, 3], block=2), lists([1, -1], block=4)], 8, [False, True, True, True])
    >>> blocks.kv_block, blocks.indices.tolist(), members.tolist()
    (2, [[[[0, 2, 3]]]], [[[[1, 2, 3]]]])
    """
    block = math.gcd(*(selected.kv_block for selected in choices))
    total = -(-keys // block)
    fine = [selected if selected.kv_block == block else selected.finer(block, keys) for selected in choices]
    heads = math.lcm(*(selected.indices.shape[1] for selected in fine))
    batch = max(selected.indices.shape[0] for selected in fine)
    lists = [repeat_kv(selected.indices, heads).expand(batch, heads, -1, -1) for selected in fine]
    blocks = torch.cat(lists, dim=3)
    bits = torch.cat([torch.full_like(part, 1 << number) for number, part in enumerate(lists)], dim=3)
    blocks, order = torch.where(blocks < 0, total, blocks).sort(dim=3, stable=True)
    bits = bits.gather(3, order)
    # Equal blocks stand together, at most one a choice: the first gets the bits of all, the others go.
    members, again = bits.clone(), torch.zeros_like(blocks, dtype=torch.bool)
    for step in range(1, len(choices)):
        same = blocks[..., step:] == blocks[..., :-step]
        members[..., :-step] += bits[..., step:] * same
        again[..., step:] |= same
    keep = ~again & (blocks < total)
    if wanted:
        keep &= torch.tensor(wanted, device=blocks.device)[torch.where(keep, members, 0).long()]
    blocks, order = torch.where(keep, blocks, total).sort(dim=3, stable=True)
    members = members.gather(3, order)
    counts = keep.sum(3, dtype=torch.int32)
    # On a GPU, where to read a length is to wait, lists keep the width of all together.
    width = int(counts.max()) if counts.device.type == "cpu" and counts.numel() else min(blocks.shape[3], total)
    blocks, members = blocks[..., :width], members[..., :width]
    there = blocks < total
    blocks, members = torch.where(there, blocks, -1), torch.where(there, members, 0)
    return SelectedBlocks(blocks.int(), counts, 1, block, total, choices[0].first), members.int()
