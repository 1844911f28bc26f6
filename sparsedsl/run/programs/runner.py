"""Evaluate a program node by node: what the dense reference and the fast lowerings have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.nn import functional

from sparsedsl.analysis.domain import Domain
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.evaluate import evaluate
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.program.axes import unit_of
from sparsedsl.program.node import Node
from sparsedsl.program.tensors import Input
from sparsedsl.run.programs.call import ProgramCall
from sparsedsl.run.programs.parts import spread

__all__ = ["Runner", "means"]

Tensor = torch.Tensor


def means(*kinds: type) -> Callable[[Any], Any]:
    """Mark a method as what nodes of these kinds give."""

    def mark(method: Any) -> Any:
        method.kinds = kinds
        return method

    return mark


def _kinds(method: Any) -> tuple[type, ...]:
    return getattr(method, "kinds", ())


class Runner:
    """One evaluation of a program: node -> value, each computed once.

    What a kind of node means is a method marked with :func:`means`; a subclass's method takes the place of one for the same kind.
    """

    _rules: ClassVar[dict[type, str]] = {}

    def __init_subclass__(cls) -> None:
        cls._rules = {
            kind: name for base in reversed(cls.__mro__) for name, method in vars(base).items() for kind in _kinds(method)
        }

    def __init__(self, call: ProgramCall):
        self.call = call
        self.values: dict[Node, Any] = {}
        self.domain: Domain = call.domain

    def value(self, node: Node) -> Any:
        """What a node gives."""
        if node not in self.values:
            kind = next((kind for kind in type(node).__mro__ if kind in self._rules), None)
            if kind is None:
                raise UnsupportedError(f"no meaning is written for {type(node).__name__}")
            self.values[node] = getattr(self, self._rules[kind])(node)
        return self.values[node]

    @means(Input)
    def _given(self, node: Input) -> Tensor:
        if node not in self.call.inputs:
            assert node.default is not None
            return self.value(node.default)
        return self.as_given(self.call.inputs[node])

    def as_given(self, x: Tensor) -> Tensor:
        """An input in the type that is computed in."""
        return x.to(self.call.dtype) if x.is_floating_point() else x

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
        return spread(self.value(node), self.domain.heads)

    def check_aligned(self, unit: int, what: str) -> None:
        if self.domain.q_offset % unit:
            raise UnsupportedError(
                f"{what} works on whole units of {unit} queries: q_offset must be a multiple of {unit}; got {self.domain.q_offset}"
            )

    def units(self, mask: Mask, node: Any) -> Tensor:
        """Which (unit of queries, unit of keys) hold a pair that the mask allows."""
        rows, columns = unit_of(node.axes[2]), unit_of(node.axes[3])
        self.check_aligned(rows, f"{node.function}()")
        allowed = self.pairs(mask)
        height, width = self.domain.rows, self.domain.kv_len
        allowed = functional.pad(allowed, (0, -width % columns, 0, -height % rows))
        allowed = allowed.unflatten(3, (-1, columns)).any(4).unflatten(2, (-1, rows)).any(3)
        return allowed

    def pairs(self, mask: Mask) -> Tensor:
        """The mask at every pair: ``(batch or 1, heads or 1, rows, keys)``."""
        domain, device = self.domain, self.call.q.device
        expr, tables = self.concrete(mask)
        env: dict[str, Any] = {**domain.lengths, **self.call.tables, **tables}
        env["b"] = torch.arange(domain.batch, device=device)[:, None, None, None]
        env["h"] = torch.arange(domain.heads, device=device)[:, None, None]
        env["q_idx"] = torch.arange(domain.q_offset, domain.q_offset + domain.rows, device=device)[:, None]
        env["kv_idx"] = torch.arange(domain.kv_len, device=device)
        value = evaluate(expr, env)
        reads = any(isinstance(bound, Node) for bound in mask.bound.values())
        lead = [
            size if symbol in expr.free_symbols or reads else 1 for symbol, size in ((BATCH, domain.batch), (HEAD, domain.heads))
        ]
        return value.expand(*lead, domain.rows, domain.kv_len)

    def check_square(self, what: str) -> None:
        if self.domain.q_offset or self.domain.rows != self.domain.kv_len:
            raise UnsupportedError(
                f"{what} chooses among the tokens of one whole sequence: it needs as many queries as keys and q_offset=0; got "
                f"{self.domain.rows} queries at {self.domain.q_offset} and {self.domain.kv_len} keys. "
                "Use it for prefill, and another pattern to decode"
            )
