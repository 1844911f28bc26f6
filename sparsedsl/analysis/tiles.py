"""Which tiles of (queries x keys) are empty, full or partial. Input: a mask, a domain, a block size. Output: :class:`BlockLists`.

Three steps, cheapest first, each in chunks of bounded memory:

1. *Runs*: the clauses of the mask are solved per row of tiles (:mod:`runs`); O(rows). Windows, sinks, prefixes, chunks, documents and
   their unions are nearly finished here.
2. *Boxes*: where a clause holds conditions that runs cannot use, interval arithmetic (:mod:`intervals`) descends from large
   boxes to tiles, so that whole regions fall at once, and on into undecided tiles while they are large.
3. *Points*: tiles still undecided are grouped by what they look like (tiles on one diagonal of a mask of ``q_idx - kv_idx`` are one
   tile), tried on a few telling points, and the last of them evaluated point by point. This step is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.intervals import TableRanges
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL, UNKNOWN, BlockLists, TileRows, check_room, expand_runs
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.points import Boxes, PointDecider, box_classes, check_points
from sparsedsl.analysis.runs import solve_clause
from sparsedsl.errors import ShapeError

__all__ = ["BRANCH", "Grid", "block_pair", "classify", "in_owner", "split", "touched_runs"]

# The descent begins at boxes of this many tiles on a side and splits by BRANCH.
ROOT, BRANCH = 64, 4
# Lists that may be longer than this are counted before they are made.
LONG = 1 << 28


@dataclass(frozen=True)
class Grid:
    """Tiles of ``block = (q, kv)`` tokens over the lengths of a domain; the last tiles may be ragged."""

    domain: Domain
    block: tuple[int, int]

    @property
    def rows(self) -> int:
        """Number of query tiles."""
        return -(-self.domain.rows // self.block[0])

    @property
    def columns(self) -> int:
        """Number of key tiles."""
        return -(-self.domain.kv_len // self.block[1])

    def queries(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last query position of each tile row."""
        first = row * self.block[0]
        last = (first + self.block[0] - 1).clamp(max=self.domain.rows - 1)
        return first + self.domain.q_offset, last + self.domain.q_offset

    def keys(self, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key of each tile column."""
        first = column * self.block[1]
        return first, (first + self.block[1] - 1).clamp(max=self.domain.kv_len - 1)

    def coarser(self, factor: int) -> Grid:
        """The grid of boxes of ``factor x factor`` tiles."""
        return Grid(self.domain, (self.block[0] * factor, self.block[1] * factor))


def block_pair(block_size: Any) -> tuple[int, int]:
    """``block_size`` as (q, kv): one number of tokens for both, or a pair."""
    pair = tuple(block_size) if isinstance(block_size, (tuple, list)) else (block_size, block_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise ShapeError(f"block_size must be a positive number of tokens, or a pair (q, kv) of them; got {block_size!r}")
    return pair


def classify(mask: Boolean, domain: Domain, block_size: Any = 128, *, minimal: bool = True) -> BlockLists:
    """The tile lists of ``mask`` over ``domain`` in tiles of ``block_size`` tokens.

    Without ``minimal``, what intervals do not decide is listed as partial instead of being looked at pair by pair: right for masks whose
    tables are new with every call, where looking costs more than a tile too many.
    """
    return _Classifier(mask, Grid(domain, block_pair(block_size)), minimal).run()


def touched_runs(mask: Boolean, domain: Domain, block_size: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tiles with an allowed pair as runs: line (group * tile rows + row), first column, and the column after the last.

    Runs of one line may touch and are in no order. Of masks that are told by bounds nothing is made that grows with the tiles.
    """
    return _Classifier(mask, Grid(domain, block_pair(block_size)), True).touched()


class _Classifier:
    """One classification; holds what its steps share. A *line* is a tile row of one group: group * rows + row."""

    def __init__(self, mask: Boolean, grid: Grid, minimal: bool):
        self.mask, self.grid, self.domain, self.minimal = mask, grid, grid.domain, minimal
        self.device = self.domain.device
        self.groups = self.domain.groups(mask)
        self.ranges = TableRanges(self.domain.tables)
        self.clauses = clauses(mask)
        self.decider = PointDecider(mask, self.domain, self.groups, self.ranges)
        # Boxes are worth descending where some condition is known neither to runs nor to the grouping by diagonals.
        self.descends = any(not self.decider.diagonal(literal) for clause in self.clauses for literal in clause.rest)

    def run(self) -> BlockLists:
        """Classes of all lines, gathered into lists."""
        self._check_room()
        counts = torch.zeros((2, self.groups.count * self.grid.rows), dtype=torch.int32, device=self.device)
        columns = self._columns_by_boxes(counts) if self.descends else self._columns_by_runs(counts)
        shape = (self.groups.batch, self.groups.heads, self.grid.rows)
        full, partial = (TileRows(counts[i].view(shape), columns[i]) for i in (0, 1))
        return BlockLists(full, partial, self.grid.block, self.domain.rows, self.domain.kv_len)

    def touched(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :func:`touched_runs`: pieces whose class is known as they are, others tile by tile."""
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if self.descends:
            found += [
                (line[kind != EMPTY], column[kind != EMPTY], column[kind != EMPTY] + 1)
                for line, column, kind in self._tiles_by_boxes()
            ]
        else:
            for line, starts, lengths, kinds in self._pieces(self.grid):
                known = (kinds != UNKNOWN) & (lengths > 0)
                owner = line[:, None].expand_as(starts)[known]
                found.append((owner, starts[known], (starts + lengths)[known]))
                unknown = (kinds == UNKNOWN) & (lengths > 0)
                if bool(unknown.any()):
                    place, column, kind = self._decide_pieces(line, starts, lengths * unknown)
                    some = kind != EMPTY
                    found.append((line[place[some]], column[some], column[some] + 1))
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        line, first, stop = (torch.cat([none, *parts]) for parts in (zip(*found, strict=True) if found else [()] * 3))
        return line, first, stop

    def _check_room(self) -> None:
        """Refuse lists that are certain not to fit into memory, before any of them is made."""
        lines = self.groups.count * self.grid.rows
        self._refuse_beyond(8 * lines)
        if lines * self.grid.columns < LONG or self.descends or not self.clauses:
            return
        listed, step = 0, max(1, EFFORT.now.tiles // len(self.clauses))
        for first in range(0, lines, step):
            line = torch.arange(first, min(first + step, lines), device=self.device)
            _, lengths, kinds = self._line_pieces(self.grid, line)
            listed += int((lengths * (kinds != UNKNOWN)).sum())
            self._refuse_beyond(8 * (lines + listed))

    def _refuse_beyond(self, count: int) -> None:
        """``count``: bytes while lists are made and joined."""
        block_q, block_kv = self.grid.block
        what = f"tile lists of {self.domain.rows:,} x {self.domain.kv_len:,} pairs in tiles of {block_q} x {block_kv}"
        way = (
            f"Take larger tiles (block_size={2 * max(self.grid.block)}) or fewer queries at a time; sd.analyse counts the tiles of "
            "masks that repeat (no table that positions choose from) without lists"
        )
        check_room(count, self.device, what, way)

    def _columns_by_runs(self, counts: torch.Tensor) -> list[torch.Tensor]:
        """Steps 1 and 3: columns of the full and the partial tiles, straight from the pieces of each line; fills ``counts``."""
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for line, starts, lengths, kinds in self._pieces(self.grid):
            base = int(line[0])
            unknown = (kinds == UNKNOWN) & (lengths > 0)
            decided = self._decide_pieces(line, starts, lengths * unknown) if bool(unknown.any()) else None
            for i, wanted in enumerate((FULL, PARTIAL)):
                chosen = lengths * (kinds == wanted)
                per_line = chosen.sum(dim=1)
                owner, columns = expand_runs(starts.reshape(-1), chosen.reshape(-1))
                if decided is not None:
                    more = (decided[2] == wanted).nonzero()[:, 0]
                    more_owner, more_columns = (t.index_select(0, more) for t in decided[:2])
                    keys = torch.cat([owner // starts.shape[1], more_owner]) * self.grid.columns
                    columns = (keys + torch.cat([columns, more_columns])).sort().values % self.grid.columns
                    per_line = per_line + torch.bincount(more_owner, minlength=per_line.numel())
                counts[i, base : base + line.numel()] = per_line
                found[i].append(columns.to(torch.int32))
        columns_of = []
        for part in found:
            columns_of.append(torch.cat(part) if part else self._no_columns())
            part.clear()  # the chunks go before the next kind is joined
        return columns_of

    def _columns_by_boxes(self, counts: torch.Tensor) -> list[torch.Tensor]:
        """Steps 1 to 3 with the descent, which meets tiles box by box: put in line order, columns ascending, at the end."""
        keys: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        listed = 0
        for line, column, kind in self._tiles_by_boxes():
            listed += kind.numel()
            self._refuse_beyond(32 * listed)  # keys, joined, sorted, with their places
            for i, wanted in enumerate((FULL, PARTIAL)):
                owner = line[kind == wanted]
                counts[i].index_add_(0, owner, torch.ones_like(owner, dtype=torch.int32))
                keys[i].append(owner * self.grid.columns + column[kind == wanted])
        return [
            (torch.cat(part).sort().values % self.grid.columns).to(torch.int32) if part else self._no_columns() for part in keys
        ]

    def _no_columns(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int32, device=self.device)

    def _decide_pieces(
        self, line: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step 3 on whole pieces: line number within the chunk, column and class of each of their tiles."""
        owner, column = expand_runs(starts.reshape(-1), lengths.reshape(-1))
        owner = owner // starts.shape[1]
        return owner, column, self._decide(line.index_select(0, owner), column)

    def _decide(self, line: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        if not self.minimal:
            return torch.full_like(column, PARTIAL)
        one = self.groups.count == 1
        group, row = (line.new_zeros(()).expand_as(line), line) if one else (line // self.grid.rows, line % self.grid.rows)
        return self._decide_boxes((group, *self.grid.queries(row), *self.grid.keys(column)))

    def _decide_boxes(self, boxes: Boxes) -> torch.Tensor:
        """Exact classes; large boxes from those of their parts, most of which intervals decide."""
        sizes = [int((high - low).max()) + 1 if low.numel() else 1 for low, high in (boxes[1:3], boxes[3:5])]
        if not self.descends or max(sizes) <= EFFORT.now.fine:
            return self.decider.decide(boxes)
        kinds = self.decider.told(boxes)
        parts = [BRANCH if size > EFFORT.now.fine else 1 for size in sizes]
        for open_ in (kinds == UNKNOWN).nonzero()[:, 0].split(max(1, EFFORT.now.boxes // math.prod(parts))):
            if open_.numel():
                kinds[open_] = self._from_parts(tuple(t[open_] for t in boxes), parts)  # type: ignore[arg-type]
        return kinds

    def _from_parts(self, boxes: Boxes, parts: list[int]) -> torch.Tensor:
        owner, pieces = split(boxes, parts)
        kinds = box_classes(self.mask, self.domain, self.groups, self.ranges, pieces)
        if bool((kinds == UNKNOWN).all()):  # intervals say nothing here: down to the points, if these are not too many
            check_points(boxes)
        some, holes = in_owner(owner, kinds, boxes[0].numel())
        # A box with an allowed and a masked pair is partial, whatever its open parts are.
        open_ = ((kinds == UNKNOWN) & ~(some & holes)[owner]).nonzero()[:, 0]
        if open_.numel():
            kinds[open_] = self._decide_boxes(tuple(t[open_] for t in pieces))  # type: ignore[arg-type]
            some, holes = in_owner(owner, kinds, boxes[0].numel())
        return torch.where(some, torch.where(holes, PARTIAL, FULL), EMPTY)

    def _pieces(self, grid: Grid) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Step 1. Chunks of lines with the pieces of each line: line, starts, lengths, kinds ``(lines, pieces)``.

        A chunk lists about ``EFFORT.now.tiles`` boxes at most, unless a single line lists more.
        """
        if not self.clauses:
            return
        total = self.groups.count * grid.rows
        step = max(1, EFFORT.now.tiles // (8 * len(self.clauses)))
        for first in range(0, total, step):
            line = torch.arange(first, min(first + step, total), device=self.device)
            starts, lengths, kinds = self._line_pieces(grid, line)
            done = lengths.sum(dim=1).cumsum(0)
            if int(done[-1]) <= EFFORT.now.tiles:
                yield line, starts, lengths, kinds
                continue
            begin = 0
            while begin < line.numel():
                limit = (int(done[begin - 1]) if begin else 0) + EFFORT.now.tiles
                stop = max(begin + 1, int(torch.searchsorted(done, limit, right=True)))
                part = slice(begin, stop)
                yield line[part], starts[part], lengths[part], kinds[part]
                begin = stop

    def _line_pieces(self, grid: Grid, line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cut each line at the ends of all clause intervals, and class the pieces."""
        row = line % grid.rows
        q_low, q_high = grid.queries(row)
        env: dict[str, Any] = self.groups.env(line // grid.rows) | self.domain.lengths | dict(self.domain.tables)
        outer, inner = [], []
        for clause in self.clauses:
            runs = solve_clause(clause, q_low, q_high, self.domain.lengths["q_len"], self.domain.kv_len, env)
            outer.append(self._touched(grid, runs.outer_low, runs.outer_high))
            inner.append(self._contained(grid, runs.inner_low, runs.inner_high))
        cuts = torch.stack([end for run in outer + inner for end in run], dim=-1).sort(dim=-1).values
        starts, lengths = cuts[:, :-1], cuts.diff(dim=-1)
        touching = torch.zeros_like(starts)
        certain = torch.zeros_like(starts, dtype=torch.bool)
        full = certain
        for clause, (o_start, o_stop), (i_start, i_stop) in zip(self.clauses, outer, inner, strict=True):
            inside = (starts >= o_start[:, None]) & (starts < o_stop[:, None])
            touching = touching + inside
            certain = certain | inside if clause.tight else certain
            full = full | ((starts >= i_start[:, None]) & (starts < i_stop[:, None]))
        # Touched by one tight clause and not inside it: some pairs allowed, some not. Several may fill a tile together.
        kinds = torch.where(certain & (touching == 1), PARTIAL, UNKNOWN)
        kinds = torch.where(full, FULL, kinds)
        return starts, lengths * (touching > 0), kinds

    @staticmethod
    def _touched(grid: Grid, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Half-open range of tile columns that the key interval touches."""
        low, high = low.clamp(min=0), high.clamp(max=grid.domain.kv_len - 1)
        start = low // grid.block[1]
        return start, torch.where(low <= high, high // grid.block[1] + 1, start)

    @staticmethod
    def _contained(grid: Grid, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Half-open range of tile columns inside the key interval; the ragged last tile ends where the keys end."""
        last = grid.domain.kv_len - 1
        low, high = low.clamp(min=0), high.clamp(max=last)
        start = (low + grid.block[1] - 1) // grid.block[1]
        stop = torch.where(high == last, grid.columns, (high + 1) // grid.block[1])
        return start, torch.where(low <= high, torch.maximum(start, stop), start)

    def _tiles_by_boxes(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Steps 1 to 3 with the descent: (line, column, class) of tiles, box by box."""
        grid = self.grid.coarser(ROOT)
        for line, starts, lengths, kinds in self._pieces(grid):
            owner, column = expand_runs(starts.reshape(-1), lengths.reshape(-1))
            kind = kinds.reshape(-1)[owner]
            owner = line[owner // starts.shape[1]]
            # A partial box says nothing about its children.
            kind = torch.where(kind == PARTIAL, UNKNOWN, kind)
            yield from self._descend(owner // grid.rows, owner % grid.rows, column, kind, ROOT)

    def _descend(
        self, group: torch.Tensor, row: torch.Tensor, column: torch.Tensor, kind: torch.Tensor, factor: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Step 2. Split undecided boxes until they are tiles; empty ones fall, full ones need no further question."""
        grid = self.grid.coarser(factor)
        step = EFFORT.now.boxes // BRANCH**2
        for begin in range(0, kind.numel(), step):
            g, r, c, k = (t[begin : begin + step] for t in (group, row, column, kind))
            open_ = (k == UNKNOWN).nonzero()[:, 0]
            if open_.numel():
                boxes = (g[open_], *grid.queries(r[open_]), *grid.keys(c[open_]))
                k = k.index_put((open_,), box_classes(self.mask, self.domain, self.groups, self.ranges, boxes))
            keep = k != EMPTY
            g, r, c, k = (t[keep] for t in (g, r, c, k))
            if factor > 1:
                yield from self._descend(*self._children(g, r, c, k, factor), factor // BRANCH)
            elif k.numel():
                line = g * grid.rows + r
                open_ = (k == UNKNOWN).nonzero()[:, 0]
                if open_.numel():
                    k = k.index_put((open_,), self._decide(line[open_], c[open_]))
                yield line, c, k

    def _children(
        self, group: torch.Tensor, row: torch.Tensor, column: torch.Tensor, kind: torch.Tensor, factor: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        child = self.grid.coarser(factor // BRANCH)
        steps = torch.arange(BRANCH, device=self.device)
        rows = (row[:, None, None] * BRANCH + steps[:, None]).expand(-1, BRANCH, BRANCH).reshape(-1)
        columns = (column[:, None, None] * BRANCH + steps).expand(-1, BRANCH, BRANCH).reshape(-1)
        inside = (rows < child.rows) & (columns < child.columns)
        groups, kinds = (t[:, None].expand(-1, BRANCH**2).reshape(-1)[inside] for t in (group, kind))
        return groups, rows[inside], columns[inside], kinds


def split(boxes: Boxes, parts: list[int]) -> tuple[torch.Tensor, Boxes]:
    """Boxes cut into ``parts`` (of the queries, of the keys) of about one size: the box of each piece, and the pieces."""
    group, q_low, q_high, kv_low, kv_high = boxes
    ends = []
    for low, high, number in ((q_low, q_high, parts[0]), (kv_low, kv_high, parts[1])):
        size = (high - low) // number + 1
        first = low[:, None] + size[:, None] * torch.arange(number, device=low.device)
        ends.append((first, torch.minimum(first + size[:, None] - 1, high[:, None])))
    (q_first, q_last), (kv_first, kv_last) = ends
    shape = (group.numel(), *parts)
    pieces = [t[:, :, None].expand(shape).reshape(-1) for t in (q_first, q_last)]
    pieces += [t[:, None, :].expand(shape).reshape(-1) for t in (kv_first, kv_last)]
    owner = torch.arange(group.numel(), device=group.device)[:, None, None].expand(shape).reshape(-1)
    inside = ((pieces[0] <= pieces[1]) & (pieces[2] <= pieces[3])).nonzero()[:, 0]
    owner = owner[inside]
    return owner, (group[owner], *(t[inside] for t in pieces))  # type: ignore[return-value]


def in_owner(owner: torch.Tensor, kinds: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a box is known to have an allowed pair, and whether it is known to have a masked one, from the classes of its pieces."""
    partial = kinds == PARTIAL
    some, holes = (
        torch.bincount(owner[of], minlength=count) > 0 for of in ((kinds == FULL) | partial, (kinds == EMPTY) | partial)
    )
    return some, holes
