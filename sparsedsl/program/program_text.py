"""Read the text forms of programs and patterns back: :func:`read_program`, :func:`read_given`. Never executes Python: it walks the
syntax tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Mask, as_mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.table_reads import Table
from sparsedsl.lang.text import Reader, reading
from sparsedsl.program import branches, given_blocks, key_choices, orders, recurrences, scores, select, sources, tensors
from sparsedsl.program.graph import Program
from sparsedsl.program.node import one_of
from sparsedsl.program.rules import Rules

__all__ = ["TEXT_RULES", "read_given", "read_program"]

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
        key_choices.Diagonals: key_choices.diagonals,
        key_choices.ChosenKeys: key_choices.keys_chosen,
        key_choices.Divergence: key_choices.divergence,
        scores.Softmax: lambda scores, among: scores.softmax(among),
        scores.Regroup: lambda scores, block, how="sum": scores.regroup(block, how),
        scores.Gumbel: lambda scores, seed: scores.gumbel(seed),
        scores.Plus: lambda first, second: first + second,
        scores.Relu: lambda x: x.relu(),
        scores.Scaled: lambda x, factor=1.0, offset=0.0: one_of(scores.Scaled(x, factor, offset)),
        scores.Weighted: lambda x, by: by * x,
        scores.Overlap: lambda x, block, how="strips": x.overlap(block, how),
        scores.GivenScores: scores.given_scores,
        scores.GivenKeyScores: scores.given_key_scores,
        scores.Grouped: scores.grouped,
        scores.GroupedKeys: scores.grouped,
        select.TopK: select.top_k,
        select.TopP: select.top_p,
        select.Threshold: select.threshold,
        given_blocks.Given: given_blocks.given,
        sources.Slots: sources.slots,
        branches.Attend: branches.attend,
        branches.Recall: branches.recall,
        recurrences.Linear: recurrences.linear,
        branches.Joint: branches.joint,
        branches.Mix: branches.mix,
        branches.Compact: branches.compact,
    },
)
_NODES = {kind.function: make for kind, make in TEXT_RULES.items()}


class _ProgramReader(Reader):
    functions = Reader.functions | _NODES | {"per_chunk": sources.per_chunk}  # type: ignore[operator]

    def __init__(self, source: str, bound: Mapping[str, Any] | None = None):
        super().__init__(source)
        self.names |= {"q": tensors.q, "k": tensors.k, "v": tensors.v}
        self.own_names = frozenset(self.names)
        if bound:
            declare = self.functions["table"]
            self.functions = {**self.functions, "table": lambda *a, **words: _BoundTable(declare(*a, **words), bound)}

    def declares(self, function: str) -> bool:
        """A table, or a node."""
        return function in _NODES or super().declares(function)

    @property
    def nodes(self) -> list[Any]:
        """The nodes that were declared."""
        return [value for name, value in self.names.items() if name not in self.own_names]


class _BoundTable:
    """A table whose reads carry its tensor, if there is one for it."""

    def __init__(self, table: Table[Any], bound: Mapping[str, Any]):
        self.table = table
        self.tensors = {name: tensor for name, tensor in bound.items() if name == table.spec.name}

    def __getitem__(self, indices: Any) -> Any:
        return self.table[indices].bind(**self.tensors)


def read_program(text: str) -> Program:
    """The program of a text form: ``read_program(program.text) == program``.

    Raises :class:`~sparsedsl.PatternError` for what is not part of the language.

    >>> import sparsedsl as sd
    >>> program = sd.Program(sd.patterns.nsa())
    >>> read_program(program.text) == program
    True
    """
    if not isinstance(text, str):
        raise PatternError(f"a program is read from text; got {type(text).__name__}")
    with reading(text):
        reader = _ProgramReader(text)
        reader.program()
        if not reader.nodes:
            raise PatternError("this is not the text form of a program, which ends with an attention")
        return Program(reader.nodes[-1])


def read_given(text: str, bound: Mapping[str, Any] | None = None) -> Mask | Pattern | Program:
    """What a text form is of: a mask, a pattern (it ends with ``attend(...)``) or a program (with ``name = attend(...)``).

    ``bound``: table name -> tensor, for tables that are to be bound. Raises :class:`~sparsedsl.PatternError` for what is not part of the
    language, and for an expression that is no mask.

    >>> import sparsedsl as sd
    >>> read_given("kv_idx <= q_idx"), read_given(sd.attend(sd.kv_idx <= sd.q_idx, scale=0.5).text)
    (Mask(kv_idx <= q_idx), <Pattern attend(kv_idx <= q_idx, scale=0.5)>)
    >>> program = sd.Program(sd.patterns.moba())
    >>> read_given(program.text) == program
    True
    """
    if not isinstance(text, str):
        raise PatternError(f"a pattern is read from text; got {type(text).__name__}")
    with reading(text):
        reader = _ProgramReader(text, bound)
        match reader.program():
            case [] if reader.nodes:
                return Program(reader.nodes[-1])
            case [Pattern() as pattern]:
                return pattern
            case [Mask() | bool() as mask]:
                return as_mask(mask)
        raise PatternError("this is the text form of no mask, pattern or program")
