"""The keys each query may see, as intervals in closed form: what a kernel computes for itself, instead of reading lists.

Input: a mask. Output: one :class:`Span` a clause, ``first <= kv_idx <= last`` with ends that read the query, or None where some clause
relates queries to keys in a way that no interval says. The queries each key is seen by come from the same code, with the two indices
exchanged. An end may need a search in a monotone table; such spans are solved on the table's device, row by row (:func:`span_rows`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.clauses import Bound, Clause, bound_of, clauses, monotone
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.runs import invert, limits, rising_form
from sparsedsl.lang import functions as fn
from sparsedsl.lang.evaluate import maximum, minimum
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, Q_IDX, Q_LEN

__all__ = ["Span", "exchanged", "never_empty", "span_rows", "spans"]

# More intervals than this a row cost more than they save: they are put in order by every program.
MAX_SPANS = 4


@dataclass(frozen=True)
class Span:
    """One interval of ``kv_idx`` for every query. ``bounds`` limit the key; ``conditions`` read no key and must hold.

    Of spans with ``exchanged`` indices, ``kv_idx`` stands for the query and ``q_idx`` for the key.
    """

    bounds: tuple[Bound, ...]
    conditions: tuple[Boolean, ...]

    @functools.cached_property
    def searched(self) -> bool:
        """Whether an end has no closed form: it is where a monotone table reaches a value."""
        return any(
            form.factor is None and form.divisor is None for bound in self.bounds for form in [rising_form(bound.kv_part, KV_IDX)]
        )

    @functools.cached_property
    def ends(self) -> tuple[sympy.Expr, sympy.Expr]:
        """``first`` and ``last``, inside ``0 .. kv_len - 1``; only of spans that are not searched.

        >>> import sparsedsl as sd
        >>> spans(((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512)).expr)[0].ends
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


def _ends(bound: Bound) -> tuple[sympy.Expr | None, sympy.Expr | None]:
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
def spans(mask: Boolean, *, of: str = "keys") -> tuple[Span, ...] | None:
    """The mask as a union of spans: of the keys for each query, or of the queries for each key. None: it is no such union.

    >>> import sparsedsl as sd
    >>> spans(((sd.q_idx - sd.kv_idx) % 3 == 0).expr) is None
    True
    """
    found = [_span(clause) for clause in clauses(exchanged(mask) if of == "queries" else mask)]
    if len(found) > MAX_SPANS or any(span is None for span in found):
        return None
    # Those that begin at key 0 come first: they need not be put in order.
    kept = [span for span in found if span is not None and sympy.false not in span.conditions]
    return tuple(sorted(kept, key=lambda span: span.searched or span.ends[0] != 0))


def _span(clause: Clause) -> Span | None:
    bounds: list[Bound] = []
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
    return Span(tuple(bounds), () if holds == sympy.true else (holds,))


def span_rows(span: Span, domain: Domain, *, of: str = "keys") -> tuple[torch.Tensor, torch.Tensor]:
    """``first`` and ``last`` of every row, ``(batch, heads, rows)``, int32 or, where positions want it, int64; size 1 where the span
    does not read ``b`` or ``h``.

    ``of="keys"``: rows are the queries of the domain, and ends are keys. ``of="queries"``: rows are keys, and ends are positions of
    queries. No host synchronisation. ``last < first`` is the empty span.
    """
    groups = domain.groups(span.exprs)
    rows = torch.arange(domain.rows, device=domain.device) + domain.q_offset
    length, lengths = domain.kv_len, domain.lengths
    if of == "queries":
        rows, length = torch.arange(domain.kv_len, device=domain.device), lengths["q_len"]
        lengths = {"q_len": domain.kv_len, "kv_len": length}
    env: dict[str, Any] = {**groups.env(), **lengths, **domain.tables, "q_idx": rows}
    first: Any = torch.zeros((groups.count, rows.numel()), dtype=torch.int64, device=domain.device)
    last: Any = first + length - 1
    for bound in span.bounds:
        at = evaluate(bound.q_part, env)
        low, high = limits(bound, env)
        low, high = (torch.as_tensor(end, device=domain.device) - at for end in (low, high))
        shape = joined_shape(low.shape, high.shape, first.shape)
        begin, end = invert(bound.kv_part, KV_IDX, low.expand(shape), high.expand(shape), length, env)
        first, last = maximum(first, begin), minimum(last, end)
    for condition in span.conditions:
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
