"""Masks with one value in each block: the sides that are found, and that the mask really is constant within."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.analysis.block_wise import block_sides
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify

chosen = sd.table("chosen", dtype=bool)
FOUND = {
    "a table": (chosen[q_idx // 16, kv_idx // 8], (16, 8)),
    "several sides": (chosen[q_idx // 16, kv_idx // 8] | (q_idx // 24 == kv_idx // 12), (8, 4)),
    "by head": ((q_idx // 32 + kv_idx // 16 + h) % 3 == 0, (32, 16)),
    "chunks": (q_idx // 20 == kv_idx // 20, (20, 20)),
    "the diagonal within": (chosen[q_idx // 16, kv_idx // 16] & (kv_idx <= q_idx), None),
    "queries alone": (chosen[q_idx // 16, kv_idx], None),
    "one side": (q_idx // 16 > 2, None),
    "a remainder": (chosen[q_idx % 16, kv_idx // 16], None),
}


@pytest.mark.parametrize("name", FOUND)
def test_sides(name):
    mask, wanted = FOUND[name]
    assert block_sides(mask.expr) == wanted


@pytest.mark.parametrize("name", [name for name, (_, sides) in FOUND.items() if sides])
def test_no_block_is_cut(name):
    mask, sides = FOUND[name]
    tables = {"chosen": (torch.arange(40)[:, None] * 7 + torch.arange(40) * 3) % 5 < 2}
    domain = Domain(
        rows=sides[0] * 5, kv_len=sides[1] * 6, heads=2, tables=tables if name in ("a table", "several sides") else {}
    )
    assert classify(mask.expr, domain, sides).partial.total == 0
