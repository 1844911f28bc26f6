"""Pictures of patterns: which pairs attend, how the tiles are classed, and what the score function does.

Short sequences are drawn pair by pair. Long ones are drawn on a grid of cells, each shaded by its share of allowed pairs. Which
cells hold none and which hold nothing else is decided by the tile analysis (:mod:`sparsedsl.analysis.windows`); what remains is counted
where that is cheap, and sampled where it is not. The caption says which. Nothing of the size ``q_len x kv_len`` is held, and there are
never more cells than the paper has room for, so that a cell with a single allowed pair, such as one of a global token, stays visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.figures import axes_of
from sparsedsl.grid_picture import ImageGrid, draw_patch
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern, attend
from sparsedsl.lang.symbols import HEAD
from sparsedsl.pattern_place import PatternPlace
from sparsedsl.picture_style import CLASS_NAMES, Theme, columns_of, fit_title, theme_of, thousands, whole_ticks
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program_picture import draw_program, parts, size_of
from sparsedsl.score_picture import beyond, draw_curve, draw_scores, missing_for_score, score_limits, score_values
from sparsedsl.strip_picture import draw_strips

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

PANELS = ("pairs", "tiles", "strips", "score")
# Cells along a side of a panel: at most CELLS, and so many an inch that none falls between the pixels of a picture of 72 an inch.
CELLS, AN_INCH, FEWEST = 256, 64, 16
# Lines between tiles are drawn where there are no more of them along a side.
LINES = 64


def plot(
    pattern: Any,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    block_size: int | tuple[int, int] | None = None,
    head: int | Sequence[int] = 0,
    batch: int = 0,
    q_offset: int = 0,
    panels: Sequence[str] | None = None,
    grid: tuple[int, ...] | None = None,
    query: Any = None,
    coordinates: Any = None,
    theme: str = "light",
    ax: Axes | Sequence[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    title: str | None = None,
    **tables: Any,
) -> Figure:
    """Draw a pattern: allowed pairs, tile classes and, if there is one, the score function. Of a program, draw the graph of its nodes.

    Args:
        pattern: a mask, a score or a pattern; or a program, such as ``sd.patterns.hsa()``.
        q_len: number of queries. May be left out for a program; given, its axes are shown with their sizes. With ``grid`` default all
            of its patches.
        kv_len: number of keys; default ``q_offset + q_len``.
        block_size: tokens in a tile, or ``(q, kv)``; default 128, or less for short sequences, so that there is something to see.
        head, batch: which head and batch entry of a pattern that depends on ``h`` or ``b``. Several heads, such as ``range(8)``: one
            small picture for each, all with the same colours.
        q_offset: position of the first query.
        panels: which of ``"pairs"``, ``"tiles"``, ``"strips"`` (what the `tiled` backend computes), ``"score"``; default pairs and tiles,
            and the score if it is modified. Of several heads, one of these; default what tells heads apart.
        grid: ``(rows, columns)`` of an image, or ``(frames, rows, columns)`` of a video, whose patches the tokens are. Drawn is then
            which patches a query attends to, on the image: one picture for each query and frame.
        query: with ``grid``, a token or its coordinates in the grid, or a list of these; default a corner, an edge and the middle.
        coordinates: with ``grid``, ``sd.patterns.grid_position(sd.q_idx, ...)`` where tokens do not lie row by row.
        theme: ``"light"`` or ``"dark"``, the page that the picture stands on.
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
    >>> figure = sd.plot(sd.patterns.alibi_window(heads=4, window=16), 64, head=range(4))
    >>> [axes.get_title() for axes in figure.axes][:4]
    ['head 0', 'head 1', 'head 2', 'head 3']
    >>> figure = sd.plot(sd.patterns.neighbourhood_2d(12, 12, kernel=5), grid=(12, 12), query=(0, 11))
    >>> print(figure.get_supxlabel())
    the query at row 0, column 11 attends to 25 of 144 patches
    >>> figure = sd.plot(sd.patterns.moba(), 4096)
    >>> [text.get_text().splitlines()[-1] for text in figure.axes[0].texts if text.get_text().startswith("dot")]
    ['keys/512=8]']
    """
    look, program = theme_of(theme), as_program(pattern)
    if program is not None:
        unused = {"block_size": block_size, "head": head or None, "batch": batch or None, "panels": panels}
        unused |= {"grid": grid, "query": query, "coordinates": coordinates, **tables}
        return _plot_program(program, q_len, kv_len, q_offset, ax, figsize, title, look, unused)
    pattern = as_pattern(pattern, where="the pattern of plot()")
    words: dict[str, Any] = {"block_size": block_size, "batch": batch, "q_offset": q_offset, "function": plot}
    sheet = _Sheet(look, ax, figsize, title)
    if grid is not None:
        given = {"panels": panels, "q_len": q_len, "kv_len": kv_len, "q_offset": q_offset or None, "block_size": block_size}
        return _plot_grid(pattern, ImageGrid(grid, coordinates), query, given, sheet, {**words, "head": head}, tables)
    if query is not None or coordinates is not None:
        raise PatternError("plot(): query and coordinates say where on a grid; give grid=(rows, columns) too")
    if q_len is None:
        raise ShapeError("plot(): q_len, the number of queries to draw, is missing")
    if isinstance(head, Sequence):
        places = [PatternPlace(pattern, q_len, kv_len, tables, head=one, **words) for one in head]
        return _plot_heads(pattern, places, list(head), panels, sheet)
    place = PatternPlace(pattern, q_len, kv_len, tables, head=head, **words)
    names = _panels(panels, ax, place)
    figure, axes, own = axes_of(ax, len(names), (0.6 + 4.2 * len(names), 4.9) if figsize is None else figsize)
    notes = [_PANELS[name](axis, place, look) for name, axis in zip(names, axes, strict=True)]
    if own:
        sheet.finish(figure, pattern, 20 + 42 * len(axes), [place.caption, *notes])
    return figure


@dataclass(frozen=True)
class _Sheet:
    """What is said of the figure, whatever is on it."""

    theme: Theme
    ax: Any
    figsize: Any
    title: str | None

    def finish(self, figure: Figure, pattern: Pattern, width: int, notes: list[str]) -> None:
        """Headline, caption and page of a figure of ours."""
        plain = not pattern.has_score and pattern.sink is None and pattern.scale is None
        text = str(pattern.mask) if plain else pattern.text.splitlines()[-1]
        title = fit_title(text, width) if self.title is None else self.title
        figure.suptitle(title, fontsize=9, family="monospace", color=self.theme.text)
        figure.supxlabel("\n".join(filter(None, notes)), fontsize=8, color=self.theme.dim)
        self.theme.on(figure)


def _plot_program(
    program: Program, q_len: Any, kv_len: Any, q_offset: Any, ax: Any, figsize: Any, title: str | None, theme: Theme,
    unused: dict[str, Any],
) -> Figure:  # fmt: skip
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
        draw_program(axis, part, sizes, name, theme)
    if own:
        theme.on(figure)
        if title is not None:
            figure.suptitle(title, fontsize=9, family="monospace", color=theme.text)
    return figure


def _plot_heads(pattern: Pattern, places: list[PatternPlace], heads: list[int], panels: Any, sheet: _Sheet) -> Figure:
    """A small picture for each head."""
    if not places:
        raise ShapeError("plot(): head names no head; give a number, or some, such as range(8)")
    place, theme = places[0], sheet.theme
    if panels is None:
        by_mask = HEAD in pattern.mask.expr.free_symbols
        scored = pattern.has_score and not missing_for_score(place) and score_values(place, 2) is not None
        name = "pairs" if by_mask or not scored else "score"
    else:
        names = _panels(panels, None, place)
        if len(names) != 1:
            raise PatternError(f"plot(): of several heads one panel is drawn; got panels={panels!r}")
        name = names[0]
    columns = columns_of(len(places))
    size = (0.4 + 2.1 * columns, 1.1 + 2.25 * -(-len(places) // columns)) if sheet.figsize is None else sheet.figsize
    figure, axes, own = axes_of(sheet.ax, len(places), size, columns=columns)
    values = [score_values(one, _room(axes[0])) for one in places] if name == "score" else []
    known = [part for part in values if part is not None]
    limits = score_limits(known) if known else None
    for number, (axis, one) in enumerate(zip(axes, places, strict=True)):
        if name == "score" and limits is not None and (part := values[number]) is not None:
            image = draw_scores(axis, one, part, limits, theme)
            _frame(axis, one, "", theme)
        else:
            _PANELS[name](axis, one, theme)
            if legend := axis.get_legend():
                legend.remove()
        axis.set_title(f"head {heads[number]}", fontsize=9, color=theme.text)
        axis.set_xlabel(""), axis.set_ylabel("")
        axis.tick_params(labelsize=6)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(whole_ticks(3))
    if own:
        what = f"{name}; " if name != "score" else "logit where q · k = 0; "
        caption = f"{what}queries down, keys to the right; {place.q_len:,} x {place.kv_len:,}"
        sheet.finish(figure, pattern, 24 + 20 * columns, [caption])
        if name == "score" and limits is not None:
            bar = figure.colorbar(
                image, ax=axes, shrink=0.6, extend=beyond(torch.cat([part.flatten() for part in known]), limits)
            )
            bar.ax.tick_params(labelsize=7, colors=theme.dim)
    return figure


def _plot_grid(
    pattern: Pattern,
    grid: ImageGrid,
    query: Any,
    given: dict[str, Any],
    sheet: _Sheet,
    words: dict[str, Any],
    tables: dict[str, Any],
) -> Figure:
    """What patches attend to, on the image."""
    beside = [name for name in ("panels", "q_offset", "block_size") if given[name] is not None]
    beside += [name for name in ("q_len", "kv_len") if given[name] not in (None, grid.tokens)]
    if beside:
        raise PatternError(
            f"plot(): with grid={grid.shape} all {grid.tokens} patches are the sequence, and {beside[0]} says nothing; leave it out"
        )
    place, queries = PatternPlace(pattern, grid.tokens, None, tables, **words), grid.queries(query)
    columns = grid.frames if grid.frames > 1 else columns_of(len(queries), 4)
    rows = -(-len(queries) * grid.frames // columns)
    tall = grid.shape[-2] / grid.shape[-1]
    wide = 2.4 if columns <= 4 else 1.6
    size = (0.5 + wide * columns, 1.1 + (0.4 + wide * tall) * rows) if sheet.figsize is None else sheet.figsize
    figure, axes, own = axes_of(sheet.ax, len(queries) * grid.frames, size, columns=columns)
    notes = [
        draw_patch(axes[i * grid.frames : (i + 1) * grid.frames], place, grid, token, sheet.theme)
        for i, token in enumerate(queries)
    ]
    if own:
        sheet.finish(figure, pattern, int(12 * size[0]), notes)
        theme = sheet.theme
        entries = [(theme.pair, "attended"), (theme.nothing, "masked"), (theme.query, "the query")]
        theme.legend(axes[columns * (rows - 1) + (len(axes) - 1) % columns // 2], entries, below=-0.02)
    return figure


# ---- panels ----------------------------------------------------------------------------------------------------------------


def _room(axis: Axes) -> int:
    """How many cells stand along a side of a panel: no more than have a pixel each."""
    box = axis.get_window_extent()
    inches = min(box.width, box.height) / axis.figure.dpi
    return max(FEWEST, min(CELLS, int(AN_INCH * inches)))


def _extent(place: PatternPlace, cell: tuple[int, int], rows: int, columns: int) -> tuple[float, float, float, float]:
    """Edges of a grid of cells, whose last row and column may reach beyond the positions: left, right, bottom, top."""
    top = place.q_offset - 0.5
    return -0.5, columns * cell[1] - 0.5, top + rows * cell[0], top


def _frame(axis: Axes, place: PatternPlace, title: str, theme: Theme) -> None:
    """What the panels share."""
    left, right, bottom, top = _extent(place, (1, 1), place.q_len, place.kv_len)
    axis.set_xlabel("kv_idx (key)", fontsize=9)
    axis.set_ylabel("q_idx (query)", fontsize=9)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    axis.set_aspect("equal" if 1 / 4 <= place.q_len / place.kv_len <= 4 else "auto")
    for line in (axis.xaxis, axis.yaxis):
        line.set_major_locator(whole_ticks())
        line.set_major_formatter(thousands(max(abs(edge) for edge in (left, right, bottom, top))))
    theme.axes(axis, title)


def _draw_pairs(axis: Axes, place: PatternPlace, theme: Theme) -> str:
    """Allowed pairs, or their share in each cell."""
    from matplotlib.colors import ListedColormap, PowerNorm

    room = _room(axis)
    if max(place.q_len, place.kv_len) <= room:
        pairs = place.pairs()
        colours = ListedColormap([theme.nothing, theme.pair])
        extent = _extent(place, (1, 1), *pairs.shape)
        axis.imshow(pairs.numpy(), cmap=colours, vmin=0, vmax=1, extent=extent, interpolation="nearest")
        theme.legend(axis, [(theme.pair, "allowed"), (theme.nothing, "masked")])
        _frame(axis, place, "allowed pairs", theme)
        return f"{int(pairs.sum()):,} of {pairs.numel():,} pairs allowed ({_percent(pairs.double().mean())})"
    many = max(place.q_len / place.block[0], place.kv_len / place.block[1]) >= room
    cell = place.cell_for(room, whole_tiles=many)
    survey = place.survey(cell)
    # The root makes thin structure visible; a cell with a single allowed pair is never as light as an empty one.
    share = torch.where(survey.cells.classes == EMPTY, 0.0, survey.share.clamp(min=1e-4))
    extent = _extent(place, cell, *share.shape)
    image = axis.imshow(share.numpy(), cmap=theme.shades(), norm=PowerNorm(0.4, 0, 1), extent=extent, interpolation="nearest")
    bar = theme.bar(axis, image, ticks=[0, 0.01, 0.1, 0.5, 1])
    bar.ax.set_xticklabels(["0", "1 %", "10 %", "50 %", "100 %"])
    _frame(axis, place, "share of allowed pairs", theme)
    return survey.how


def _draw_strips(axis: Axes, place: PatternPlace, theme: Theme) -> str:
    """The rectangles that `tiled` computes."""
    note = draw_strips(axis, attend(Mask(place.mask)), place.domain, theme)
    theme.legend(axis, [(theme.full, "unmasked"), (theme.partial, "masked")])
    _frame(axis, place, "strips of `tiled`", theme)
    return note


def _draw_tiles(axis: Axes, place: PatternPlace, theme: Theme) -> str:
    """Tile classes; of long sequences the classes of cells of several tiles."""
    from matplotlib.colors import ListedColormap

    cell = place.cell_for(_room(axis))
    survey = place.survey(cell)
    classes = survey.cells.classes
    colours = ListedColormap([theme.of_class(kind) for kind in sorted(CLASS_NAMES)])
    extent = _extent(place, cell, *classes.shape)
    axis.imshow(classes.numpy(), cmap=colours, vmin=0, vmax=2, extent=extent, interpolation="nearest")
    rows, columns = classes.shape
    if max(rows, columns) <= LINES:
        left, right, bottom, top = extent
        width = 0.6 if max(rows, columns) <= LINES // 2 else 0.3
        axis.vlines([left + i * cell[1] for i in range(1, columns)], top, bottom, color=theme.page, linewidth=width)
        axis.hlines([top + i * cell[0] for i in range(1, rows)], left, right, color=theme.page, linewidth=width)
    theme.legend(axis, [(theme.of_class(kind), CLASS_NAMES[kind]) for kind in (FULL, PARTIAL, EMPTY)])
    _frame(axis, place, "tiles of {} x {}".format(*place.block), theme)
    tiles = [-(-n // b) for n, b in zip((place.q_len, place.kv_len), place.block, strict=True)]
    of = [c // b for c, b in zip(cell, place.block, strict=True)]
    kinds = "" if of == [1, 1] else f"; a cell is {of[0]} x {of[1]} tiles, partial if they differ"
    total = f"{tiles[0] * tiles[1]:,} tiles"
    count = place.tile_counts(survey)
    if count is None:
        return total + ("" if bool(survey.cells.certain.all()) else ", some classes sampled") + kinds
    return f"{total}: " + ", ".join(f"{count[kind]:,} {CLASS_NAMES[kind]}" for kind in (FULL, PARTIAL, EMPTY)) + kinds


def _draw_score(axis: Axes, place: PatternPlace, theme: Theme) -> str:
    """What the score function does: over positions at logit 0, or over logits if it does not depend on positions."""
    values = score_values(place, _room(axis))
    if values is None:
        draw_curve(axis, place, theme)
        return ""
    limits = score_limits([values])
    image = draw_scores(axis, place, values, limits, theme)
    theme.bar(axis, image, extend=beyond(values, limits))
    _frame(axis, place, "logit, where q · k = 0", theme)
    shown = list(values.shape) == [place.q_len, place.kv_len]
    return "" if shown else "score sampled at {} x {} pairs".format(*values.shape)


_PANELS = {"pairs": _draw_pairs, "tiles": _draw_tiles, "strips": _draw_strips, "score": _draw_score}


def _panels(panels: Any, ax: Any, place: PatternPlace) -> tuple[str, ...]:
    """Which panels to draw."""
    if panels is None:
        if ax is not None and not isinstance(ax, (tuple, list)) and not hasattr(ax, "flat"):
            return ("pairs",)
        score = place.pattern.has_score and not missing_for_score(place)
        plain = place.mask == sympy.true and score
        return ("score",) if plain else ("pairs", "tiles", "score") if score else ("pairs", "tiles")
    names = tuple(panels) if isinstance(panels, (tuple, list)) else (panels,)
    if not names or any(not isinstance(name, str) or name not in PANELS for name in names):
        raise PatternError(f"plot(): panels must be some of {', '.join(map(repr, PANELS))}; got {panels!r}")
    if "score" in names and not place.pattern.has_score:
        raise PatternError("plot(): the pattern does not modify the score; leave the panel 'score' out")
    return names


def _percent(share: Any) -> str:
    return f"{float(share):.3g}" if float(share) < 0.001 else f"{100 * float(share):.3g} %"
