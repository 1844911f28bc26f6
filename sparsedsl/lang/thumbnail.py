"""A mask as a small picture: cells of queries and keys, each looked at in a few places. For a glance; :func:`sparsedsl.plot` is exact."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from sparsedsl.errors import SparseDSLError
from sparsedsl.html_card import tile_map
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.symbols import HEAD, KV_IDX, Q_IDX
from sparsedsl.lang.tables import table_reads

__all__ = ["thumbnail"]

CELLS = 48
# Places looked at in a cell, on each side; its first and last among them.
PLACES = 4
SHORTEST, LONGEST = 64, 1 << 16


def thumbnail(
    certain: sympy.Basic, tables: Mapping[str, Any], *, possible: sympy.Basic | None = None, q_len: int | None = None,
    kv_len: int | None = None, q_offset: int = 0,
) -> str:  # fmt: skip
    """SVG of the pairs that ``certain`` allows, and lighter of those that only ``possible`` does; batch entry and head 0.

    Without lengths it shows as many tokens as the constants of the mask suggest. Empty where a table has no values.

    >>> import sparsedsl as sd
    >>> thumbnail((sd.kv_idx <= sd.q_idx).expr, {})[:4], thumbnail((sd.table("doc")[sd.kv_idx] == 0).expr, {})
    ('<svg', '')
    """
    masks = [certain] if possible is None else [certain, possible]
    if any(read.spec.name not in tables for mask in masks for read in table_reads(mask)):
        return ""
    rows = q_len or _length(masks, tables)
    keys = kv_len or q_offset + rows
    env: dict[str, Any] = {"b": 0, "h": 0, "q_len": q_offset + rows, "kv_len": keys, **tables}
    q, kv = (_places(length) for length in (rows, keys))
    env |= {"q_idx": (q.reshape(-1) + q_offset)[:, None], "kv_idx": kv.reshape(-1)}
    try:
        with torch.no_grad():
            found = [
                evaluate(mask, env).expand(q.numel(), kv.numel()).reshape(*q.shape, *kv.shape).movedim(1, 2).flatten(2)
                for mask in masks
            ]
    except (SparseDSLError, RuntimeError, ValueError, OverflowError):  # a picture is no reason to show nothing at all
        return ""
    cells = found[0].any(-1).int() + found[0].all(-1).int()
    if possible is not None:
        cells = torch.where(found[0].all(-1), 2, found[-1].any(-1).int())
    per_head = any(HEAD in mask.free_symbols for mask in masks)
    words = f"{rows:,} queries (downwards) x {keys:,} keys{', head 0' if per_head else ''}; dark: all pairs, light: some"
    return tile_map(cells.tolist(), words)


def _places(length: int) -> torch.Tensor:
    """Positions looked at: (cells, places), ascending."""
    count = min(CELLS, length)
    first = torch.arange(count) * length // count
    last = torch.arange(1, count + 1) * length // count - 1
    return first[:, None] + (last - first)[:, None] * torch.arange(PLACES) // (PLACES - 1)


def _length(masks: list[sympy.Basic], tables: Mapping[str, Any]) -> int:
    """As many tokens as tables have values for; else so many that windows, chunks and strides of the masks can be seen."""
    reach = [
        operator.index(size)
        for mask in masks
        for read in table_reads(mask)
        for argument, size in zip(read.args, getattr(tables[read.spec.name], "shape", ()), strict=False)
        if argument in (Q_IDX, KV_IDX)
    ]
    constants = [abs(int(number)) for mask in masks for number in mask.atoms(sympy.Integer)]
    suggested = max(SHORTEST, 1 << (max([1, *constants]) * 4 - 1).bit_length())
    return max(1, min(LONGEST, *(reach or [suggested])))
