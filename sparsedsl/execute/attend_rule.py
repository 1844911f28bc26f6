"""Attention of a program: what attends in any case over a static mask, what choices add along their lists, one softmax over both.

For all backends. A mask is split once (:mod:`execute.mask_split`); then the queries are looked at, all at once, or in pieces where
choices or scores for single queries have to be read as tables, which are as large as queries x blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.errors import ShapeError
from sparsedsl.execute.lowering import Lowering, Shortcut, has_own_rows
from sparsedsl.execute.mask_split import EITHER, MaskSplit
from sparsedsl.execute.requests import parts_of
from sparsedsl.execute.seen_rows import pages_seen
from sparsedsl.lang.expressions import Mask, Score, as_mask
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.symbols import Q_LEN, SCORE
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.axes import block_of, rows_on
from sparsedsl.program.branches import Attend, blocks_of_keys
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Take
from sparsedsl.program.select import Choice
from sparsedsl.runtime.call import check_call, inner_call
from sparsedsl.runtime.heads import alike, lse_merge, repeat_kv
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.repeated import Again
from sparsedsl.runtime.sinks import sink_logit
from sparsedsl.selection.chunking import PIECES, cut
from sparsedsl.selection.scores_at_blocks import selected_scores
from sparsedsl.selection.selected_call import SelectedAgain, SelectedCall
from sparsedsl.selection.union_lists import joined_lists

__all__ = ["attend_node", "chunk_weights"]

Tensor = torch.Tensor
# Output, and LSE where it is wanted.
Result = tuple[Tensor, Tensor | None]


# Names of the nodes of an attention that are read as tables with rows.
_TABLES: Cache[tuple[str, ...]] = Cache()


def attend_node(run: Lowering, node: Attend) -> Any:
    """``(out, lse)`` of an attend node; the LSE is None where nobody reads it."""
    parts = parts_of(node, run.dispatch.whole_tables)
    k, v, places = _keys(run, node, parts)
    q, k, v = alike(run.value(node.x), k, v)
    kv_heads = k.shape[1] if places is None else places.kv_heads(k)
    if q.shape[1] % kv_heads:
        raise ShapeError(f"attend(): {q.shape[1]} query heads are no multiple of {kv_heads} key heads")
    if not k.shape[2]:
        return _no_rows(run, node, q, k, v)
    weights, log_total = chunk_weights(run, node)
    work = _AttendCall(run, node, parts, weights, places)
    found = [work.of(rows, q, k, v) for rows in work.pieces()]
    out, lse = (
        None if part[0] is None else part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in zip(*found, strict=True)
    )
    if run.keeps and (shortcut := work.shortcut(q, k, v)) is not None:
        run.shortcuts[node] = shortcut
    return out, lse if node.normaliser is None else log_total


def _no_rows(run: Lowering, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """No window is complete yet, or no block: one row of zeros that nobody may see."""
    pattern = replace(node.pattern, mask=as_mask(False), score=Score(SCORE), causal=False)
    k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    tables, wanted = {name: run.call.tables[name] for name in pattern.tables}, node in run.weighed
    return run.dispatch.attend(pattern, q, k, v, tables, q_offset=run.domain.q_offset, scale=run.call.scale, lse=wanted)


def _keys(run: Lowering, node: Attend, parts: MaskSplit) -> tuple[Tensor, Tensor, Places | None]:
    """Keys and values, and where they lie: those in one order are read in it, if no lists are followed."""
    if parts.selected == sympy.false and isinstance(node.y, Take) and isinstance(node.z, Take) and node.y.order is node.z.order:
        (k, of_k), (v, of_v) = run.placed(node.y), run.placed(node.z)
        if of_k is of_v:
            return k, v, None if of_k is None else Places(of_k)
    if run.in_pages is None:
        return run.value(node.y), run.value(node.z), None
    paged = run.paged(node.y), run.paged(node.z)
    if paged[0] is paged[1] is None:
        return run.value(node.y), run.value(node.z), None
    seen = pages_seen(run, node, parts, run.in_pages.page)
    k, v = (run.value(x) if of is None else run.in_pages.seen(of, seen) for x, of in zip((node.y, node.z), paged, strict=True))
    return k, v, None


@dataclass(frozen=True, eq=False)
class _AttendCall:
    """An attend node of a call. ``weights``: of the chunks of its normaliser, along the selected blocks of its normaliser; None
    without one. ``places``: of rows of keys that are not gathered."""

    run: Lowering
    node: Attend
    parts: MaskSplit
    weights: Tensor | None
    places: Places | None = None

    # ---- pieces of queries -------------------------------------------------------------------------------------------------

    def pieces(self) -> Iterable[slice]:
        """The queries, by number in the call, in pieces whose tables are small."""
        domain, nodes = self.run.domain, self._nodes()
        taken = sum(self._row_bytes(node) for node in nodes if block_of(node.axes[2]) == 1)
        step = max(1, PIECES.now.table_bytes // max(1, taken))
        if step >= domain.rows:
            return [slice(0, domain.rows)]
        # Computed once, and not again with each piece in the backward pass.
        for read in self.node.pattern.bound.values():
            if isinstance(read, Node):
                self.run.value(read)
        # Blocks of queries are not cut.
        whole = math.lcm(*(block_of(node.axes[2]) for node in nodes))
        return cut(0, domain.rows, max(step // whole, 1) * whole)

    def shortcut(self, q: Tensor, k: Tensor, v: Tensor) -> Shortcut | None:
        """The passes alone, where one choice at most is followed, nothing is read as a table, and nothing is made for lengths."""
        node, parts, run, domain = self.node, self.parts, self.run, self.run.domain
        static, selected = parts.static != sympy.false, parts.selected != sympy.false
        reads = any(_reads_nodes(node, mask) for mask in (parts.static, parts.selected))
        if (
            reads
            or (selected and blocks_of_keys(node) > 1)
            or self.places is not None
            or run.call.tables
            or parts.symbols
            or len(parts.choices) > 1
        ):
            return None
        if selected and node.pattern.sink is not None:
            return None
        near = far = None
        if static or not selected:
            pattern = _fixed(node, parts.static, not selected)
            near = run.dispatch.attend_again(pattern, q, k, v, q_offset=domain.q_offset, scale=run.call.scale)
        if selected:
            call = self.selected_call(replace(domain, kv_len=k.shape[2], heads=q.shape[1]), None, q, k, v)
            far = run.dispatch.selected_again(q, k, v, call)
        if (near is None and (static or not selected)) or (far is None and selected):
            return None
        return functools.partial(_again, node, parts.choices[0] if selected else None, near, far)

    def _nodes(self) -> list[Node]:
        """The nodes that are read as tables with a row for each query, or for each block of queries."""
        bound = self.node.pattern.bound
        return [bound[name] for name in _TABLES.get((self.node.key, self.run.dispatch.whole_tables), [], self._names)]

    def _names(self) -> tuple[str, ...]:
        pattern, found = self.node.pattern, []
        exprs = (self.parts.static, self.parts.selected, pattern.score.expr)
        reads = {read for expr in exprs for read in table_reads(expr)}
        for name, node in pattern.bound.items():
            own = [read for read in reads if read.spec.name == name]
            if own and isinstance(node, Node) and len(node.axes) == 4 and (block_of(node.axes[2]) > 1 or has_own_rows(node, own)):
                found.append(name)
        return tuple(found)

    def _row_bytes(self, node: Node) -> int:
        domain = self.run.domain
        each = 1 if isinstance(node, Choice) else self.run.call.dtype.itemsize
        return domain.batch * domain.heads * rows_on(node.axes[3], domain.kv_len) * each

    def of(self, rows: slice, q: Tensor, k: Tensor, v: Tensor) -> Result:
        """The results of some queries."""
        domain = self.run.domain
        if (domain.kv_len, domain.heads) != (k.shape[2], q.shape[1]):
            domain = replace(domain, kv_len=k.shape[2], heads=q.shape[1])
        if rows == slice(0, domain.rows):
            return self._of(domain, None, q, k, v)
        part = replace(domain, rows=rows.stop - rows.start, q_offset=domain.q_offset + rows.start)
        if not torch.is_grad_enabled():
            return self._of(part, rows, q[:, :, rows], k, v)
        # The backward pass makes the tables of a piece again: all of them together are what is too much.
        return checkpoint(self._of, part, rows, q[:, :, rows], k, v, use_reentrant=False)

    def _of(self, domain: Domain, rows: slice | None, q: Tensor, k: Tensor, v: Tensor) -> Result:
        node, parts, wanted = self.node, self.parts, self.node in self.run.weighed
        if parts.selected == sympy.false:
            return self.static(domain, rows, q, k, v, sink=True, lse=wanted)
        made = self.selected_call(domain, rows, q, k, v)
        near: Any = None
        if parts.static != sympy.false:
            near = self.static(domain, rows, q, k, v, sink=False, lse=True)
        found: Any = self.run.dispatch.selected(q, k, v, made, near)
        if node.pattern.sink is not None:
            call = check_call(attend(True), q, k, v, {}, q_offset=domain.q_offset)
            logit = sink_logit(self._written(rows), call, self.run.call.tables, self.run.call.dtype)
            found = lse_merge([found, (torch.zeros_like(found[0]), logit)])
        return found

    def _written(self, rows: slice | None) -> Pattern:
        """The node's pattern; of a piece with the length of the whole, which is no longer that of the piece, as a number."""
        pattern = self.node.pattern
        sink = pattern.sink
        if sink is not None:
            sink = Score(self._lengths(sink.expr, rows), sink.bound)
        score = Score(self._lengths(pattern.score.expr, rows), pattern.score.bound)
        return replace(pattern, score=score, sink=sink, causal=False)

    def _lengths(self, expr: Any, rows: slice | None) -> Any:
        return expr if rows is None else expr.xreplace({Q_LEN: sympy.Integer(self.run.domain.lengths["q_len"])})

    # ---- what attends in any case --------------------------------------------------------------------------------------------

    def static(self, domain: Domain, rows: slice | None, q: Tensor, k: Tensor, v: Tensor, *, sink: bool, lse: bool) -> Result:
        """Attention over a mask that reads tables only."""
        pattern, tables = self._pattern(self.parts.static, rows, sink=sink)
        run = self.run
        return run.dispatch.attend(
            pattern, q, k, v, tables, q_offset=domain.q_offset, scale=run.call.scale, lse=lse, places=self.places
        )

    def _pattern(
        self, mask: Any, rows: slice | None, *, sink: bool, more: Mapping[str, Tensor] = MappingProxyType({})
    ) -> tuple[Pattern, dict[str, Tensor]]:
        """The pattern with another mask, its reads of nodes as reads of tables, and all tables it reads."""
        if rows is None and not more and not _reads_nodes(self.node, mask):
            made = _fixed(self.node, mask, sink)
            return made, {name: self.run.call.tables[name] for name in made.tables}
        own, written = self.node.pattern, self._written(rows)
        mask, masks = self.run.concrete(self._lengths(mask, rows), own.mask.bound, rows)
        score, scores = self.run.concrete(written.score.expr, own.score.bound, rows)
        made = replace(own, mask=Mask(mask), score=Score(score), sink=written.sink if sink else None, causal=False)
        tables = {**self.run.call.tables, **masks, **scores, **more}
        return made, {name: tables[name] for name in made.tables}

    # ---- what choices add ----------------------------------------------------------------------------------------------------

    def selected_call(self, domain: Domain, rows: slice | None, q: Tensor, k: Tensor, v: Tensor) -> SelectedCall:
        """Attention along the lists of the choices, as a backend is asked for it."""
        run, node, parts = self.run, self.node, self.parts
        tokens = blocks_of_keys(node)
        lists = [run.value(choice) for choice in parts.choices]
        lists = lists if tokens == 1 else [selected.of_rows(tokens, k.shape[2]) for selected in lists]
        lists = lists if rows is None else [selected.rows(rows) for selected in lists]
        weights = self.weights if rows is None or self.weights is None else self.weights[:, :, rows]
        blocks, members = lists[0], None
        if len(lists) > 1:
            blocks, members = joined_lists(lists, domain.kv_len, parts.wanted)
        bits = {symbol.name: _either(q.device) for symbol in parts.symbols}
        reach, tables = self._pattern(parts.reach, rows, sink=False, more=bits)
        call = inner_call(reach, q, k, v, tables, q_offset=domain.q_offset, scale=run.scale(node.pattern.scale, q))
        mask, _ = run.concrete(self._lengths(parts.selected, rows), node.pattern.mask.bound, rows)
        symbols = tuple(symbol.name for symbol in parts.symbols)
        return SelectedCall(
            blocks, call.scale, replace(call.domain, tables={}) if call.tables else call.domain, mask, reach.score.expr,
            {name: table for name, table in call.tables.items() if name not in bits}, symbols,
            members if symbols else None, weights, node.normaliser is not None and node.normaliser.inner == "softmax1",
        )  # fmt: skip


