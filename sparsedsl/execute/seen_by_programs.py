"""The mask of all keys that a program can see, whatever it chooses."""

from __future__ import annotations

from sparsedsl.lang.expressions import Mask
from sparsedsl.program.graph import Program

__all__ = ["mask_of"]


def mask_of(program: Program) -> Mask | None:
    """The pairs of which some may attend; None: it may be any key, or what is chosen depends on all."""
    return None if program.static is None else program.static.mask
