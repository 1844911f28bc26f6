"""Allowed keys per query row: exact density and empty rows, without the grid. Input: a mask, a domain, its tile lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.mask_clauses import clauses, only_difference
from sparsedsl.analysis.runs import solve_clause
from sparsedsl.lang.steps import evaluate

__all__ = ["RowCounts", "closed_counts", "count_rows", "looked_at", "row_counts"]

# Rows solved at once; differences of queries and keys that are looked at.
ROWS, DIAGONALS = 1 << 16, 1 << 24


@dataclass(frozen=True)
class RowCounts:
    """Of ``rows`` query rows (over all groups), ``allowed`` pairs in total and ``empty`` rows with none.

    ``exact`` is False where rows were sampled: then ``allowed`` and ``empty`` are estimates scaled up from the sample.
    ``first_empty`` is (group, row) of one empty row.
    """

    rows: int
    allowed: int
    empty: int
    first_empty: tuple[int, int] | None
    exact: bool

    def scaled(self, share: int) -> RowCounts:
        """The counts when each group stands for ``share`` pairs of batch entry and head."""
        return replace(self, rows=self.rows * share, allowed=self.allowed * share, empty=self.empty * share)


def count_rows(mask: Boolean, domain: Domain, lists: BlockLists) -> RowCounts:
    """Count allowed pairs and empty rows: in closed form or along diagonals where the mask allows it, by points of partial tiles else."""
    total = domain.groups(mask).count * domain.rows
    exact = looked_at(mask, domain, lists) <= EFFORT.now.counted_points
    seen = allowed = empty = 0
    first = None
    for start, counts in _counted(mask, domain, lists, exact):
        seen += counts.numel()
        allowed += int(counts.sum())
        none = (counts == 0).nonzero()[:, 0]
        if none.numel() and first is None:
            first = divmod(start + int(none[0]), domain.rows)
        empty += none.numel()
    if exact:
        return RowCounts(total, allowed, empty, first, True)
    return RowCounts(total, round(allowed * total / seen), round(empty * total / seen), first, False)


def row_counts(mask: Boolean, domain: Domain, lists: BlockLists) -> torch.Tensor | None:
    """Allowed keys of every row, int64 ``(groups * rows,)``; None where too many points would have to be looked at."""
    if looked_at(mask, domain, lists) > EFFORT.now.counted_points:
        return None
    return torch.cat([counts for _, counts in _counted(mask, domain, lists, True)])


def looked_at(mask: Boolean, domain: Domain, lists: BlockLists) -> int:
    """How many points are evaluated to count the rows exactly; 0 where they are not counted by points."""
    if _is_closed(mask) or _is_diagonal(mask, domain):
        return 0
    return lists.partial.total * lists.block[0] * lists.block[1]


def _counted(mask: Boolean, domain: Domain, lists: BlockLists, exact: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces of the rows of all groups: the number of the first, and the keys each may attend to."""
    if _is_closed(mask):
        return _closed_rows(mask, domain)
    if _is_diagonal(mask, domain):
        return _rows_by_diagonals(mask, domain)
    return _rows_by_points(mask, domain, lists, exact)


def _is_closed(mask: Boolean) -> bool:
    return all(not clause.rest for clause in clauses(mask))


def _is_diagonal(mask: Boolean, domain: Domain) -> bool:
    """Whether a pair is told by ``q_idx - kv_idx``, in windows with strides, and these are few enough to look at each."""
    return domain.rows + domain.kv_len <= DIAGONALS and only_difference(mask)


def _rows_by_diagonals(mask: Boolean, domain: Domain) -> Iterator[tuple[int, torch.Tensor]]:
    """As :func:`_closed_rows`: each difference of a query and a key is looked at once, and a row sees ``kv_len`` of them in a line."""
    groups = domain.groups(mask)
    q = torch.arange(domain.rows, device=domain.device) + domain.q_offset
    difference = torch.arange(domain.q_offset - domain.kv_len + 1, domain.q_offset + domain.rows, device=domain.device)
    places = {"q_idx": difference.clamp(min=0), "kv_idx": (-difference).clamp(min=0)}
    last = q - int(difference[0]) + 1
    for group in range(groups.count):
        env = groups.env(torch.tensor(group, device=domain.device)) | domain.lengths | dict(domain.tables)
        holds = torch.as_tensor(evaluate(mask, {**env, **places}), device=domain.device).expand(difference.numel())
        upto = torch.cat([last.new_zeros(1), holds.to(torch.int64).cumsum(0)])
        yield group * domain.rows, upto[last] - upto[last - domain.kv_len]


