"""HTML for notebooks: a table with a small picture, in the colours of the page, light or dark. No library, nothing to load."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["card", "grid", "tile_map"]

# Nothing has a colour of its own: text and picture take that of the page, by which light and dark pages both read.
_CELL = "text-align:left;vertical-align:top;padding:1px 10px 1px 0;border:0;background:none;color:inherit"
_PICTURE_SIDE = 132  # pixels


def card(
    title: str, code: str, rows: Iterable[tuple[str, str]], picture: str = "", notes: Sequence[str] = (), more: str = ""
) -> str:
    """A report: what it is of, its facts (name and words each), a picture (SVG) beside them, warnings below. All text is escaped.

    >>> card("Pattern", "kv_idx < q_idx", [("heads", "8")]).count("&lt;")
    1
    """
    lines = "".join(
        f'<tr style="background:none"><td style="{_CELL};opacity:.65;white-space:nowrap">{html.escape(name)}</td>'
        f'<td style="{_CELL}">{html.escape(words)}</td></tr>'
        for name, words in rows
    )
    facts = f'<table style="border-collapse:collapse;border:0;margin:4px 0">{lines}</table>' if lines else ""
    warnings = "".join(f'<div style="margin:2px 0"><b>!</b> {html.escape(note)}</div>' for note in notes)
    drawn = f'<div style="flex:none">{picture}</div>' if picture else ""
    return (
        f'<div style="display:flex;gap:16px;align-items:flex-start;color:inherit">{drawn}<div style="min-width:0">'
        f"<div><b>{html.escape(title)}</b></div>"
        f'<pre style="white-space:pre-wrap;margin:2px 0;background:none;color:inherit">{html.escape(code)}</pre>'
        f"{facts}{more}{warnings}</div></div>"
    )


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a header, escaped."""
    head = "".join(f'<th style="{_CELL};opacity:.65;font-weight:normal">{html.escape(name)}</th>' for name in header)
    body = "".join(
        '<tr style="background:none">' + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse;border:0;margin:4px 0"><tr style="background:none">{head}</tr>{body}</table>'


def tile_map(cells: Sequence[Sequence[int]], words: str) -> str:
    """A picture of rows of cells, queries downwards: 0 nothing, 1 some, 2 all. ``words``: what it shows, for those who cannot see it.

    >>> tile_map([[2, 0], [2, 2]], "causal").count("<path")
    1
    """
    rows, columns = len(cells), max((len(row) for row in cells), default=0)
    if not rows or not columns:
        return ""
    longest = max(rows, columns)
    width, height = (max(8, _PICTURE_SIDE * side // longest) for side in (columns, rows))
    paths = []
    for kind, opacity in ((1, 0.35), (2, 0.85)):
        runs = "".join(
            f"M{first} {row}h{length}v1h-{length}z" for row, line in enumerate(cells) for first, length in _runs(line, kind)
        )
        paths += [f'<path d="{runs}" fill="currentColor" fill-opacity="{opacity}"/>'] if runs else []
    line = f'stroke="currentColor" stroke-opacity=".4" stroke-width="{longest / 100:.3g}"'
    frame = f'<rect width="{columns}" height="{rows}" fill="none" {line}/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" viewBox="0 0 {columns} {rows}" '
        f'preserveAspectRatio="none" shape-rendering="crispEdges" style="color:inherit"><title>{html.escape(words)}</title>'
        f"{''.join(paths)}{frame}</svg>"
    )


def _runs(line: Sequence[int], kind: int) -> Iterable[tuple[int, int]]:
    """First cell and length of each run of a kind."""
    first = None
    for column, cell in enumerate([*line, -1]):
        if cell == kind and first is None:
            first = column
        elif cell != kind and first is not None:
            yield first, column - first
            first = None
