"""Which pages of keys the queries of each request can see: what is read of a pool, and what need not be kept in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.key_intervals import KeyInterval, intervals
from sparsedsl.analysis.tiles import classify
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import attend
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import HEAD
from sparsedsl.program.packing import packing_of
from sparsedsl.runtime.call import exactly
from sparsedsl.runtime.packed_rows import KeyRows, Requests

__all__ = ["VisiblePages", "seen_pages"]

Tensor = torch.Tensor
# Intervals of a mask that are worked out for each query; and rows of the tiles that a mask that has none is asked in.
MOST_INTERVALS, TILE_ROWS = 32, 64


@dataclass(frozen=True, eq=False)
class VisiblePages:
    """Pages of each request, in the compressed form that FlashInfer and vLLM read: those of request ``r`` are
    ``indices[indptr[r] : indptr[r + 1]]``, rising; int32. ``page``: keys of one.

    >>> import sparsedsl as sd
    >>> local = sd.compile(sd.patterns.sliding_window(20))
    >>> pages = local.visible_pages(torch.tensor([100, 3]), torch.tensor([1, 1]), page=16)
    >>> pages.indptr.tolist(), pages.indices.tolist()
    ([0, 2, 3], [5, 6, 0])
    >>> pages.physical(torch.tensor([[9, 9, 9, 9, 9, 2, 7], [4, 9, 9, 9, 9, 9, 9]])).tolist()
    [2, 7, 4]
    """

    indptr: Tensor
    indices: Tensor
    page: int

    @property
    def counts(self) -> Tensor:
        """How many pages each request sees, ``(R,)``."""
        return self.indptr.diff()

    @property
    def owners(self) -> Tensor:
        """The request of every listed page."""
        return torch.arange(self.counts.numel(), device=self.indptr.device).repeat_interleave(self.counts)

    def physical(self, block_table: Tensor) -> Tensor:
        """The pages of a pool, by a table ``(R, pages)`` of them: what FlashInfer calls ``paged_kv_indices``. int32.

        Raises:
            ShapeError: the table is of other requests, or too narrow.
        """
        wide = int(self.indices.max()) + 1 if self.indices.numel() else 0
        if not isinstance(block_table, Tensor) or block_table.ndim != 2 or block_table.is_floating_point():
            raise ShapeError(f"block_table must be whole numbers (requests, pages); got {shown(block_table)}")
        if block_table.shape[0] != self.counts.numel() or block_table.shape[1] < wide:
            raise ShapeError(
                f"block_table must be of {self.counts.numel()} requests and at least {wide} pages; got {tuple(block_table.shape)}"
            )
        return block_table[self.owners, self.indices.long()].to(torch.int32)


def seen_pages(mask: Mask, requests: Requests, page: int, width: int, heads: int, tables: Mapping[str, Tensor]) -> Tensor:
    """Which of ``width`` pages of ``page`` keys some query and head of each request sees, bool ``(R, width)``, on the requests' device.

    Waits for no number where the keys that a query sees are intervals in closed form; ``tables``: of the mask, by name.
    """
    if not (requests.count and requests.rows and width):
        return torch.zeros((requests.count, width), dtype=torch.bool, device=requests.ends.device)
    found = intervals(mask.expr, most=MOST_INTERVALS)
    if found is None or any(interval.searched for interval in found):
        return _in_tiles(mask, requests, page, width, heads, tables)
    ends = torch.zeros(requests.count * (width + 1), dtype=torch.int64, device=requests.ends.device)
    for interval in found:
        _mark(interval, requests, page, width, heads, tables, ends)
    return (ends.view(requests.count, width + 1).cumsum(1) > 0)[:, :width]


def _mark(
    interval: KeyInterval, requests: Requests, page: int, width: int, heads: int, tables: Mapping[str, Tensor], ends: Tensor
) -> None:
    """Adds 1 where the pages of a query begin, and takes 1 off behind its last."""
    told = requests.row_tables(0)
    owner, real = told["q_row_request"].clamp(max=requests.count - 1), told["q_row_request"] < requests.count
    env: dict[str, Any] = {
        "b": told["q_request"], "h": 0, "q_idx": told["q_position"], "q_len": told["q_end"], "kv_len": told["kv_end"], **tables,
    }  # fmt: skip
    if HEAD in interval.exprs.free_symbols:
        env["h"] = torch.arange(heads, device=owner.device)[:, None]
    shape = (heads if HEAD in interval.exprs.free_symbols else 1, owner.numel())
    first, last = (torch.as_tensor(evaluate(end, env), device=owner.device).expand(shape) for end in interval.ends)
    for condition in interval.conditions:
        last = torch.where(torch.as_tensor(evaluate(condition, env), device=owner.device).expand(shape), last, -1)
    seen = (first <= last) & real
    line, one = (owner * (width + 1)).expand(shape), seen.to(torch.int64)
    low, high = (torch.where(seen, (end // page).clamp(0, width - 1), 0) for end in (first, last))
    ends.index_add_(0, (line + low).flatten(), one.flatten())
    ends.index_add_(0, (line + high + 1).flatten(), -one.flatten())


def _in_tiles(mask: Mask, requests: Requests, page: int, width: int, heads: int, tables: Mapping[str, Tensor]) -> Tensor:
    """The same by the tiles of the packed row, pairs looked at where bounds do not say."""
    if not requests.looked_at:
        raise UnsupportedError(
            f"which pages {mask} sees is found by looking at pairs, on the CPU, and the lengths are on {requests.ends.device}: pass "
            "cu_seqlens_q, kv_lens and q_start as CPU tensors"
        )
    packing = packing_of(attend(mask))
    kept = torch.arange(width) * page < requests.kv_lens[:, None]
    owner, number = kept.nonzero().unbind(1)
    if not owner.numel():
        return kept
    keys, _ = KeyRows.in_pages(owner, number, page, requests.kv_lens, packing.span)
    made = {**requests.row_tables(packing.span), "kv_place": keys.place, "kv_position": keys.position}
    own = {name: made[what] for what, name in packing.wanted.items()} | {name: table.cpu() for name, table in tables.items()}
    expr = packing.pattern.mask.expr
    domain = exactly((expr,), Domain(requests.rows, keys.place.numel(), 0, 1, heads, own))
    with torch.no_grad():
        lists = classify(expr, domain, (TILE_ROWS, page))
    column = torch.cat([lists.full.columns, lists.partial.columns]).long().unique()
    seen = torch.zeros_like(kept)
    seen[owner[column], number[column]] = True
    return seen
