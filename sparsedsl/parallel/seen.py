"""What chunks of queries see of the keys, from the tile lists of a pattern; nothing of the size queries x keys is made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.rows import closed_counts
from sparsedsl.analysis.tiles import classify, touched_runs
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.symbols import BATCH
from sparsedsl.parallel.stages import certain_pattern, stages_of
from sparsedsl.program.decided import possible
from sparsedsl.program.graph import Program
from sparsedsl.runtime.call import bind_tables, exactly

__all__ = ["Seen", "check_planned", "seen_by", "seen_of_program", "united"]

Tensor = torch.Tensor
# Rows of the tiles of masks that no bounds say: larger ones would be decided pair by pair where a table says blocks.
FINE = 128
# Pairs that a token of a recurrence counts for: as many as its state has rows, of heads of width 128.
SCAN_PAIRS = 128


@dataclass(frozen=True, eq=False)
class Seen:
    """What chunks of queries see of the granules of keys, and compute.

    work: pairs of query and key of a chunk, mean over heads, float64 ``(chunks,)``; counted, or where there are more than
    ``EFFORT.placed_rows`` rows estimated from evenly spaced ones of every chunk. chunk, first, stop: int64 ``(runs,)``, half-open runs of
    granules of which some head of the chunk sees a key, in order, with gaps between those of a chunk.
    """

    work: Tensor
    chunk: Tensor
    first: Tensor
    stop: Tensor


def seen_by(pattern: Pattern, q_len: int, chunk: int, granule: int, heads: int | None, tables: Mapping[str, Any]) -> Seen:
    """What each chunk of queries sees of as many keys, and what that costs."""
    if pattern.mask.expr == sympy.false:
        none = torch.zeros(0, dtype=torch.int64)
        return Seen(torch.zeros(-(-q_len // chunk), dtype=torch.float64), none, none, none)
    bound = bind_tables(pattern, tables)
    domain = Domain(q_len, q_len, 0, 1, count_heads((pattern,), bound, heads), bound)
    domain = exactly((pattern.mask.expr,), domain)
    mask = pattern.mask.expr
    with torch.no_grad():
        if all(not clause.rest for clause in clauses(mask)):
            line, first, stop = touched_runs(mask, domain, (chunk, granule))
            runs = line % -(-q_len // chunk), first, stop
            work = _closed_work(mask, domain, chunk)
        else:
            runs, work = _listed(mask, domain, chunk, granule)
    return Seen(work.cpu(), *(part.cpu() for part in united(*runs, -(-q_len // granule))))


def _closed_work(mask: Boolean, domain: Domain, chunk: int) -> Tensor:
    """From the ends of intervals of rows, of all or of evenly spaced ones of every chunk."""
    groups, q_len = domain.groups(mask).count, domain.rows
    begin = torch.arange(0, q_len, chunk, device=domain.device)
    size = (q_len - begin).clamp(max=chunk)
    looked = size.clamp(max=max(1, chunk * EFFORT.now.placed_rows // (groups * q_len)))
    number = torch.arange(int(looked.max()), device=domain.device)
    there = number < looked[:, None]
    row = (begin[:, None] + (2 * number + 1) * size[:, None] // (2 * looked[:, None]))[there]
    owner = there.nonzero()[:, 0]
    work = torch.zeros(begin.numel(), dtype=torch.float64, device=domain.device)
    for group in range(groups):
        work.index_add_(0, owner, closed_counts(mask, domain, group * q_len + row).to(torch.float64))
    return work * size / looked / groups


def _listed(mask: Boolean, domain: Domain, chunk: int, granule: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Runs and work from tile lists, of which a partial one counts half."""
    rows, q_len = FINE if chunk % FINE == 0 else chunk, domain.rows
    try:
        lists = classify(mask, domain, (rows, granule))
    except UnsupportedError as error:
        what = str(error).partition(". Take larger tiles")[0]
        raise UnsupportedError(f"{what}. Take a larger granule (now {granule} keys)") from error
    _, groups, lines, columns = lists.shape
    work = torch.zeros(-(-q_len // chunk), dtype=torch.float64, device=domain.device)
    found = []
    for part, share in ((lists.full, 1.0), (lists.partial, 0.5)):
        first, column = part.owners() % lines * rows, part.columns.to(torch.int64)
        heights, widths = (rows + first).clamp(max=q_len) - first, (q_len - column * granule).clamp(max=granule)
        work.index_add_(0, first // chunk, (heights * widths).to(torch.float64) * share)
        found.append(first // chunk * columns + column)
    tiles = torch.cat(found).unique()
    return (tiles // columns, tiles % columns, tiles % columns + 1), work / groups


def united(line: Tensor, first: Tensor, stop: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half-open runs of ``0 .. length - 1`` of lines, in order, each place of a line in one of them, with gaps between.

    >>> [part.tolist() for part in united(*torch.tensor([[1, 0, 1, 1], [4, 0, 2, 8], [6, 3, 4, 9]]), 10)]
    [[0, 1, 1], [0, 2, 8], [3, 6, 9]]
    """
    begin, end = line * (length + 1) + first, line * (length + 1) + stop
    begin, order = begin.sort()
    reached = end[order].cummax(0).values
    opens = torch.ones_like(begin, dtype=torch.bool)
    opens[1:] = begin[1:] > reached[:-1]
    begin, end = begin[opens], reached[opens.roll(-1)]
    return begin // (length + 1), begin % (length + 1), end - begin // (length + 1) * (length + 1)


def seen_of_program(program: Program, q_len: int, chunk: int, granule: int, heads: int | None, tables: Mapping[str, Any]) -> Seen:
    """What each chunk of queries of a program sees whatever is chosen, and what it computes with what choices add at most."""
    parts, work = [], torch.zeros(-(-q_len // chunk), dtype=torch.float64)
    tokens = torch.full_like(work, chunk)
    tokens[-1] = q_len - (tokens.numel() - 1) * chunk
    stages = stages_of(program)
    work += tokens * SCAN_PAIRS * len(stages.recurrent)
    for node in stages.late:
        certain = certain_pattern(program, node)
        limits = [None if choice.most is None else choice.most * choice.blocks[1] for choice in node.selections]
        least, most = (
            seen_by(attend(mask, heads=certain.heads), q_len, chunk, granule, heads, _read_by(tables, mask.tables))
            for mask in (certain.mask, possible(node.pattern.mask))
        )
        added = most.work - least.work
        known = [limit for limit in limits if limit is not None]
        work += least.work + (torch.minimum(added, tokens * sum(known)) if len(known) == len(limits) else added)
        parts.append(least)
    none = torch.zeros(0, dtype=torch.int64)
    chunks, first, stop = (torch.cat([none, *(getattr(part, name) for part in parts)]) for name in ("chunk", "first", "stop"))
    return Seen(work, *united(chunks, first, stop, -(-q_len // granule)))


def _read_by(tables: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: table for name, table in tables.items() if name in names}


def check_planned(name: str, patterns: Iterable[Pattern]) -> None:
    """Whether these can have one placement of tokens.

    Raises:
        UnsupportedError: batch entries see different keys.
    """
    if any(BATCH in pattern.mask.expr.free_symbols for pattern in patterns):
        raise UnsupportedError(
            f"pattern {name or 'of the plan'} reads b: batch entries see different keys, and have one placement of tokens. Plan each by "
            "itself, or put them behind each other, as documents of one sequence"
        )
