"""One evaluation of a program by the kernels of a backend: what every rule of the lowering asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.kernels import Kernels
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.program.axes import unit_of
from sparsedsl.program.branches import Branch, Joint
from sparsedsl.program.node import Node
from sparsedsl.runtime.heads import NEVER, spread
from sparsedsl.runtime.interpreter import Evaluation, Rule
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.selection.scores import ScoreSource
from sparsedsl.selection.selected import Picks

__all__ = ["Lowering"]

Tensor = torch.Tensor


class Lowering(Evaluation):
    """Tensors keep their types, scores are sources that give blocks, choices are lists; a branch gives ``(out, lse or None)``.

    ``kernels``: of the backend. ``lse``: whether the root's is wanted.
    """

    def __init__(self, rules: Mapping[type[Node], Rule], call: ProgramCall, kernels: Kernels, *, lse: bool):
        super().__init__(rules, call)
        self.kernels = kernels
        root = call.program.root
        # Branches whose LSE somebody reads: FlexAttention has none on CPU, and the others save the work.
        self.weighed: set[Branch] = {branch for node in call.program.order if isinstance(node, Joint) for branch in node.branches}
        self.weighed |= {root} if lse else set()

    def again(self, call: ProgramCall, *, lse: bool) -> Any:
        """The result of another call, whose program is part of this one."""
        return type(self)(self.rules, call, self.kernels, lse=lse).value(call.program.root)

    def scale(self, own: float | None, q: Tensor) -> float:
        """The factor on dot products: the call's, else the node's own, else the usual one."""
        return self.call.scale or own or q.shape[3] ** -0.5

    def concrete(self, part: Any) -> tuple[Any, dict[str, Tensor]]:
        """An expression whose reads of nodes are reads of tables, and those tables. Rows of units are counted from the call's first."""
        expr, tables = part.expr, {}
        for name, node in part.bound.items():
            if not isinstance(node, Node) or name not in part.tables:
                continue
            table = tables[name] = self.table(node)
            for read in table_reads(expr):
                if read.spec.name == name and table.ndim == 4:
                    first = self.domain.q_offset // unit_of(node.axes[2])
                    moved = (read.args[0], read.args[1], read.args[2] - first, read.args[3])
                    expr = expr.xreplace({read: read_class(read.spec)(*moved)})
        return expr, tables

    def concrete_pattern(self, pattern: Pattern) -> tuple[Pattern, dict[str, Tensor]]:
        """A pattern whose reads of nodes are reads of tables, and all tables it reads."""
        (mask, masks), (score, scores) = self.concrete(pattern.mask), self.concrete(pattern.score)
        made = Pattern(Mask(mask), Score(score), pattern.sink, pattern.scale)
        tables = {**self.call.tables, **masks, **scores}
        return made, {name: tables[name] for name in made.tables}

    def table(self, node: Node) -> Tensor:
        """What a node gives, as a table ``(B, H, ..)`` that masks and scores read."""
        value = self.value(node)
        if isinstance(value, Picks):
            value = value.table()
        elif isinstance(value, ScoreSource):
            rows, units = value.shape[2:]
            if unit_of(node.axes[2]) == 1 and rows * units > self.kernels.most_table_entries:
                raise UnsupportedError(
                    f"{node!r} is read as a table inside of a score: {rows} queries x {units} units would have to be held. "
                    "Use larger units, or backend='reference', which holds them"
                )
            value = functional.pad(value.scores(), (0, -(-self.domain.kv_len // unit_of(node.axes[3])) - units), value=NEVER)
        return spread(value, self.domain.heads)
