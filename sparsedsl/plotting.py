"""Pictures of patterns: which pairs attend, how the tiles are classed, and what the score function does.

Short sequences are drawn pair by pair. Long ones are drawn on a grid of cells, each shaded by its share of allowed pairs. Which
cells hold none and which hold nothing else is decided by the tile analysis, where it needs no trying of pairs; what remains is
counted where that is cheap, and sampled where it is not. The caption says which. Nothing of the size ``q_len x kv_len`` is held.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.intervals import TableRanges
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.points import PointDecider, box_classes
from sparsedsl.analysis.tiles import Grid, classify
from sparsedsl.errors import PatternError, ShapeError, TableError
from sparsedsl.figures import axes_of
from sparsedsl.lang.advice import surplus
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern, attend
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program_picture import draw_program, parts, size_of
from sparsedsl.runtime.call import bind_tables
from sparsedsl.strip_picture import MASKED, WHOLE, draw_strips

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

PANELS = ("pairs", "tiles", "strips", "score")
# Drawn pair by pair up to this length; longer, in cells of which there are at most CELLS along a side.
EXACT, CELLS = 512, 256
# Up to so many pairs the tile analysis decides every cell, whatever the pattern; beyond, only where it need not try pairs.
ALWAYS_EXACT = 1 << 24
# Pairs evaluated to find the shares of cells that are neither empty nor full; of each such cell at least LEAST.
POINTS, LEAST = 1 << 21, 64
# Tiles are counted, for the caption, if there are no more than this many to list; points are evaluated this many at a time.
LISTED, CHUNK = 1 << 21, 1 << 19

PAIR = "#1d4e79"
NOTHING = "#f3f3f0"
CLASS_COLOURS = {EMPTY: NOTHING, PARTIAL: "#f0a23b", FULL: "#2a7f8f"}
CLASS_NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}


def plot(
    pattern: Any,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    block_size: int | tuple[int, int] | None = None,
    head: int = 0,
    batch: int = 0,
    q_offset: int = 0,
    panels: Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    **tables: Any,
) -> Figure:
    """Draw a pattern: allowed pairs, tile classes and, if there is one, the score function. Of a program, draw the graph of its nodes.

    Args:
        pattern: a mask, a score or a pattern; or a program, such as ``sd.patterns.hsa()``.
        q_len: number of queries. May be left out for a program; given, its axes are shown with their sizes.
        kv_len: number of keys; default ``q_offset + q_len``.
        block_size: tokens in a tile, or ``(q, kv)``; default 128, or less for short sequences, so that there is something to see.
        head, batch: which head and batch entry of a pattern that depends on ``h`` or ``b``.
        q_offset: position of the first query.
        panels: which of ``"pairs"``, ``"tiles"``, ``"strips"`` (what the `tiled` backend computes), ``"score"``; default pairs and tiles,
            and the score if it is modified.
        ax: matplotlib axes to draw in, one for each panel; with a single one and no ``panels``, the pairs. Default a new figure.
        figsize: of the new figure, in inches.
        title: default the text of the pattern, shortened.
        **tables: the tables that the mask reads, and those of the score if it is to be drawn, as in a call.

    Returns:
        The ``matplotlib.figure.Figure``; ``plot(...).savefig("pattern.png")`` writes it. No pyplot state is touched.

    Raises:
        UnsupportedError: matplotlib is not installed.
        PatternError, ShapeError, TableError: arguments that do not fit.

    >>> import sparsedsl as sd
    >>> figure = sd.plot(sd.patterns.causal() & (sd.q_idx - sd.kv_idx < 16), 64)
    >>> [axes.get_title() for axes in figure.axes]
    ['allowed pairs', 'tiles of 4 x 4']
    >>> figure = sd.plot(sd.patterns.moba(), 4096)
    >>> [text.get_text().splitlines()[-1] for text in figure.axes[0].texts if text.get_text().startswith("dot")]
    ['keys/512=8]']
    """
    program = as_program(pattern)
    if program is not None:
        unused = {"block_size": block_size, "head": head or None, "batch": batch or None, "panels": panels, **tables}
        return _plot_program(program, q_len, kv_len, q_offset, ax, figsize, title, unused)
    pattern = as_pattern(pattern, where="the pattern of plot()")
    if q_len is None:
        raise ShapeError("plot(): q_len, the number of queries to draw, is missing")
    view = _View(pattern, q_len, kv_len, block_size, head, batch, q_offset, tables)
    names = _panels(panels, ax, view)
    figure, axes, own = axes_of(ax, len(names), (0.6 + 4.4 * len(names), 5.0) if figsize is None else figsize)
    notes = [getattr(view, f"draw_{name}")(axis) for name, axis in zip(names, axes, strict=True)]
    if own:
        figure.suptitle(_headline(pattern, len(axes)) if title is None else title, fontsize=9, family="monospace")
        figure.supxlabel("\n".join([view.caption, *filter(None, notes)]), fontsize=8, color="#444444")
    return figure


def _plot_program(
    program: Program, q_len: Any, kv_len: Any, q_offset: Any, ax: Any, figsize: Any, title: str | None, unused: dict[str, Any]
) -> Figure:
    """The graph of a program, and beside it what runs inside of its ``compact()``."""
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise PatternError(
            f"plot(): of a program the graph is drawn, which {given[0]} says nothing of; leave it out. "
            "Which pairs a call attends to follows from attn.choices(q, k, v, ...)"
        )
    if q_len is None and (kv_len is not None or q_offset):
        raise ShapeError("plot(): kv_len and q_offset need q_len, the number of queries")
    sizes = {}
    if q_len is not None:
        domain = Domain(q_len, q_offset + q_len if kv_len is None else kv_len, q_offset)
        sizes = {"queries": domain.rows, "keys": domain.kv_len}
    graphs = parts(program)
    wanted = [size_of(part) for part in graphs.values()]
    widths, height = [width for width, _ in wanted], max(height for _, height in wanted)
    figure, axes, own = axes_of(ax, len(graphs), (sum(widths), height + 0.4) if figsize is None else figsize, widths)
    for axis, (name, part) in zip(axes, graphs.items(), strict=True):
        draw_program(axis, part, sizes, name)
    if own and title is not None:
        figure.suptitle(title, fontsize=9, family="monospace")
    return figure


class _View:
    """One head and batch entry of a pattern over one range of positions: what all panels draw from."""

    def __init__(
        self,
        pattern: Pattern,
        q_len: int,
        kv_len: int | None,
        block_size: Any,
        head: int,
        batch: int,
        q_offset: int,
        tables: dict[str, Any],
    ):
        for name, value in (("head", head), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ShapeError(f"plot(): {name} must be a whole number of at least 0; got {value!r}")
        unknown = set(tables) - set(pattern.tables)
        if unknown:
            known = [*pattern.tables, *inspect.signature(plot).parameters]
            raise TableError(
                "plot() got an " + surplus(unknown, known, f"the pattern reads {', '.join(pattern.tables) or 'no table'}")
            )
        check_size("q_len", q_len, 1), check_size("q_offset", q_offset, 0)
        self.pattern, self.tables = pattern, pattern.bound | tables
        # a constant head and batch entry: the analysis then sees a single group
        self.place = {BATCH: sympy.Integer(batch), HEAD: sympy.Integer(head)}
        self.mask = pattern.mask.expr.xreplace(self.place)
        read = attend(pattern.mask)
        bound = bind_tables(read, {name: tensor for name, tensor in self.tables.items() if name in read.tables})
        for symbol, name, size in ((BATCH, "batch", batch), (HEAD, "head", head)):
            self._check_rows(symbol, name, size, bound)
        domain = Domain(q_len, q_offset + q_len if kv_len is None else kv_len, q_offset, tables=bound)
        self.domain = exact_domain((self.mask,), domain)
        self.q_len, self.kv_len, self.q_offset = q_len, self.domain.kv_len, q_offset
        self.block = self._block(block_size)
        who = [
            f"{name} {value}"
            for symbol, name, value in ((BATCH, "batch entry", batch), (HEAD, "head", head))
            if self._reads(symbol)
        ]
        self.caption = f"{q_len:,} queries x {self.kv_len:,} keys" + "".join(f", {part}" for part in who)

    def _reads(self, symbol: sympy.Symbol) -> bool:
        return any(symbol in expr.free_symbols for expr in self.pattern.exprs)

    def _check_rows(self, symbol: sympy.Symbol, name: str, value: int, bound: dict[str, torch.Tensor]) -> None:
        """A head that a table of heads does not have would be drawn as its last one."""
        from sparsedsl.lang.tables import table_reads

        for read in table_reads(self.pattern.mask.expr):
            for axis, index in enumerate(read.args):
                size = bound[read.spec.name].shape[axis]
                if index == symbol and value >= size:
                    raise ShapeError(f"plot(): {name}={value}, but the table {read.spec.name!r} has {size} of them")

    def _block(self, given: object) -> tuple[int, int]:
        if given is None:
            size = 128
            while size > 1 and max(self.q_len, self.kv_len) < 16 * size:
                size //= 2
            return size, size
        pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
        if len(pair) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in pair):
            raise ShapeError(f"plot(): block_size must be a whole number of at least 1, or (q, kv); got {given!r}")
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
        """Every pair; for short sequences."""
        return self.allowed(torch.arange(self.q_len)[:, None], torch.arange(self.kv_len)[None])

    @functools.cached_property
    def cells(self) -> tuple[int, int]:
        """Tokens in a cell of the picture: whole tiles, as many as it takes for CELLS cells along a side."""
        q_cell, kv_cell = (b * -(-n // (b * CELLS)) for b, n in zip(self.block, (self.q_len, self.kv_len), strict=True))
        return q_cell, kv_cell

    @functools.cached_property
    def exact(self) -> bool:
        """Whether the tile analysis decides every cell quickly: the sequence is short, or no pairs need trying."""
        if self.q_len * self.kv_len <= ALWAYS_EXACT:
            return True
        decider = PointDecider(self.mask, self.domain, self.domain.groups(self.mask), TableRanges(self.domain.tables))
        return all(decider.diagonal(literal) for clause in clauses(self.mask) for literal in clause.rest)

    @functools.cached_property
    def survey(self) -> tuple[torch.Tensor, torch.Tensor, str]:
        """The class of every cell, its share of allowed pairs, and how they were found."""
        grid = Grid(self.domain, self.cells)
        if self.exact:
            classes = classify(self.mask, self.domain, self.cells).classes()[0, 0].cpu().long()
        else:
            row, column = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij")
            places = (torch.zeros_like(row), *grid.queries(row), *grid.keys(column))
            boxes: Any = tuple(t.flatten().to(self.domain.device) for t in places)
            ranges = TableRanges(self.domain.tables)
            classes = box_classes(self.mask, self.domain, self.domain.groups(self.mask), ranges, boxes).view(row.shape).cpu()
        share = (classes == FULL).double()
        row, column = ((classes != FULL) & (classes != EMPTY)).nonzero(as_tuple=True)
        area = self.cells[0] * self.cells[1]
        points = area if row.numel() * area <= POINTS else max(LEAST, POINTS // row.numel())
        hits = self._hits(row, column, points if points < area else None)
        share[row, column] = hits
        cells = f"cells of {self.cells[0]:,} x {self.cells[1]:,} tokens"
        if not self.exact:
            classes[row, column] = torch.where(hits == 0, EMPTY, torch.where(hits == 1, FULL, PARTIAL))
            return (
                classes,
                share,
                f"sampled picture: {points:,} pairs tried in each of the {cells} that is not provably empty or full",
            )
        if points < area:
            how = f"{cells}: empty and full ones are exact, the others sampled at {points:,} pairs each"
            return classes, share, how
        return classes, share, f"{cells}, their shares of allowed pairs counted"

    def _hits(self, row: torch.Tensor, column: torch.Tensor, samples: int | None) -> torch.Tensor:
        """The share of allowed pairs in some cells, from all their pairs or from ``samples`` of each, corners among them."""
        generator = torch.Generator().manual_seed(0)
        q_cell, kv_cell = self.cells
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

    # ---- panels --------------------------------------------------------------------------------------------------------------

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Positions at the edges of the picture: left, right, bottom, top."""
        return -0.5, self.kv_len - 0.5, self.q_offset + self.q_len - 0.5, self.q_offset - 0.5

    def frame(self, axis: Axes, title: str) -> None:
        """What the panels share."""
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("kv_idx (key)", fontsize=9)
        axis.set_ylabel("q_idx (query)", fontsize=9)
        axis.tick_params(labelsize=8)
        left, right, bottom, top = self.extent
        axis.set_xlim(left, right)
        axis.set_ylim(bottom, top)
        axis.set_aspect("equal" if 1 / 4 <= self.q_len / self.kv_len <= 4 else "auto")
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(_locator())
            line.set_major_formatter(_thousands(max(abs(edge) for edge in self.extent)))
        axis.spines[:].set(color="#999999", linewidth=0.5)

    def grid_extent(self) -> tuple[float, float, float, float]:
        """The extent of the grid of cells, whose last row and column may reach beyond the positions."""
        rows, columns = self.survey[0].shape
        left, _, _, top = self.extent
        return left, left + columns * self.cells[1], top + rows * self.cells[0], top

    def draw_pairs(self, axis: Axes) -> str:
        """Allowed pairs, or their share in each cell."""
        from matplotlib.colors import ListedColormap, PowerNorm

        if max(self.q_len, self.kv_len) <= EXACT:
            pairs = self.pairs()
            axis.imshow(
                pairs.numpy(),
                cmap=ListedColormap([NOTHING, PAIR]),
                vmin=0,
                vmax=1,
                extent=self.extent,
                interpolation="nearest",
            )
            _legend(axis, [(PAIR, "allowed"), (NOTHING, "masked")])
            self.frame(axis, "allowed pairs")
            return f"{int(pairs.sum()):,} of {pairs.numel():,} pairs allowed ({_percent(pairs.double().mean())})"
        classes, share, how = self.survey
        # The root makes thin structure visible; a cell with a single allowed pair is never as light as an empty one.
        share = torch.where(classes == EMPTY, 0.0, share.clamp(min=1e-4))
        image = axis.imshow(
            share.numpy(),
            cmap=_shades(),
            norm=PowerNorm(0.4, 0, 1),
            extent=self.grid_extent(),
            interpolation="nearest",
        )
        bar = _bar(axis, image, ticks=[0, 0.01, 0.1, 0.5, 1])
        bar.ax.set_xticklabels(["0", "1 %", "10 %", "50 %", "100 %"])
        self.frame(axis, "share of allowed pairs")
        return how

    def draw_strips(self, axis: Axes) -> str:
        """The rectangles that `tiled` computes."""
        note = draw_strips(axis, attend(Mask(self.mask)), self.domain)
        axis.set_facecolor(NOTHING)
        _legend(axis, [(WHOLE, "unmasked"), (MASKED, "masked")])
        self.frame(axis, "strips of `tiled`")
        return note

    def draw_tiles(self, axis: Axes) -> str:
        """Tile classes; of long sequences the classes of cells of several tiles."""
        from matplotlib.colors import ListedColormap

        classes = self.survey[0]
        colours = ListedColormap([CLASS_COLOURS[kind] for kind in sorted(CLASS_COLOURS)])
        axis.imshow(classes.numpy(), cmap=colours, vmin=0, vmax=2, extent=self.grid_extent(), interpolation="nearest")
        rows, columns = classes.shape
        if max(rows, columns) <= 64:
            left, right, bottom, top = self.grid_extent()
            axis.vlines(
                [left + i * self.cells[1] for i in range(1, columns)],
                top,
                bottom,
                color="white",
                linewidth=0.6,
            )
            axis.hlines([top + i * self.cells[0] for i in range(1, rows)], left, right, color="white", linewidth=0.6)
        _legend(axis, [(CLASS_COLOURS[kind], CLASS_NAMES[kind]) for kind in (FULL, PARTIAL, EMPTY)])
        q_block, kv_block = self.block
        self.frame(axis, f"tiles of {q_block} x {kv_block}")
        return self._tiles_note()

    def _tiles_note(self) -> str:
        classes = self.survey[0]
        tiles = [-(-n // b) for n, b in zip((self.q_len, self.kv_len), self.block, strict=True)]
        of = [c // b for c, b in zip(self.cells, self.block, strict=True)]
        one = of == [1, 1]
        total = f"{tiles[0] * tiles[1]:,} tiles"
        kinds = "" if one else f"; a cell is {of[0]} x {of[1]} tiles, partial if they differ"
        if not self.exact:
            return f"{total}, classes sampled{kinds}"
        count = {kind: int((classes == kind).sum()) for kind in CLASS_NAMES}
        if not one:
            if (count[FULL] + count[PARTIAL]) * of[0] * of[1] > LISTED:
                return total + kinds
            lists = classify(self.mask, self.domain, self.block)
            count = {FULL: lists.full.total, PARTIAL: lists.partial.total}
            count[EMPTY] = tiles[0] * tiles[1] - sum(count.values())
        return f"{total}: " + ", ".join(f"{count[kind]:,} {CLASS_NAMES[kind]}" for kind in (FULL, PARTIAL, EMPTY)) + kinds

    def missing_for_score(self) -> list[str]:
        """Tables that the score reads and nobody gave."""
        return [name for name in self.pattern.score.tables if name not in self.tables]

    def draw_score(self, axis: Axes) -> str:
        """What the score function does: over positions at logit 0, or over logits if it does not depend on positions."""
        score = self.pattern.score
        names = score.tables
        if missing := self.missing_for_score():
            raise TableError(
                f"plot(): the score panel wants {', '.join(missing)}; pass {missing[0]}=tensor, or leave the panel out"
            )
        tables = bind_tables(as_pattern(score), {name: tensor for name, tensor in self.tables.items() if name in names})
        expr = score.expr.xreplace(self.place)
        tables = dict(exact_domain((expr,), replace(self.domain, tables=tables)).tables)
        if not expr.free_symbols & {Q_IDX, KV_IDX}:
            return self._draw_curve(axis, expr, tables)
        side = [min(n, CELLS) for n in (self.q_len, self.kv_len)]
        rows, keys = (((torch.arange(s) + 0.5) * n / s).long() for s, n in zip(side, (self.q_len, self.kv_len), strict=True))
        zero = {"score": torch.zeros((), dtype=torch.float64)} | tables
        values = self.value(expr, rows[:, None], keys[None], **zero).double()
        values = values.where(self.allowed(rows[:, None], keys[None]) & values.isfinite(), torch.nan)
        largest = float(values.abs().nan_to_num().max()) or 1.0
        image = axis.imshow(values.numpy(), cmap="RdBu", vmin=-largest, vmax=largest, extent=self.extent, interpolation="nearest")
        axis.set_facecolor(NOTHING)
        _bar(axis, image)
        self.frame(axis, "logit, where q · k = 0")
        shown = side == [self.q_len, self.kv_len]
        return "" if shown else f"score sampled at {side[0]} x {side[1]} pairs"

    def _draw_curve(self, axis: Axes, expr: sympy.Basic, tables: dict[str, torch.Tensor]) -> str:
        numbers = [abs(float(number)) for number in expr.atoms(sympy.Number) if number.is_finite]
        reach = 2 * max([1.0, *numbers])
        raw = torch.linspace(-reach, reach, 401, dtype=torch.float64)
        zero = torch.zeros(401, dtype=torch.int64)
        axis.plot(raw.numpy(), raw.numpy(), color="#bbbbbb", linewidth=1, label="unchanged")
        modified = self.value(expr, zero, zero, score=raw, **tables)
        axis.plot(raw.numpy(), modified.numpy(), color=PAIR, linewidth=2, label="modified")
        axis.set_title("logit", fontsize=10)
        axis.set_xlabel("scaled q · k", fontsize=9)
        axis.set_ylabel("logit in the softmax", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(color="#eeeeee")
        axis.set_box_aspect(1)
        axis.legend(fontsize=8, frameon=False)
        return ""


def _panels(panels: Any, ax: Any, view: _View) -> tuple[str, ...]:
    """Which panels to draw."""
    if panels is None:
        if ax is not None and not isinstance(ax, (tuple, list)) and not hasattr(ax, "flat"):
            return ("pairs",)
        score = view.pattern.has_score and not view.missing_for_score()
        plain = view.mask == sympy.true and score
        return ("score",) if plain else ("pairs", "tiles", "score") if score else ("pairs", "tiles")
    names = tuple(panels) if isinstance(panels, (tuple, list)) else (panels,)
    if not names or any(not isinstance(name, str) or name not in PANELS for name in names):
        raise PatternError(f"plot(): panels must be some of {', '.join(map(repr, PANELS))}; got {panels!r}")
    if "score" in names and not view.pattern.has_score:
        raise PatternError("plot(): the pattern does not modify the score; leave the panel 'score' out")
    return names


def _shades() -> Any:
    """From nothing, with a step, to the colour of an allowed pair."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", [(0, NOTHING), (0.004, NOTHING), (0.0041, "#c9dcec"), (1, PAIR)])


def _locator() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True, steps=[1, 2, 4, 5, 8, 10])


def _legend(axis: Axes, entries: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, edgecolor="#999999", linewidth=0.5, label=name) for colour, name in entries]
    axis.legend(
        handles=handles,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=len(handles),
        frameon=False,
    )


def _bar(axis: Axes, image: Any, **options: Any) -> Any:
    bar = axis.figure.colorbar(image, cax=axis.inset_axes((0.1, -0.22, 0.8, 0.03)), orientation="horizontal", **options)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set(color="#999999", linewidth=0.5)
    return bar


def _percent(share: Any) -> str:
    return f"{float(share):.3g}" if float(share) < 0.001 else f"{100 * float(share):.3g} %"


def _thousands(largest: float) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: f"{x / 1000:g}K" if largest >= 10_000 and x else f"{x:,g}")


def _headline(pattern: Pattern, panels: int) -> str:
    """The pattern's text on at most two lines as wide as the figure."""
    plain = not pattern.has_score and pattern.sink is None and pattern.scale is None
    text = str(pattern.mask) if plain else pattern.text.splitlines()[-1]
    width = 20 + 44 * panels
    rows = textwrap.wrap(text, width, break_on_hyphens=False)
    return "\n".join(rows if len(rows) <= 2 else [rows[0], rows[1][: width - 4] + " ..."])
