"""From a mask to the units each row may choose: limits and a rule, without looking at every pair where intervals say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.spans import span_rows, spans
from sparsedsl.lang.evaluate import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.run.choosing.candidates import Candidates, PairRule

__all__ = ["candidates_of", "constant_in_units", "unit_rule"]

Tensor = torch.Tensor


def candidates_of(mask: Any, domain: Domain, q_unit: int, kv_unit: int, heads: int, tables: Mapping[str, Tensor]) -> Candidates:
    """The units of ``kv_unit`` keys with a pair that ``mask`` allows, for every unit of ``q_unit`` queries.

    ``heads``: of the scores; where the mask tells more heads apart, a unit is allowed if it is for one head of the group.
    """
    if mask == sympy.true:
        return Candidates()
    domain = replace(domain, tables={**domain.tables, **tables})
    found = None if tables else spans(mask)  # of tables that nodes give nothing is declared that intervals could rely on
    if found is None:
        return Candidates(allowed=unit_rule(mask, domain, q_unit, kv_unit, heads, {}))
    ends = [
        tuple(_per_unit(end, q_unit, fill) for end, fill in zip(span_rows(s, domain), (domain.kv_len, -1), strict=True))
        for s in found
    ]
    if not ends:
        return Candidates(end=torch.zeros(-(-domain.rows // q_unit), dtype=torch.int64, device=domain.device))
    # (.., rows, q_unit): -1 and kv_len mark queries without keys
    begin = torch.stack(torch.broadcast_tensors(*(first.amin(-1) for first, _ in ends))).amin(0) // kv_unit
    end = torch.stack(torch.broadcast_tensors(*(last.amax(-1) for _, last in ends))).amax(0) // kv_unit + 1
    begin, end = _joined(begin, heads, "amin"), _joined(end, heads, "amax")
    exact = len(ends) == 1 and q_unit == 1 and ends[0][0].shape[1] in (1, heads)

    def allowed(rows: Tensor, units: Tensor) -> Tensor:
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        verdict = None
        for first, last in ends:
            low, high = first[:, :, some, :, None] // kv_unit, last[:, :, some, :, None]
            inside = ((units >= low) & (units <= high // kv_unit) & (high >= 0)).any(3)
            verdict = inside if verdict is None else verdict | inside
        assert verdict is not None
        return _joined_flags(verdict, heads)

    return Candidates(begin=begin, end=end, allowed=None if exact else allowed)


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


def constant_in_units(mask: Any, q_unit: int, kv_unit: int) -> bool:
    """Whether a mask reads queries and keys only by the units they lie in."""

    def only_by_units(symbol: sympy.Symbol, unit: int) -> bool:
        if unit == 1:
            return True
        known = {
            read: sympy.Dummy(integer=True)
            for read in mask.atoms(sympy.floor)
            if (share := sympy.Wild("share", exclude=[0])) and (match := read.args[0].match(symbol * share)) is not None
            and match[share].is_Rational and match[share].p == 1 and match[share].q % unit == 0
        }  # fmt: skip
        return symbol not in mask.xreplace(known).free_symbols

    return only_by_units(Q_IDX, q_unit) and only_by_units(KV_IDX, kv_unit)


def unit_rule(mask: Any, domain: Domain, q_unit: int, kv_unit: int, heads: int, tables: Mapping[str, Tensor]) -> PairRule:
    """Whether a unit of queries and a unit of keys hold a pair that ``mask`` allows, looked up pair by pair (one where all are alike)."""
    one = constant_in_units(mask, q_unit, kv_unit)
    device = domain.device
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
