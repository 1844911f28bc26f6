"""What :meth:`~sparsedsl.Attention.plan_paged` gives: paged calls that share lengths and tables, as the layers of a model do in a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.execute.packed_inputs import given_back, refuse_gradients, rows_first, wants_lse
from sparsedsl.execute.page_summaries import PageSummaries
from sparsedsl.execute.paged_work import ByRequest, InOneRow, PageTable
from sparsedsl.execute.pools import Pools, pools_of
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.program.graph import Program
from sparsedsl.runtime.arguments import arranged, joined_tables
from sparsedsl.runtime.packed_rows import Requests

if TYPE_CHECKING:
    from sparsedsl.execute.calls import Calls

__all__ = ["PagedPlan", "begin_summaries"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class PagedPlan:
    """Calls of :meth:`~sparsedsl.Attention.paged` that share lengths and a table of pages: what is seen, and where it lies, is known.

    Made by :meth:`~sparsedsl.Attention.plan_paged`, called with the queries and pools of each layer. The lengths and the table of pages
    are those of the moment it was made. ``heads``: of queries. ``page``, ``pages``: keys of a page, and pages of a pool.

    >>> import torch, sparsedsl as sd
    >>> local = sd.compile(sd.patterns.sliding_window(16), backend="tiled")
    >>> table, kv_lens, ends = torch.tensor([[3, 5, 1], [0, -1, -1]]), torch.tensor([40, 7]), torch.tensor([0, 1, 3])
    >>> plan = local.plan_paged(table, kv_lens, ends, heads=4, page=16, pages=8)
    >>> layers = [(torch.randn(3, 4, 32), *torch.randn(2, 8, 16, 2, 32)) for _ in range(2)]
    >>> [plan(q, k_pool, v_pool).shape for q, k_pool, v_pool in layers]
    [torch.Size([3, 4, 32]), torch.Size([3, 4, 32])]
    """

    _calls: Calls
    _work: InOneRow | ByRequest
    _requests: Requests
    _table: PageTable
    heads: int

    @property
    def page(self) -> int:
        """Keys of a page."""
        return self._table.page

    @property
    def pages(self) -> int:
        """Pages of a pool."""
        return self._table.pages

    @property
    def device(self) -> torch.device:
        """Where calls run."""
        return self._table.table.device

    def __call__(
        self, q: Tensor, k_pool: Tensor, v_pool: Tensor, *, return_lse: bool = False, scale: float | None = None,
        k_scale: Tensor | float | None = None, v_scale: Tensor | float | None = None, layout: str = "thd", pool_layout: str = "nhd",
        summaries: PageSummaries | None = None, tables: Mapping[str, Tensor] | None = None, **named: Any,
    ) -> Any:  # fmt: skip
        """What :meth:`~sparsedsl.Attention.paged` gives for these queries and pools; arguments and results are its.

        ``tables``, ``named``: of scores and sinks, such as are others in each layer, in the place of those that the plan was made with.

        Raises:
            ShapeError: q or the pools do not fit each other or the plan. TableError: a table that the mask reads, which the plan has looked
                at. UnsupportedError: somebody wants gradients.
        """
        check_word("layout", layout, ("thd", "htd"))
        check_word("pool_layout", pool_layout, ("nhd", "hnd"))
        q = rows_first("q", q, layout)
        q, _, _, _ = arranged(q, q, q, None)
        named = joined_tables(named, tables)
        refuse_gradients(q, k_pool, v_pool, *named.values())
        pools = pools_of(q[0].transpose(0, 1), k_pool, v_pool, k_scale, v_scale, pool_layout)
        self._check(q, pools.page, pools.pages)
        work = self._work.given_tables(named, self.heads, self.device) if named else self._work
        if summaries is not None:
            begin_summaries(summaries, self._calls.program, k_pool, v_pool, pools)
        found = work.attend(q, pools, scale=scale, lse=wants_lse(self._calls, return_lse), summaries=summaries)
        return given_back(*found, replace(self._requests, rows=q.shape[2]), return_lse, layout)

    def _check(self, q: Tensor, page: int, pages: int) -> None:
        got = q.shape[1], q.shape[2], page, pages, str(q.device)
        wanted = self.heads, self._requests.rows, self.page, self.pages, str(self.device)
        for what, one, other in zip(("heads of q", "rows of q", "keys of a page", "pages", "device"), got, wanted, strict=True):
            if one != other:
                raise ShapeError(f"{what}: got {one}, and the plan was made for {other}. Call plan_paged() for such calls")


def begin_summaries(summaries: Any, program: Program, k_pool: Tensor, v_pool: Tensor, pools: Pools) -> None:
    """A call of a program over pools begins, which uses what was kept of their blocks of keys.

    Raises:
        ShapeError: it is of another program or other pools, or they were written and nobody said where.
    """
    if not isinstance(summaries, PageSummaries):
        raise ShapeError(f"summaries must be what page_summaries() of this program made; got {shown(summaries)}")
    summaries.begin(program, k_pool, v_pool, (pools.k_scale, pools.v_scale))
