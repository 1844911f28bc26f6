"""Solve a clause for the keys of a query tile, many tiles at a time.

Input: a :class:`~sparsedsl.analysis.mask_clauses.Clause` and first and last query of each tile. Output: per tile two intervals of
``kv_idx``: *outer* (every key allowed for some query of the tile lies in it) and *inner* (every key in it is allowed for every query
of the tile). Both cost O(tiles); nothing per key or per pair.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch

from sparsedsl.analysis.mask_clauses import Clause, KeyBound, monotone
from sparsedsl.lang.evaluation import maximum, minimum
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead

__all__ = ["RisingForm", "Runs", "invert", "limits", "rising_form", "solve_clause"]

# Stands in for "no bound": beyond every integer of a call, which reach 2**60 (``lang.reach.LIMIT``), with room to add one of them.
FAR = 1 << 62


@dataclass(frozen=True)
class Runs:
    """Inclusive key intervals per query tile, int64 tensors of one shape; ``low > high`` is the empty interval."""

    outer_low: torch.Tensor
    outer_high: torch.Tensor
    inner_low: torch.Tensor
    inner_high: torch.Tensor


def solve_clause(
    clause: Clause, q_low: torch.Tensor, q_high: torch.Tensor, q_len: int, kv_len: int, env: Mapping[str, Any]
) -> Runs:
    """Outer and inner key intervals of ``clause`` for query tiles ``[q_low, q_high]``.

    ``env`` holds ``b``, ``h`` (broadcasting against the tiles), the lengths and the tables.
    """
    zero = torch.zeros_like(q_low) + sum(env[name] * 0 for name in ("b", "h"))
    q_first, q_last = q_low + zero, q_high + zero
    inner_ok = torch.ones_like(zero, dtype=torch.bool)
    outer_ok = inner_ok.clone()
    ends = [(bound, limits(bound, env)) for bound in clause.bounds]
    for bound, (low, high) in ends:
        outer_ok = outer_ok & (low <= high)
        if bound.kv_part == 0:
            first, last = invert(bound.q_part, Q_IDX, low, high, q_len, env)
            inner_ok = inner_ok & (first <= q_low) & (last >= q_high)
            q_first, q_last = maximum(q_first, first), minimum(q_last, last)
    outer_ok = outer_ok & (q_first <= q_last)
    outer = [zero, zero + kv_len - 1]
    inner = [zero, zero + kv_len - 1]
    for bound, (low, high) in ends:
        if bound.kv_part == 0:
            continue
        # Where the tile has no query left, the clipped range is the tile itself: the result is discarded below.
        clipped = torch.where(outer_ok, q_first, q_low + zero), torch.where(outer_ok, q_last, q_high + zero)
        least, most = _extremes(bound.q_part, *clipped, env)
        first, last = invert(bound.kv_part, KV_IDX, low - most, high - least, kv_len, env)
        outer = [maximum(outer[0], first), minimum(outer[1], last)]
        least, most = _extremes(bound.q_part, q_low + zero, q_high + zero, env)
        first, last = invert(bound.kv_part, KV_IDX, low - least, high - most, kv_len, env)
        inner = [maximum(inner[0], first), minimum(inner[1], last)]
    if clause.rest:
        inner_ok = torch.zeros_like(inner_ok)
    empty = torch.full_like(zero, -1)
    return Runs(
        outer[0],
        torch.where(outer_ok, outer[1], empty),
        inner[0],
        torch.where(outer_ok & inner_ok, inner[1], empty),
    )


def limits(bound: KeyBound, env: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of ``bound.low`` and ``bound.high``; :data:`FAR` away where there is none."""
    low = torch.tensor(-FAR) if bound.low is None else evaluate(bound.low, env)
    high = torch.tensor(FAR) if bound.high is None else evaluate(bound.high, env)
    return low, high


