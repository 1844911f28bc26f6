"""Choices for blocks of queries on torch: the part of a mask that is the same for all pairs of two blocks becomes lists of full tiles.

Such tiles need no mask and no analysis: whether a block attends is looked up once. What is left is an ordinary mask. PBS is the example:
picked blocks of earlier segments are whole, and only a query's own segment is compared position by position.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch

from sparsedsl.analysis.block_masks import constant_in_blocks
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists, TileRows
from sparsedsl.analysis.proofs import satisfiable
from sparsedsl.backends.tiled.attention import HeadSizes, TiledKernel
from sparsedsl.lang.pattern import Pattern
from sparsedsl.selection.candidates import PairRule
from sparsedsl.tiling.residues import ResidueClass
from sparsedsl.tiling.schedule import ResiduePlan, Schedule

__all__ = ["WholeTiles", "split", "whole_tiles"]

Tensor = torch.Tensor
# Pairs of blocks looked at in one piece.
PIECE = 1 << 22


@functools.lru_cache(maxsize=256)
def split(mask: Any, q_block: int, kv_block: int) -> tuple[Any, Any] | None:
    """``(whole, rest)``: the arms of a union that are the same for all pairs of two blocks, and the others; they share no pair.

    None where there are no such arms, or where it is not known that the two parts are apart.
    """
    arms = sympy.Or.make_args(mask)
    whole = [arm for arm in arms if constant_in_blocks(arm, q_block, kv_block)]
    rest = sympy.Or(*(arm for arm in arms if arm not in whole))
    if not whole:
        return None
    part = sympy.Or(*whole)
    if rest == sympy.false:
        return part, rest
    return (part, rest) if satisfiable(sympy.And(part, rest)).status == "REFUTED" else None


def whole_tiles(rule: PairRule, domain: Domain, heads: int, q_block: int, kv_block: int) -> BlockLists:
    """The pairs of blocks that ``rule`` names, as full tiles."""
    rows, columns = -(-domain.rows // q_block), -(-domain.kv_len // kv_block)
    device = domain.device
    step = max(1, PIECE // max(1, columns * heads * domain.batch))
    job = torch.arange(columns, device=device)
    tables = []
    for start in range(0, rows, step):
        some = torch.arange(start, min(start + step, rows), device=device)
        tables.append(rule(some, job).expand(domain.batch, heads, len(some), columns))
    table = torch.cat(tables, dim=2)
    counts = table.sum(3, dtype=torch.int32)
    found = table.nonzero()[:, 3].to(torch.int32)
    none = TileRows(torch.zeros_like(counts), found[:0])
    return BlockLists(TileRows(counts, found), none, (q_block, kv_block), domain.rows, domain.kv_len)


class WholeTiles(TiledKernel):
    """The ``tiled`` lowering on lists of full tiles that are there already."""

    def __init__(self, pattern: Pattern, lists: BlockLists) -> None:
        super().__init__(pattern)
        self.lists = lists

    def schedule_of(self, domain: Domain, sizes: HeadSizes) -> Schedule:
        """The lists as they are."""
        residue = ResidueClass(self.pattern.mask.expr, scattered=True)
        plan = ResiduePlan(residue, domain.q_offset, domain.rows, lists=self.lists)
        plans = (plan,) if self.lists.listed else ()
        return Schedule(plans, self.lists.shape[:2], False, False, self.lists.block[0], 0.0)
