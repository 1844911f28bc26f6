"""Masks that only say which blocks attend: every pair of a block of queries and a block of keys is allowed, or none is."""

from __future__ import annotations

import functools
import math

import sympy
from sympy.logic.boolalg import Boolean

from sparsedsl.lang.symbols import KV_IDX, Q_IDX

__all__ = ["block_sides"]


@functools.lru_cache(maxsize=1024)
def block_sides(mask: Boolean) -> tuple[int, int] | None:
    """Queries and keys of the largest blocks, counted from position 0, within which ``mask`` has one value; None if it has none.

    >>> import sparsedsl as sd
    >>> chosen = sd.table("chosen", dtype=bool)
    >>> block_sides(chosen[sd.q_idx // 128, sd.kv_idx // 64].expr), block_sides((sd.kv_idx <= sd.q_idx).expr)
    ((128, 64), None)
    """
    sides = []
    for index in (Q_IDX, KV_IDX):
        found = [node for node in mask.atoms(sympy.floor) if _side(node, index) > 1]
        if not found or index in mask.xreplace({node: sympy.Dummy(integer=True) for node in found}).free_symbols:
            return None
        sides.append(math.gcd(*(_side(node, index) for node in found)))
    return sides[0], sides[1]


def _side(node: sympy.Basic, index: sympy.Symbol) -> int:
    """``n`` of ``index // n``; 0 of anything else."""
    share = node.args[0] / index
    return int(share.q) if share.is_Rational and share.p == 1 else 0
