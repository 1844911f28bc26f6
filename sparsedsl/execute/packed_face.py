"""Calls of many requests at once, as users make them: :meth:`ragged` over rows that lie behind each other, :meth:`paged` over pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.calls import Calls
from sparsedsl.execute.kept_summaries import summarised
from sparsedsl.execute.packed_calls import PackedAttention
from sparsedsl.execute.packed_inputs import PagedRows, given_back, inputs_by_request, refuse_gradients, rows_first, wants_lse
from sparsedsl.execute.page_summaries import PageSummaries
from sparsedsl.execute.paged_plan import PagedPlan, begin_summaries
from sparsedsl.execute.paged_work import ByRequest, InOneRow, PageTable
from sparsedsl.execute.pools import check_block_table, check_pools, pools_of
from sparsedsl.execute.request_loop import request_by_request
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.pattern import attend
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.runtime.arguments import arranged, joined_tables
from sparsedsl.runtime.call import bind_tables, check_tensors
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.packed_rows import KeyRows, Requests, check_ends, check_numbers, requests_of
from sparsedsl.runtime.seen_pages import VisiblePages, seen_pages

__all__ = ["PackedFace", "reads_pages"]

Tensor = torch.Tensor
Result = tuple[Tensor, Tensor | None]
# Backends that read keys of pages: where they lie, or copies of the pages that are seen.
READS_PAGES = ("auto", "reference", "tiled", "cpp", "triton")


def reads_pages(backend: str, device: torch.device) -> bool:
    """Whether :meth:`PackedFace.paged` runs there; :meth:`PackedFace.ragged` does everywhere."""
    return backend in READS_PAGES and (device.type == "cpu" or backend != "auto")


class PackedFace:
    """What a compiled attention offers for rows of many requests."""

    _calls: Calls
    _packed: PackedAttention | None = None

    def ragged(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_start: Tensor | None = None, *,
        return_lse: bool = False, scale: float | None = None, layout: str = "thd", tables: Mapping[str, Tensor] | None = None,
        **named: Any,
    ) -> Any:  # fmt: skip
        """Attention of many requests whose rows lie behind each other, without padding; each sees its own keys alone.

        Args:
            q, k, v: ``(T, Hq, D)``, ``(N, Hkv, D)``, ``(N, Hkv, Dv)``; with ``layout="htd"`` heads stand first. Rows behind the last
                request are padding: out is 0 there, the LSE -inf.
            cu_seqlens_q, cu_seqlens_k: int32 or int64 ``(R + 1,)``, where queries and keys of each request begin and end; on the CPU or
                on the device of the call. On a GPU they are not looked at, nor checked, and no call waits for them.
            q_start: ``(R,)``, the position of the first query of each; None puts the last query at the last key.
            return_lse, scale, tables, named: as :meth:`__call__`; ``b`` is the number of the request. Inputs of programs have the axes that
                they were declared with: their queries and keys are packed like q and k, in a batch of 1; others are a batch of requests.

        Returns:
            ``out (T, Hq, Dv)`` in the layout of q; then the LSE ``(Hq, T)``, if asked for. Gradients go to q, k, v and learned tables.

        Raises:
            ShapeError, TableError: as :meth:`__call__`; lengths that do not fit. UnsupportedError: the backend cannot, or it is part of
                a graph.

        A pattern is one call over all rows. A program goes from request to request, which needs the lengths on the CPU.

        >>> import torch, sparsedsl as sd
        >>> local = sd.compile(sd.patterns.sliding_window(16))
        >>> q, k, v = torch.randn(10, 4, 8), torch.randn(70, 2, 8), torch.randn(70, 2, 8)
        >>> out = local.ragged(q, k, v, torch.tensor([0, 9, 10]), torch.tensor([0, 9, 70]))  # a prompt of 9, a token behind 60
        >>> out.shape
        torch.Size([10, 4, 8])
        """
        _refuse_graphs("ragged")
        check_word("layout", layout, ("thd", "htd"))
        named = joined_tables(named, tables)
        q, k, v = (rows_first(name, x, layout) for name, x in (("q", q), ("k", k), ("v", v)))
        q, k, v, _ = arranged(q, k, v, None)
        check_tensors(q, k, v)
        ends = check_ends("cu_seqlens_k", cu_seqlens_k, k.shape[2], q.device, "k")
        requests = requests_of(cu_seqlens_q, ends.diff(), q_start, q.shape[2], q.device, "cu_seqlens_k")
        if self._goes_by_request(requests):
            given = inputs_by_request(self._calls.program, named, requests, ends)
            first = ends.tolist()

            def keys_of(number: int) -> tuple[Tensor, Tensor, None]:
                rows = slice(first[number], first[number + 1])
                return k[:, :, rows], v[:, :, rows], None

            found = request_by_request(
                self._calls, q, v.shape[3], requests, keys_of, given, scale=scale, lse=wants_lse(self._calls, return_lse)
            )
        else:
            packed = self._pattern_calls()
            bound = packed.bound(named, q.shape[1], q.device)
            if not requests.count:
                return self._nobody(q, v.shape[3], return_lse, layout)
            ends = ends.to(requests.ends.device)
            keys = KeyRows.behind_each_other(ends, k.shape[2], packed.packing.span)
            told = packed.told(requests, keys, q.device)
            found = packed.attend(q, k, v, requests, told, bound, scale=scale, lse=wants_lse(self._calls, return_lse))
        return given_back(*found, requests, return_lse, layout)

    def paged(
        self, q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: Tensor, kv_lens: Tensor, cu_seqlens_q: Tensor,
        q_start: Tensor | None = None, *, return_lse: bool = False, scale: float | None = None, k_scale: Tensor | float | None = None,
        v_scale: Tensor | float | None = None, layout: str = "thd", pool_layout: str = "nhd", summaries: PageSummaries | None = None,
        tables: Mapping[str, Tensor] | None = None, **named: Any,
    ) -> Any:  # fmt: skip
        """Attention of many requests over keys that lie in pages of a pool. Pages that no query can see are not read.

        Args:
            q: ``(T, Hq, D)``, the new tokens of all requests; with ``layout="htd"`` heads stand first.
            k_pool, v_pool: ``(pages, page, Hkv, D)``; with ``pool_layout="hnd"`` ``(pages, Hkv, page, D)``. In the dtype of q, or quantised
                (float8, int8): pages are then turned into numbers as they are read.
            block_table: int32 or int64 ``(R, width)``, the pages of each request in order. Entries of pages that no query sees, and those
                behind the last key, may hold anything.
            kv_lens: ``(R,)``, keys of each request, the new ones included.
            cu_seqlens_q: ``(R + 1,)``, where the queries of each begin and end: one each to decode, more to prefill, mixed at will.
            q_start: ``(R,)``, the position of the first query of each; None puts the last query at the last key.
            k_scale, v_scale: of quantised pools factors ``(pages,)`` or ``(pages, Hkv)``, or one number; None is 1.
            summaries: what :meth:`page_summaries` of a program made for these pools: blocks of keys that are over, and were summed up in
                an earlier call, are not read for it again.
            return_lse, scale, tables, named: as :meth:`ragged`; but inputs of programs that have rows for keys lie in pools of their own,
                ``(pages, page, H, D)`` as keys do. On an axis ``keys/64`` there are ``page / 64`` rows a page; where a block takes several
                pages, one, with the last of them.

        Returns:
            As :meth:`ragged`. There are no gradients.

        Raises:
            ShapeError, TableError: as :meth:`ragged`; pools, scales or tables that do not fit, a page that is seen and is not there.
            UnsupportedError: somebody wants gradients; a backend that reads no pages.

        ``cpp`` and ``triton`` read rows where they lie; ``tiled`` copies the pages that are seen; ``flex`` does not read pages. A program
        goes from request to request: the pages that it attends to are copied, and those that it sums up.

        >>> import torch, sparsedsl as sd
        >>> local = sd.compile(sd.patterns.sliding_window(16), backend="tiled")
        >>> k_pool, v_pool = torch.randn(2, 8, 16, 2, 32).unbind(0)  # 8 pages of 16 keys, 2 heads
        >>> table, kv_lens = torch.tensor([[3, 5, 1], [0, -1, -1]]), torch.tensor([40, 7])
        >>> out = local.paged(torch.randn(3, 4, 32), k_pool, v_pool, table, kv_lens, torch.tensor([0, 1, 3]))
        >>> out.shape  # one token of the first request, two of the second
        torch.Size([3, 4, 32])
        """
        _refuse_graphs("paged")
        check_word("layout", layout, ("thd", "htd"))
        check_word("pool_layout", pool_layout, ("nhd", "hnd"))
        named = joined_tables(named, tables)
        q = rows_first("q", q, layout)
        q, _, _, _ = arranged(q, q, q, None)
        self._refuse_pages(q.device)
        refuse_gradients(q, k_pool, v_pool, *named.values())
        pools = pools_of(q[0].transpose(0, 1), k_pool, v_pool, k_scale, v_scale, pool_layout)
        if summaries is not None:
            begin_summaries(summaries, self._calls.program, k_pool, v_pool, pools)
        lengths = (block_table, kv_lens, cu_seqlens_q, q_start)
        plan = self._plan(lengths, pools.pages, pools.page, q.shape[2], q.shape[1], q.device, named, pool_layout, copy=False)
        found = plan._work.attend(q, pools, scale=scale, lse=wants_lse(self._calls, return_lse), summaries=summaries)
        return given_back(*found, plan._requests, return_lse, layout)

    def plan_paged(
        self, block_table: Tensor, kv_lens: Tensor, cu_seqlens_q: Tensor, q_start: Tensor | None = None, *, heads: int, page: int,
        pages: int, rows: int | None = None, device: torch.device | None = None, copy: bool = False, pool_layout: str = "nhd",
        tables: Mapping[str, Tensor] | None = None, **named: Any,
    ) -> PagedPlan:  # fmt: skip
        """What calls of :meth:`paged` with these lengths have in common, made once: for the layers of a model, which share them in a step.

        Args:
            block_table, kv_lens, cu_seqlens_q, q_start, tables, named: as :meth:`paged`.
            heads: of queries. page: keys of a page. pages: how many the pools have.
            rows: of q; None: as many as ``cu_seqlens_q`` ends with, which must then be on the CPU.
            device: of the calls; None: that of ``block_table``.
            copy: the pages that are seen are copied behind each other, with which every backend runs; else they are read where they lie.
            pool_layout: as :meth:`paged`; of inputs that lie in pools of their own.

        Returns:
            :class:`~sparsedsl.PagedPlan`, to be called with ``(q, k_pool, v_pool)`` of each layer.

        Raises:
            ShapeError, TableError, UnsupportedError: as :meth:`paged`.

        >>> import torch, sparsedsl as sd
        >>> local = sd.compile(sd.patterns.sliding_window(16), backend="tiled")
        >>> table, kv_lens, ends = torch.tensor([[3, 5, 1], [0, -1, -1]]), torch.tensor([40, 7]), torch.tensor([0, 1, 3])
        >>> plan = local.plan_paged(table, kv_lens, ends, heads=4, page=16, pages=8)
        >>> q, k_pool, v_pool = torch.randn(3, 4, 32), *torch.randn(2, 8, 16, 2, 32)
        >>> torch.equal(plan(q, k_pool, v_pool), local.paged(q, k_pool, v_pool, table, kv_lens, ends))
        True
        """
        _refuse_graphs("plan_paged")
        check_word("pool_layout", pool_layout, ("nhd", "hnd"))
        named = joined_tables(named, tables)
        for name, number in (("heads", heads), ("page", page)):
            check_size(name, number, 1)
        check_size("pages", pages, 0)
        if device is None:
            device = block_table.device if isinstance(block_table, Tensor) else torch.device("cpu")
        if not copy:
            self._refuse_pages(device)
        refuse_gradients(*named.values())
        if rows is None:
            ends = check_numbers("cu_seqlens_q", cu_seqlens_q, None, device)
            rows = int(ends[-1]) if ends.numel() else 0
        lengths = (block_table, kv_lens, cu_seqlens_q, q_start)
        return self._plan(lengths, pages, page, rows, heads, device, named, pool_layout, copy=copy)

    def page_summaries(self, k_pool: Tensor, v_pool: Tensor, *, pool_layout: str = "nhd") -> PageSummaries:
        """An empty place, beside pools of pages, for what the program makes of blocks of keys; pass it to calls of :meth:`paged` as
        ``summaries=``.

        A step of decoding then reads one row for each block that is over, the pages that it attends to, and those of the block that is not:
        see :class:`~sparsedsl.PageSummaries`.

        Args:
            k_pool, v_pool, pool_layout: the pools, as :meth:`paged` takes them. They keep their memory as long as the summaries are used.

        Raises:
            ShapeError: they are no pools.
            UnsupportedError: the program sums up no keys.

        >>> import torch, sparsedsl as sd
        >>> quest = sd.compile((sd.kv_idx <= sd.q_idx) & sd.top_k(sd.bound(sd.q, sd.k, 16), 4))
        >>> k_pool, v_pool = torch.randn(2, 32, 16, 2, 64).unbind(0)
        >>> kept = quest.page_summaries(k_pool, v_pool)
        >>> kept.pages, kept.page
        (32, 16)
        """
        check_word("pool_layout", pool_layout, ("nhd", "hnd"))
        if not summarised(self._calls.program):
            raise UnsupportedError(
                f"{self._calls.program!r} makes no summaries or bounds of keys that could be kept; call it without summaries="
            )
        check_pools(k_pool, v_pool, pool_layout)
        return PageSummaries(self._calls.program, k_pool, v_pool, k_pool.shape[1 if pool_layout == "nhd" else 2])

    def visible_pages(
        self, q_start: Tensor, q_lens: Tensor, page: int, *, kv_lens: Tensor | None = None, heads: int | None = None,
        tables: Mapping[str, Tensor] | None = None, **named: Any,
    ) -> VisiblePages:  # fmt: skip
        """The pages of each request that some query, of some head, can see: what :meth:`paged` reads. All others may be freed.

        Args:
            q_start, q_lens: int32 or int64 ``(R,)``, the position of the first query of each request, and how many there are.
            page: keys of a page.
            kv_lens: ``(R,)``; None: keys go up to the last query.
            heads: query heads, for patterns that tell them apart and do not say how many there are.
            tables, named: tables of the pattern, as calls take them.

        Returns:
            :class:`~sparsedsl.VisiblePages`, compressed rows of page numbers. Of a program all pages that hold keys: which of them a call
            reads depends on what it chooses, and the next one may choose any.

        Raises:
            ShapeError, TableError: numbers or tables that do not fit.

        >>> import torch, sparsedsl as sd
        >>> stream = sd.compile(sd.patterns.streaming_llm(32, sink_count=4))
        >>> pages = stream.visible_pages(torch.tensor([1000, 5]), torch.tensor([1, 3]), page=16)
        >>> pages.indptr, pages.indices
        (tensor([0, 4, 5], dtype=torch.int32), tensor([ 0, 60, 61, 62,  0], dtype=torch.int32))
        """
        named = joined_tables(named, tables)
        check_size("page", page, 1)
        device = q_start.device if isinstance(q_start, Tensor) else torch.device("cpu")
        q_start = check_numbers("q_start", q_start, None, device)
        q_lens = check_numbers("q_lens", q_lens, q_start.numel(), device)
        kv_lens = q_start + q_lens if kv_lens is None else check_numbers("kv_lens", kv_lens, q_start.numel(), device)
        ends = torch.nn.functional.pad(q_lens.cumsum(0), (1, 0))
        # A list is as long as there are pages: here somebody has to look.
        rows, most = int(ends[-1]), int(kv_lens.max()) if kv_lens.numel() else 0
        requests = Requests(ends, q_start, kv_lens, rows, ends.is_cpu)
        seen = self._seen(requests, page, -(-most // page), self._heads(heads), named, device)
        owner, number = seen.nonzero().unbind(1)
        indptr = torch.nn.functional.pad(torch.bincount(owner, minlength=requests.count).cumsum(0), (1, 0))
        return VisiblePages(indptr.to(torch.int32), number.to(torch.int32), page)

    # ---- inside ----------------------------------------------------------------------------------------------------------------

    def _pattern_calls(self) -> PackedAttention:
        if self._packed is None:
            assert self._calls.static is not None
            self._packed = PackedAttention(self._calls.static.pattern, self._calls.backend)
        return self._packed

    def _goes_by_request(self, requests: Requests) -> bool:
        calls = self._calls
        if calls.static is not None and calls.backend != "reference":
            return False
        if not requests.looked_at:
            what = "reference goes" if calls.static is not None else "programs go"
            raise UnsupportedError(
                f"{what} from request to request, and the lengths are on {requests.ends.device}: to read them is to wait. Pass "
                "cu_seqlens, kv_lens and q_start as CPU tensors, as schedulers have them"
            )
        return True

    def _plan(
        self, lengths: tuple[Any, ...], pages: int, page: int, rows: int, heads: int, device: torch.device, named: Mapping[str, Any],
        pool_layout: str, *, copy: bool,
    ) -> PagedPlan:  # fmt: skip
        block_table, kv_lens, cu_seqlens_q, q_start = lengths
        kv_lens = check_numbers("kv_lens", kv_lens, None, device)
        requests = requests_of(cu_seqlens_q, kv_lens, q_start, rows, device)
        table = PageTable(check_block_table(block_table, requests.count, device, kv_lens, page), page, pages)
        work: InOneRow | ByRequest
        if self._goes_by_request(requests):
            given = inputs_by_request(self._calls.program, named, requests, PagedRows(table.table, pages, page, pool_layout))
            work = ByRequest(self._calls, given, requests, table)
        else:
            packed = self._pattern_calls()
            work = InOneRow.planned(packed, packed.bound(named, heads, device), requests, table, heads, device, copies=copy)
        return PagedPlan(self._calls, work, requests, table, heads)

    def _refuse_pages(self, device: torch.device) -> None:
        if self._calls.backend not in READS_PAGES:
            raise UnsupportedError(
                f"backend={self._calls.backend!r} reads keys that lie behind each other, and no pages. Use backend='cpp' on a CPU, "
                "backend='triton' on a GPU, backend='tiled', which copies the pages that are seen, or copy them and call ragged()"
            )
        if device.type != "cpu" and self._calls.backend == "auto":
            raise UnsupportedError(
                f"which backend is the fastest over pages is not known for {device.type}. Use backend='triton', which reads rows where "
                "they lie, or backend='tiled', which copies the pages that are seen"
            )

    def _heads(self, heads: int | None) -> int:
        if heads is not None:
            return check_size("heads", heads, 1)
        declared = next((part.heads for part in self._calls.program.expressions if part.heads is not None), None)
        return declared or 1

    def _seen(
        self, requests: Requests, page: int, width: int, heads: int, named: Mapping[str, Any], device: torch.device
    ) -> Tensor:  # fmt: skip
        """Which pages are seen, bool ``(R, width)``."""
        if self._calls.static is None:
            return torch.arange(width, device=requests.ends.device) * page < requests.kv_lens[:, None]
        mask = self._calls.static.pattern.mask
        own = {name: table for name, table in by_kept_name(named, mask.tables).items() if name in mask.tables}
        return seen_pages(mask, requests, page, width, heads, bind_tables(attend(mask), own, device=device))

    def _nobody(self, q: Tensor, value_dim: int, lse: bool, layout: str) -> Any:
        """There are no requests."""
        none = torch.zeros(0, dtype=torch.int64, device=q.device)
        requests = Requests(torch.zeros(1, dtype=torch.int64, device=q.device), none, none, q.shape[2], q.is_cpu)
        out, weight = q.new_zeros((*q.shape[:3], value_dim)), q.new_zeros(q.shape[:3], dtype=accumulated(q.dtype))
        return given_back(out, weight, requests, lse, layout)


def _refuse_graphs(what: str) -> None:
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            f"{what}() makes tables and lists out of the lengths of a call, and is not part of a graph (torch.compile): call it outside, "
            "as in a function under torch.compiler.disable"
        )
