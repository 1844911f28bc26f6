"""What every query sees as runs of keys, and what sees every key as runs of queries: the form that all exports start from.

Input: a mask and a domain. Output: :class:`Spans`. The ends come from the closed forms of the analysis wherever there are any; else from
its tile lists, and only partial tiles are looked at pair by pair, some at a time. Memory follows the runs, never rows x keys.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.key_intervals import interval_rows, intervals
from sparsedsl.analysis.lists import BlockLists, TileRows, run_numbers
from sparsedsl.analysis.tiles import classify
from sparsedsl.lang.steps import evaluate

__all__ = ["Room", "Spans", "first_difference", "merged", "spans_of", "tile_pairs"]

# Tiles in which a mask without a closed form is looked at.
TILE = 128
# More intervals a line than this are no longer solved one by one.
MOST_INTERVALS = 64


class Room:
    """Says no, by ``refuse(bytes)``, as soon as more than ``most`` bytes would be held."""

    def __init__(self, most: int, refuse: Any) -> None:
        self.most, self.refuse = most, refuse

    def check(self, count: int) -> None:
        """Raise what ``refuse`` raises where ``count`` bytes are too many."""
        if count > self.most:
            self.refuse(count)


@dataclass(frozen=True, eq=False)
class Spans:
    """Half-open runs of ``0 .. length - 1`` for every line, in order, with gaps between them.

    ``shape`` is ``(batch, heads, lines)``, size 1 where the mask does not tell batch entries or heads apart. ``counts``, one a line, and
    ``starts`` and ``stops``, one a run, are flat int64.
    """

    shape: tuple[int, int, int]
    length: int
    counts: torch.Tensor
    starts: torch.Tensor
    stops: torch.Tensor

    @functools.cached_property
    def owners(self) -> torch.Tensor:
        """The flat line of every run."""
        return run_numbers(self.counts)

    @functools.cached_property
    def begins(self) -> torch.Tensor:
        """Where the runs of every line begin among all."""
        return self.counts.cumsum(0) - self.counts

    @functools.cached_property
    def ranks(self) -> torch.Tensor:
        """The number of every run within its line."""
        return torch.arange(self.starts.numel(), device=self.starts.device) - self.begins[self.owners]

    @property
    def most(self) -> int:
        """Most runs in any line."""
        return int(self.counts.max()) if self.counts.numel() else 0

    @property
    def most_away(self) -> int:
        """Most runs in any line that do not begin at 0."""
        at_zero = torch.bincount(self.owners[self.starts == 0], minlength=self.counts.numel())
        return int((self.counts - at_zero).max()) if self.counts.numel() else 0

    def at(self, line: int) -> list[range]:
        """The runs of one flat line."""
        begin, count = int(self.begins[line]), int(self.counts[line])
        part = slice(begin, begin + count)
        return [range(a, z) for a, z in zip(self.starts[part].tolist(), self.stops[part].tolist(), strict=True)]

    def group(self, batch: int, head: int) -> Spans:
        """The lines of one batch entry and head, which count as 0 where the mask does not tell them apart."""
        batches, heads, lines = self.shape
        number = (batch if batches > 1 else 0) * heads + (head if heads > 1 else 0)
        counts = self.counts[number * lines : (number + 1) * lines]
        begin = int(self.counts[: number * lines].sum())
        part = slice(begin, begin + int(counts.sum()))
        return Spans((1, 1, lines), self.length, counts, self.starts[part], self.stops[part])

    def gaps(self, low: torch.Tensor | None = None) -> Spans:
        """What lies in no run, from ``low`` on, one number a line; None: from 0 on."""
        lines = self.counts.numel()
        number = self.counts + 1
        first = number.cumsum(0) - number
        starts = torch.zeros(int(number.sum()), dtype=torch.int64, device=self.counts.device)
        stops = torch.full_like(starts, self.length)
        place = first[self.owners] + self.ranks
        starts[place + 1] = self.stops
        stops[place] = self.starts
        line = run_numbers(number)
        if low is not None:
            starts = torch.maximum(starts, low[line])
        kept = starts < stops
        counts = torch.bincount(line[kept], minlength=lines)
        return Spans(self.shape, self.length, counts, starts[kept], stops[kept])

    def dense(self) -> torch.Tensor:
        """``(batch, heads, lines, length)`` bool; for tests and small pictures."""
        edges = torch.zeros(self.counts.numel(), self.length + 1, dtype=torch.int32, device=self.counts.device)
        edges.index_put_((self.owners, self.starts), edges.new_ones(()), accumulate=True)
        edges.index_put_((self.owners, self.stops), -edges.new_ones(()), accumulate=True)
        return (edges.cumsum(1)[:, :-1] > 0).view(*self.shape, self.length)


def merged(shape: tuple[int, int, int], length: int, line: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> Spans:
    """Runs from pieces in any order, which may overlap, touch or be empty; ``line`` is the flat line of each."""
    kept = start < stop
    if not bool(kept.all()):
        line, start, stop = line[kept], start[kept], stop[kept]
    begin = line * (length + 1) + start
    if bool((begin[1:] < begin[:-1]).any()):
        begin, order = begin.sort()
        line, stop = line[order], stop[order]
    # Lines lie one behind the other, each one place longer than its runs reach: a new line never goes on with a run.
    reach = (line * (length + 1) + stop).cummax(0).values if line.numel() else begin
    new = torch.ones_like(begin, dtype=torch.bool)
    new[1:] = begin[1:] > reach[:-1]
    first = new.nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_full((min(1, first.numel()),), begin.numel())]) - 1
    owner = line[first]
    lines = shape[0] * shape[1] * shape[2]
    base = owner * (length + 1)
    return Spans(shape, length, torch.bincount(owner, minlength=lines), begin[first] - base, reach[last] - base)


def first_difference(mine: Spans, other: Spans) -> tuple[int, int, bool] | None:
    """The first flat line where two differ, the first place there, and whether ``mine`` has it; None: they are the same."""
    unequal = (mine.counts != other.counts).nonzero()[:, 0]
    line = int(unequal[0]) if unequal.numel() else mine.counts.numel()
    upto = int(mine.counts[:line].sum())
    moved = ((mine.starts[:upto] != other.starts[:upto]) | (mine.stops[:upto] != other.stops[:upto])).nonzero()[:, 0]
    if moved.numel():
        line = int(mine.owners[int(moved[0])])
    elif not unequal.numel():
        return None
    edges = [{end for run in spans.at(line) for end in (run.start, run.stop)} for spans in (mine, other)]
    place = min(edges[0] ^ edges[1])
    return line, place, any(place in run for run in mine.at(line))


def spans_of(mask: Boolean, domain: Domain, room: Room, *, of: str = "keys") -> Spans:
    """The runs of keys that each query sees, or with ``of="queries"`` the runs of queries, counted from 0, that see each key."""
    groups = domain.groups(mask)
    lines, length = (domain.rows, domain.kv_len) if of == "keys" else (domain.kv_len, domain.rows)
    shape = (groups.batch, groups.heads, lines)
    found = intervals(mask, of=of, most=MOST_INTERVALS)
    if found is None:
        return _from_tiles(mask, domain, shape, length, room, of)
    room.check(16 * groups.count * lines)
    pieces = [_solved(interval, domain, shape, length, of) for interval in found]
    if not pieces:
        empty = torch.zeros(0, dtype=torch.int64, device=domain.device)
        return merged(shape, length, empty, empty, empty)
    starts, stops = (torch.stack(ends, dim=-1) for ends in zip(*pieces, strict=True))
    line = torch.arange(starts.shape[0], device=domain.device)[:, None].expand(starts.shape)
    return merged(shape, length, line.reshape(-1), starts.reshape(-1), stops.reshape(-1))


def _solved(
    interval: Any, domain: Domain, shape: tuple[int, int, int], length: int, of: str
) -> tuple[torch.Tensor, torch.Tensor]:
    first, last = (end.to(torch.int64).expand(shape).reshape(-1) for end in interval_rows(interval, domain, of=of))
    if of == "queries":  # positions -> rows
        first, last = first - domain.q_offset, last - domain.q_offset
    return first.clamp(0, length), (last + 1).clamp(0, length)


# ---- where no formula says the ends -----------------------------------------------------------------------------------------------


def _from_tiles(mask: Boolean, domain: Domain, shape: tuple[int, int, int], length: int, room: Room, of: str) -> Spans:
    lists = classify(mask, domain, TILE)
    full, partial, block = lists.full, lists.partial, lists.block
    if of == "queries":
        full, partial, block = full.transposed(lists.shape[3]), partial.transposed(lists.shape[3]), block[::-1]
    pieces = [_full_pieces(full, block, shape, length, room)]
    held = 24 * pieces[0][0].numel()
    owners = partial.owners()
    step = max(1, EFFORT.now.points // (block[0] * block[1]))
    for begin in range(0, owners.numel(), step):
        part = slice(begin, begin + step)
        found = _partial_pieces(mask, domain, lists, owners[part], partial.columns[part].to(torch.int64), shape, of)
        held += 24 * found[0].numel()
        room.check(held)
        pieces.append(found)
    line, start, stop = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return merged(shape, length, line, start, stop)


def _full_pieces(
    full: TileRows, block: tuple[int, int], shape: tuple[int, int, int], length: int, room: Room
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neighbouring full tiles of a row of tiles as one piece for each of its lines."""
    batch, heads, rows = full.counts.shape
    columns = full.columns.to(torch.int64)
    runs = merged((batch, heads, rows), -(-length // block[1]), full.owners(), columns, columns + 1)
    room.check(24 * runs.starts.numel() * block[0])
    group, row = runs.owners // rows, runs.owners % rows
    line = row[:, None] * block[0] + torch.arange(block[0], device=row.device)
    inside = line < shape[2]
    start, stop = ((ends[:, None] * block[1]).clamp(max=length).expand(line.shape)[inside] for ends in (runs.starts, runs.stops))
    return (group[:, None] * shape[2] + line)[inside], start, stop


def tile_pairs(mask: Boolean, domain: Domain, lists: BlockLists, owner: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Which pairs of listed tiles attend, ``(tiles, block_q, block_kv)`` bool, False beyond the lengths; ``owner`` is a flat row."""
    groups, rows = domain.groups(mask), lists.shape[2]
    group, row = owner // rows, owner % rows
    q = row[:, None, None] * lists.block[0] + torch.arange(lists.block[0], device=owner.device)[:, None]
    kv = column[:, None, None] * lists.block[1] + torch.arange(lists.block[1], device=owner.device)
    inside = (q < domain.rows) & (kv < domain.kv_len)
    env: dict[str, Any] = groups.env(group[:, None, None]) | domain.lengths | dict(domain.tables)
    places = {"q_idx": q.clamp(max=domain.rows - 1) + domain.q_offset, "kv_idx": kv.clamp(max=domain.kv_len - 1)}
    return evaluate(mask, env | places).expand(inside.shape) & inside


def _partial_pieces(
    mask: Boolean,
    domain: Domain,
    lists: BlockLists,
    owner: torch.Tensor,
    across: torch.Tensor,
    shape: tuple[int, int, int],
    of: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pieces inside of some tiles; ``owner`` and ``across`` say where they lie, rows and columns exchanged for ``of="queries"``."""
    rows, columns = lists.shape[2:]
    if of == "keys":
        lines, (height, width) = rows, lists.block
        bits = tile_pairs(mask, domain, lists, owner, across)
    else:
        lines, (width, height) = columns, lists.block
        bits = tile_pairs(mask, domain, lists, owner // columns * rows + across, owner % columns).transpose(1, 2)
    edges = torch.nn.functional.pad(bits.to(torch.int8), (1, 1)).diff(dim=-1)
    tile, line, start = (edges == 1).nonzero().unbind(1)
    stop = (edges == -1).nonzero()[:, 2]
    flat = owner[tile] // lines * shape[2] + owner[tile] % lines * height + line
    return flat, across[tile] * width + start, across[tile] * width + stop
