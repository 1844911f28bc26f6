"""From a mask to the units each row may choose: limits and a rule, without looking at every pair where intervals say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.spans import span_rows, spans
from sparsedsl.analysis.units import constant_in_units
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.selection.candidates import Candidates, PairRule

__all__ = ["candidates_of", "unit_rule"]

Tensor = torch.Tensor


def candidates_of(mask: Any, domain: Domain, q_unit: int, kv_unit: int, heads: int, device: torch.device) -> Candidates:
    """The units of ``kv_unit`` keys with a pair that ``mask`` allows, for every unit of ``q_unit`` queries.

    ``heads``: of the scores; where the mask tells more heads apart, a unit is allowed if it is for one head of the group. ``device``: of
    the scores. Limits are made where the tables are: on the host if there are none, so that a GPU is not asked how far to score.
    """
    if mask == sympy.true:
        return Candidates()
    ends = _ends(mask, domain, q_unit)
    if ends is None:
        return Candidates(allowed=_pair_rule(mask, domain, q_unit, kv_unit, heads, {}, device))
    if not ends:
        return Candidates(end=torch.zeros(-(-domain.rows // q_unit), dtype=torch.int64, device=domain.device))
    # (.., rows, q_unit): -1 and kv_len mark queries without keys
    begin = torch.stack(torch.broadcast_tensors(*(first.amin(-1) for first, _ in ends))).amin(0) // kv_unit
    end = torch.stack(torch.broadcast_tensors(*(last.amax(-1) for _, last in ends))).amax(0) // kv_unit + 1
    begin, end = _joined(begin, heads, "amin"), _joined(end, heads, "amax")
    exact = len(ends) == 1 and q_unit == 1 and ends[0][0].shape[1] in (1, heads)
    return Candidates(begin=begin, end=end, allowed=None if exact else _span_rule(ends, kv_unit, heads, device))


def _ends(mask: Any, domain: Domain, q_unit: int) -> list[Any] | None:
    """First and last key of each interval of the mask, ``(B, H, units of queries, q_unit)``; None: it is no union of intervals."""
    found = spans(mask)
    if found is None:
        return None
    fills = (domain.kv_len, -1)
    return [tuple(_per_unit(end, q_unit, fill) for end, fill in zip(span_rows(s, domain), fills, strict=True)) for s in found]


def _span_rule(ends: list[Any], kv_unit: int, heads: int, device: torch.device) -> PairRule:
    """A unit is allowed where some interval of some query of the row reaches into it."""
    here = [(first.to(device), last.to(device)) for first, last in ends]

    def allowed(rows: Tensor, units: Tensor) -> Tensor:
        verdict = None
        for first, last in here:
            low, high = (end.index_select(2, rows)[..., None] for end in (first, last))
            inside = ((units >= low // kv_unit) & (units <= high // kv_unit) & (high >= 0)).any(3)
            verdict = inside if verdict is None else verdict | inside
        assert verdict is not None
        return _joined_flags(verdict, heads)

    return allowed


def _per_unit(end: Tensor, unit: int, fill: int) -> Tensor:
    """``(B, H, rows) -> (B, H, units, unit)``."""
    missing = -end.shape[2] % unit
    end = torch.cat([end, end.new_full((*end.shape[:2], missing), fill)], dim=2) if missing else end
    return end.long().unflatten(2, (-1, unit))


def _joined(limit: Tensor, heads: int, how: str) -> Tensor:
    if limit.shape[1] in (1, heads):
        return limit
    return getattr(limit.unflatten(1, (heads, -1)), how)(2)


def _joined_flags(flags: Tensor, heads: int) -> Tensor:
    return flags if flags.shape[1] in (1, heads) else flags.unflatten(1, (heads, -1)).any(2)


def unit_rule(
    mask: Any, domain: Domain, q_unit: int, kv_unit: int, heads: int, tables: Mapping[str, Tensor], device: torch.device
) -> PairRule:
    """Whether a unit of queries and a unit of keys hold a pair that ``mask`` allows. ``tables``: those of the program's own nodes."""
    # Of tables that nodes give nothing is declared that intervals could rely on.
    ends = None if tables else _ends(mask, domain, q_unit)
    if not ends:
        return _pair_rule(mask, domain, q_unit, kv_unit, heads, tables, device)
    return _span_rule(ends, kv_unit, heads, device)


def _pair_rule(
    mask: Any, domain: Domain, q_unit: int, kv_unit: int, heads: int, tables: Mapping[str, Tensor], device: torch.device
) -> PairRule:
    """The same, looked up pair by pair, or at one pair where all of two units are alike."""
    one = constant_in_units(mask, q_unit, kv_unit)
    q_steps = torch.arange(1 if one else q_unit, device=device)
    kv_steps = torch.arange(1 if one else kv_unit, device=device)
    free = mask.free_symbols
    env: dict[str, Any] = {**domain.lengths, **domain.tables, **tables}
    env["b"] = torch.arange(domain.batch, device=device).view(-1, 1, 1, 1, 1, 1) if BATCH in free else 0
    env["h"] = torch.arange(domain.heads, device=device).view(-1, 1, 1, 1, 1) if HEAD in free else 0

    def rule(rows: Tensor, units: Tensor) -> Tensor:
        q = (rows[:, None] * q_unit + q_steps + domain.q_offset).view(1, 1, len(rows), len(q_steps), 1, 1)
        kv = (units[:, None] * kv_unit + kv_steps).view(1, 1, 1, 1, len(units), len(kv_steps))
        allowed = evaluate(mask, {**env, "q_idx": q, "kv_idx": kv})
        real = (q < domain.lengths["q_len"]) & (kv < domain.kv_len)
        return _joined_flags((allowed & real).any(5).any(3), heads)

    return rule
