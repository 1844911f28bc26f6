"""What a search shows while it runs: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from sparsedsl.quantities import seconds_text

__all__ = ["Progress"]

SECONDS = 5.0  # between two lines


class Progress:
    """Counts steps of stages, on ``sys.stderr``; shows nothing unless ``shown``."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bar: Any = None
        self._what, self._done, self._total, self._said, self._began = "", 0, 0, 0.0, 0.0

    @contextlib.contextmanager
    def stage(self, what: str, total: int) -> Iterator[None]:
        """One stage of so many steps."""
        self._what, self._done, self._total = what, 0, total
        self._began = self._said = time.monotonic()
        if self.shown and total and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit="run", leave=False, file=sys.stderr)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            elif total:
                self._say()

    def step(self) -> None:
        """One step is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif time.monotonic() - self._said >= SECONDS:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        if self.shown:
            seconds = self._said - self._began
            print(f"search: {self._what}, {self._done} of {self._total}, {seconds_text(seconds)}", file=sys.stderr, flush=True)
