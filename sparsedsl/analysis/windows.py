"""A look at part of a mask: the class of every cell of a grid laid over some queries and keys, in bounded time.

Input: a mask, the domain of the whole call, a :class:`Window` of it. Output: :class:`Cells`. What it costs follows from the number of
cells and, where the mask has conditions that its clauses do not solve, of tokens along a side; never from the pairs. The steps are those
of :mod:`sparsedsl.analysis.tiles`: intervals of clauses row by row, interval arithmetic on the cells they leave open, telling points, and
all points of what is still open, after splitting it; but the last is done for so many points only. Cells beyond are told by a sample, and
marked as not certain.

Nothing thin is lost between the telling points: where a condition reads the key alone, such as ``kv_idx % 4096 == 17``, a key of every
column that it holds for is among them, and so for queries and for differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.adjustable import Adjustable
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.intervals import TableRanges
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL, UNKNOWN
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.points import Boxes, PointDecider, box_classes
from sparsedsl.analysis.runs import solve_clause
from sparsedsl.analysis.tiles import BRANCH, in_owner, split
from sparsedsl.errors import ShapeError
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import KV_IDX, Q_IDX

__all__ = ["LOOKING", "Cells", "Looking", "Window", "window_cells"]


@dataclass(frozen=True)
class Looking:
    """How closely a window is looked at.

    - ``few``: a window of no more pairs than this is looked at pair by pair.
    - ``points`` looked at to decide cells of others; ``sample``: pairs tried in a cell that is told by a sample, or less.
    - ``depth``: how often open cells are split; into a piece for each 32 of the points at once, at most.
    - ``along``: tokens at which conditions of one index are evaluated, at most; so many ``conditions`` give telling points.
    """

    few: int = 1 << 19
    points: int = 1 << 21
    sample: int = 64
    depth: int = 4
    along: int = 1 << 22
    conditions: int = 4


LOOKING = Adjustable(Looking())
# Nodes of an expression whose points count once; pieces at once at most; pairs tried in a cell at least, where there are too many cells.
PLAIN, MOST_PIECES, LEAST = 16, 1 << 19, 8


@dataclass(frozen=True)
class Window:
    """Positions of queries and keys, and the size of a cell in tokens, ``(q, kv)``. The last cells may be ragged.

    >>> window = Window(range(0, 100), range(0, 64), (16, 16))
    >>> window.rows, window.columns
    (7, 4)
    """

    queries: range
    keys: range
    cell: tuple[int, int]

    def __post_init__(self) -> None:
        for name, part in (("queries", self.queries), ("keys", self.keys)):
            if not isinstance(part, range) or part.step != 1 or not len(part):
                raise ShapeError(f"Window: {name} must be a range of at least one position, in steps of 1; got {part!r}")
        if len(self.cell) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.cell):
            raise ShapeError(f"Window: cell must be two whole numbers of at least 1, (q, kv); got {self.cell!r}")

    @property
    def rows(self) -> int:
        """Cells from top to bottom."""
        return -(-len(self.queries) // self.cell[0])

    @property
    def columns(self) -> int:
        """Cells from left to right."""
        return -(-len(self.keys) // self.cell[1])

    def edges(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """First and last query of each row ``(rows,)``, first and last key of each column ``(columns,)``."""
        found = []
        for part, size in ((self.queries, self.cell[0]), (self.keys, self.cell[1])):
            first = torch.arange(part.start, part.stop, size)
            found += [first, (first + size - 1).clamp(max=part.stop - 1)]
        return found[0], found[1], found[2], found[3]


@dataclass(frozen=True)
class Cells:
    """``classes (rows, columns)`` int64: EMPTY, PARTIAL or FULL. ``certain (rows, columns)`` bool: False where a sample says so.

    A PARTIAL cell is always certain: it was seen to hold an allowed and a masked pair, or proved to.
    """

    window: Window
    classes: torch.Tensor
    certain: torch.Tensor


def window_cells(mask: Boolean, domain: Domain, window: Window, *, points: int | None = None, seed: int = 0) -> Cells:
    """The class of every cell of ``window``, for the first batch entry and head.

    Args:
        mask: a boolean expression; its reads of ``b`` and ``h`` see 0.
        domain: the whole call: lengths that the mask reads, and tables.
        window: positions; queries within ``q_offset .. q_offset + rows``, keys within ``0 .. kv_len``.
        points: pairs that may be looked at to decide cells; beyond, cells are told by samples. Default ``LOOKING.now.points``.
        seed: of the samples.

    Raises:
        ShapeError: the window reaches beyond the domain.

    >>> import sparsedsl as sd
    >>> window = Window(range(0, 1 << 20), range(0, 1 << 20), (1 << 18, 1 << 18))
    >>> window_cells((sd.kv_idx <= sd.q_idx).expr, Domain(1 << 20, 1 << 20), window).classes.tolist()
    [[1, 0, 0, 0], [2, 1, 0, 0], [2, 2, 1, 0], [2, 2, 2, 1]]
    """
    last = domain.q_offset + domain.rows
    if (
        window.queries.start < domain.q_offset
        or window.queries.stop > last
        or window.keys.start < 0
        or window.keys.stop > domain.kv_len
    ):
        raise ShapeError(
            f"the window of queries {window.queries} and keys {window.keys} reaches beyond queries "
            f"{range(domain.q_offset, last)} and keys {range(domain.kv_len)}"
        )
    on_cpu = replace(domain, tables={name: table.cpu() for name, table in domain.tables.items()})
    return _Looker(mask, on_cpu, LOOKING.now.points if points is None else points, seed).look(window)


class _Looker:
    def __init__(self, mask: Boolean, domain: Domain, points: int, seed: int):
        self.mask, self.domain = mask, domain
        # A point of a long expression counts for several.
        self.points = points // max(1, sum(1 for _ in sympy.preorder_traversal(mask)) // PLAIN)
        self.pieces = min(self.points // 32, MOST_PIECES)
        self.groups = domain.groups(mask)
        self.ranges = TableRanges(domain.tables)
        self.decider = PointDecider(mask, domain, self.groups, self.ranges)
        self.env: dict[str, Any] = {"b": 0, "h": 0} | domain.lengths | dict(domain.tables)
        self.generator = torch.Generator().manual_seed(seed)

    def look(self, window: Window) -> Cells:
        """Pairs where they are few; else clauses, boxes, witnesses, points, samples, each for what those before leave open."""
        certain = torch.ones((window.rows, window.columns), dtype=torch.bool)
        if len(window.queries) * len(window.keys) <= LOOKING.now.few:
            return Cells(window, self._by_pairs(window), certain)
        classes = self._by_clauses(window)
        for look in (self._by_boxes, self._by_witnesses):
            rows, columns = ((classes == UNKNOWN).any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
            if rows.numel():
                part = classes[rows[:, None], columns]
                found = look(window, rows, columns)
                classes[rows[:, None], columns] = torch.where(part == UNKNOWN, found, part)
        row, column = (classes == UNKNOWN).nonzero(as_tuple=True)
        if row.numel():
            q_first, q_last, kv_first, kv_last = window.edges()
            boxes: Any = (torch.zeros_like(row), q_first[row], q_last[row], kv_first[column], kv_last[column])
            kinds = self._on_diagonals(boxes)
            self._refine(boxes, kinds, lambda part: self._alike(part, LOOKING.now.depth))
            open_ = (kinds == UNKNOWN).nonzero()[:, 0]
            self._refine(boxes, kinds, self._sampled)
            guessed = open_[kinds[open_] != PARTIAL]
            certain[row[guessed], column[guessed]] = False
            classes[row, column] = kinds
        return Cells(window, classes, certain)

    def _by_pairs(self, window: Window) -> torch.Tensor:
        """What all pairs of the window say."""
        q, kv = (torch.arange(part.start, part.stop) for part in (window.queries, window.keys))
        pairs = self.decider.allowed(q.new_zeros(()), q[:, None], kv)
        if window.cell == (1, 1):
            return torch.where(pairs, FULL, EMPTY)
        beyond = (0, window.columns * window.cell[1] - len(window.keys), 0, window.rows * window.cell[0] - len(window.queries))
        shape = (window.rows, window.cell[0], window.columns, window.cell[1])
        some, all_ = (torch.nn.functional.pad(pairs, beyond, value=value).view(shape) for value in (False, True))
        some, all_ = some.any(dim=3).any(dim=1), all_.all(dim=3).all(dim=1)
        return torch.where(all_, FULL, torch.where(some, PARTIAL, EMPTY))

    def _by_clauses(self, window: Window) -> torch.Tensor:
        """What the intervals of the clauses say of every cell."""
        q_first, q_last, kv_first, kv_last = window.edges()
        shape = (window.rows, window.columns)
        touching = torch.zeros(shape, dtype=torch.uint8)
        certain = torch.zeros(shape, dtype=torch.bool)
        full = torch.zeros_like(certain)
        for clause in clauses(self.mask):
            runs = solve_clause(clause, q_first, q_last, self.domain.lengths["q_len"], self.domain.kv_len, self.env)
            outer = (runs.outer_low[:, None] <= kv_last) & (runs.outer_high[:, None] >= kv_first)
            outer &= (runs.outer_low <= runs.outer_high)[:, None]
            full |= (runs.inner_low[:, None] <= kv_first) & (runs.inner_high[:, None] >= kv_last)
            touching += outer
            if clause.tight:
                certain |= outer
        # Touched by one tight clause and not inside it: some pairs allowed, some not. Several may fill a cell together.
        kinds = torch.where(certain & (touching == 1), PARTIAL, UNKNOWN)
        return torch.where(full, FULL, torch.where(touching > 0, kinds, EMPTY))

    def _by_boxes(self, window: Window, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What interval arithmetic says: parts of the mask that read one index are worked out once a row or a column."""
        q_first, q_last, kv_first, kv_last = window.edges()
        boxes: Any = (
            rows.new_zeros(()),
            q_first[rows, None],
            q_last[rows, None],
            kv_first[None, columns],
            kv_last[None, columns],
        )
        return box_classes(self.mask, self.domain, self.groups, self.ranges, boxes).expand(rows.numel(), columns.numel())

    def _by_witnesses(self, window: Window, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """PARTIAL for cells with an allowed and a masked pair at their corners, or where a condition of one index changes; else UNKNOWN."""
        queries = self._places(Q_IDX, window.queries, window.cell[0])[rows]
        keys = self._places(KV_IDX, window.keys, window.cell[1])[columns]
        some = torch.zeros(rows.numel(), columns.numel(), dtype=torch.bool)
        holes = torch.zeros_like(some)
        for q in queries.unbind(1):
            for kv in keys.unbind(1):
                allowed = self.decider.allowed(q.new_zeros(()), q[:, None], kv)
                some |= allowed
                holes |= ~allowed
        return torch.where(some & holes, PARTIAL, UNKNOWN)

    def _places(self, symbol: sympy.Symbol, along: range, size: int) -> torch.Tensor:
        """``(cells, places)``: the ends of each cell of an axis, and a token where a condition of this axis alone holds, and fails."""
        first = torch.arange(along.start, along.stop, size)
        places = [first, (first + size - 1).clamp(max=along.stop - 1)]
        alone = [x for x in self.decider.literals if facts(x).symbols & {Q_IDX, KV_IDX} == {symbol}]
        if not alone or size == 1 or len(along) > LOOKING.now.along:
            return torch.stack(places, dim=1)
        tokens = torch.arange(along.start, along.stop)
        padded = torch.nn.functional.pad(tokens, (0, first.numel() * size - tokens.numel()), value=along.stop - 1).view(-1, size)
        for literal in alone[: LOOKING.now.conditions]:
            holds = evaluate(literal, self.env | {symbol.name: padded}).expand(padded.shape)
            for wanted in (holds, ~holds):
                places.append(padded.gather(1, wanted.to(torch.uint8).argmax(dim=1, keepdim=True))[:, 0])
        return torch.stack(places, dim=1)

    def _on_diagonals(self, boxes: Boxes) -> torch.Tensor:
        """PARTIAL for boxes in which a condition of differences changes, and the mask with it; else UNKNOWN."""
        _, q_low, q_high, kv_low, kv_high = boxes
        some = torch.zeros_like(q_low, dtype=torch.bool)
        holes = some.clone()
        least, most = q_low - kv_high, q_high - kv_low
        floor, top = int(least.min()), int(most.max())
        if top - floor <= LOOKING.now.along:
            apart = torch.arange(floor, top + 1)
            for literal in filter(self.decider.diagonal, self.decider.literals):
                env = self.env | {"q_idx": apart.clamp(min=0), "kv_idx": (-apart).clamp(min=0)}
                holds = evaluate(literal, env).expand(apart.shape)
                for wanted in (holds, ~holds):
                    # the next difference, from each on, that is as wanted: a minimum over what follows
                    far = torch.where(wanted, apart, top).flip(0).cummin(0).values.flip(0)
                    chosen = torch.minimum(far[least - floor], most)
                    kv = torch.minimum(torch.maximum(q_low - chosen, kv_low), kv_high)
                    allowed = self.decider.allowed(q_low.new_zeros(()), kv + chosen, kv)
                    some |= allowed
                    holes |= ~allowed
        return torch.where(some & holes, PARTIAL, UNKNOWN)

    def _decide(self, boxes: Boxes, depth: int) -> torch.Tensor:
        """Classes of boxes; UNKNOWN where the points that may be looked at do not do."""
        kinds = box_classes(self.mask, self.domain, self.groups, self.ranges, boxes)
        self._refine(boxes, kinds, self.decider.told)
        self._refine(boxes, kinds, lambda part: self._alike(part, depth))
        return kinds

    @staticmethod
    def _refine(boxes: Boxes, kinds: torch.Tensor, decide: Any) -> None:
        open_ = (kinds == UNKNOWN).nonzero()[:, 0]
        if open_.numel():
            kinds[open_] = decide(tuple(t[open_] for t in boxes))

    def _alike(self, boxes: Boxes, depth: int) -> torch.Tensor:
        """One of those that look the same decides for all."""
        chosen, inverse = self.decider.representatives(boxes)
        if chosen is None or inverse is None:
            return self._by_parts(boxes, depth)
        return self._by_parts(tuple(t[chosen] for t in boxes), depth)[inverse]  # type: ignore[arg-type]

    def _by_parts(self, boxes: Boxes, depth: int) -> torch.Tensor:
        sizes = [int((high - low).max()) + 1 for low, high in (boxes[1:3], boxes[3:5])]
        count = boxes[0].numel()
        if count * math.prod(sizes) <= self.points:
            self.points -= count * math.prod(sizes)
            return self.decider.decide(boxes)
        parts = [BRANCH if size >= BRANCH else 1 for size in sizes]
        kinds = torch.full_like(boxes[1], UNKNOWN)
        some = slice(0, self.pieces // math.prod(parts))  # the first cells are decided, rather than none
        if not depth or math.prod(parts) == 1 or not some.stop:
            return kinds
        owner, pieces = split(tuple(t[some] for t in boxes), parts)  # type: ignore[arg-type]
        found = self._decide(pieces, depth - 1)
        allowed, holes = in_owner(owner, found, kinds[some].numel())
        unsure = torch.bincount(owner[found == UNKNOWN], minlength=kinds[some].numel()) > 0
        known = torch.where(allowed, torch.where(holes, PARTIAL, FULL), EMPTY)
        kinds[some] = torch.where(unsure & ~(allowed & holes), UNKNOWN, known)
        return kinds

    def _sampled(self, boxes: Boxes) -> torch.Tensor:
        """What some pairs of each box say."""
        group, q_low, q_high, kv_low, kv_high = boxes
        kinds = []
        sample = max(LEAST, min(LOOKING.now.sample, self.points // group.numel()))
        step = max(1, EFFORT.now.points // sample)
        for begin in range(0, group.numel(), step):
            part = slice(begin, begin + step)
            places = []
            for low, high in ((q_low[part], q_high[part]), (kv_low[part], kv_high[part])):
                drawn = torch.rand(low.numel(), sample, generator=self.generator, dtype=torch.float64)
                places.append(low[:, None] + (drawn * (high - low + 1)[:, None]).long())
            allowed = self.decider.allowed(group[part][:, None], places[0], places[1])
            all_, some = allowed.all(dim=1), allowed.any(dim=1)
            kinds.append(torch.where(all_, FULL, torch.where(some, PARTIAL, EMPTY)))
        return torch.cat(kinds)