def _extremes(
    expr: sympy.Expr, q_first: torch.Tensor, q_last: torch.Tensor, env: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest value of an expression monotone in ``q_idx``."""
    at_first, at_last = (evaluate(expr, {**env, "q_idx": q}) for q in (q_first, q_last))
    return (at_first, at_last) if (monotone(expr, Q_IDX) or 0) >= 0 else (at_last, at_first)


def invert(
    expr: sympy.Expr, symbol: sympy.Symbol, low: torch.Tensor, high: torch.Tensor, length: int, env: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last index ``i`` in ``[0, length)`` with ``low <= expr(i) <= high``, for ``expr`` monotone in ``symbol``.

    The bounds may lie outside the range (first > last when no index fits). Closed form for ``c * i + r`` and ``i // c + r``;
    otherwise a binary search, O(log length) evaluations for all tiles together.
    """
    form = rising_form(expr, symbol)
    if form.negated:
        low, high = -high, -low
    if form.fixed != 0:
        offset = evaluate(form.fixed, env)
        low, high = low.clamp(-FAR, FAR) - offset, high.clamp(-FAR, FAR) - offset
    if form.factor is not None:
        return (low, high) if form.factor == 1 else (-((-low) // form.factor), high // form.factor)
    if form.divisor is not None:
        # Beyond the clamp lies no index: these reach 2**60.
        most = FAR // form.divisor
        return low.clamp(-most, most) * form.divisor, high.clamp(-most, most) * form.divisor + form.divisor - 1
    moving = form.moving
    if isinstance(moving, TableRead) and moving.args == (symbol,):
        table = env[moving.spec.name][:length]
        first, after = (_search(table, target, length) for target in (low, high + 1))
        return first, after - 1
    return _bisect(moving, symbol, low, length, env), _bisect(moving, symbol, high + 1, length, env) - 1


@dataclass(frozen=True)
class RisingForm:
    """``moving + fixed``, or its negative if ``negated``; ``moving`` reads the symbol and does not fall as it grows.

    ``moving`` is ``factor * symbol`` if ``factor`` is not None, and ``symbol // divisor`` if ``divisor`` is not None.
    """

    negated: bool
    moving: sympy.Expr
    fixed: sympy.Expr
    factor: int | None
    divisor: int | None


@functools.lru_cache(maxsize=1024)
def rising_form(expr: sympy.Expr, symbol: sympy.Symbol) -> RisingForm:
    """The symbolic part of :func:`invert`, which is asked again for every chunk of tiles."""
    negated = (monotone(expr, symbol) or 0) < 0
    moving, fixed = sympy.Add(-expr if negated else expr, 0).as_independent(symbol, as_Add=True)[::-1]
    coefficient, core = moving.as_coeff_Mul()
    if core == symbol and coefficient.is_Integer:
        return RisingForm(negated, moving, fixed, int(coefficient), None)
    if isinstance(core, sympy.floor) and coefficient == 1:
        numerator, denominator = core.args[0].as_numer_denom()
        if numerator == symbol and denominator.is_Integer:
            return RisingForm(negated, moving, fixed, None, int(denominator))
    return RisingForm(negated, moving, fixed, None, None)


def _search(table: torch.Tensor, target: torch.Tensor, length: int) -> torch.Tensor:
    """Least index in ``[0, length]`` at which a monotone table reaches ``target``, in the table's own type, without a copy of it."""
    if table.dtype not in (torch.int32, torch.int64):
        table = table.to(torch.int32)
    top = torch.iinfo(table.dtype).max
    wanted = target.clamp(-top - 1, top).to(table.dtype).contiguous()
    if table.device.type == "cpu":
        # numpy's search keeps to one thread: for so few targets torch's spends its time waking the others.
        place = torch.as_tensor(np.searchsorted(table.numpy(), wanted.numpy()))
    else:
        place = torch.searchsorted(table, wanted)
    # Past the end of a table shorter than the range, reads repeat its last value; beyond the type's range nothing is reached.
    return torch.where((place == table.numel()) | (target > top), length, place)


def _bisect(expr: sympy.Expr, symbol: sympy.Symbol, target: torch.Tensor, length: int, env: Mapping[str, Any]) -> torch.Tensor:
    """Least index in ``[0, length]`` at which the non-decreasing ``expr`` reaches ``target`` (``length`` if it never does)."""
    shape = joined_shape(target.shape, *(env[n].shape for n in ("b", "h") if isinstance(env[n], torch.Tensor)))
    low = torch.zeros(shape, dtype=torch.int64, device=target.device)
    high = torch.full_like(low, length)
    for _ in range(length.bit_length()):
        middle = (low + high) // 2
        reached = evaluate(expr, {**env, symbol.name: middle.clamp(max=length - 1)}) >= target
        open_ = low < high
        high = torch.where(open_ & reached, middle, high)
        low = torch.where(open_ & ~reached, middle + 1, low)
    return low
