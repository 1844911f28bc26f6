"""Calls over pages of a pool: what depends on lengths, tables and the numbers of pages alone, made once for all calls that share them.

The layers of a model do in a step: only q and what the pool holds are others. :class:`InOneRow` is for patterns, one attention over all
requests; :class:`ByRequest` for programs, and for what a call means: each request by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import ShapeError, TableError
from sparsedsl.execute.packed_calls import PackedAttention
from sparsedsl.execute.page_summaries import PageSummaries
from sparsedsl.execute.paged_keys import PagedKeys, RequestKeys
from sparsedsl.execute.pools import Pools, computed_in
from sparsedsl.execute.request_loop import request_by_request
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.program import tensors
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.packed_rows import KeyRows, Requests
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.seen_pages import seen_pages

if TYPE_CHECKING:
    from sparsedsl.execute.calls import Calls

__all__ = ["ByRequest", "InOneRow", "PageTable"]

Tensor = torch.Tensor
Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class PageTable:
    """``table``: the pages of each request, int64 ``(R, width)``; ``page``: keys of one; ``pages``: how many the pool has."""

    table: Tensor
    page: int
    pages: int

    def width(self, requests: Requests) -> int:
        """Pages of a request at most: as many as its keys need, where one may look."""
        wide = self.table.shape[1]
        return min(wide, -(-int(requests.kv_lens.max()) // self.page)) if requests.looked_at else wide

    def of(self, requests: Requests, owner: Tensor, number: Tensor) -> Tensor:
        """The page of the pool that is number ``number`` of request ``owner``, each of them there."""
        device = self.table.device
        found = self.table[owner.to(device), number.to(device)]
        if not found.is_cpu:
            return found.clamp(0, max(self.pages - 1, 0))
        wrong = ((found < 0) | (found >= self.pages)).nonzero()
        if wrong.numel():
            first = int(wrong[0])
            request = int(owner[first]) if requests.numbers is None else int(requests.numbers[owner[first]])
            raise ShapeError(
                f"block_table has page {int(found[first])} for page {int(number[first])} of request {request}, which its queries see; the "
                f"pool has pages 0 to {self.pages - 1}"
            )
        return found


# ---- all requests in one row -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """Some requests. ``rows``: of q that are theirs, None: all. ``told``: the tables of rows by name. ``pages (P,)``: that are seen;
    ``inside (P, page)``: which row of its page each key has. ``placed``: places of keys, by how many rows lie from page to page."""

    requests: Requests
    rows: Tensor | None
    told: dict[str, Tensor]
    pages: Tensor
    inside: Tensor
    placed: dict[int, Places] = field(default_factory=dict)

    def places(self, step: int) -> Places:
        if step not in self.placed:
            rows = (self.pages[:, None] * step + self.inside).to(torch.int32)
            self.placed[step] = Places(keys=rows.view(1, 1, -1))
        return self.placed[step]


@dataclass(frozen=True, eq=False)
class InOneRow:
    """A pattern: all requests in one call, or on a CPU those with few queries and those with many in one each.

    ``bound``: its tables. ``copies``: the pages that are seen are copied; else they are read where they lie.
    """

    packed: PackedAttention
    bound: Mapping[str, Tensor]
    parts: tuple[_Part, ...]
    copies: bool

    @staticmethod
    def planned(
        packed: PackedAttention, bound: Mapping[str, Tensor], requests: Requests, table: PageTable, heads: int, device: torch.device,
        *, copies: bool = False,
    ) -> InOneRow:  # fmt: skip
        """Looks at lengths and at the mask, once."""

        def part(requests: Requests, rows: Tensor | None) -> _Part:
            mask = packed.pattern.mask
            of_mask = {name: bound[name].to(requests.ends.device) for name in mask.tables}
            own = table if requests.numbers is None else replace(table, table=table.table[requests.numbers])
            width = own.width(requests)
            seen = seen_pages(mask, requests, table.page, width, heads, of_mask)
            owner, number = seen.nonzero().unbind(1)
            keys, inside = KeyRows.in_pages(owner, number, table.page, requests.kv_lens, packed.packing.span)
            told = packed.told(requests, keys, device)
            return _Part(requests, rows, told, own.of(requests, owner, number), inside.to(device))

        if not requests.count:
            return InOneRow(packed, bound, (), copies)
        split = packed.parts(requests)
        parts = [part(requests, None)] if split is None else [part(*one) for one in split]
        return InOneRow(packed, bound, tuple(parts), copies)

    def attend(
        self, q: Tensor, pools: Pools, *, scale: float | None, lse: bool, summaries: PageSummaries | None = None
    ) -> Result:
        """``out (1, Hq, T, Dv)`` and the LSE of ``q (1, Hq, T, D)``."""
        if self.parts and self.parts[0].rows is None:
            return self._part(self.parts[0], q, pools, scale, lse)
        out, weights = q.new_zeros((*q.shape[:3], pools.v.shape[3])), None
        if lse:
            weights = q.new_full(q.shape[:3], float("-inf"), dtype=accumulated(q.dtype))
        for part in self.parts:
            own, weight = self._part(part, q[:, :, part.rows], pools, scale, lse)
            out[:, :, part.rows] = own
            if weights is not None and weight is not None:
                weights[:, :, part.rows] = weight
        return out, weights

    def given_tables(self, named: Mapping[str, Any], heads: int, device: torch.device) -> InOneRow:
        """The same with other tables for scores and sinks."""
        named = by_kept_name(named, self.packed.pattern.tables)
        looked_at = sorted(set(named) & set(self.packed.pattern.mask.tables))
        if looked_at:
            raise TableError(
                f"the mask reads the table{'s' * (len(looked_at) > 1)} {', '.join(looked_at)}, and a plan has looked at the mask: give it "
                "to plan_paged(), one plan for each"
            )
        return replace(self, bound=self.packed.bound({**self.bound, **named}, heads, device))

    def _part(self, part: _Part, q: Tensor, pools: Pools, scale: float | None, lse: bool) -> Result:
        places = None
        if not part.pages.numel():
            k, v = (pool.transpose(1, 2)[:1, :, :0] for pool in (pools.k, pools.v))
            k, v = (x.new_zeros((1, *x.shape[1:])).to(computed_in(q, pools)) for x in (k, v))
        elif pools.quantised or self.copies:
            # Rows of a page that hold no key are those of the last one that is there, as where nothing is copied.
            k, v = (_in_a_row(x, part.inside) for x in pools.numbers(part.pages, computed_in(q, pools)))
        else:
            k, v, step = pools.in_place()
            places = part.places(step)
        out, found = self.packed.attend(
            q.to(k.dtype), k, v, part.requests, part.told, self.bound, scale=scale, lse=lse, places=places
        )
        return out.to(q.dtype), found


def _in_a_row(pages: Tensor, inside: Tensor) -> Tensor:
    """``(P, page, H, D)`` -> ``(1, H, P * page, D)``, each row that of number ``inside (P, page)`` of its page."""
    rows = pages.gather(1, inside[:, :, None, None].expand(pages.shape))
    return rows.flatten(0, 1).transpose(0, 1)[None]


# ---- from request to request -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ByRequest:
    """A program, or what a call means: each request over its own pages behind each other. ``given``: tables and inputs of a request."""

    calls: Calls
    given: Callable[[int], Mapping[str, Any]]
    requests: Requests
    table: PageTable

    def attend(
        self, q: Tensor, pools: Pools, *, scale: float | None, lse: bool, summaries: PageSummaries | None = None
    ) -> Result:  # fmt: skip
        """As :meth:`InOneRow.attend`. A program reads the pages that it asks for, the meaning all. ``summaries``: of blocks of keys."""
        dtype, lens, fresh = computed_in(q, pools), self.requests.kv_lens.tolist(), self.requests.starts.tolist()
        table = self.table.table.cpu()
        table = torch.where((table >= 0) & (table < pools.pages), table, -1)
        keys = PagedKeys(pools, self.table.width(self.requests) if lens else 0, dtype, summaries)

        def keys_of(number: int) -> tuple[Tensor, Tensor, RequestKeys | None]:
            of = keys.request(table[number, : -(-lens[number] // pools.page)], lens[number], fresh[number])
            if self.calls.backend == "reference":
                return of.all(tensors.k), of.all(tensors.v), None
            return of.rows(tensors.k), of.rows(tensors.v), of

        out, found = request_by_request(
            self.calls, q.to(dtype), pools.v.shape[3], self.requests, keys_of, self.given, scale=scale, lse=lse
        )
        if summaries is not None:
            summaries.pages_read = keys.pages_read
        return out.to(q.dtype), found

    def given_tables(self, named: Mapping[str, Any], heads: int, device: torch.device) -> ByRequest:
        """As :meth:`InOneRow.given_tables`: what a program is given may decide what it chooses."""
        raise TableError(
            f"{', '.join(sorted(named))}: tables and inputs of a program, and of backend='reference', are given to plan_paged(), one plan "
            "for each"
        )
