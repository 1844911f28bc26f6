"""Tile lists for engines that take blocks, counted before they are made, and which pairs of partial ones attend."""

from __future__ import annotations

import torch

from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.tiles import classify
from sparsedsl.analysis.totals import repeated_totals
from sparsedsl.export.export_case import Part
from sparsedsl.export.spans import tile_pairs

__all__ = ["listed_tiles", "partial_pairs"]

# From so many tiles on they are counted first, where the mask repeats.
MANY = 1 << 22
# Pairs that are looked at together.
AT_ONCE = 1 << 22


def listed_tiles(part: Part, block: tuple[int, int], bytes_a_tile: int = 4) -> BlockLists:
    """The blocks of a mask; refused before they are listed if they would take more than the case allows."""
    domain = part.domain
    tiles = domain.groups(part.mask).count * -(-domain.rows // block[0]) * -(-domain.kv_len // block[1])
    what = f"the blocks of {block[0]} x {block[1]} tokens"
    if tiles > MANY and (totals := repeated_totals(part.mask, domain, block)) is not None:
        part.case.check_bytes(bytes_a_tile * totals.listed, what)
    lists = classify(part.mask, domain, block)
    part.case.check_bytes(bytes_a_tile * lists.listed, what)
    return lists


def partial_pairs(part: Part, lists: BlockLists) -> torch.Tensor:
    """Which pairs of the partial tiles attend, ``(partial tiles, block_q, block_kv)`` bool, False beyond the lengths."""
    owners, columns = lists.partial.owners(), lists.partial.columns.to(torch.int64)
    out = torch.zeros(owners.numel(), *lists.block, dtype=torch.bool, device=owners.device)
    step = max(1, AT_ONCE // (lists.block[0] * lists.block[1]))
    for begin in range(0, owners.numel(), step):
        piece = slice(begin, begin + step)
        out[piece] = tile_pairs(part.mask, part.domain, lists, owners[piece], columns[piece])
    return out
