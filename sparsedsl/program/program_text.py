"""Read the text form of a program back: :func:`read_program`. Never executes Python: it walks the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.text import Reader, reading
from sparsedsl.lang.wrapped import Expression
from sparsedsl.program import branches, orders, scores, select, sources, tensors
from sparsedsl.program.graph import Program
from sparsedsl.program.node import one_of
from sparsedsl.program.rules import Rules

__all__ = ["TEXT_RULES", "read_program"]

# What is called for the word that a node of the kind is written with; kinds that share a word share it too.
TEXT_RULES: Rules[Callable[..., Any]] = Rules(
    "the text form",
    {
        tensors.Input: tensors.input,
        tensors.Summary: tensors.summary,
        orders.Take: orders.take,
        orders.Order: orders.segment_sort,
        orders.Inverse: lambda order: one_of(orders.Inverse(order)),
        orders.Tokens: orders.keep_tokens,
        scores.Dot: scores.dot,
        scores.Bound: scores.bound,
        scores.Antidiagonal: scores.antidiagonal,
        scores.Probe: scores.probe,
        scores.Smooth: scores.smooth,
        scores.Softmax: lambda scores, among: scores.softmax(among),
        scores.Regroup: lambda scores, block, how="sum": scores.regroup(block, how),
        scores.Gumbel: lambda scores, seed: scores.gumbel(seed),
        scores.Plus: lambda first, second: first + second,
        scores.Grouped: scores.grouped,
        scores.GroupedKeys: scores.grouped,
        select.TopK: select.top_k,
        select.TopP: select.top_p,
        select.Threshold: select.threshold,
        sources.Slots: sources.slots,
        branches.Attend: branches.attend,
        branches.Recall: branches.recall,
        branches.Linear: branches.linear,
        branches.Joint: branches.joint,
        branches.Mix: branches.mix,
        branches.Compact: branches.compact,
    },
)
_NODES = {kind.function: make for kind, make in TEXT_RULES.items()}


class _ProgramReader(Reader):
    functions = Reader.functions | _NODES | {"per_chunk": sources.per_chunk}  # type: ignore[operator]

    def __init__(self, source: str, bound: Mapping[str, Any]):
        super().__init__(source)
        self.bound = bound
        self.names |= {"q": tensors.q, "k": tensors.k, "v": tensors.v}

    def declares(self, function: str) -> bool:
        """A table, or a node."""
        return function in _NODES or super().declares(function)

    def value(self, node: ast.AST) -> Any:
        """The value of one syntax node; reads of tables that are bound carry them."""
        found = super().value(node)
        match node:
            case ast.Subscript(value=ast.Name(id=name)) if (
                name in self.bound and name in self.tables and isinstance(found, Expression)
            ):
                return found.bind(**{name: self.bound[name]})
        return found


def read_program(text: str, bound: Mapping[str, Any] | None = None) -> Program:
    """The program of a text form: ``read_program(program.text, program.bound) == program``. ``bound``: tensors of its tables, by name.

    Raises :class:`~sparsedsl.PatternError` for what is not part of the language.

    >>> import sparsedsl as sd
    >>> program = sd.Program(sd.patterns.nsa())
    >>> read_program(program.text) == program
    True
    """
    if not isinstance(text, str):
        raise PatternError(f"a program is read from text; got {type(text).__name__}")
    with reading(text):
        reader = _ProgramReader(text, bound or {})
        before = set(reader.names)
        reader.program()
        made = [value for name, value in reader.names.items() if name not in before]
        if not made:
            raise PatternError("this is not the text form of a program, which ends with an attention")
        return Program(made[-1])
