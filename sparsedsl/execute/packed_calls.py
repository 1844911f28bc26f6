"""Calls of many requests at once, behind each other in one row: one attention of a packed pattern over all of them. The stages:

1. *check*  (:mod:`runtime.packed_rows`, :mod:`execute.pools`): lengths, tensors, pools
2. *see*    (:mod:`runtime.seen_pages`): the pages that some query can see; the others are not read
3. *tell*   (:mod:`program.packing`): tables of the place and position of every row, and where the rows of keys lie
4. *run*    (:mod:`execute.static`): by a backend, as every call
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.execute.static import StaticAttention
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.packing import Packing, packing_of
from sparsedsl.runtime.call import Call, bind_tables, check_call, exactly
from sparsedsl.runtime.packed_rows import KeyRows, Requests
from sparsedsl.runtime.places import Places

__all__ = ["PackedAttention"]

Tensor = torch.Tensor
Result = tuple[Tensor, Tensor | None]
# Requests with as few queries are computed apart from those with more: strips of queries then are of one request.
FEW_QUERIES = 8


class PackedAttention:
    """One pattern over rows of many requests, on one backend."""

    def __init__(self, pattern: Pattern, backend: str) -> None:
        self.pattern, self.backend = pattern, backend

    @functools.cached_property
    def packing(self) -> Packing:
        """The pattern of such rows."""
        return packing_of(self.pattern)

    @functools.cached_property
    def static(self) -> StaticAttention:
        """What runs it. Its tables are others at every call."""
        return StaticAttention(self.packing.pattern, minimal=False)

    def bound(self, named: Mapping[str, Any], heads: int, device: torch.device) -> dict[str, Tensor]:
        """The tables of the pattern, checked."""
        found = bind_tables(self.pattern, named, device=device)
        count_heads((self.pattern,), found, heads)
        return found

    def told(self, requests: Requests, keys: KeyRows, device: torch.device) -> dict[str, Tensor]:
        """The tables that say of every row whose it is and where it stands, by name."""
        made = {**requests.row_tables(self.packing.span), "kv_place": keys.place, "kv_position": keys.position}
        return {name: made[what].to(device) for what, name in self.packing.wanted.items()}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, requests: Requests, told: Mapping[str, Tensor], tables: Mapping[str, Tensor], *,
        scale: float | None, lse: bool, places: Places | None = None,
    ) -> Result:  # fmt: skip
        """``out (1, Hq, T, Dv)`` and the LSE ``(1, Hq, T)`` of ``q (1, Hq, T, D)`` over keys and values ``(1, Hkv, .., D)``.

        ``told``: what :meth:`told` gave. ``tables``: those of the pattern. ``places``: where the rows of keys lie in k and v, if not in
        order.
        """
        packing, own = self.packing, {**told, **tables}
        if requests.looked_at:
            call = check_call(packing.pattern, q, k, v, own, scale=scale, places=places)
        else:
            call = self._unlooked(q, k, v, own, tables, scale, places)
        run = self._run(requests)
        return self.static.attend(replace(call, run=run) if run else call, self.backend, lse=lse)

    def _unlooked(
        self, q: Tensor, k: Tensor, v: Tensor, own: dict[str, Tensor], tables: Mapping[str, Tensor], scale: float | None,
        places: Places | None,
    ) -> Call:  # fmt: skip
        """A call whose numbers are on a device: what is known of them is how many there are."""
        rows, kv_len = (q.shape[2], k.shape[2]) if places is None else places.lengths(q, k)
        ours = {name: table for name, table in own.items() if name not in tables}
        longest = Domain(max(rows, 1), max(kv_len, 1), 0, max(rows, 1), q.shape[1], dict(tables))
        given = {**ours, **exactly(self.pattern.exprs, longest).tables}
        usual = self.pattern.scale if self.pattern.scale is not None else q.shape[-1] ** -0.5
        domain = Domain(max(rows, 1), max(kv_len, 1), 0, 1, q.shape[1], given)
        return Call(q, k, v, domain, float(usual if scale is None else scale), own, places, True)

    def _run(self, requests: Requests) -> int:
        """Neighbouring queries of one request, where they are few everywhere; 0: there are many, or nobody may look."""
        if not requests.looked_at or not requests.count:
            return 0
        lens = requests.q_lens
        if int(lens.max()) > FEW_QUERIES:
            return 0
        return math.gcd(*lens.unique().tolist()) if requests.rows == int(requests.ends[-1]) else 1

    def parts(self, requests: Requests) -> list[tuple[Requests, Tensor]] | None:
        """Requests with few queries and those with many, each with its rows; None: there is one kind only, or it is all the same."""
        if not requests.looked_at:
            return None
        few = requests.q_lens <= FEW_QUERIES
        busy = requests.q_lens > 0
        if not bool((few & busy).any()) or not bool((~few).any()):
            return None
        return [requests.among(kind.nonzero()[:, 0]) for kind in (few & busy, ~few)]
