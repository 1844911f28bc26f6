"""Masks whose queries see only keys of their own residue: each residue is a short sequence of its own, and its mask is often a interval.

``causal & ((q_idx - kv_idx) % 4 == 0)`` over positions 0, 4, 8, .. is plain causal attention, and so it is over 1, 5, 9, ..
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import sympy

from sparsedsl.analysis.key_intervals import intervals
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.lang import functions as fn
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.strict import StrictFunction
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, Q_IDX, Q_LEN

__all__ = ["RESIDUE", "Residues", "residues"]

# The residue of a position.
RESIDUE = sympy.Symbol("residue", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Residues:
    """``pattern`` over the positions of one residue: ``q_idx`` and ``kv_idx`` count within it, ``residue`` is the residue
    modulo ``step``."""

    pattern: Pattern
    step: int


@functools.lru_cache(maxsize=512)
def residues(pattern: Pattern) -> Residues | None:
    """The pattern within a residue, if that has intervals where the whole has none; else None.

    >>> import sparsedsl as sd
    >>> causal = sd.kv_idx <= sd.q_idx
    >>> residues(sd.attend(causal & ((sd.q_idx - sd.kv_idx) % 4 == 0) & (sd.q_idx - sd.kv_idx < 100)))
    Residues(pattern=<Pattern attend((4*kv_idx <= 4*q_idx) & (4*q_idx - 4*kv_idx < 100))>, step=4)
    >>> residues(sd.attend(causal)) is None
    True
    """
    mask = pattern.mask.expr
    read = mask.free_symbols | pattern.score.expr.free_symbols
    learned = any(spec.learned and name in pattern.score.tables for name, spec in pattern.tables.items())
    exact = any(expr.has(StrictFunction) for expr in pattern.exprs)
    # The lengths of a residue are not those that the pattern asks for; gradients and prepared tables go along whole axes.
    if read & {Q_LEN, KV_LEN} or learned or exact or intervals(mask) is not None:
        return None
    for step in _steps(mask):
        within = _within(pattern, step)
        found = [intervals(within.mask.expr, of=of) for of in ("keys", "queries")]
        if all(some is not None and not any(interval.searched for interval in some) for some in found):
            return Residues(within, step)
    return None


def _steps(mask: sympy.Basic) -> list[int]:
    """Numbers that every clause wants ``q_idx - kv_idx`` to be a multiple of, the largest first."""
    common: set[int] | None = None
    for clause in clauses(mask):
        mine = {
            int(relation.lhs.args[1])
            for relation in clause.rest
            if isinstance(relation, sympy.Eq)
            and isinstance(relation.lhs, fn.Mod)
            and relation.rhs == 0
            and relation.lhs.args[1].is_Integer
            and relation.lhs.args[1] > 1
            and relation.lhs.args[0] in (Q_IDX - KV_IDX, KV_IDX - Q_IDX)
        }
        common = mine if common is None else common & mine
    return sorted(common or (), reverse=True)


def _within(pattern: Pattern, step: int) -> Pattern:
    places = {Q_IDX: step * Q_IDX + RESIDUE, KV_IDX: step * KV_IDX + RESIDUE}
    mask, score = Mask(_simplified(pattern.mask.expr.xreplace(places))), Score(pattern.score.expr.xreplace(places))
    return replace(pattern, mask=mask, score=score, causal=False)


def _simplified(mask: sympy.Basic) -> sympy.Basic:
    """Sums multiplied out, so that residues cancel; relations between numbers decided."""
    expanded = mask.replace(lambda node: isinstance(node, fn.Mod), lambda node: fn.Mod(sympy.expand(node.args[0]), node.args[1]))
    return expanded.replace(lambda node: isinstance(node, sympy.Add), sympy.expand)