def closed_counts(mask: Boolean, domain: Domain, line: torch.Tensor) -> torch.Tensor:
    """Allowed keys of some rows, ``line`` being group * rows + row, of a mask whose clauses are bounds and nothing else."""
    parts = [_closed_form(mask, domain, some) for some in line.split(ROWS)]
    return torch.cat(parts) if parts else torch.zeros_like(line)


def _closed_rows(mask: Boolean, domain: Domain) -> Iterator[tuple[int, torch.Tensor]]:
    """As :func:`_counted`, from the ends of the intervals of every row."""
    total = domain.groups(mask).count * domain.rows
    for start in range(0, total, ROWS):
        line = torch.arange(start, min(start + ROWS, total), device=domain.device)
        yield start, _closed_form(mask, domain, line)


def _closed_form(mask: Boolean, domain: Domain, line: torch.Tensor) -> torch.Tensor:
    """Length of the union of the key intervals of each row; a tile of one row has equal outer and inner intervals."""
    groups = domain.groups(mask)
    q = line % domain.rows + domain.q_offset
    env: dict[str, Any] = groups.env(line // domain.rows) | domain.lengths | dict(domain.tables)
    starts, stops = [], []
    for clause in clauses(mask):
        runs = solve_clause(clause, q, q, domain.lengths["q_len"], domain.kv_len, env)
        start = runs.inner_low.clamp(min=0)
        starts.append(start)
        stops.append(torch.maximum(start, runs.inner_high.clamp(max=domain.kv_len - 1) + 1))
    if not starts:
        return torch.zeros_like(line)
    start, order = torch.stack(starts, dim=-1).sort(dim=-1)
    stop = torch.stack(stops, dim=-1).gather(-1, order)
    reached = stop.cummax(dim=-1).values
    before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], dim=-1)
    return (stop - torch.maximum(start, before)).clamp(min=0).sum(dim=-1)


def _rows_by_points(mask: Boolean, domain: Domain, lists: BlockLists, exact: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """As :func:`_closed_rows`, from all points of the partial tiles of all tile rows, or of evenly spaced ones if not ``exact``."""
    block_q, block_kv = lists.block
    lines = lists.partial.counts.reshape(-1)
    chosen = torch.arange(lines.numel(), device=domain.device)
    if not exact:
        chosen = (
            torch.linspace(0, lines.numel() - 1, min(EFFORT.now.sampled_rows, lines.numel()), device=domain.device)
            .round()
            .to(torch.int64)
            .unique()
        )
    rows = lists.shape[2]
    ends = lines.to(torch.int64).cumsum(0)
    # Keys of the full tiles of every line, the ragged last column counted as it is
    widths = torch.full((lists.full.total,), block_kv, device=domain.device)
    widths[lists.full.columns == lists.shape[3] - 1] -= lists.shape[3] * block_kv - domain.kv_len
    full_keys = torch.zeros(lines.numel(), dtype=torch.int64, device=domain.device).index_add_(0, lists.full.owners(), widths)
    groups = domain.groups(mask)
    for line in chosen.tolist():
        group, row = divmod(line, rows)
        top = row * block_q
        q = torch.arange(top, min(top + block_q, domain.rows), device=domain.device)
        columns = lists.partial.columns[int(ends[line] - lines[line]) : int(ends[line])].to(torch.int64)
        counts = full_keys[line].expand(q.numel()).clone()
        step = max(1, (1 << 20) // (q.numel() * block_kv))
        for begin in range(0, columns.numel(), step):
            kv = (columns[begin : begin + step, None] * block_kv + torch.arange(block_kv, device=domain.device)).reshape(-1)
            kv = kv[kv < domain.kv_len]
            env = groups.env(torch.tensor(group, device=domain.device)) | domain.lengths | dict(domain.tables)
            holds = evaluate(mask, {**env, "q_idx": q[:, None] + domain.q_offset, "kv_idx": kv})
            counts += holds.expand(q.numel(), kv.numel()).sum(dim=1)
        yield group * domain.rows + top, counts
