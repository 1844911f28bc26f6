"""Interval arithmetic on expressions over boxes of indices, many boxes at a time.

Input: an expression and, for every symbol, a range ``(low, high)`` (inclusive; tensors or Python ints). Output: a range that holds
every value the expression takes on the box; for a mask the pair ``(always, ever)``. Ranges may be too wide, never too narrow.
Called with Python ints it is exact big-integer arithmetic, which is how 32-bit overflow is found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch

from sparsedsl.lang import functions as fn
from sparsedsl.lang.evaluation import maximum, minimum
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.strict import StrictFunction, is_condition
from sparsedsl.lang.tables import TableRead

__all__ = ["Intervals", "TableRanges", "wrapped"]

Range = tuple[Any, Any]
# Float ranges are widened by this, relative and absolute: more than float32 rounding can move a value.
FLOAT_SLACK = 1e-4


class TableRanges:
    """Minimum and maximum of tables over index ranges, from pyramids made once per table: twice the table's size."""

    def __init__(self, tables: Mapping[str, torch.Tensor]):
        self.tables = tables
        self._pyramids: dict[tuple[str, tuple[bool, ...]], tuple[Any, ...]] = {}

    def range(self, read: TableRead, indices: list[Range]) -> Range:
        """Range of ``read`` with each index in its range; reads outside the table clamp to it, as everywhere."""
        spec = read.spec
        table = self.tables.get(spec.name)
        if table is None:
            if spec.dtype == "bool":
                return 0, 1
            return spec.values_in or (-math.inf, math.inf)
        clamped = []
        for (low, high), size in zip(indices, table.shape, strict=True):
            low, high = (minimum(maximum(_whole(v, size), 0), size - 1) for v in (low, high))
            clamped.append((low, high))
        if spec.monotone and all(_is_point(r) for r in clamped[:-1]):
            return self._at(table, [low for low, _ in clamped]), self._at(table, [high for _, high in clamped])
        moving = tuple(not _is_point(r) for r in clamped)
        if not any(moving):
            value = self._at(table, [low for low, _ in clamped])
            return value, value
        return self._covered(spec.name, table, clamped, moving)

    @staticmethod
    def _at(table: torch.Tensor, indices: list[Any]) -> Any:
        value = table[tuple(torch.as_tensor(i, device=table.device) for i in indices)]
        return value if value.is_floating_point() else value.to(torch.int64)

    def _covered(self, name: str, table: torch.Tensor, ranges: list[Range], moving: tuple[bool, ...]) -> Range:
        """Extremes over the cells of the pyramid level at which every moving range touches at most two cells."""
        lows, highs, offsets, strides = self._pyramid(name, table, moving)
        widest = None
        for (low, high), moves in zip(ranges, moving, strict=True):
            if moves:
                width = torch.as_tensor(high - low + 1, device=table.device)
                widest = width if widest is None else torch.maximum(widest, width)
        assert widest is not None
        level = torch.ceil(torch.log2(widest.to(torch.float64))).to(torch.int64).clamp(0, offsets.numel() - 1)
        result: Range | None = None
        for corner in itertools.product(*((0, 1) if moves else (0,) for moves in moving)):
            cell = offsets[level]
            for axis, ((low, high), moves, upper) in enumerate(zip(ranges, moving, corner, strict=True)):
                place = torch.as_tensor(high if upper else low, device=table.device)
                cell = cell + (place >> level if moves else place) * strides[axis][level]
            found = lows[cell], highs[cell]
            result = found if result is None else (torch.minimum(result[0], found[0]), torch.maximum(result[1], found[1]))
        assert result is not None
        return result

    def _pyramid(self, name: str, table: torch.Tensor, moving: tuple[bool, ...]) -> tuple[Any, ...]:
        """All levels, flat and concatenated: minima, maxima, offset of each level, and strides per axis and level."""
        key = (name, moving)
        if key not in self._pyramids:
            low = table if table.is_floating_point() else table.to(torch.int64)
            levels = [(low, low)]
            while any(size > 1 for size, moves in zip(levels[-1][0].shape, moving, strict=True) if moves):
                low, high = levels[-1]
                for axis, moves in enumerate(moving):
                    if moves:
                        low, high = _halve(low, axis, torch.minimum), _halve(high, axis, torch.maximum)
                levels.append((low, high))
            sizes = torch.tensor([0] + [low.numel() for low, _ in levels[:-1]])
            offsets = sizes.cumsum(0).to(table.device)
            strides = []
            for axis in range(table.ndim):
                strides.append(torch.tensor([math.prod(low.shape[axis + 1 :]) for low, _ in levels], device=table.device))
            flat = [torch.cat([part[i].reshape(-1) for part in levels]) for i in (0, 1)]
            self._pyramids[key] = (flat[0], flat[1], offsets, strides)
        return self._pyramids[key]


