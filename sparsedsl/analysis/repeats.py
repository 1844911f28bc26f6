"""A mask at any length as few kinds of squares: what repeats is looked at once.

Cut the grid into *squares* of ``side`` tokens, a multiple of the tile and of every divisor in the mask. From one square to the next, each
number that the mask compares (a *form*: ``q_idx - kv_idx``, ``q_idx // 1500``, ``kv_idx % 4``) changes by a constant, whatever the
place in the square. So a square is known by its forms: all below a limit, none below it, or, next to a limit, exactly where. In a
row of squares those next to a limit are few, and between them lie *runs* of equal squares; from row to row the ends of runs move along
straight lines. Rows between two crossings of such lines, a *strip*, are an arithmetic series. Python integers throughout: nothing wraps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.intervals import Intervals, TableRanges
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.lang import functions as fn
from sparsedsl.lang.conditions import Fact, fact_of
from sparsedsl.lang.symbols import KV_IDX, Q_IDX

__all__ = ["RowRun", "Square", "Strip", "strips"]

# No square is larger, for it is worked out tile by tile; and no more lines of ends are compared, in all kinds of rows together.
LARGEST_SIDE, MOST_CROSSINGS = 1 << 17, 1 << 17


class _Irregular(Exception):
    """Something does not change by a constant from square to square, or too much changes."""


@dataclass(frozen=True)
class Square:
    """``rows x keys`` pairs from row ``row`` (0 is the first query) and key ``column`` on; smaller than others at the ends."""

    row: int
    column: int
    rows: int
    keys: int


@dataclass(frozen=True)
class RowRun:
    """Squares side by side, all alike, and like every other square with this ``kind``: ``first`` of them in the first row of squares of
    the strip, ``last`` in the last, and evenly more or fewer between. ``square`` is one of them."""

    square: Square
    kind: tuple[object, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Strip:
    """``count`` rows of squares that are made of the same runs."""

    count: int
    runs: tuple[RowRun, ...]


def strips(mask: Boolean, rows: int, kv_len: int, block: tuple[int, int]) -> tuple[Strip, ...] | None:
    """Every square of ``rows x kv_len`` pairs once, or None where they do not repeat.

    ``mask`` reads no symbols but ``q_idx``, counted from the first query, and ``kv_idx``. Squares are cut along tiles of ``block`` tokens.

    >>> import sparsedsl as sd
    >>> [strip.count for strip in strips((sd.kv_idx <= sd.q_idx).expr, 2**40, 2**40, (128, 128))]
    [1, 8589934589, 1, 1]
    """
    try:
        return tuple(_Cut(mask, rows, kv_len, block).strips())
    except _Irregular:
        return None


@dataclass(frozen=True)
class _RowForm:
    """``local + by_row * R + by_column * C`` in square (R, C), with ``low <= local <= high`` over the square; it matters whether it
    reaches ``limit``."""

    by_row: int
    by_column: int
    low: int
    high: int
    limit: int

    def place(self, row: int, column: int) -> bool | tuple[int]:
        """Whether all of the square reaches the limit or nothing does; else how far the square is moved."""
        moved = self.by_row * row + self.by_column * column
        if moved + self.low >= self.limit or moved + self.high < self.limit:
            return moved + self.low >= self.limit
        return (moved,)

    def changes(self, step: int, fixed: int) -> list[int]:
        """Where along ``step * i + fixed`` the square's place is another than at ``i - 1``; perhaps one or two more."""
        if step > 0:
            first = -((self.high + fixed - self.limit) // step)
        else:
            first = (self.low + fixed - self.limit) // -step + 1
        return [first + i for i in range(-(-(self.high - self.low) // abs(step)) + 1)]


class _Cut:
    def __init__(self, mask: Boolean, rows: int, kv_len: int, block: tuple[int, int]):
        self.rows, self.kv_len = rows, kv_len
        facts = _facts(mask)
        needs = [_period(fact.form) for fact in facts]
        self.side = side = math.lcm(*block, *needs)
        if side > LARGEST_SIDE:
            raise _Irregular
        local = Intervals({"q_idx": (0, side - 1), "kv_idx": (0, side - 1)}, TableRanges({}))
        self.forms: list[_RowForm] = []
        for fact in facts:
            low, high = local.range(fact.form)
            by_row, by_column = (side * _slope(fact.form, symbol) for symbol in (Q_IDX, KV_IDX))
            if not all(isinstance(v, int) or v == int(v) for v in (low, high) if abs(v) != math.inf) or math.inf in (-low, high):
                raise _Irregular
            for limit in _limits(fact):
                self.forms.append(_RowForm(int(by_row), int(by_column), int(low), int(high), limit))
        self.forms = list(dict.fromkeys(self.forms))

    def strips(self) -> Iterator[Strip]:
        """Rows of whole squares by what limits rows alone, then the rest."""
        whole, rest = divmod(self.rows, self.side)
        cuts = {0, whole}
        for form in self.forms:
            if form.by_column == 0 and form.by_row != 0:
                cuts.update(cut for cut in form.changes(form.by_row, 0) if 0 < cut < whole)
        for first, stop in itertools.pairwise(sorted(cuts)):
            yield from self._series(first, stop)
        if rest:
            yield self._strip([whole], rest)

    def _series(self, first: int, stop: int) -> Iterator[Strip]:
        """Rows ``first .. stop - 1``: by remainders, so that ends move by whole squares, and cut where ends cross."""
        moving = [form for form in self.forms if form.by_column]
        step = math.lcm(*(abs(form.by_column) // math.gcd(form.by_row, form.by_column) for form in moving))
        ends = sum(len(form.changes(form.by_column, 0)) for form in moving) + 3
        if min(step, stop - first) * ends**2 > MOST_CROSSINGS:
            raise _Irregular
        for start in range(first, min(first + step, stop)):
            count = -(-(stop - start) // step)
            lines = list(zip(self._ends(start), self._ends(start + step), strict=True))
            cuts = {0, count}
            for (a, a_next), (b, b_next) in itertools.combinations(set(lines), 2):
                if (speed := (a_next - a) - (b_next - b)) != 0:
                    # They meet at (b - a) / speed: before it, there, and after it the order is another.
                    cuts.update(cut for cut in (-((a - b) // speed), (b - a) // speed + 1) if 0 < cut < count)
            for begin, end in itertools.pairwise(sorted(cuts)):
                yield self._strip([start + step * i for i in (begin, end - 1)], self.side, end - begin)

    def _ends(self, row: int) -> list[int]:
        """Columns at which squares of a row may be of another kind than the one before; beyond the keys too."""
        whole = self.kv_len // self.side
        moving = (form.changes(form.by_column, form.by_row * row) for form in self.forms if form.by_column)
        return [0, whole, whole + 1, *itertools.chain.from_iterable(moving)]

    def _strip(self, places: list[int], rows: int, count: int = 1) -> Strip:
        """The strip whose first and last rows of squares are ``places``."""
        runs = [self._runs(row, rows) for row in places]
        if [run.kind for run in runs[0]] != [run.kind for run in runs[-1]]:
            raise _Irregular
        joined = (RowRun(a.square, a.kind, a.first, b.first) for a, b in zip(runs[0], runs[-1], strict=True))
        return Strip(count, tuple(joined))

    def _runs(self, row: int, rows: int) -> list[RowRun]:
        whole, rest = divmod(self.kv_len, self.side)
        ends = sorted({end for end in self._ends(row) if 0 <= end <= whole})
        found = [self._run(row, start, stop, rows, self.side) for start, stop in itertools.pairwise(ends)]
        return [*found, self._run(row, whole, whole + 1, rows, rest)] if rest else found

    def _run(self, row: int, start: int, stop: int, rows: int, keys: int) -> RowRun:
        kinds = {(rows, keys, *(form.place(row, column) for form in self.forms)) for column in (start, stop - 1)}
        if len(kinds) > 1:
            raise _Irregular
        return RowRun(Square(row * self.side, start * self.side, rows, keys), kinds.pop(), stop - start, stop - start)


def _facts(mask: Boolean) -> list[Fact]:
    """Everything that decides the mask, as forms of integers with limits that are numbers."""
    found = []
    for clause in clauses(mask):
        found += [Fact(bound.q_part + bound.kv_part, bound.low, bound.high) for bound in clause.bounds]
        for part in clause.rest:
            relations = part.atoms(Relational)
            if not relations or part.xreplace(dict.fromkeys(relations, sympy.true)).free_symbols:
                raise _Irregular
            known = [fact_of(relation) for relation in relations]
            if any(fact is None for fact in known):
                raise _Irregular
            found += [fact for fact in known if fact is not None]
    if any(limit is not None and not limit.is_Integer for fact in found for limit in (fact.low, fact.high)):
        raise _Irregular
    if any(fact.form.free_symbols - {Q_IDX, KV_IDX} for fact in found):
        raise _Irregular
    return found


def _limits(fact: Fact) -> set[int]:
    """The numbers of which it matters whether the form reaches them."""
    return ({int(fact.low)} if fact.low is not None else set()) | ({int(fact.high) + 1} if fact.high is not None else set())


def _slope(expr: sympy.Expr, symbol: sympy.Symbol) -> Fraction:
    """By how much ``expr`` changes, over whole periods, for each step of ``symbol``."""
    if symbol not in expr.free_symbols:
        return Fraction(0)
    match expr:
        case sympy.Symbol():
            return Fraction(1)
        case sympy.Add():
            return sum((_slope(term, symbol) for term in expr.args), Fraction(0))
        case sympy.Mul():
            number, rest = expr.as_coeff_Mul()
            if number.is_Rational and not isinstance(rest, sympy.Mul):
                return Fraction(int(number.p), int(number.q)) * _slope(rest, symbol)
        case sympy.floor() | sympy.ceiling():
            return _slope(expr.args[0], symbol)
        case sympy.Mod() if expr.args[1].is_Integer:
            return Fraction(0)
        case sympy.Min() | sympy.Max():
            slopes = {_slope(part, symbol) for part in expr.args}
            if len(slopes) == 1:
                return slopes.pop()
        case fn.Abs() if _slope(expr.args[0], symbol) == 0:
            return Fraction(0)
    raise _Irregular


def _period(expr: sympy.Expr) -> int:
    """A length over which every part of ``expr`` changes by its slope exactly, in either direction."""
    least = 1
    for node in sympy.preorder_traversal(expr):
        if isinstance(node, (sympy.floor, sympy.ceiling, sympy.Mod)):
            by = int(node.args[1]) if isinstance(node, sympy.Mod) and node.args[1].is_Integer else 1
            least = math.lcm(least, *(abs((_slope(node.args[0], symbol) / by).denominator) for symbol in (Q_IDX, KV_IDX)))
    return math.lcm(least, *(_slope(expr, symbol).denominator for symbol in (Q_IDX, KV_IDX)))
