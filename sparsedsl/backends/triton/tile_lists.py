"""What the loops of a generated kernel read from memory: ends of intervals that need a search, or compact lists of tiles."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.key_intervals import interval_rows, intervals
from sparsedsl.analysis.lists import BlockLists, TileRows
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern

__all__ = ["all_as_partial", "interval_values", "list_values"]


def interval_values(pattern: Pattern, domain: Domain, of: str, device: torch.device) -> dict[str, Any]:
    """Arguments of the intervals that are searched, by name; empty where all ends have a closed form. No host synchronisation."""
    values: dict[str, Any] = {}
    for i, interval in enumerate(intervals(pattern.mask.expr, of=of) or ()):
        if not interval.searched:
            continue
        first, last = (end.to(device) for end in interval_rows(interval, domain, of=of))
        values |= {f"first_{of}_{i}_ptr": first, f"last_{of}_{i}_ptr": last}
        values |= _steps(f"{of}_{i}_step", first.shape[0], first.shape[1])
    return values


def list_values(lists: BlockLists, of: str, device: torch.device) -> dict[str, Any]:
    """Arguments of the tile lists, by name; ``of="queries"``: listed by tile of keys."""
    values: dict[str, Any] = {}
    lists = full_tiles_inside(lists, of)
    for kind, part in (("full", lists.full), ("partial", lists.partial)):
        rows = part if of == "keys" else part.transposed(lists.shape[3])
        values |= {f"{kind}_starts_{of}_ptr": _starts(rows).to(device), f"{kind}_columns_{of}_ptr": _columns(rows).to(device)}
    batch, heads = lists.shape[:2]
    return values | _steps(f"{of}_list", batch, heads)


def full_tiles_inside(lists: BlockLists, of: str) -> BlockLists:
    """The same tiles, with the ragged last columns listed as partial: a kernel reads full tiles without looking at the lengths.

    ``of``: what the loop runs over, "keys" or "queries".
    """
    rows, columns = lists.shape[2:]
    ragged = lists.kv_len % lists.block[1] if of == "keys" else lists.q_rows % lists.block[0]
    if not ragged or not lists.full.total:
        return lists
    owner = lists.full.owners()
    cut = lists.full.columns == columns - 1 if of == "keys" else owner % rows == rows - 1
    full = _from_pairs(owner[~cut], lists.full.columns[~cut], lists)
    partial = _from_pairs(
        torch.cat([owner[cut], lists.partial.owners()]), torch.cat([lists.full.columns[cut], lists.partial.columns]), lists
    )
    return BlockLists(full, partial, lists.block, lists.q_rows, lists.kv_len)


def all_as_partial(lists: BlockLists) -> BlockLists:
    """The same tiles, all of them listed as partial: those of a line in ascending order, whatever they are."""
    if not lists.full.total:
        return lists
    owner, columns = (
        torch.cat(pair) for pair in ((lists.full.owners(), lists.partial.owners()), (lists.full.columns, lists.partial.columns))
    )
    none = _from_pairs(owner[:0], columns[:0], lists)
    return BlockLists(none, _from_pairs(owner, columns, lists), lists.block, lists.q_rows, lists.kv_len)


def _from_pairs(owner: torch.Tensor, columns: torch.Tensor, lists: BlockLists) -> TileRows:
    shape = lists.full.counts.shape
    order = (owner * lists.shape[3] + columns).argsort()
    counts = torch.bincount(owner, minlength=shape.numel()).to(torch.int32).view(shape)
    return TileRows(counts, columns[order])


def _starts(rows: TileRows) -> torch.Tensor:
    counts = rows.counts.reshape(-1)
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=starts[1:])
    if rows.total > torch.iinfo(torch.int32).max:
        raise UnsupportedError(f"{rows.total:,} tiles are more than a list of the triton backend holds (2**31); use larger tiles")
    return starts.to(torch.int32)


def _columns(rows: TileRows) -> torch.Tensor:
    # A pointer must point at something.
    return rows.columns if rows.total else torch.zeros(1, dtype=torch.int32, device=rows.columns.device)


def _steps(name: str, batch: int, heads: int) -> dict[str, int]:
    """How far apart batch entries and heads lie, in lines; 0 where all share one."""
    return {f"{name}_b": heads if batch > 1 else 0, f"{name}_h": 1 if heads > 1 else 0}