def _halve(values: torch.Tensor, axis: int, op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    size = values.shape[axis]
    even = values.index_select(axis, torch.arange(0, size, 2, device=values.device))
    odd = values.index_select(axis, torch.arange(1, size + (size & 1), 2, device=values.device).clamp(max=size - 1))
    return op(even, odd)


def _whole(value: Any, size: int) -> Any:
    """Infinite bounds of unknown tables cannot index; the table's own ends can."""
    if isinstance(value, float):
        return size - 1 if value > 0 else 0
    return value


def _is_point(r: Range) -> bool:
    return r[0] is r[1] or (not isinstance(r[0], torch.Tensor) and not isinstance(r[1], torch.Tensor) and r[0] == r[1])


class Intervals:
    """Ranges of expressions over boxes given by ``ranges``: symbol name -> (low, high)."""

    def __init__(self, ranges: Mapping[str, Range], tables: TableRanges):
        self.ranges, self.tables = ranges, tables
        self._points = {name for name, r in ranges.items() if _is_point(r)}
        self._env = {name: ranges[name][0] for name in self._points} | dict(tables.tables)
        self._known: dict[sympy.Basic, Range] = {}

    def range(self, expr: sympy.Basic) -> Range:
        """``(low, high)`` of a number expression, ``(always, ever)`` of a mask."""
        if expr not in self._known:
            self._known[expr] = self._compute(expr)
        return self._known[expr]

    def _compute(self, expr: sympy.Basic) -> Range:
        if expr.is_Symbol:
            return self.ranges[expr.name]
        if expr.is_Integer:
            return int(expr), int(expr)
        names = {s.name for s in facts(expr).symbols}
        reads = {read.spec.name for read in facts(expr).reads}
        if names <= self._points and reads <= self.tables.tables.keys() and (names or reads) and not self._unbound(names):
            value = evaluate(expr, self._env)
            return value, value
        for kind in type(expr).__mro__:
            if kind in _RULES:
                return _RULES[kind](self, expr)
        if isinstance(expr, (sympy.logic.boolalg.Boolean,)):
            return False, True
        return -math.inf, math.inf

    def _unbound(self, names: set[str]) -> bool:
        # Python ints stay Python ints: evaluating them would wrap at 64 bits.
        return all(not isinstance(self.ranges[name][0], torch.Tensor) for name in names)


def _symmetric(values: list[Any]) -> Range:
    low = high = values[0]
    for value in values[1:]:
        low, high = minimum(low, value), maximum(high, value)
    return low, high


def _product(a: Range, c: Range) -> Range:
    return _symmetric([_times(x, y) for x in a for y in c])


def _times(x: Any, y: Any) -> Any:
    return 0 if (not isinstance(x, torch.Tensor) and x == 0) or (not isinstance(y, torch.Tensor) and y == 0) else x * y


def _add(self: Intervals, expr: sympy.Add) -> Range:
    low, high = 0, 0
    for term in expr.args:
        term_low, term_high = self.range(term)
        low, high = low + term_low, high + term_high
    return low, high


def _mul(self: Intervals, expr: sympy.Mul) -> Range:
    result = self.range(expr.args[0])
    for factor in expr.args[1:]:
        result = _product(result, self.range(factor))
    return result


def _pow(self: Intervals, expr: sympy.Pow) -> Range:
    base, power = expr.args
    if power.is_Integer and int(power) >= 0:
        low, high = self.range(base)
        n = int(power)
        if n % 2:
            return low**n, high**n
        ends_low, ends_high = _symmetric([low**n, high**n])
        crosses = (low <= 0) & (high >= 0)
        if isinstance(crosses, torch.Tensor):
            ends_low = torch.as_tensor(ends_low, device=crosses.device)
            return torch.where(crosses, torch.zeros_like(ends_low), ends_low), ends_high
        return (0 if crosses else ends_low), ends_high
    return -math.inf, math.inf


def _floor(self: Intervals, expr: sympy.floor) -> Range:
    argument = expr.args[0]
    if not argument.is_rational:
        return -math.inf, math.inf
    numerator, denominator = argument.as_numer_denom()
    low, high = self.range(numerator)
    d_low, d_high = self.range(denominator)
    if _finite(low, high, d_low, d_high) and _positive(d_low):
        return _symmetric([x // d for x in (low, high) for d in ((d_low,) if d_low is d_high else (d_low, d_high))])
    return -math.inf, math.inf


def _finite(*values: Any) -> bool:
    return all(isinstance(v, torch.Tensor) or abs(v) != math.inf for v in values)


def _positive(value: Any) -> bool:
    return bool((value > 0).all()) if isinstance(value, torch.Tensor) else value > 0


def _mod(self: Intervals, expr: sympy.Mod) -> Range:
    low, high = self.range(expr.args[0])
    d_low, d_high = self.range(expr.args[1])
    if not _finite(low, high, d_low, d_high) or not _positive(d_low):
        if _finite(d_low, d_high):
            return minimum(d_low + 1, 0), maximum(d_high - 1, 0)
        return -math.inf, math.inf
    if not _is_point((d_low, d_high)):
        return 0, d_high - 1
    same = (low // d_low) == (high // d_low)
    if isinstance(same, torch.Tensor):
        zero = torch.zeros((), dtype=torch.int64, device=same.device)
        return torch.where(same, low % d_low, zero), torch.where(same, high % d_low, zero + d_low - 1)
    return (low % d_low, high % d_low) if same else (0, d_low - 1)


def _abs(self: Intervals, expr: fn.Abs) -> Range:
    low, high = self.range(expr.args[0])
    return maximum(maximum(low, -high), 0), maximum(high, -low)


def _extreme(op: Callable[[Any, Any], Any]) -> Callable[[Intervals, sympy.Basic], Range]:
    def rule(self: Intervals, expr: sympy.Basic) -> Range:
        low, high = self.range(expr.args[0])
        for argument in expr.args[1:]:
            a, c = self.range(argument)
            low, high = op(low, a), op(high, c)
        return low, high

    return rule


def _where(self: Intervals, expr: fn.Where) -> Range:
    always, ever = self.range(expr.args[0])
    (a_low, a_high), (b_low, b_high) = self.range(expr.args[1]), self.range(expr.args[2])
    low, high = minimum(a_low, b_low), maximum(a_high, b_high)
    if not isinstance(always, torch.Tensor) and not isinstance(ever, torch.Tensor):
        return (a_low, a_high) if always else (low, high) if ever else (b_low, b_high)
    always, ever = (torch.as_tensor(v) for v in (always, ever))
    pick = lambda a, b, either: torch.where(always, a, torch.where(ever, either, b))  # noqa: E731
    return tuple(pick(*(_like(v, always) for v in group)) for group in ((a_low, b_low, low), (a_high, b_high, high)))  # type: ignore[return-value]


def _like(value: Any, other: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, device=other.device)


def _bit_and(self: Intervals, expr: fn.BitAnd) -> Range:
    (a_low, a_high), (c_low, c_high) = (self.range(a) for a in expr.args)
    if all(_nonnegative(v) for v in (a_low, c_low)):
        return 0, minimum(a_high, c_high)
    for low, high in ((a_low, a_high), (c_low, c_high)):
        if _nonnegative(low):
            return 0, high
    return -math.inf, math.inf


def _nonnegative(value: Any) -> bool:
    return bool((value >= 0).all()) if isinstance(value, torch.Tensor) else value >= 0


def _table(self: Intervals, expr: TableRead) -> Range:
    return self.tables.range(expr, [self.range(index) for index in expr.args])


def _rising(op: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Intervals, sympy.Basic], Range]:
    def rule(self: Intervals, expr: sympy.Basic) -> Range:
        low, high = (op(torch.as_tensor(v).to(torch.float64)) for v in self.range(expr.args[0]))
        return low, high

    return rule


def _exact(self: Intervals, expr: StrictFunction) -> Range:
    if is_condition(expr):
        return 0, 1
    if expr.is_positive:  # 1 << n, n from 0 to 62
        low, high = self.range(expr.args[1])
        return (1 << low, 1 << high) if isinstance(low, int) and isinstance(high, int) else (1, 1 << 62)
    return wrapped(self.range(expr.args[0]), int(expr.args[1])) if expr.operation == "wrap" else (-math.inf, math.inf)


def wrapped(index: Range, size: int) -> Range:
    """Range of an index that counts from the end of ``size`` entries when it is negative."""
    low, high = index
    if not isinstance(low, torch.Tensor) and not isinstance(high, torch.Tensor):
        if low >= 0 or high < 0:
            return (low, high) if low >= 0 else (low + size, high + size)
        return min(low + size, 0), max(high, size - 1)
    low, high = torch.as_tensor(low), torch.as_tensor(high)
    least = torch.where(low >= 0, low, torch.where(high < 0, low + size, (low + size).clamp(max=0)))
    return least, torch.where(low >= 0, high, torch.where(high < 0, high + size, high.clamp(min=size - 1)))


def _relation(expr: sympy.Basic, low: Any, high: Any) -> Range:
    """``(always, ever)`` of ``difference (relation) 0`` with the difference in ``[low, high]``."""
    if isinstance(expr, sympy.Le):
        return high <= 0, low <= 0
    if isinstance(expr, sympy.Lt):
        return high < 0, low < 0
    if isinstance(expr, sympy.Ge):
        return low >= 0, high >= 0
    if isinstance(expr, sympy.Gt):
        return low > 0, high > 0
    equal_always, equal_ever = (low == 0) & (high == 0), (low <= 0) & (high >= 0)
    if isinstance(expr, sympy.Eq):
        return equal_always, equal_ever
    return _invert(equal_ever), _invert(equal_always)


def _invert(value: Any) -> Any:
    return ~value if isinstance(value, torch.Tensor) else not value


def _relational(self: Intervals, expr: sympy.Basic) -> Range:
    difference = expr.args[0] - expr.args[1]
    if difference.is_integer:
        return _relation(expr, *self.range(difference))
    (a_low, a_high), (c_low, c_high) = self.range(expr.args[0]), self.range(expr.args[1])
    if not _finite(a_low, a_high, c_low, c_high):
        return False, True
    low, high = a_low - c_high, a_high - c_low
    slack = FLOAT_SLACK * (1 + maximum(maximum(abs(a_low), abs(a_high)), maximum(abs(c_low), abs(c_high))))
    always, ever = _relation(expr, low - slack, high + slack)
    if isinstance(expr, sympy.Ne):
        always = _invert(_relation(sympy.Eq(*expr.args, evaluate=False), low - slack, high + slack)[1])
    return always, ever


def _and(self: Intervals, expr: sympy.And) -> Range:
    always, ever = True, True
    for argument in expr.args:
        a, e = self.range(argument)
        always, ever = always & a, ever & e
    return always, ever


def _or(self: Intervals, expr: sympy.Or) -> Range:
    always, ever = False, False
    for argument in expr.args:
        a, e = self.range(argument)
        always, ever = always | a, ever | e
    return always, ever


def _xor(self: Intervals, expr: sympy.Xor) -> Range:
    always, ever = self.range(expr.args[0])
    for argument in expr.args[1:]:
        a, e = self.range(argument)
        # (always, ever) of x ^ y: both must be decided for "always"; "never" needs both decided and equal
        always, ever = (always & _invert(e)) | (_invert(ever) & a), (ever & _invert(a)) | (_invert(always) & e)
    return always, ever


def _not(self: Intervals, expr: sympy.Not) -> Range:
    always, ever = self.range(expr.args[0])
    return _invert(ever), _invert(always)


_RULES: dict[type, Callable[[Intervals, Any], Range]] = {
    sympy.Rational: lambda self, expr: (float(expr), float(expr)),
    sympy.Float: lambda self, expr: (float(expr), float(expr)),
    sympy.NumberSymbol: lambda self, expr: (float(expr), float(expr)),
    sympy.logic.boolalg.BooleanTrue: lambda self, expr: (True, True),
    sympy.logic.boolalg.BooleanFalse: lambda self, expr: (False, False),
    sympy.Add: _add,
    sympy.Mul: _mul,
    sympy.Pow: _pow,
    sympy.floor: _floor,
    sympy.ceiling: lambda self, expr: tuple(-v for v in reversed(self.range(sympy.floor(-expr.args[0])))),
    sympy.Mod: _mod,
    sympy.Min: _extreme(minimum),
    sympy.Max: _extreme(maximum),
    fn.Abs: _abs,
    sympy.tanh: _rising(torch.tanh),
    sympy.exp: _rising(torch.exp),
    fn.Sigmoid: _rising(torch.sigmoid),
    fn.Relu: _rising(torch.relu),
    fn.Where: _where,
    fn.BitAnd: _bit_and,
    StrictFunction: _exact,
    TableRead: _table,
    sympy.core.relational.Relational: _relational,
    sympy.And: _and,
    sympy.Or: _or,
    sympy.Xor: _xor,
    sympy.Not: _not,
}
