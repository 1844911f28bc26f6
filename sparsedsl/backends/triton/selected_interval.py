"""Masks that are one interval of keys for each query: what the kernels along lists read instead of evaluating them pair by pair."""

from __future__ import annotations

from typing import NamedTuple

import sympy
import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.key_intervals import interval_rows, intervals

__all__ = ["Interval", "interval_of"]

Tensor = torch.Tensor


class Interval(NamedTuple):
    """Keys that a query may attend to: positions ``first <= j <= last``, each int32 ``(B or 1, Hq or 1, Sq)``, contiguous."""

    first: Tensor
    last: Tensor


_INTERVALS: Cache[Interval | None] = Cache()


def interval_of(mask: sympy.Basic, domain: Domain, device: torch.device) -> Interval | None:
    """The keys that each query sees under ``mask``, on ``device``, if they are one interval for every query of the call; else None.

    Remembered for lengths and tables.
    """
    tables = [domain.tables[name] for name in sorted(domain.tables)]
    key = (mask, domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, device)
    return _INTERVALS.get(key, tables, lambda: _interval(mask, domain, device))


def _interval(mask: sympy.Basic, domain: Domain, device: torch.device) -> Interval | None:
    """Of several intervals at most one may hold keys: conditions that exclude each other are two intervals, of which one is empty."""
    found = intervals(mask)
    if not found:
        return None
    ends = [
        torch.broadcast_tensors(*parts) for parts in zip(*(interval_rows(interval, domain) for interval in found), strict=True)
    ]
    first, last = (torch.stack(parts) for parts in ends)
    holds = last >= first
    if len(found) > 1 and bool((holds.sum(0) > 1).any()):
        return None
    both = torch.where(holds, first, domain.kv_len).amin(0), torch.where(holds, last, -1).amax(0)
    return Interval(*(end.to(device, torch.int32).contiguous() for end in torch.broadcast_tensors(*both)))
