"""One head and batch entry of a pattern over a range of positions: what pictures and the playground look at. Knows nothing of drawing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.analysis.mask_clauses import clauses, only_difference
from sparsedsl.analysis.tiles import classify
from sparsedsl.analysis.windows import Cells, Window, window_cells
from sparsedsl.errors import ShapeError, TableError
from sparsedsl.lang.advice import surplus
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import table_reads
from sparsedsl.runtime.call import bind_tables

__all__ = ["PatternPlace", "Survey"]

# Up to so many pairs the tiles of any pattern are counted; beyond, only where none need trying.
ALWAYS_COUNTED = 1 << 24
# Pairs evaluated to decide cells, and to find the shares of cells that are neither empty nor full; of each such cell at least LEAST.
DECIDED, POINTS, LEAST = 1 << 26, 1 << 21, 64
# Tiles are counted if there are no more than this many to list; points are evaluated this many at a time.
LISTED, CHUNK = 1 << 21, 1 << 19


@dataclass(frozen=True)
class Survey:
    """Classes of the cells of a picture, their shares of allowed pairs ``(rows, columns)``, and in words how these were found."""

    cells: Cells
    share: torch.Tensor
    how: str


class PatternPlace:
    """A pattern at a head and a batch entry, for ``q_len`` queries from ``q_offset`` on and ``kv_len`` keys.

    ``where``: the function that errors name, and ``arguments`` of it beside tables. Raises :class:`~sparsedsl.ShapeError` and
    :class:`~sparsedsl.TableError` for arguments that do not fit.

    >>> import sparsedsl as sd
    >>> place = PatternPlace(sd.attend(sd.patterns.causal()), 64, None, {})
    >>> int(place.pairs().sum())
    2080
    """

    def __init__(
        self,
        pattern: Pattern,
        q_len: int,
        kv_len: int | None,
        tables: Mapping[str, Any],
        *,
        block_size: Any = None,
        head: int = 0,
        batch: int = 0,
        q_offset: int = 0,
        where: str = "plot()",
        function: Callable[..., Any] | None = None,
    ):
        for name, value in (("head", head), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ShapeError(f"{where}: {name} must be a whole number of at least 0; got {value!r}")
        unknown = set(tables) - set(pattern.tables)
        if unknown:
            known = [*pattern.tables, *(inspect.signature(function).parameters if function else ())]
            what = f"the pattern reads {', '.join(pattern.tables) or 'no table'}"
            raise TableError(f"{where} got an " + surplus(unknown, known, what))
        check_size("q_len", q_len, 1), check_size("q_offset", q_offset, 0)
        self.pattern, self.tables, self.where = pattern, pattern.bound | dict(tables), where
        # a constant head and batch entry: the analysis then sees a single group
        self.at = {BATCH: sympy.Integer(batch), HEAD: sympy.Integer(head)}
        self.mask = pattern.mask.expr.xreplace(self.at)
        read = attend(pattern.mask)
        bound = bind_tables(read, {name: tensor for name, tensor in self.tables.items() if name in read.tables})
        for symbol, name, size in ((BATCH, "batch", batch), (HEAD, "head", head)):
            self._check_rows(symbol, name, size, bound)
        domain = Domain(q_len, q_offset + q_len if kv_len is None else kv_len, q_offset, tables=bound)
        self.domain = exact_domain((self.mask,), domain)
        self.q_len, self.kv_len, self.q_offset = q_len, self.domain.kv_len, q_offset
        self.block = self._block(block_size)
        self._surveys: dict[tuple[int, int], Survey] = {}
        who = [
            f"{name} {value}"
            for symbol, name, value in ((BATCH, "batch entry", batch), (HEAD, "head", head))
            if self.reads(symbol)
        ]
        self.caption = f"{q_len:,} queries x {self.kv_len:,} keys" + "".join(f", {part}" for part in who)

    def reads(self, symbol: sympy.Symbol) -> bool:
        """Whether mask or score tell heads (batch entries) apart."""
        return any(symbol in expr.free_symbols for expr in self.pattern.exprs)

    def _check_rows(self, symbol: sympy.Symbol, name: str, value: int, bound: Mapping[str, torch.Tensor]) -> None:
        """A head that a table of heads does not have would be drawn as its last one."""
        for read in table_reads(self.pattern.mask.expr):
            for axis, index in enumerate(read.args):
                size = bound[read.spec.name].shape[axis]
                if index == symbol and value >= size:
                    raise ShapeError(f"{self.where}: {name}={value}, but the table {read.spec.name!r} has {size} of them")

    def _block(self, given: object) -> tuple[int, int]:
        if given is None:
            size = 128
            while size > 1 and max(self.q_len, self.kv_len) < 16 * size:
                size //= 2
            return size, size
        pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
        if len(pair) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in pair):
            raise ShapeError(f"{self.where}: block_size must be a whole number of at least 1, or (q, kv); got {given!r}")
        return pair

    # ---- evaluation, in bounded pieces ---------------------------------------------------------------------------------------

    def allowed(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The mask at broadcast rows (counted from the first query) and keys."""
        return self.value(self.mask, rows, keys).to(torch.bool)

    def value(self, expr: sympy.Basic, rows: torch.Tensor, keys: torch.Tensor, **more: Any) -> torch.Tensor:
        """An expression at broadcast rows and keys."""
        device = self.domain.device
        env = self.domain.lengths | {"q_idx": (rows + self.q_offset).to(device), "kv_idx": keys.to(device)} | more
        return evaluate(expr, env | dict(self.domain.tables)).broadcast_to(torch.broadcast_shapes(rows.shape, keys.shape)).cpu()

    def pairs(self) -> torch.Tensor:
        """Every pair ``(queries, keys)``; for short sequences."""
        return self.allowed(torch.arange(self.q_len)[:, None], torch.arange(self.kv_len)[None])

    @property
    def queries(self) -> range:
        """Positions of the queries."""
        return range(self.q_offset, self.q_offset + self.q_len)

    def window(self, cell: tuple[int, int], queries: range | None = None, keys: range | None = None) -> Window:
        """All positions, or some, in cells of ``(q, kv)`` tokens."""
        return Window(queries or self.queries, keys or range(self.kv_len), cell)

    def cells(self, window: Window, points: int | None = None) -> Cells:
        """The classes of the cells of a window."""
        return window_cells(self.mask, self.domain, window, points=points)

    # ---- a picture of it all -------------------------------------------------------------------------------------------------

    def cell_for(self, most: int, whole_tiles: bool = True) -> tuple[int, int]:
        """Tokens in a cell where at most ``most`` cells stand along a side: a power of two of tiles, or a number of tokens.

        Powers of two are what most patterns with blocks are made of: cells then do not cut their blocks.
        """
        if not whole_tiles:
            return -(-self.q_len // most), -(-self.kv_len // most)
        q_cell, kv_cell = (
            block * (1 << (-(-n // (block * most)) - 1).bit_length())
            for block, n in zip(self.block, (self.q_len, self.kv_len), strict=True)
        )
        return q_cell, kv_cell

    def survey(self, cell: tuple[int, int]) -> Survey:
        """Every cell of a grid over all positions; kept, as several panels show it."""
        if cell not in self._surveys:
            self._surveys[cell] = self._survey(cell)
        return self._surveys[cell]

    def _survey(self, cell: tuple[int, int]) -> Survey:
        cells = self.cells(self.window(cell), DECIDED)
        classes = cells.classes
        share = (classes == FULL).double()
        row, column = (classes == PARTIAL).nonzero(as_tuple=True)
        area = cell[0] * cell[1]
        points = area if row.numel() * area <= POINTS else max(LEAST, POINTS // max(1, row.numel()))
        share[row, column] = self._shares(row, column, cell, points if points < area else None)
        named = f"cells of {cell[0]:,} x {cell[1]:,} tokens"
        if not bool(cells.certain.all()):
            guessed = int((~cells.certain).sum())
            how = f"sampled picture: {guessed:,} of the {named} are told by a sample of their pairs, the others are certain"
        elif points < area:
            how = f"{named}: empty and full ones are exact, the others sampled at {points:,} pairs each"
        else:
            how = f"{named}, their shares of allowed pairs counted"
        return Survey(cells, share, how)

    def _shares(self, row: torch.Tensor, column: torch.Tensor, cell: tuple[int, int], samples: int | None) -> torch.Tensor:
        """The share of allowed pairs in some cells, from all their pairs or from ``samples`` of each, corners among them."""
        generator = torch.Generator().manual_seed(0)
        q_cell, kv_cell = cell
        points = samples or q_cell * kv_cell
        corners = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
        found = []
        step = max(1, CHUNK // points)
        for start in range(0, row.numel(), step):
            i, j = row[start : start + step, None] * q_cell, column[start : start + step, None] * kv_cell
            height, width = (self.q_len - i).clamp(max=q_cell), (self.kv_len - j).clamp(max=kv_cell)
            if samples is None:
                place = torch.arange(points)
                y, x = place // kv_cell, place % kv_cell
            else:
                y, x = ((torch.rand(i.numel(), points, generator=generator) * n).long() for n in (height, width))
                y[:, :4], x[:, :4] = corners[0] * (height - 1), corners[1] * (width - 1)
            inside = (y < height) & (x < width)
            hit = self.allowed(i + torch.minimum(y, height - 1), j + torch.minimum(x, width - 1)) & inside
            found.append(hit.sum(1).double() / inside.sum(1))
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def tile_counts(self, survey: Survey) -> dict[int, int] | None:
        """How many tiles there are of each class; None where counting them takes too long."""
        cell, classes = survey.cells.window.cell, survey.cells.classes
        tiles = [-(-n // b) for n, b in zip((self.q_len, self.kv_len), self.block, strict=True)]
        count = {kind: int((classes == kind).sum()) for kind in (EMPTY, PARTIAL, FULL)}
        if cell == self.block:
            return count if bool(survey.cells.certain.all()) else None
        each = (cell[0] // self.block[0]) * (cell[1] // self.block[1])
        few = self.q_len * self.kv_len <= ALWAYS_COUNTED
        solved = all(only_difference(literal) for clause in clauses(self.mask) for literal in clause.rest)
        if not (few or solved) or (count[FULL] + count[PARTIAL]) * each > LISTED:
            return None
        lists = classify(self.mask, self.domain, self.block)
        count = {FULL: lists.full.total, PARTIAL: lists.partial.total}
        return count | {EMPTY: tiles[0] * tiles[1] - sum(count.values())}
