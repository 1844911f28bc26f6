"""A program as a small picture: of its first attention, the pairs that attend whatever is chosen, and lighter those that may."""

from __future__ import annotations

from typing import Any

from sparsedsl.lang.thumbnail import thumbnail
from sparsedsl.program.branches import Attend
from sparsedsl.program.decided import possible

__all__ = ["picture_of"]


def picture_of(program: Any, **lengths: int) -> str:
    """SVG of a :class:`~sparsedsl.Program`; see :func:`~sparsedsl.lang.thumbnail.thumbnail`. Empty where there is no attention, or its
    mask reads tables without values.

    >>> import sparsedsl as sd
    >>> picture_of(sd.Program(sd.patterns.moba(chunk=16, top_k=2)))[:4], picture_of(sd.Program(sd.patterns.ring_linear([0.9])))
    ('<svg', '')
    """
    for node in program.nodes(Attend):
        mask = node.pattern.mask
        allowed, certain = possible(mask), ~possible(~mask)
        return thumbnail(certain.expr, program.bound, possible=allowed.expr, **lengths)
    return ""
