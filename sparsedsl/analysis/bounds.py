"""Which indices a pattern reads its tables at, and whether the tables reach that far for every pair the mask allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.guarded import GuardedIntervals
from sparsedsl.analysis.intervals import TableRanges
from sparsedsl.analysis.mask_clauses import Clause, clauses, only_difference
from sparsedsl.errors import TableError
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.functions import Where
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.strict import StrictFunction
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import TableRead

__all__ = ["allowed_range", "check_reads", "index_ranges", "value_ranges"]

# An index that cannot be reasoned about is worked out at no more points than this.
POINTS = 1 << 22


@dataclass(frozen=True)
class _Read:
    read: TableRead
    guard: Boolean


def _reads(expr: sympy.Basic, guard: Boolean) -> Iterator[_Read]:
    """Every table read with the condition under which its value matters."""
    if isinstance(expr, Where):
        condition, a, b = expr.args
        yield from _reads(condition, guard)
        yield from _reads(a, sympy.And(guard, condition))
        yield from _reads(b, sympy.And(guard, sympy.Not(condition)))
        return
    if isinstance(expr, TableRead):
        yield _Read(expr, guard)
    for argument in expr.args:
        yield from _reads(argument, guard)


def _symbol_ranges(domain: Domain) -> dict[str, tuple[int, int]]:
    lengths = {name: (value, value) for name, value in domain.lengths.items()}
    return lengths | {
        "b": (0, domain.batch - 1),
        "h": (0, domain.heads - 1),
        "q_idx": (domain.q_offset, domain.q_offset + domain.rows - 1),
        "kv_idx": (0, domain.kv_len - 1),
    }


def value_ranges(domain: Domain) -> dict[str, tuple[int, int]]:
    """Least and greatest value of every integer table of the call."""
    found = {}
    for name, table in domain.tables.items():
        if not table.is_floating_point() and table.numel():
            low, high = torch.aminmax(table if table.dtype != torch.bool else table.to(torch.uint8))
            found[name] = (int(low), int(high))
    return found


class _RangeFacts(TableRanges):
    """Table values known by their extremes only: enough for index ranges, and exact in Python integers."""

    def __init__(self, values: Mapping[str, tuple[int, int]]):
        super().__init__({})
        self.values = values

    def range(self, read: TableRead, indices: list[Any]) -> tuple[Any, Any]:
        """The table's own extremes, else what was declared."""
        return self.values.get(read.spec.name) or super().range(read, indices)


def index_ranges(domain: Domain, values: Mapping[str, tuple[int, int]]) -> GuardedIntervals:
    """Interval arithmetic over the whole domain in Python integers: nothing wraps."""
    return GuardedIntervals(_symbol_ranges(domain), _RangeFacts(values))


def allowed_range(index: sympy.Expr, mask: Boolean, intervals: GuardedIntervals) -> tuple[Any, Any]:
    """Range of ``index`` over the pairs that ``mask`` allows, or somewhat more; low > high if it allows none."""
    return intervals.within(index, clauses(mask)) or (0, -1)


def check_reads(pattern: Pattern, domain: Domain) -> None:
    """Raise :class:`TableError` unless every read that an allowed pair depends on lies inside its table.

    Reads that only masked pairs make (``bias[q_idx - kv_idx]`` above the diagonal of a causal mask) may fall outside.
    """
    intervals = index_ranges(domain, value_ranges(domain))
    parts = [(pattern.mask.expr, sympy.true), (pattern.score.expr, pattern.mask.expr)]
    if pattern.sink is not None:
        parts.append((pattern.sink.expr, sympy.true))
    for expr, guard in parts:
        for item in _reads(expr, guard):
            table = domain.tables[item.read.spec.name]
            for axis, (index, size) in enumerate(zip(item.read.args, table.shape, strict=True)):
                low, high = intervals.range(index)
                if low >= 0 and high < size:
                    continue
                ways = clauses(item.guard)
                if item.guard == sympy.true and expr == pattern.mask.expr:
                    ways = tuple(clause for clause in clauses(expr) if _mentions(clause, item.read)) or ways
                # What a relation says that reads the table itself is not known before it is read.
                low, high = intervals.within(index, ways, unread=item.read) or (0, 0)
                if (low < 0 or high >= size) and not _inside_at_every_point(index, item.guard, domain, size):
                    raise TableError(_message(item.read, axis, index, size, low, high, tuple(table.shape)))


def _inside_at_every_point(index: sympy.Expr, guard: Boolean, domain: Domain, size: int) -> bool:
    """Whether every read at ``index`` lies inside: worked out where intervals know nothing, since the index holds exact operations.

    An index that depends on ``q_idx - kv_idx`` alone costs one point a difference; others are worked out up to ``POINTS`` points.
    """
    if not index.has(StrictFunction):
        return False
    groups = domain.groups(sympy.Tuple(index, guard))
    along = only_difference(index)
    if groups.count * (domain.rows + domain.kv_len if along else domain.rows * domain.kv_len) > POINTS:
        return False
    q, kv = torch.arange(domain.rows) + domain.q_offset, torch.arange(domain.kv_len)
    if along:
        q, kv = torch.cat([q, q[:1].expand(domain.kv_len)]), torch.cat([torch.zeros_like(q), kv])
        guard = guard if only_difference(guard) else sympy.true
    else:
        q, kv = q[:, None], kv
    of_group = {name: torch.as_tensor(value).reshape(-1, *(1,) * q.ndim) for name, value in groups.env().items()}
    symbols: dict[str, Any] = {**of_group, "q_idx": q, "kv_idx": kv, **domain.lengths}
    env = {name: torch.as_tensor(value, device=domain.device) for name, value in symbols.items()} | dict(domain.tables)
    value = evaluate(index, env)
    return not bool(((value < 0) | (value >= size)).logical_and(evaluate(guard, env)).any())


def _mentions(clause: Clause, read: TableRead) -> bool:
    """Whether ``clause`` reads the table outside of solved bounds (a bound reads at all positions)."""
    return any(relation.has(read) for relation in clause.rest) or any(
        part is not None and part.has(read)
        for bound in clause.bounds
        for part in (bound.q_part, bound.kv_part, bound.low, bound.high)
    )


def _message(read: TableRead, axis: int, index: sympy.Expr, size: int, low: Any, high: Any, shape: tuple[int, ...]) -> str:
    name = read.spec.name
    reach = f"{low}..{high}" if all(abs(v) != float("inf") for v in (low, high)) else "values that no declared fact bounds"
    symbols = index.free_symbols
    way = "Pass a longer table, or limit" if low >= 0 else "The index goes below zero: limit"
    if symbols <= {BATCH, HEAD} and low >= 0:
        way = f"Pass a table with {high + 1} entries along dimension {axis}, one for each, or limit"
    return (
        f"table {name!r} is too short: it has shape {shape}, {size} entries along dimension {axis}, but the pattern reads it there at "
        f"{expression_text(index)} = {reach}. {way} the index: sd.clamp(index, 0, {size - 1})"
    )
