"""How many cases the test kit draws, and which, where a test run says so: what ``pytest --sparsedsl-examples=N`` sets.

It lies this low, and loads nothing, because pytest reads it at every start, whatever it is to test.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable

__all__ = ["ASKED", "Asked"]


@dataclass(frozen=True)
class Asked:
    """``examples``: random cases a property; ``seed``: of the cases; None: as the code says that calls the kit."""

    examples: int | None = None
    seed: int | None = None


# Has the last word in `sd.testing.check`, `sd.testing.kernel_test` and the command.
ASKED = Adjustable(Asked())
