"""How many query heads a pattern is written for: what it declares, and the length of tables that are read by the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sparsedsl.errors import ShapeError
from sparsedsl.lang.pattern import Pattern

__all__ = ["count_heads"]


def count_heads(patterns: Iterable[Pattern], tables: Mapping[str, Any], heads: int | None) -> int:
    """``heads``, checked against what the patterns and their tables say; None takes what they say, else 1.

    A shard of the heads counts them from 0, so that without ``head_offset`` it would get what is meant for the first heads: a number that
    does not fit is refused. A table with fewer entries than there are heads is left to the check of what is read.

    >>> import torch, sparsedsl as sd
    >>> count_heads([sd.attend(True, score=sd.patterns.alibi(8))], {}, None)
    8
    >>> window = sd.table("window")
    >>> count_heads([sd.attend(sd.q_idx - sd.kv_idx < window[sd.h])], {"window": torch.tensor([4, 9])}, None)
    2

    Raises :class:`~sparsedsl.ShapeError`.
    """
    found: dict[int, str] = {}
    for pattern in patterns:
        if pattern.heads is not None:
            found.setdefault(pattern.heads, "the pattern is declared for")
        for name, dim in pattern.head_reads:
            table = tables.get(name)
            if table is not None and table.ndim > dim:
                found.setdefault(table.shape[dim], f"table {name!r} is read by h and has")
    if heads is None:
        return next(iter(found), 1)
    for number, source in found.items():
        if number > heads or (number < heads and source.startswith("the pattern")):
            raise ShapeError(
                f"{source} {number} heads; this call has {heads}. A part of the heads counts them from 0 and would get what is meant "
                "for the first ones: say which the first one is, head_offset=, or give it a table with its own entries (slopes too: "
                f"alibi(slopes='slopes') reads them from a table), or a pattern for {heads} heads"
            )
    return heads
