"""The keys each query may see, as intervals in closed form: what a kernel computes for itself, instead of reading lists.

Input: a mask. Output: one :class:`KeyInterval` a clause, ``first <= kv_idx <= last`` with ends that read the query, or None
where some clause relates queries to keys in a way that no interval says. The queries each key is seen by come from the same
code, with the two indices exchanged. An end may need a search in a monotone table; such intervals are solved on the table's
device, row by row (:func:`interval_rows`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.mask_clauses import Clause, KeyBound, bound_of, clauses, monotone
from sparsedsl.analysis.runs import invert, limits, rising_form
from sparsedsl.lang import functions as fn
from sparsedsl.lang.evaluation import maximum, minimum
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate, prepared_value
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.tables import table_reads

__all__ = ["KeyInterval", "exchanged", "interval_rows", "intervals", "keys_of_one_query", "never_empty"]

# An expression made ready: the values of its symbols -> its own.
_Value = Callable[[Mapping[str, Any]], Any]
# More intervals than this a row cost more than they save: they are put in order by every program.
MAX_INTERVALS = 4


@dataclass(frozen=True)
class KeyInterval:
    """One interval of ``kv_idx`` for every query. ``bounds`` limit the key; ``conditions`` read no key and must hold.

    Of intervals with ``exchanged`` indices, ``kv_idx`` stands for the query and ``q_idx`` for the key.
    """

    bounds: tuple[KeyBound, ...]
    conditions: tuple[Boolean, ...]

    @functools.cached_property
    def searched(self) -> bool:
        """Whether an end has no closed form: it is where a monotone table reaches a value."""
        return any(
            form.factor is None and form.divisor is None for bound in self.bounds for form in [rising_form(bound.kv_part, KV_IDX)]
        )

    @functools.cached_property
    def ends(self) -> tuple[sympy.Expr, sympy.Expr]:
        """``first`` and ``last``, inside ``0 .. kv_len - 1``; only of intervals that are not searched.

        >>> import sparsedsl as sd
        >>> intervals(((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512)).expr)[0].ends
        (Max(0, q_idx - 511), Min(q_idx, kv_len - 1))
        """
        firsts: list[sympy.Expr] = [sympy.Integer(0)]
        lasts: list[sympy.Expr] = [KV_LEN - 1]
        for bound in self.bounds:
            first, last = _ends(bound)
            firsts += [] if first is None else [first]
            lasts += [] if last is None else [last]
        return fn.Max(*firsts), fn.Min(*lasts)

    @functools.cached_property
    def exprs(self) -> sympy.Tuple:
        """Everything it reads."""
        parts = [part for bound in self.bounds for part in (bound.q_part, bound.kv_part, bound.low, bound.high)]
        return sympy.Tuple(*(part for part in parts if part is not None), *self.conditions)


def _ends(bound: KeyBound) -> tuple[sympy.Expr | None, sympy.Expr | None]:
    form = rising_form(bound.kv_part, KV_IDX)
    low = None if bound.low is None else bound.low - bound.q_part
    high = None if bound.high is None else bound.high - bound.q_part
    if form.negated:
        low, high = (None if high is None else -high), (None if low is None else -low)
    low = None if low is None else sympy.expand(low - form.fixed)
    high = None if high is None else sympy.expand(high - form.fixed)
    if form.factor is not None:
        if form.factor == 1:
            return low, high
        return (
            None if low is None else -fn.floor_div(-low, sympy.Integer(form.factor)),
            None if high is None else fn.floor_div(high, sympy.Integer(form.factor)),
        )
    assert form.divisor is not None
    return (None if low is None else low * form.divisor), (None if high is None else high * form.divisor + form.divisor - 1)


@functools.lru_cache(maxsize=256)
def exchanged(expr: Any) -> Any:
    """``expr`` with the roles of queries and keys exchanged.

    >>> import sparsedsl as sd
    >>> exchanged((sd.q_idx - 2 * sd.kv_idx).expr)
    kv_idx - 2*q_idx
    """
    return expr.xreplace({Q_IDX: KV_IDX, KV_IDX: Q_IDX, Q_LEN: KV_LEN, KV_LEN: Q_LEN})


@functools.lru_cache(maxsize=1024)
def intervals(mask: Boolean, *, of: str = "keys", most: int = MAX_INTERVALS) -> tuple[KeyInterval, ...] | None:
    """The mask as a union of intervals: of the keys for each query, or of the queries for each key. None: it is no such union of ``most``.

    >>> import sparsedsl as sd
    >>> intervals(((sd.q_idx - sd.kv_idx) % 3 == 0).expr) is None
    True
    """
    found = [_interval(clause) for clause in clauses(exchanged(mask) if of == "queries" else mask)]
    if len(found) > most or any(interval is None for interval in found):
        return None
    # Those that begin at key 0 come first: they need not be put in order.
    kept = [interval for interval in found if interval is not None and sympy.false not in interval.conditions]
    # One that must hold something first begins elsewhere where it does not.
    return tuple(sorted(kept, key=lambda interval: interval.searched or bool(interval.conditions) or interval.ends[0] != 0))


def _interval(clause: Clause) -> KeyInterval | None:
    bounds: list[KeyBound] = []
    conditions: list[Boolean] = []
    for bound in clause.bounds:
        if bound.kv_part != 0:
            bounds.append(bound)
        else:
            conditions += [sympy.Ge(bound.q_part, bound.low)] if bound.low is not None else []
            conditions += [sympy.Le(bound.q_part, bound.high)] if bound.high is not None else []
    for relation in clause.rest:
        if KV_IDX not in relation.free_symbols:
            conditions.append(relation)
            continue
        # The solver of tiles wants both sides monotone; for one query the query's side may be anything.
        found = bound_of(relation) if isinstance(relation, Relational) else None
        if found is None or monotone(found.kv_part, KV_IDX) is None:
            return None
        bounds.append(found)
    # Ends of clauses that hold for all queries, such as window[h] >= 1, are conditions too: first > last says so by itself.
    # One condition, so that what contradicts itself is seen to.
    holds = sympy.And(*conditions)
    return KeyInterval(tuple(bounds), () if holds == sympy.true else (holds,))


def keys_of_one_query(mask: Boolean, domain: Domain) -> list[range] | None:
    """The keys that the query at ``domain.q_offset`` sees, as ranges that follow each other; None where no closed form says them.

    >>> import sparsedsl as sd
    >>> keys_of_one_query(((sd.kv_idx <= sd.q_idx) & ((sd.q_idx - sd.kv_idx < 4) | (sd.kv_idx < 2))).expr, Domain(1, 100, 60))
    [range(0, 2), range(57, 61)]
    """
    found = _closed(mask)
    if found is None:
        return None
    env = {"q_idx": domain.q_offset, **domain.lengths}
    ends = [range(int(first(env)), int(last(env)) + 1) for first, last, holds in found if holds is None or bool(holds(env))]
    joined: list[range] = []
    for part in sorted(filter(None, ends), key=lambda part: part.start):
        if joined and part.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, part.stop))
        else:
            joined.append(part)
    return joined


@functools.lru_cache(maxsize=1024)
def _closed(mask: Boolean) -> tuple[tuple[_Value, _Value, _Value | None], ...] | None:
    """First and last key of each interval, and what must hold; None where they are more than formulas of the position and lengths."""
    found = intervals(mask)
    if found is None or any(interval.searched or _reads_more(interval) for interval in found):
        return None
    made = []
    for interval in found:
        first, last = interval.ends
        holds = prepared_value(sympy.And(*interval.conditions)) if interval.conditions else None
        made.append((prepared_value(first), prepared_value(last), holds))
    return tuple(made)


def _reads_more(interval: KeyInterval) -> bool:
    exprs = interval.exprs
    return bool(exprs.free_symbols & {BATCH, HEAD}) or bool(table_reads(exprs))


def interval_rows(interval: KeyInterval, domain: Domain, *, of: str = "keys") -> tuple[torch.Tensor, torch.Tensor]:
    """``first`` and ``last`` of every row, ``(batch, heads, rows)``, int32 or, where positions want it, int64; size 1 where the interval
    does not read ``b`` or ``h``.

    ``of="keys"``: rows are the queries of the domain, and ends are keys. ``of="queries"``: rows are keys, and ends are positions of
    queries. No host synchronisation. ``last < first`` is the empty interval.
    """
    groups = domain.groups(interval.exprs)
    rows = torch.arange(domain.rows, device=domain.device) + domain.q_offset
    length, lengths = domain.kv_len, domain.lengths
    if of == "queries":
        rows, length = torch.arange(domain.kv_len, device=domain.device), lengths["q_len"]
        lengths = {"q_len": domain.kv_len, "kv_len": length}
    env: dict[str, Any] = {**groups.env(), **lengths, **domain.tables, "q_idx": rows}
    first: Any = torch.zeros((groups.count, rows.numel()), dtype=torch.int64, device=domain.device)
    last: Any = first + length - 1
    for bound in interval.bounds:
        at = evaluate(bound.q_part, env)
        low, high = limits(bound, env)
        low, high = (torch.as_tensor(end, device=domain.device) - at for end in (low, high))
        shape = joined_shape(low.shape, high.shape, first.shape)
        begin, end = invert(bound.kv_part, KV_IDX, low.expand(shape), high.expand(shape), length, env)
        first, last = maximum(first, begin), minimum(last, end)
    for condition in interval.conditions:
        last = torch.where(evaluate(condition, env), last, -1)
    empty = last < first
    shape = (groups.batch, groups.heads, rows.numel())
    ends = (torch.where(empty, length, first), torch.where(empty, -1, last))
    small = torch.int32 if length < 2**31 else torch.int64
    return tuple(end.to(small).view(shape).contiguous() for end in ends)  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def never_empty(mask: Boolean) -> str | None:
    """Why every query is known to see a key: the first one ("first"), its own ("diagonal", if there is a key at its position), or None.

    >>> import sparsedsl as sd
    >>> never_empty((sd.q_idx - sd.kv_idx >= 0).expr), never_empty((abs(sd.q_idx - sd.kv_idx) < 3).expr)
    ('first', 'diagonal')
    """
    for why, key in (("first", sympy.Integer(0)), ("diagonal", Q_IDX)):
        if mask.xreplace({KV_IDX: key}) == sympy.true:
            return why
    return None
