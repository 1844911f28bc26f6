"""Read the text form of a program back: :func:`read_program`. Never executes Python: it walks the syntax tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.text import Reader, reading
from sparsedsl.program import branches, orders, scores, select, sources, tensors
from sparsedsl.program.graph import Program
from sparsedsl.program.node import one_of

__all__ = ["read_program"]

_NODES: Mapping[str, Any] = {
    "input": tensors.input,
    "summary": tensors.summary,
    "take": orders.take,
    "segment_sort": orders.segment_sort,
    "inverse": lambda order: one_of(orders.Inverse(order)),
    "keep_tokens": orders.keep_tokens,
    "dot": scores.dot,
    "bound": scores.bound,
    "antidiagonal": scores.antidiagonal,
    "probe": scores.probe,
    "smooth": scores.smooth,
    "softmax": lambda scores, among: scores.softmax(among),
    "regroup": lambda scores, unit, how="sum": scores.regroup(unit, how),
    "gumbel": lambda scores, seed: scores.gumbel(seed),
    "plus": lambda first, second: first + second,
    "grouped": scores.grouped,
    "top_k": select.top_k,
    "top_p": select.top_p,
    "threshold": select.threshold,
    "slots": sources.slots,
    "attend": branches.attend,
    "recall": branches.recall,
    "linear": branches.linear,
    "joint": branches.joint,
    "mix": branches.mix,
    "compact": branches.compact,
}


class _ProgramReader(Reader):
    functions = Reader.functions | _NODES | {"per_chunk": sources.per_chunk}  # type: ignore[operator]

    def __init__(self, source: str):
        super().__init__(source)
        self.names |= {"q": tensors.q, "k": tensors.k, "v": tensors.v}

    def declares(self, function: str) -> bool:
        """A table, or a node."""
        return function in _NODES or super().declares(function)


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
        before = set(reader.names)
        reader.program()
        made = [value for name, value in reader.names.items() if name not in before]
        if not made:
            raise PatternError("this is not the text form of a program, which ends with an attention")
        return Program(made[-1])
