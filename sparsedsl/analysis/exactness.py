"""Integers are exact, or the call is refused: how far the integers of a call reach, and tables whose values reach too far.

What runs computes in int64, and solvers want room to add. So every sum, product, minimum, .. must stay within ``LIMIT``. Tables may
hold any int64 all the same where their values are only compared (``doc[q_idx] == doc[kv_idx]``, ``kv_idx < end[q_idx]``): before
anything else sees them, such tables are *squeezed*. Only the order and the small differences of values decide a comparison, so the
gaps between values (0 among them, for positions and constants) shrink to just more than any difference that the expressions ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.core.relational import Relational

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.errors import TableError, UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.reach import LIMIT, Range, Reach, TooFar
from sparsedsl.lang.tables import TableRead

__all__ = ["exact_domain"]

# Tables whose values reach farther may be squeezed: first those that no arithmetic could take, then all that no int32 holds.
FAR = (LIMIT >> 1, 1 << 31)
# Differences up to here survive in any case, so that another length or offset seldom wants another table.
LEAST = 1 << 32


def exact_domain(exprs: tuple[sympy.Basic, ...], domain: Domain) -> Domain:
    """``domain``, whose tables are exchanged where values are too far apart to compute with; masks and scores keep their values.

    Raises TableError or UnsupportedError where an integer of ``exprs`` may leave +-2**60 and is not only compared.

    >>> import sparsedsl as sd
    >>> end = torch.tensor([3, torch.iinfo(torch.int64).max])
    >>> mask = sd.kv_idx < sd.table("end")[sd.q_idx]
    >>> exact_domain((mask.expr,), Domain(2, 8, tables={"end": end})).tables["end"]
    tensor([         3, 4294967300])
    """
    tables: tuple[tuple[str, Range], ...] = ()
    if domain.tables:
        tables = tuple((name, values) for name, table in domain.tables.items() if (values := _rounded(table)) is not None)
    # Rounded up to powers of two, so that few are told apart.
    longest = 1 << (max(domain.q_offset + domain.rows, domain.kv_len) - 1).bit_length()
    lengths = longest, 1 << (domain.batch - 1).bit_length(), 1 << (domain.heads - 1).bit_length()
    if _fits(exprs, lengths, tables):
        return domain
    held = [domain.tables[name] for name, _ in tables]

    def change() -> dict[str, torch.Tensor]:
        return _changed(exprs, domain, _symbols(longest, *lengths), _found(domain, tables))

    try:
        changed = _CHANGED.get((exprs, lengths, tables), held, change)
    except TooFar:
        return _for_this_call(exprs, domain, _found(domain, tables))
    return replace(domain, tables={**domain.tables, **changed}) if changed else domain


# What the tables of a call are exchanged for, for all lengths up to a power of two.
_CHANGED: Cache[dict[str, torch.Tensor]] = Cache()


def _found(domain: Domain, tables: tuple[tuple[str, Range], ...]) -> dict[str, Range]:
    return {name: _extremes(domain.tables[name]) for name, _ in tables}


def _for_this_call(exprs: tuple[sympy.Basic, ...], domain: Domain, found: Mapping[str, Range]) -> Domain:
    symbols = _symbols(domain.lengths["q_len"], domain.kv_len, domain.batch, domain.heads, domain.q_offset)
    try:
        changed = _changed(exprs, domain, symbols, found)
    except TooFar as error:
        raise _refusal(error.expr, Reach(symbols, found), found, domain) from None
    return replace(domain, tables={**domain.tables, **changed}) if changed else domain


def _changed(
    exprs: tuple[sympy.Basic, ...], domain: Domain, symbols: Mapping[str, Range], found: Mapping[str, Range]
) -> dict[str, torch.Tensor]:
    """The tables that must be exchanged; raises TooFar where that does not help."""
    try:
        _check(exprs, Reach(symbols, found))
        return {}
    except TooFar as error:
        cause = error
    for far in FAR:
        names = tuple(name for name, (low, high) in found.items() if low < -far or high > far)
        if names:
            try:
                return _squeezed(exprs, domain, symbols, found, names)
            except TooFar as error:
                cause = error
    raise cause


def _check(exprs: tuple[sympy.Basic, ...], reach: Reach) -> None:
    for expr in exprs:
        reach.check(expr)


@functools.lru_cache(maxsize=4096)
def _fits(exprs: tuple[sympy.Basic, ...], lengths: tuple[int, int, int], tables: tuple[tuple[str, Range], ...]) -> bool:
    """Whether nothing leaves the limit, for lengths and values rounded up to powers of two: asked by every call, so remembered."""
    try:
        _check(exprs, Reach(_symbols(lengths[0], *lengths), dict(tables)))
    except TooFar:
        return False
    return True


def _symbols(q_len: int, kv_len: int, batch: int, heads: int, q_offset: int = 0) -> dict[str, Range]:
    return {
        "b": (0, batch - 1), "h": (0, heads - 1), "q_idx": (q_offset, q_len - 1), "kv_idx": (0, kv_len - 1), "q_len": (1, q_len),
        "kv_len": (1, kv_len),
    }  # fmt: skip


def _up(number: int) -> int:
    return 1 << (number - 1).bit_length()


_ROUNDED: Cache[Range | None] = Cache()


def _rounded(table: torch.Tensor) -> Range | None:
    """A range of powers of two around the values, looked up once a tensor and version; None of floats and booleans.

    Of narrow types it is that of the type, which costs no look at the values.
    """
    if table.is_floating_point():
        return None
    return _ROUNDED.get(None, [table], lambda: _round(table))


def _round(table: torch.Tensor) -> Range | None:
    if table.dtype == torch.bool or not table.numel():
        return None
    limits = torch.iinfo(table.dtype)
    low, high = _extremes(table) if table.dtype.itemsize == 8 else (limits.min, limits.max)
    size = 1 << max(low.bit_length(), high.bit_length())
    return (-size if low < 0 else 0), size


def _extremes(table: torch.Tensor) -> Range:
    low, high = torch.aminmax(table)
    return int(low), int(high)


def _refusal(expr: sympy.Basic, reach: Reach, found: Mapping[str, Range], domain: Domain) -> Exception:
    if isinstance(expr, Relational) and expr.rhs.is_Integer and abs(expr.rhs) > LIMIT:
        what = f"{expression_text(expr)} compares with the constant {expr.rhs}"
    else:
        expr = expr.lhs - expr.rhs if isinstance(expr, Relational) else expr
        low, high = reach.range(expr)
        far = f"may be anything from {low} to {high}" if max(-low, high) > LIMIT else "is more than a comparison"
        what = f"{expression_text(expr)} {far}"
    limit = "integers are computed exactly up to 2**60 and never wrap around"
    names = sorted({read.spec.name for read in expr.atoms(TableRead)} & found.keys())
    beyond = [name for name in names if max(-found[name][0], found[name][1]) > FAR[1]]
    if beyond:
        held = ", ".join(f"{name!r} holds values from {found[name][0]} to {found[name][1]}" for name in beyond)
        return TableError(
            f"table {held}: {what}; {limit}. Values anywhere in int64 may be compared (t[q_idx] == t[kv_idx], kv_idx < t[q_idx]), but "
            "not added up, multiplied or used as numbers beside that: pass smaller ones"
        )
    where = f"q_len {domain.lengths['q_len']} (q_offset {domain.q_offset}) and kv_len {domain.kv_len}"
    return UnsupportedError(f"at {where} {what}; {limit}. Use smaller constants, offsets or lengths")


# ---- squeezing --------------------------------------------------------------------------------------------------------------------


def _squeezed(
    exprs: tuple[sympy.Basic, ...],
    domain: Domain,
    symbols: Mapping[str, Range],
    found: Mapping[str, Range],
    names: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    """The tables ``names``, squeezed; raises TooFar where their values are not only compared."""
    shapes = {name: tuple(table.shape) for name, table in domain.tables.items()}
    near = Reach(symbols, {name: ends for name, ends in found.items() if name not in names})
    use = _Use(near, frozenset(names), shapes)
    for expr in exprs:
        use.visit(expr)
    tables = [domain.tables[name] for name in names]
    difference = max(LEAST, _up(use.difference + 1))
    if difference > LIMIT:
        raise TooFar(use.widest)
    changed = dict(zip(names, _squeeze(tables, difference), strict=True))
    _check(exprs, Reach(symbols, {**found, **{name: _extremes(table) for name, table in changed.items()}}))
    return changed


def _squeeze(tables: list[torch.Tensor], difference: int) -> list[torch.Tensor]:
    """The tables with every gap between neighbouring values (of all of them, and 0) cut to ``difference + 1``.

    >>> _squeeze([torch.tensor([-(2**63), -7, 5, 2**62, 2**62 + 1])], 10)
    [tensor([-18,  -7,   5,  16,  17])]
    """
    wide = [table.to(torch.int64) for table in tables]
    values = torch.cat([wide[0].new_zeros(1), *(table.reshape(-1) for table in wide)]).unique()
    # A gap of 2**63 and more wraps around and is negative.
    gaps = values.diff()
    gaps = torch.where((gaps < 0) | (gaps > difference), difference + 1, gaps)
    places = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    places = places - places[torch.searchsorted(values, 0)]
    return [places[torch.searchsorted(values, table.contiguous())] for table in wide]


@dataclass(frozen=True)
class _Far:
    """What becomes of a value that reads squeezed tables. ``plus``: it is one of their values, ``minus``: the negative of one, both:
    a difference of two; beside something no larger than ``beside``. A difference is itself up to that of the squeezing less ``beside``
    and lies beyond it where it did."""

    plus: bool
    minus: bool
    beside: int

    @property
    def difference(self) -> _Far:
        return _Far(True, True, self.beside)


class _Use:
    """How expressions use the tables that are to be squeezed. ``difference``: the largest whose exact value decides, in ``widest``."""

    def __init__(self, near: Reach, names: frozenset[str], shapes: Mapping[str, tuple[int, ...]]):
        self.near, self.names, self.shapes = near, names, shapes
        self.difference, self.widest = 0, sympy.Integer(0)
        self._known: dict[sympy.Basic, _Far | None] = {}

    def visit(self, expr: sympy.Basic) -> None:
        """Look through all comparisons of ``expr``; raises TooFar where a value is used as a number."""
        if isinstance(expr, Relational) and all(side.is_integer for side in expr.args):
            self._compared(self.far(expr.args[0]), self.far(expr.args[1]), expr)
        elif expr.is_integer:
            if self.far(expr) is not None:
                raise TooFar(expr)
        else:
            for argument in expr.args:
                self.visit(argument)

    def _size(self, expr: sympy.Expr) -> int:
        low, high = self.near.range(expr)
        return max(-low, high, 0)

    def _compared(self, left: _Far | None, right: _Far | None, expr: sympy.Basic) -> None:
        if left is None and right is None:
            return
        sides = [
            _Far(False, False, self._size(e)) if side is None else side for side, e in zip((left, right), expr.args, strict=True)
        ]
        both = self._sum(sides[0], _Far(sides[1].minus, sides[1].plus, sides[1].beside), expr)
        self._asks(both.beside, expr)

    def _asks(self, difference: int, expr: sympy.Basic) -> None:
        if difference > self.difference:
            self.difference, self.widest = difference, expr

    @staticmethod
    def _sum(a: _Far, c: _Far, expr: sympy.Basic) -> _Far:
        if (a.plus and c.plus) or (a.minus and c.minus):
            raise TooFar(expr)
        return _Far(a.plus or c.plus, a.minus or c.minus, a.beside + c.beside)

    def far(self, expr: sympy.Expr) -> _Far | None:
        """How a whole number depends on squeezed tables; None: not at all."""
        if expr not in self._known:
            self._known[expr] = self._far(expr)
        return self._known[expr]

    def _far(self, expr: sympy.Expr) -> _Far | None:
        if isinstance(expr, TableRead):
            for index, size in zip(expr.args, self.shapes.get(expr.spec.name, [0] * len(expr.args)), strict=True):
                known = self.far(index)
                if known is not None:  # clamped into the table: beyond its end is beyond its end
                    self._asks(known.beside + size, expr)
            return _Far(True, False, 0) if expr.spec.name in self.names else None
        if isinstance(expr, fn.Where):
            self.visit(expr.args[0])
        numbers = expr.args[1:] if isinstance(expr, fn.Where) else expr.args
        if not all(argument.is_integer for argument in numbers):
            for argument in numbers:
                self.visit(argument)
            return None
        parts = [self.far(argument) for argument in numbers]
        far = [part for part in parts if part is not None]
        if not far:
            return None
        beside = sum(self._size(e) for e, part in zip(numbers, parts, strict=True) if part is None)
        match expr:
            case sympy.Add():
                return functools.reduce(lambda a, c: self._sum(a, c, expr), far, _Far(False, False, beside))
            case sympy.Mul() if len(far) == 1:
                factor = sympy.Mul(*(e for e, part in zip(numbers, parts, strict=True) if part is None))
                if factor == -1:
                    return _Far(far[0].minus, far[0].plus, far[0].beside)
                return far[0].difference
            case fn.Where() | sympy.Min() | sympy.Max():
                beside += sum(part.beside for part in far)
                self._asks(beside, expr)
                return _Far(any(part.plus for part in far), any(part.minus for part in far), beside)
            case fn.Abs():
                return far[0].difference
        raise TooFar(expr)
