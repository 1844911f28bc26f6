"""Where a pattern or program changes: the lengths and positions that random cases must come close to, and go beyond."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch

from sparsedsl.lang.tables import table_reads

__all__ = ["constants_of", "edges_of"]

# Cases beyond this many keys are left to proofs.
_FARTHEST = 5000
# Values of a table that are looked at.
_VALUES = 6


def constants_of(exprs: Iterable[sympy.Basic]) -> set[int]:
    """The whole numbers written in expressions, divisors too.

    >>> import sparsedsl as sd
    >>> sorted(constants_of([((sd.q_idx // 64 == sd.kv_idx // 64) & (sd.q_idx - sd.kv_idx < 300)).expr]))
    [0, 1, 64, 299]
    """
    numbers = {n for expr in exprs for n in expr.atoms(sympy.Rational)}
    return {abs(int(part)) for n in numbers for part in (n.p, n.q)}


def edges_of(exprs: Iterable[sympy.Basic], bound: Mapping[str, Any], numbers: Iterable[int] = ()) -> list[int]:
    """Positions at which something may change: constants and products of two, ranges of tables, values and lengths of those given.

    Args:
        exprs: of a pattern or program.
        bound: name -> tensor; what else is bound is left out.
        numbers: more constants: chunk sizes, delays, windows.
    """
    exprs = tuple(exprs)
    constants = constants_of(exprs) | {abs(n) for n in numbers}
    found = constants | {a * b for a, b in itertools.combinations(sorted(c for c in constants if 1 < c <= _FARTHEST), 2)}
    for read in {read for expr in exprs for read in table_reads(expr)}:
        found |= {abs(n) for n in read.spec.values_in or ()}
    for value in bound.values():
        if isinstance(value, torch.Tensor):
            found |= set(value.shape)
            if value.numel() and not value.is_floating_point() and value.dtype != torch.bool:
                seen = value.unique()
                found |= {abs(int(seen[i])) for i in {round(n * (len(seen) - 1) / (_VALUES - 1)) for n in range(_VALUES)}}
    return sorted(n for n in found if 1 < n <= _FARTHEST)
