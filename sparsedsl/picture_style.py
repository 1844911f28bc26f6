"""How pictures look: colours for light and dark pages, legends, axes of positions, and titles that fit.

Blue, orange and grey are told apart by people who do not see red, green or blue, and in print; ``tests/test_plotting.py`` looks at the
colours as they see them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.errors import PatternError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CLASS_NAMES", "DARK", "LIGHT", "THEMES", "Theme", "columns_of", "fit_title", "theme_of", "thousands", "whole_ticks"]

CLASS_NAMES = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}


@dataclass(frozen=True)
class Theme:
    """Colours of a page. ``nothing``: masked pairs and empty tiles; ``faint``: a cell of few allowed pairs, ``pair``: of all of them."""

    name: str
    page: str
    text: str
    dim: str
    line: str
    nothing: str
    faint: str
    pair: str
    full: str
    partial: str
    query: str

    def of_class(self, kind: int) -> str:
        """The colour of EMPTY, PARTIAL or FULL."""
        return {EMPTY: self.nothing, PARTIAL: self.partial, FULL: self.full}[kind]

    def shades(self) -> Any:
        """From nothing, with a step, to the colour of an allowed pair."""
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list(
            "share", [(0, self.nothing), (0.004, self.nothing), (0.0041, self.faint), (1, self.pair)]
        )

    def on(self, figure: Figure) -> None:
        """The colour of the page; only of figures that are ours."""
        figure.set_facecolor(self.page)

    def axes(self, axis: Axes, title: str) -> None:
        """Title, ticks and edges of a panel."""
        axis.set_title(title, fontsize=10, color=self.text)
        axis.tick_params(labelsize=8, colors=self.dim)
        axis.xaxis.label.set_color(self.text)
        axis.yaxis.label.set_color(self.text)
        axis.set_facecolor(self.nothing)
        axis.spines[:].set(color=self.line, linewidth=0.5)

    def legend(self, axis: Axes, entries: list[tuple[str, str]], below: float = -0.16) -> None:
        """Squares with names below a panel."""
        axis.legend(
            handles=self.handles(entries), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(entries),
            frameon=False, labelcolor=self.text,
        )  # fmt: skip

    def handles(self, entries: list[tuple[str, str]]) -> list[Any]:
        """What a legend is made of: ``(colour, name)``."""
        from matplotlib.patches import Patch

        return [Patch(facecolor=colour, edgecolor=self.line, linewidth=0.5, label=name) for colour, name in entries]

    def bar(self, axis: Axes, image: Any, **options: Any) -> Any:
        """A colour bar below a panel."""
        bar = axis.figure.colorbar(image, cax=axis.inset_axes((0.1, -0.22, 0.8, 0.03)), orientation="horizontal", **options)
        bar.ax.tick_params(labelsize=8, colors=self.dim)
        bar.outline.set(color=self.line, linewidth=0.5)
        return bar


LIGHT = Theme(
    "light", page="#ffffff", text="#1a1a1a", dim="#444444", line="#999999", nothing="#f3f3f0", faint="#a9c6e0", pair="#12477a",
    full="#1f6fb4", partial="#f0a23b", query="#c2372b",
)  # fmt: skip
DARK = Theme(
    "dark", page="#14171c", text="#e6e6e3", dim="#b4b8be", line="#5b626c", nothing="#242830", faint="#3f617f", pair="#8ec7f7",
    full="#4c9be0", partial="#f3ad4b", query="#ff7a66",
)  # fmt: skip
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}


def theme_of(name: Any) -> Theme:
    """The theme of a name; raises :class:`~sparsedsl.PatternError` for others."""
    if not isinstance(name, str) or name not in THEMES:
        raise PatternError(f"plot(): theme must be {' or '.join(map(repr, THEMES))}; got {name!r}")
    return THEMES[name]


def thousands(largest: float) -> Any:
    """Ticks of positions: ``40K`` where they are many."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: f"{x / 1000:g}K" if largest >= 10_000 and x else f"{x:,g}")


def whole_ticks(bins: int = 6) -> Any:
    """A few whole numbers along an axis."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=bins, integer=True, steps=[1, 2, 4, 5, 8, 10])


# ---- titles ----------------------------------------------------------------------------------------------------------------


def fit_title(text: str, width: int, lines: int = 2) -> str:
    """``text`` on at most so many lines, which end between conditions and never inside a bracket; what is too long is left out.

    >>> print(fit_title("(q_idx >= kv_idx) & ((q_idx - kv_idx < 16) | (kv_idx < 4))", 40))
    (q_idx >= kv_idx) &
    ((q_idx - kv_idx < 16) | (kv_idx < 4))
    >>> print(fit_title("(q_idx >= kv_idx) & ((q_idx - kv_idx < 16) | (kv_idx < 4))", 28))
    (q_idx >= kv_idx) &
    ((q_idx - kv_idx < 16) ...)
    """
    rows = [""]
    for piece in _pieces(" ".join(text.split())):
        joined = f"{rows[-1]} {piece}".strip()
        if len(joined) <= width:
            rows[-1] = joined
            continue
        if not rows[-1]:
            rows[-1] = _shortened(piece, width)
        elif len(rows) < lines:
            rows.append(piece if len(piece) <= width else _shortened(piece, width))
        else:
            rows[-1] = _dots(rows[-1], width)
            break
    return "\n".join(rows)


def _pieces(text: str) -> list[str]:
    """``text`` cut at blanks outside of brackets."""
    found, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [piece for piece in found if piece]


def _shortened(piece: str, width: int) -> str:
    """A bracket with less in it: as many of its parts as fit, then dots; just dots where there is room for no more."""
    start = next((place for place, letter in enumerate(piece) if letter in "([{"), None)
    if start is None:
        return piece[: width - 4] + " ..." if width > 8 else "..."
    if _closing(piece, start) != len(piece) - 1:
        text = f"{piece[:start]}{piece[start]}...{piece[_closing(piece, start)]} ..."
        return text if len(text) <= width else "..."
    head, tail, room = piece[: start + 1], piece[-1], width - start - 2
    kept = ""
    for part in _pieces(piece[start + 1 : -1]):
        longer = f"{kept} {part}".strip()
        if len(longer) + 4 > room:
            kept = kept or (_shortened(part, room - 4) if room > 12 else "")
            break
        kept = longer
    kept = kept.rstrip("&|^ ")
    text = f"{head}{kept} ...{tail}" if kept not in ("", "...") else f"{head}...{tail}"
    return text if len(text) <= width else "..."


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth == 0:
            return place
    return len(text) - 1


def _dots(row: str, width: int) -> str:
    """``row`` with dots behind it, shortened by whole pieces where they need room."""
    pieces = _pieces(row)
    while len(pieces) > 1 and len(" ".join(pieces)) + 4 > width:
        pieces.pop()
    text = " ".join(pieces)
    return f"{text} ..." if len(text) + 4 <= width else f"{_shortened(text, width - 4)} ..."


def columns_of(count: int, most: int = 5) -> int:
    """How many of ``count`` small pictures stand side by side: as few places stay empty as can be.

    >>> [columns_of(count) for count in (1, 4, 6, 8, 10, 12, 32)]
    [1, 4, 3, 4, 5, 4, 4]
    """
    if count <= most:
        return count
    return min(range(most, 2, -1), key=lambda columns: -count % columns)
