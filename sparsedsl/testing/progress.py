"""What a check shows while it runs: a bar where somebody watches a terminal, a line every few seconds where the output is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["Progress"]

# Seconds between two lines; a check that is over before says nothing.
EVERY = 5.0


class Progress:
    """Counts cases, or other ``unit``, towards ``total``. ``shown``: whether anything is shown at all; ``stream``: where, None: stderr.

    >>> import io
    >>> out, times = io.StringIO(), iter([0.0, 2.0, 6.0, 7.0])
    >>> with Progress(3, "numbers", stream=out, clock=lambda: next(times)) as progress:
    ...     for _ in range(3):
    ...         progress.update()
    >>> print(out.getvalue(), end="")
    numbers: 2 of 3 cases, 6 s
    """

    def __init__(
        self,
        total: int,
        what: str,
        *,
        unit: str = "cases",
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.unit, self.done, self.note = total, what, unit, 0, ""
        self._stream = sys.stderr if stream is None else stream
        watched = shown and self._stream.isatty()
        self._bar: Any = (
            tqdm(total=total, desc=f"{what:10}", unit=f" {unit}", leave=False, file=self._stream) if watched else None
        )
        self._clock = clock if shown and not watched else None
        self._began = self._told = clock() if self._clock else 0.0

    def update(self, cases: int = 1) -> None:
        """So many cases are over."""
        self.done += cases
        if self._bar is not None:
            self._bar.update(cases)
        self._tell()

    def say(self, note: str) -> None:
        """What goes on beside counting."""
        self.note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note)
        self._tell()

    def _tell(self) -> None:
        if self._clock is None:
            return
        now = self._clock()
        if now - self._told >= EVERY:
            self._told = now
            note = f"; {self.note}" if self.note else ""
            told = f"{self.what}: {self.done} of {self.total} {self.unit}, {now - self._began:.0f} s{note}"
            print(told, file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