def _again(node: Attend, choice: Choice | None, near: Again | None, far: SelectedAgain | None, run: Lowering) -> Result | None:
    """``near``: over the keys that attend in any case; ``far``: along the lists of the choice."""
    q, k, v, q_offset = run.value(node.x), run.value(node.y), run.value(node.z), run.domain.q_offset
    if not k.shape[2]:  # no window is complete yet
        return None
    if not q.dtype is k.dtype is v.dtype:
        q, k, v = alike(q, k, v)
    first = near(q, k, v, q_offset) if near is not None else None
    if far is None or choice is None:
        return first
    weights, log_total = (None, None) if node.normaliser is None else chunk_weights(run, node)
    if near is not None and first is None:
        return None
    found = far(q, k, v, q_offset, run.value(choice), weights, first)
    return found if found is None or node.normaliser is None else (found[0], log_total)


def chunk_weights(run: Lowering, node: Attend) -> tuple[Tensor | None, Tensor | None]:
    """Those of the chunks of its normaliser, along the lists, and the logarithm of their sum for each query head, where somebody reads it;
    None without a normaliser."""
    rule = node.normaliser
    if rule is None:
        return None, None
    if node in run.chunk_weights:
        return run.chunk_weights[node]
    weights, log_total = run.dispatch.weighed(selected_scores(run.value(rule.scores), run.value(rule.selected)), rule.weights)
    return weights, repeat_kv(log_total, run.call.q.shape[1]) if node in run.weighed else None


@functools.lru_cache(maxsize=1024)
def _reads_nodes(node: Attend, mask: Any) -> bool:
    """Whether a mask, or the score of an attention, reads what other nodes give."""
    names = {name for name, value in node.pattern.bound.items() if isinstance(value, Node)}
    return any(read.spec.name in names for expr in (mask, node.pattern.score.expr) for read in table_reads(expr))


@functools.lru_cache(maxsize=1024)
def _fixed(node: Attend, mask: Any, sink: bool) -> Pattern:
    """The pattern of an attention with another mask, which reads nothing of other nodes: the same at every call."""
    own = node.pattern
    return replace(own, mask=Mask(mask), score=Score(own.score.expr), sink=own.sink if sink else None, causal=False)


@functools.lru_cache(maxsize=16)
def _either(device: torch.device) -> Tensor:
    return torch.tensor(EITHER, device=device)
