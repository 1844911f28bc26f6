"""Options that code reads at the moment it uses them, and that a caller may change for a while.

What is kept here says how much is worked on at once and from where on another way is taken: time and memory, never more of a
result than roundings. Each floor has its own frozen dataclass of such options, with the reasons beside the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

__all__ = ["Adjustable"]

Options = TypeVar("Options")


class Adjustable(Generic[Options]):
    """Holds the options that count now. They count for the whole process, all of its threads included.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Sizes:
    ...     rows: int = 4096
    >>> sizes = Adjustable(Sizes())
    >>> with sizes.using(rows=1):
    ...     print(sizes.now)
    Sizes(rows=1)
    >>> sizes.now.rows
    4096
    """

    def __init__(self, options: Options) -> None:
        self.now = options

    @contextmanager
    def using(self, **changes: Any) -> Iterator[Options]:
        """Other values for some fields until the block is left, also by an error. TypeError for a field that there is not.

        What was worked out before, and kept, stays as it was: schedules, tile lists.
        """
        before = self.now
        self.now = dataclasses.replace(before, **changes)  # type: ignore[type-var]
        try:
            yield self.now
        finally:
            self.now = before
