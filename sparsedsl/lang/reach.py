"""How far integers reach: ranges of expressions in Python integers, for every way in which an expression may be taken apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import sympy
from sympy.core.relational import Relational

from sparsedsl.lang import functions as fn
from sparsedsl.lang.strict import StrictFunction, is_condition
from sparsedsl.lang.tables import TableRead

__all__ = ["LIMIT", "Range", "Reach", "TooFar"]

# Where integers are computed with, none may be larger than this: four of them add up without leaving int64.
LIMIT = 1 << 60
# Whole numbers that come of floats are exact up to here.
FLOATS = 1 << 53
# Larger than any number that matters: stands for powers that nobody wants to write out.
HUGE = 1 << 256

Range = tuple[int, int]


class TooFar(Exception):
    """``expr`` may leave the limit."""

    def __init__(self, expr: sympy.Basic):
        super().__init__(expr)
        self.expr = expr


class Reach:
    """Ranges of integer expressions. ``symbols`` and ``tables``: the range of each; a table that is not named holds what it declares,
    else positions.

    Of ``minimum(a, c)`` and ``maximum(a, c)`` the range holds those of both, since solvers take either by itself, unless it is ``tight``.
    """

    def __init__(self, symbols: Mapping[str, Range], tables: Mapping[str, Range], *, tight: bool = False):
        self.symbols, self.tables, self.tight = symbols, tables, tight
        self._known: dict[sympy.Basic, Range] = {}

    def check(self, expr: sympy.Basic) -> None:
        """Raise :class:`TooFar` where an integer that something is computed with may be larger than the limit.

        Values of tables may be any int64 where they are divided, read at, or become floats at once.
        """
        seen = set()
        todo = [expr]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            todo += node.args
            if isinstance(node, Relational) and all(side.is_integer for side in node.args):
                for side in node.args:
                    self._check(side, self.range(side))
            elif node.is_integer and not node.is_Atom and not isinstance(node, TableRead):
                self._check(node, self.range(node))
                if isinstance(node, sympy.Add):  # whatever is added up first
                    ranges = [self.range(term) for term in node.args]
                    self._check(node, (sum(min(low, 0) for low, _ in ranges), sum(max(high, 0) for _, high in ranges)))
                elif isinstance(node, sympy.Mul):
                    size = math.prod(max(-low, high, 1) for low, high in map(self.range, node.args))
                    self._check(node, (-size, size))
                parts = node.args
                if isinstance(node, (sympy.floor, sympy.ceiling)) and node.args[0].is_rational:
                    parts = node.args[0].as_numer_denom()
                    todo += parts
                for argument in parts:
                    if argument.is_Integer:
                        self._check(argument, self.range(argument))

    @staticmethod
    def _check(expr: sympy.Basic, range_: Range) -> None:
        if range_[0] < -LIMIT or range_[1] > LIMIT:
            raise TooFar(expr)

    def range(self, expr: sympy.Basic) -> Range:
        """Least and greatest value."""
        if expr not in self._known:
            self._known[expr] = self._range(expr)
        return self._known[expr]

    def _range(self, expr: sympy.Basic) -> Range:
        match expr:
            case sympy.Symbol():
                return self.symbols.get(expr.name, self._longest)
            case sympy.Integer():
                return int(expr), int(expr)
            case TableRead():
                return self._table(expr)
            case sympy.Add():
                ranges = [self.range(term) for term in expr.args]
                return sum(low for low, _ in ranges), sum(high for _, high in ranges)
            case sympy.Mul() if expr.is_integer and all(factor.is_integer for factor in expr.args):
                low = high = 1
                for factor in expr.args:
                    ends = [end * other for end in (low, high) for other in self.range(factor)]
                    low, high = min(ends), max(ends)
                return low, high
            case sympy.Pow() if expr.exp.is_Integer and expr.exp >= 0 and expr.base.is_integer:
                return self._power(*self.range(expr.base), int(expr.exp))
            case fn.Abs():
                low, high = self.range(expr.args[0])
                return max(low, -high, 0), max(-low, high)
            case sympy.Min() | sympy.Max() if self.tight:
                choose = min if isinstance(expr, sympy.Min) else max
                lows, highs = zip(*map(self.range, expr.args), strict=True)
                return choose(lows), choose(highs)
            case sympy.Min() | sympy.Max():
                return self._hull(*expr.args)
            case fn.Where():
                return self._hull(*expr.args[1:])
            case sympy.floor() if expr.args[0].is_rational:
                return self._quotient(*expr.args[0].as_numer_denom())
            case sympy.ceiling() if expr.args[0].is_rational:
                low, high = self._quotient(*(-expr.args[0]).as_numer_denom())
                return -high, -low
            case sympy.Mod():
                (low, high), (least, most) = map(self.range, expr.args)
                if low >= 0 and least > 0:
                    return 0, min(high, most - 1)
                return min(least + 1, 0), max(most - 1, 0)
            case fn.BitAnd():
                ranges = [self.range(a) for a in expr.args]
                positive = [high for low, high in ranges if low >= 0]
                low = 0 if positive else -1 << max(max(-low, high, 1) for low, high in ranges).bit_length()
                return low, min(positive) if positive else max(high for _, high in ranges)
            case StrictFunction():
                return self._exact(expr)
        return -FLOATS, FLOATS

    @property
    def _longest(self) -> Range:
        far = max(self.symbols["q_len"][1], self.symbols["kv_len"][1])
        return -far, far

    def _table(self, read: TableRead) -> Range:
        if read.spec.dtype == "bool":
            return 0, 1
        return self.tables.get(read.spec.name) or read.spec.values_in or self._longest

    def _hull(self, *exprs: sympy.Basic) -> Range:
        ranges = [self.range(expr) for expr in exprs]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    @staticmethod
    def _power(low: int, high: int, power: int) -> Range:
        size = max(-low, high, 1)
        if size.bit_length() * power > 256:
            return (-HUGE if low < 0 else 0), HUGE if size > 1 else 1
        ends = [low**power, high**power, *([0] if low <= 0 <= high and power else [])]
        return min(ends), max(ends)

    def _quotient(self, numerator: sympy.Expr, divisor: sympy.Expr) -> Range:
        (low, high), (least, most) = self.range(numerator), self.range(divisor)
        if least > 0:
            ends = [end // by for end in (low, high) for by in (least, most)]
            return min(ends), max(ends)
        size = max(-low, high)
        return -size, size

    def _exact(self, expr: StrictFunction) -> Range:
        """Exact operations on whole numbers; those that torch lets wrap around in int64 may be anything that int64 holds."""
        if is_condition(expr):
            return 0, 1
        if expr.prefix != "i64":
            return -FLOATS, FLOATS
        # No solver looks inside of one of these, so that a minimum there is one.
        inside = self if self.tight else Reach(self.symbols, self.tables, tight=True)
        ranges = [inside.range(a) for a in expr.args]
        (low, high), *others = ranges
        match expr.operation:
            case "wrap":
                return low, max(high, others[0][1] - 1)
            case "shl" if others[0][0] >= 0 and others[0][1] < 256:
                ends = [end << by for end in (low, high) for by in others[0]]
                return min(ends), max(ends)
            case "shr" | "fmod":
                return min(low, 0), max(high, 0)
            case "gcd":
                return 0, max(max(-low, high) for low, high in ranges)
            case "lcm" | "mul":
                size = math.prod(max(-low, high) for low, high in ranges)
                return -size, size
            case "add" | "sub":
                size = sum(max(-low, high) for low, high in ranges)
                return -size, size
            case "pow" if others[0][0] >= 0 and others[0][1] < 256:
                powers = [self._power(low, high, by) for by in {*others[0], max(others[0][1] - 1, 0)}]
                return min(least for least, _ in powers), max(most for _, most in powers)
        return -HUGE, HUGE
