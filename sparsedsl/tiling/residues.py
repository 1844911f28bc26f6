"""A mask as a union of disjoint *residue classes*: regular subsets of queries and keys on which it is dense, and the scattered rest.

Input: a boolean expression. Output: :class:`ResidueClass` objects, no two of which allow the same pair. Conditions such as
``(q_idx - kv_idx) % 8 == 0`` become coordinates: the queries with remainder 3 see the keys with remainder 3, and among those the
mask is an ordinary window. A strided view makes each residue dense.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.mask_clauses import Clause, clauses
from sparsedsl.lang import functions as fn
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.plain_values import Reported

__all__ = ["ResidueClass", "residue_classes", "union"]

# A remainder of more than this many residues makes residue classes too short to be worth a view each.
MAX_RESIDUES = 64


@dataclass(frozen=True)
class ResidueClass(Reported):
    """Queries at positions ``q_start + q_step * i`` and keys at ``kv_start + kv_step * j``; ``mask`` reads ``i`` as ``q_idx``, ``j`` as
    ``kv_idx``. ``scattered``: the mask has conditions that no row solves to intervals."""

    mask: Boolean
    q_start: int = 0
    q_step: int = 1
    kv_start: int = 0
    kv_step: int = 1
    scattered: bool = False

    def _said(self) -> dict[str, Any]:
        places = {"q_start": self.q_start, "q_step": self.q_step, "kv_start": self.kv_start, "kv_step": self.kv_step}
        return {"mask": expression_text(self.mask), **places, "scattered": self.scattered}

    @property
    def plain(self) -> bool:
        """Whether its coordinates are the positions themselves."""
        return (self.q_start, self.q_step, self.kv_start, self.kv_step) == (0, 1, 0, 1)

    def inside(self, expr: sympy.Basic) -> sympy.Basic:
        """An expression over positions, written in the coordinates of the residue."""
        if self.plain:
            return expr
        return expr.xreplace({Q_IDX: self.q_step * Q_IDX + self.q_start, KV_IDX: self.kv_step * KV_IDX + self.kv_start})

    def __str__(self) -> str:
        if self.plain:
            return "every query, every key"
        return f"queries {_progression(self.q_start, self.q_step)}, keys {_progression(self.kv_start, self.kv_step)}"


def _progression(start: int, step: int) -> str:
    return "all" if step == 1 else f"{start}, {start + step}, {start + 2 * step}, .."


@dataclass(frozen=True)
class _Congruence:
    """``(a * q_idx + c * kv_idx + shift) % modulus == remainder`` with ``a``, ``c`` in -1, 0, 1, ``c`` not 0."""

    a: int
    c: int
    modulus: int
    remainder: int

    def residues(self) -> list[tuple[int, int, int, int]]:
        """``(q_start, q_step, kv_start, kv_step)`` of the residue classes."""
        starts = range(self.modulus) if self.a else range(1)
        q_step = self.modulus if self.a else 1
        return [(q, q_step, self.c * (self.remainder - self.a * q) % self.modulus, self.modulus) for q in starts]


@functools.lru_cache(maxsize=1024)
def residue_classes(mask: Boolean) -> tuple[ResidueClass, ...]:
    """The residue classes of a mask: first the conditions that intervals solve, then those with remainders, then the rest.

    >>> from sparsedsl import kv_idx, q_idx
    >>> found = residue_classes((((q_idx - kv_idx) % 4 == 0) & (kv_idx <= q_idx)).expr)
    >>> len(found), str(found[1]), found[1].mask
    (4, 'queries 1, 5, 9, .., keys 1, 5, 9, ..', kv_idx - q_idx <= 0)
    """
    dense: list[Clause] = []
    regular: dict[_Congruence, list[Boolean]] = {}
    rest: list[Clause] = []
    for clause in clauses(mask):
        found = next((c for c in map(_congruence, clause.rest) if c is not None), None)
        if not clause.rest:
            dense.append(clause)
        elif found is not None:
            regular.setdefault(found, []).append(_expression(clause))
        else:
            rest.append(clause)
    done: list[Boolean] = []
    result: list[ResidueClass] = []
    if dense:
        done = [_expression(clause) for clause in dense]
        result.append(ResidueClass(union(done)))
    for congruence, parts in regular.items():
        remaining = sympy.And(union(parts), *(sympy.Not(d) for d in done))
        found_classes = []
        for place in congruence.residues():
            residue = ResidueClass(remaining, *place)
            found_classes.append(ResidueClass(_normal(residue.inside(remaining)), *place))
        if any(clause.rest for residue in found_classes for clause in clauses(residue.mask)):
            rest += [clause for part in parts for clause in clauses(part)]
            continue
        result += [residue for residue in found_classes if residue.mask != sympy.false]
        done += parts
    if rest:
        remaining = sympy.And(union([_expression(clause) for clause in rest]), *(sympy.Not(d) for d in done))
        result.append(ResidueClass(remaining, scattered=True))
    return tuple(result)


def union(parts: list[Boolean]) -> Boolean:
    """``a | c | ..``; of nothing, the mask that allows nothing."""
    return sympy.Or(*parts)


def _expression(clause: Clause) -> Boolean:
    """The clause as one condition."""
    parts: list[Boolean] = list(clause.rest)
    for bound in clause.bounds:
        form = bound.q_part + bound.kv_part
        parts += [] if bound.low is None else [sympy.Le(bound.low - form, 0)]
        parts += [] if bound.high is None else [sympy.Le(form - bound.high, 0)]
    return sympy.And(*parts)


def _normal(mask: Boolean) -> Boolean:
    """The union of the clauses of a mask whose coordinates were changed: common factors divided out."""
    return union([_expression(clause) for clause in clauses(mask)])


def _congruence(relation: Boolean) -> _Congruence | None:
    """``relation`` if it fixes the remainder of a key, or of a difference or sum of query and key."""
    if not isinstance(relation, sympy.Eq):
        return None
    difference = relation.lhs - relation.rhs
    terms = [t.as_coeff_Mul() for t in sympy.Add.make_args(difference)]
    mods = [(sign, t) for sign, t in terms if isinstance(t, fn.Mod)]
    if len(mods) != 1 or abs(mods[0][0]) != 1:
        return None
    sign, mod = mods[0]
    other = (difference - sign * mod) * -sign
    argument, modulus = mod.args
    if not (other.is_Integer and modulus.is_Integer and 2 <= modulus <= MAX_RESIDUES and 0 <= other < modulus):
        return None
    a, c = argument.coeff(Q_IDX), argument.coeff(KV_IDX)
    shift = argument - a * Q_IDX - c * KV_IDX
    if a not in (-1, 0, 1) or c not in (-1, 1) or not shift.is_Integer:
        return None
    return _Congruence(int(a), int(c), int(modulus), int(other - shift) % int(modulus))
