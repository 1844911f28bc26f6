"""One checked call over pages: in one row of all requests, or from request to request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.execute.packed_calls import PackedAttention
from sparsedsl.execute.page_summaries import PageSummaries
from sparsedsl.execute.paged_keys import PagedKeys, RequestKeys
from sparsedsl.execute.pools import Pools, computed_in
from sparsedsl.execute.request_loop import request_by_request
from sparsedsl.program import tensors
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.packed_rows import KeyRows, Requests
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.seen_pages import seen_pages

if TYPE_CHECKING:
    from sparsedsl.execute.calls import Calls

__all__ = ["PagedWork"]

Tensor = torch.Tensor
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class PagedWork:
    """``q (1, Hq, T, D)``, and ``table``: the pages of each request, int64 ``(R, width)``."""

    q: Tensor
    pools: Pools
    requests: Requests
    table: Tensor
    scale: float | None
    lse: bool

    # ---- all requests in one row ---------------------------------------------------------------------------------------------------

    def in_one_row(self, packed: PackedAttention, bound: Mapping[str, Tensor]) -> Result:
        """A pattern: all requests in one call, or on a CPU those with few queries and those with many in one each."""
        parts = packed.parts(self.requests)
        if parts is None:
            return self._row(packed, bound)
        q, lse = self.q, None
        out = q.new_zeros((*q.shape[:3], self.pools.v.shape[3]))
        if self.lse:
            lse = q.new_full(q.shape[:3], float("-inf"), dtype=accumulated(q.dtype))
        for requests, rows in parts:
            assert requests.numbers is not None
            part = replace(self, q=q[:, :, rows], requests=requests, table=self.table[requests.numbers])
            own, weight = part._row(packed, bound)
            out[:, :, rows] = own
            if lse is not None and weight is not None:
                lse[:, :, rows] = weight
        return out, lse

    def _row(self, packed: PackedAttention, bound: Mapping[str, Tensor]) -> Result:
        q, pools, requests, device = self.q, self.pools, self.requests, self.q.device
        mask, page = packed.pattern.mask, pools.page
        of_mask = {name: bound[name].to(requests.ends.device) for name in mask.tables}
        owner, number = seen_pages(mask, requests, page, self._width(), q.shape[1], of_mask).nonzero().unbind(1)
        keys, inside = KeyRows.in_pages(owner, number, page, requests.kv_lens, packed.packing.span)
        pages = self._pages(owner, number)
        inside = inside.to(device)
        if not pages.numel():
            k, v = (pool.transpose(1, 2)[:1, :, :0] for pool in (pools.k, pools.v))
            k, v = (x.new_zeros((1, *x.shape[1:])).to(computed_in(q, pools)) for x in (k, v))
            places = None
        elif pools.quantised:
            # Rows of a page that hold no key are those of the last one that is there, as where nothing is copied.
            k, v = (_in_a_row(x, inside) for x in pools.numbers(pages, computed_in(q, pools)))
            places = None
        else:
            k, v, step = pools.in_place()
            places = Places(keys=(pages[:, None] * step + inside).to(torch.int32).view(1, 1, -1))
        out, lse = packed.attend(q.to(k.dtype), k, v, requests, keys, bound, scale=self.scale, lse=self.lse, places=places)
        return out.to(q.dtype), lse

    def _width(self) -> int:
        """Pages of a request at most: as many as its keys need, where one may look."""
        wide = self.table.shape[1]
        return min(wide, -(-int(self.requests.kv_lens.max()) // self.pools.page)) if self.requests.looked_at else wide

    def _pages(self, owner: Tensor, number: Tensor) -> Tensor:
        """The pages of the pool, each of them there."""
        device = self.table.device
        pages = self.table[owner.to(device), number.to(device)]
        if not pages.is_cpu:
            return pages.clamp(0, max(self.pools.pages - 1, 0))
        wrong = ((pages < 0) | (pages >= self.pools.pages)).nonzero()
        if wrong.numel():
            first = int(wrong[0])
            request = int(owner[first]) if self.requests.numbers is None else int(self.requests.numbers[owner[first]])
            raise ShapeError(
                f"block_table has page {int(pages[first])} for page {int(number[first])} of request {request}, which its queries see; the "
                f"pool has pages 0 to {self.pools.pages - 1}"
            )
        return pages

    # ---- from request to request ---------------------------------------------------------------------------------------------------

    def by_request(
        self, calls: Calls, given: Callable[[int], Mapping[str, Any]], summaries: PageSummaries | None = None
    ) -> Result:  # fmt: skip
        """A program, or what the call means: each request by itself. A program reads the pages that it asks for, the meaning reads all."""
        pools, dtype = self.pools, computed_in(self.q, self.pools)
        lens, fresh = self.requests.kv_lens.tolist(), self.requests.starts.tolist()
        table = self.table.cpu()
        table = torch.where((table >= 0) & (table < pools.pages), table, -1)
        keys = PagedKeys(pools, self._width() if lens else 0, dtype, summaries)

        def keys_of(number: int) -> tuple[Tensor, Tensor, RequestKeys | None]:
            of = keys.request(table[number, : -(-lens[number] // pools.page)], lens[number], fresh[number])
            if calls.backend == "reference":
                return of.all(tensors.k), of.all(tensors.v), None
            return of.rows(tensors.k), of.rows(tensors.v), of

        out, lse = request_by_request(
            calls, self.q.to(dtype), pools.v.shape[3], self.requests, keys_of, given, scale=self.scale, lse=self.lse
        )  # fmt: skip
        if summaries is not None:
            summaries.pages_read = keys.pages_read
        return out.to(self.q.dtype), lse


def _in_a_row(pages: Tensor, inside: Tensor) -> Tensor:
    """``(P, page, H, D)`` -> ``(1, H, P * page, D)``, each row that of number ``inside (P, page)`` of its page."""
    rows = pages.gather(1, inside[:, :, None, None].expand(pages.shape))
    return rows.flatten(0, 1).transpose(0, 1)[None]
