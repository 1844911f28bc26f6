"""Sums over many entries of a table as loops: terms that differ in one constant index become one term with a running index.

A score that adds up a small network, ``out[0]*relu(hidden[0]*x) + out[1]*relu(hidden[1]*x) + ...``, has as many terms as the network has
units, and as many derivatives. Written out they make kernels that compile for minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import sympy
from sympy.core.relational import Relational

from sparsedsl.lang import strict
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.tables import TableRead, table_reads

__all__ = ["UNIT", "Rolled", "apart", "rolled", "sums_in"]

# The running index. One is enough: no sum lies in the terms of another.
UNIT = sympy.Symbol("unit", integer=True, nonnegative=True)
# Fewer terms are written out: a loop has its price.
FEWEST = 8


class Rolled(sympy.Expr):
    """The sum of ``term`` over ``UNIT`` from ``first`` on, ``count`` numbers: ``Rolled(term, first, count)``."""

    is_commutative = True
    is_extended_real = True

    @property
    def term(self) -> sympy.Expr:
        """What is added up; it reads ``UNIT``."""
        return self.args[0]

    @property
    def units(self) -> tuple[int, int]:
        """The first value of ``UNIT``, and how many there are."""
        return int(self.args[1]), int(self.args[2])


def rolled(expr: sympy.Expr, keep: Callable[[TableRead], bool] = lambda read: True) -> sympy.Expr:
    """``expr`` with sums of eight and more such terms as :class:`Rolled`, all over the same units: where they would not be, it stays.

    Args:
        keep: of a read, whether there may be a running index in it.

    >>> import sparsedsl as sd
    >>> weights, shifts = sd.table("weights", dtype=float), sd.table("shifts", dtype=float)
    >>> total = sd.score + sum(weights[j] * sd.relu(shifts[j] * sd.score) for j in range(12))
    >>> rolled(total.expr)
    score + Rolled(weights[unit]*Relu(score*shifts[unit]), 0, 12)
    """
    found = _rolled(expr, keep)
    # A read of a table by the running index stands for one thing.
    return found if len({one.units for one in sums_in(found)}) < 2 else expr


@functools.lru_cache(maxsize=512)
def _rolled(expr: sympy.Expr, keep: Callable[[TableRead], bool]) -> sympy.Expr:
    if len(table_reads(expr)) < FEWEST or isinstance(expr, (strict.StrictFunction, Relational, TableRead)):
        return expr
    parts = [_rolled(part, keep) if isinstance(part, sympy.Expr) else part for part in expr.args]
    if any(new is not old for new, old in zip(parts, expr.args, strict=True)):
        expr = expr.func(*parts)
    return _rolled_terms(expr, keep) if isinstance(expr, sympy.Add) else expr


def _rolled_terms(expr: sympy.Add, keep: Callable[[TableRead], bool]) -> sympy.Expr:
    places: dict[sympy.Expr, set[int]] = {}
    for term in expr.args:
        reads = () if sums_in(term) else table_reads(term)
        for value in {index for read in reads for index in read.args if index.is_Integer}:
            places.setdefault(_running(term, value), set()).add(int(value))
    left, sums = set(expr.args), []
    for template, values in sorted(places.items(), key=lambda item: (-len(item[1]), sympy.default_sort_key(item[0]))):
        if len(values) < FEWEST - 1 or not all(keep(read) for read in table_reads(template) if UNIT in facts(read).symbols):
            continue
        # A term in which the index stands for something else too (a table's first entry) has another template: neighbours are looked at.
        near = sorted({value + step for value in values for step in (-1, 0, 1) if value + step >= 0})
        terms = {n: template.xreplace({UNIT: sympy.Integer(n)}) for n in near}
        for run in _runs([n for n, term in terms.items() if term in left]):
            if len(run) >= FEWEST:
                left -= {terms[n] for n in run}
                sums.append(Rolled(template, sympy.Integer(run[0]), sympy.Integer(len(run))))
    return sympy.Add(*(term for term in expr.args if term in left), *sums) if sums else expr


def _runs(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers, cut where one is missing."""
    runs: list[list[int]] = []
    for n in numbers:
        if not runs or runs[-1][-1] != n - 1:
            runs.append([])
        runs[-1].append(n)
    return runs


def _running(term: sympy.Expr, value: sympy.Integer) -> sympy.Expr:
    """The term with ``UNIT`` for ``value`` where that is an index."""
    return term.xreplace(
        {
            read: read.func(*(UNIT if index == value else index for index in read.args))
            for read in table_reads(term)
            if value in read.args
        }
    )


def sums_in(*exprs: sympy.Basic) -> list[Rolled]:
    """The sums of these expressions, each once; a sum in a sum does not count."""
    found: dict[sympy.Basic, None] = {}
    waiting, seen = list(reversed(exprs)), set[sympy.Basic]()
    while waiting:
        expr = waiting.pop()
        if isinstance(expr, Rolled):
            found[expr] = None
        elif expr not in seen and UNIT in facts(expr).symbols:
            seen.add(expr)
            waiting += reversed(expr.args)
    return [one for one in found if isinstance(one, Rolled)]


def apart(terms: Sequence[sympy.Basic]) -> tuple[list[sympy.Basic], dict[sympy.Symbol, sympy.Expr]]:
    """The terms with a symbol for each real number that is the same for all units, and what these symbols stand for.

    >>> import sparsedsl as sd
    >>> apart([UNIT * sd.exp(sd.score).expr / sd.q_idx.expr])
    ([same_0*unit], {same_0: exp(score)/q_idx})
    """
    same: dict[sympy.Expr, sympy.Symbol] = {}
    known: dict[sympy.Basic, sympy.Basic] = {}

    def named(expr: sympy.Expr) -> sympy.Expr:
        if not expr.args or expr.is_integer or not (facts(expr).symbols or facts(expr).reads):
            return expr
        return same.setdefault(expr, sympy.Symbol(f"same_{len(same)}", extended_real=True))

    def of(expr: sympy.Basic) -> sympy.Basic:
        if expr not in known:
            known[expr] = work(expr)
        return known[expr]

    def work(expr: sympy.Basic) -> sympy.Basic:
        if isinstance(expr, Rolled) or UNIT not in facts(expr).symbols:
            return named(expr) if isinstance(expr, sympy.Expr) else expr
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            alike = [part for part in expr.args if isinstance(part, Rolled) or UNIT not in facts(part).symbols]
            parts = [of(part) for part in expr.args if part not in alike]
            return expr.func(*parts, *([named(expr.func(*alike))] if alike else []))
        if not expr.args or isinstance(expr, TableRead):
            return expr
        if isinstance(expr, Relational):
            return expr.func(*map(of, expr.args), evaluate=False)
        return expr.func(*map(of, expr.args))

    return [of(term) for term in terms], {symbol: expr for expr, symbol in same.items()}
