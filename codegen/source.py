"""A small writer of Python text: lines, indentation, names that are still free."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["Source"]


class Source:
    """Python source under construction.

    ``taken``: names that :meth:`fresh` must not give out.

    >>> source = Source()
    >>> with source.block("def double(x):"):
    ...     source.line("return 2 * x")
    >>> print(source.text, end="")
    def double(x):
        return 2 * x
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._lines: list[str] = []
        self._depth = 0
        self._taken = set(taken)

    def line(self, text: str = "") -> None:
        """Add one line at the present depth; an empty one stays without blanks."""
        self._lines.append(" " * (4 * self._depth) + text if text else "")

    def lines(self, text: str) -> None:
        """Add several lines, each at the present depth plus its own indentation."""
        for line in text.strip("\n").split("\n"):
            self.line(line)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """A header line, such as ``def f():``, and what the body writes, one step deeper."""
        self.line(header)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @contextmanager
    def scope(self, taken: Iterable[str] = ()) -> Iterator[None]:
        """Names given out within are free again afterwards, as those of a function's own variables are.

        >>> source = Source()
        >>> with source.scope(taken=["x"]):
        ...     source.fresh("x"), source.fresh("y")
        ('x_1', 'y')
        >>> source.fresh("x")
        'x'
        """
        outer = self._taken
        self._taken = outer | set(taken)
        try:
            yield
        finally:
            self._taken = outer

    def fresh(self, stem: str) -> str:
        """``stem``, or ``stem`` with a number, whichever is free first; it is taken from then on.

        >>> source = Source(taken=["doc"])
        >>> source.fresh("doc"), source.fresh("doc"), source.fresh("pos")
        ('doc_1', 'doc_2', 'pos')
        """
        name, number = stem, 0
        while name in self._taken or keyword.iskeyword(name):
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        return name

    @property
    def text(self) -> str:
        """Everything written so far, ending in a newline."""
        return "\n".join(self._lines) + "\n"
