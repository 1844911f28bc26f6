"""What the parts of the converter ask of each other: a node as an index, a mask, a score, or an operand of exact operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, Score
from sparsedsl.tracing.trace_graph import TraceNode, fail

__all__ = ["Conversion"]


class Conversion(ABC):
    """Base of :class:`~sparsedsl.tracing.convert.Converter` and its parts."""

    @abstractmethod
    def index(self, node: TraceNode) -> Index:
        """A node of integer or boolean type as an integer expression."""

    @abstractmethod
    def mask(self, node: TraceNode) -> Mask:
        """A node of any type as a boolean: not zero."""

    @abstractmethod
    def score(self, node: TraceNode) -> Score:
        """A node of any type as a real expression."""

    @abstractmethod
    def exact(self, node: TraceNode) -> sympy.Basic:
        """A node of any type as an operand of exact operations."""

    @abstractmethod
    def read(self, node: TraceNode) -> Any:
        """A table read: an index, a mask or a score by the table's type."""

    @abstractmethod
    def opaque(self, node: TraceNode) -> Index:
        """An integer operation that the language has no word for, as an exact operation."""

    @abstractmethod
    def integer_compare(self, op: str, left: Index, right: Index) -> Mask:
        """A comparison of integers."""

    def located(self, convert: Callable[[TraceNode], Any], node: TraceNode) -> Any:
        """``convert(node)``, with errors of the language given the place where the operation stands."""
        try:
            return convert(node)
        except PatternError as error:
            fail(f"`{node.op}`", str(error), node.where)
