"""One evaluation of a program by backends: what every rule of the lowering asks of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.kept_summaries import BlockRows, Pooling
from sparsedsl.execute.paged_keys import RequestKeys
from sparsedsl.lang.symbols import Q_IDX
from sparsedsl.lang.tables import TableRead, read_class, table_reads
from sparsedsl.lang.wrapped import Expression
from sparsedsl.program.axes import block_of, rows_on
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Take
from sparsedsl.program.tensors import Input
from sparsedsl.runtime.heads import NEVER, repeat_kv
from sparsedsl.runtime.interpreter import Evaluation, Rule
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.selection.scores import ScoreSource
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["Lowering", "Shortcut", "has_own_rows", "reads_nodes"]

Tensor = torch.Tensor
Shortcut = Callable[[Any], Any]
"""From an evaluation of a call of a known kind (:mod:`runtime.repeated`) to a node's value, without what only depends on the kind; None:
the rule is to find it."""


class Lowering(Evaluation):
    """Tensors keep their types, scores are sources that give blocks, choices are lists; a branch gives ``(out, lse or None)``.

    ``dispatch``: who does the work. ``lse``: whether the root's is wanted. ``shortcuts``: those of the kind of call, if it is known.
    ``keeps``: rules leave shortcuts for later calls of this kind. ``after``: of recurrences that ran, how many keys they read,
    and the state after these. ``summaries``: what knows the rows of blocks of keys, if that is not the call itself: earlier calls,
    or other devices. ``in_pages``: what reads the rows of k and v; None: they are all there. ``chunk_weights``: of attentions whose chunks
    were weighed in another evaluation.
    """

    def __init__(
        self, rules: Mapping[type[Node], Rule], call: ProgramCall, dispatch: Dispatch, *, lse: bool,
        shortcuts: dict[Node, Shortcut] | None = None, keeps: bool = False, summaries: BlockRows | None = None,
        in_pages: RequestKeys | None = None,
    ) -> None:  # fmt: skip
        super().__init__(rules, call)
        self.summaries, self.in_pages = summaries, in_pages
        self.dispatch, self.keeps = dispatch, keeps
        self.shortcuts: dict[Node, Shortcut] = {} if shortcuts is None else shortcuts
        self.after: dict[Node, tuple[int, Any]] = {}
        self.chunk_weights: dict[Node, tuple[Tensor | None, Tensor | None]] = {}
        if shortcuts is not None:
            self.values.update(call.inputs.items())
        # Branches whose LSE somebody reads: FlexAttention has none on CPU, and the others save the work.
        self.weighed: Set[Node] = call.program.joined | {call.program.root} if lse else call.program.joined

    def value(self, node: Node) -> Any:
        """What a node gives."""
        if node in self.values:
            return self.values[node]
        shortcut = self.shortcuts.get(node)
        found = None if shortcut is None else shortcut(self)
        if found is None:
            found = self.rules[type(node)](self, node)
        self.values[node] = found
        return found

    def pooled(self, node: Any, of: Node, pool: Pooling) -> Tensor:
        """One row for every block of what the node ``of`` gives, by ``pool``; of keys, those of blocks that are over are kept, if any."""
        if self.in_pages is not None and (paged := self.paged(of)) is not None:
            return self.in_pages.pooled(node, paged, pool)
        x = self.value(of)
        if self.summaries is None or not isinstance(of, Input):
            return pool(x)
        return self.summaries.rows(node, of.name, x, pool)

    def paged(self, node: Node) -> Input | None:
        """The input that a node is, k or v, if its rows are read as they are asked for."""
        if self.in_pages is None:
            return None
        while isinstance(node, Input) and node not in self.call.inputs and node.default is not None:
            node = node.default
        return node if isinstance(node, Input) and node in self.in_pages.inputs else None

    def shaped(self, node: Node) -> Any:
        """What a node gives, for its shape and dtype alone: of rows in pages none is read."""
        paged = self.paged(node)
        return self.value(node) if paged is None else self.call.inputs[paged]

    def placed(self, node: Node) -> tuple[Tensor, Tensor | None]:
        """The rows that a node gives: of rows taken in an order those they are taken from, and the order, where somebody may follow it."""
        if isinstance(node, Take) and node not in self.values and self.dispatch.follows_places(self.call.q):
            return self.value(node.x), self.value(node.order)
        return self.value(node), None

    def again(self, call: ProgramCall, *, lse: bool) -> Any:
        """The result of another call, whose program is part of this one."""
        return type(self)(self.rules, call, self.dispatch, lse=lse).value(call.program.root)

    def scale(self, own: float | None, q: Tensor) -> float:
        """The factor on dot products: the call's, else the node's own, else the usual one."""
        return self.call.scale or own or q.shape[3] ** -0.5

    def concrete(self, expr: Any, bound: Mapping[str, Any], rows: slice | None = None) -> tuple[Any, dict[str, Tensor]]:
        """An expression whose reads of nodes are reads of tables, and those tables. Rows of tables are counted from their first.

        ``rows``: the queries that are looked at, by number in the call; tables with a row for each query then hold these alone.
        """
        reads = table_reads(expr)
        nodes = {read.spec.name: node for read in reads if isinstance(node := bound.get(read.spec.name), Node)}
        tables, first = {}, {}
        for name, node in nodes.items():
            part = rows if has_own_rows(node, [read for read in reads if read.spec.name == name]) else None
            tables[name] = self.table(node, part)
            if tables[name].ndim == 4:
                first[name] = self.domain.q_offset // block_of(node.axes[2]) + (0 if part is None else part.start)

        def counted(part: Any) -> Any:
            args = [counted(argument) for argument in part.args]
            if isinstance(part, TableRead) and part.spec.name in first:
                return read_class(part.spec)(*args[:2], args[2] - first[part.spec.name], args[3])
            return part if all(map(operator.is_, args, part.args)) else part.func(*args)

        return (counted(expr) if first else expr), tables

    def table(self, node: Node, rows: slice | None = None) -> Tensor:
        """What a node gives, as a table ``(B, H, ..)`` that masks and scores read; with ``rows`` those rows of it."""
        value = self.value(node)
        if isinstance(value, SelectedBlocks):
            value = (value if rows is None else value.rows(rows)).table()
        elif isinstance(value, ScoreSource):
            blocks = value.shape[3]
            value = (value if rows is None else value.narrowed(rows, slice(0, blocks))).scores()
            value = functional.pad(value, (0, rows_on(node.axes[3], self.domain.kv_len) - blocks), value=NEVER)
        return repeat_kv(value, self.domain.heads)


def has_own_rows(node: Node, reads: Iterable[TableRead]) -> bool:
    """Whether a node gives a row for each query, and these reads of it are of the row of the query that asks."""
    return len(node.axes) == 4 and node.axes[2] == "queries" and all(read.args[2] == Q_IDX for read in reads)


def reads_nodes(*parts: Expression) -> bool:
    """Whether masks or scores read what nodes of the program give."""
    return any(isinstance(part.bound.get(read.spec.name), Node) for part in parts for read in table_reads(part.expr))
