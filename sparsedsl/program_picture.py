"""Pictures of programs: the graph of nodes, in layers from the inputs to the output, each with its arguments and the axes of its result."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import accumulate, chain, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

import networkx as nx

from sparsedsl.picture_style import LIGHT, Theme
from sparsedsl.program.axes import base_of, rows_on
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "draw_program", "parts", "places", "size_of", "words"]

# What a node gives -> the colour of its box.
COLOURS = {
    "tensor": "#e8e8e3",
    "scores": "#fbe3c0",
    "key scores": "#f6eda8",
    "numbers of heads": "#f2e3c0",
    "selected": "#f0a23b",
    "keys": "#e8c77d",
    "order": "#d9b3d6",
    "tokens": "#f0b9b0",
    "memory": "#b5d9c4",
    "branch": "#b9d3ea",
}
WIDTH, LINES, FONT = 34, 4, 6.5  # characters in a line of a box, lines of its arguments, points
COLUMN, ROW = 2.2, 1.0  # inches between boxes
BEND, SWEEPS = 0.2, 24  # width of a bend, in boxes; sweeps of the layout


def parts(program: Program) -> dict[str, Program]:
    """Title -> program: the program itself, then what runs inside of each ``compact()``."""
    found = {"": program}
    for node in program.order:
        for root in node.subprograms:
            inner = parts(Program(root, inside=program))
            found |= {title or f"inside {program.labels[node]}": part for title, part in inner.items()}
    return found


def words(program: Program, node: Node, sizes: Mapping[str, int]) -> tuple[str, str, str]:
    """What stands in the box of a node: its label, its arguments, and the axes of its result with sizes that are known."""
    lines = textwrap.wrap(program.worded(node.note(), node.read), WIDTH, break_on_hyphens=False)
    lines = lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1][: WIDTH - 4] + " ..."]
    return program.labels[node], "\n".join(lines), textwrap.fill(" ".join(_axis(axis, sizes) for axis in node.axes), WIDTH)


def _axis(axis: str, sizes: Mapping[str, int]) -> str:
    size = sizes.get(base_of(axis))
    return axis if size is None else f"{axis}={rows_on(axis, size):,}"


def places(graph: nx.DiGraph) -> tuple[dict[Any, tuple[float, float]], list[list[Any]]]:
    """Node -> column and row of its box, rows counted from the output up; for each edge the nodes and bends it runs through.

    A node lies just above those that read it. An edge over several rows gets a bend ``(edge, row)`` in each. The order in a row is by the
    mean column of neighbours, swept up and down; then each row is moved as near to its neighbours as the widths of boxes allow.
    """
    row: dict[Any, int] = {}
    for node in reversed(list(nx.lexicographical_topological_sort(graph, key=lambda node: node.key))):
        row[node] = max((row[reader] + 1 for reader in graph.successors(node)), default=0)
    links, paths = nx.Graph(), []
    links.add_nodes_from(row)
    for source, reader in graph.edges:
        bends = [((source, reader), level) for level in range(row[source] - 1, row[reader], -1)]
        row |= {bend: bend[1] for bend in bends}
        paths.append([source, *bends, reader])
        nx.add_path(links, paths[-1])
    rows: list[list[Any]] = [[] for _ in range(max(row.values()) + 1)]
    for thing, level in row.items():
        rows[level].append(thing)
    column = {thing: float(place) for things in rows for place, thing in enumerate(things)}
    for sweep in range(SWEEPS):
        for things in rows if sweep % 2 else reversed(rows):
            wanted = {thing: fmean([column[other] for other in links[thing]] or [column[thing]]) for thing in things}
            if sweep < SWEEPS // 2:
                things.sort(key=wanted.__getitem__)
            widths = [1.0 if isinstance(thing, Node) else BEND for thing in things]
            column |= dict(zip(things, _apart([wanted[thing] for thing in things], widths), strict=True))
    return {thing: (column[thing], float(row[thing])) for thing in row}, paths


def _apart(wanted: list[float], widths: list[float]) -> list[float]:
    """Places in this order, with room for the widths, as near to the wanted ones as can be (in the mean of squares)."""
    offsets = list(accumulate((before + after) / 2 for before, after in pairwise([-widths[0], *widths])))
    blocks: list[tuple[float, int]] = []  # mean and length of neighbours that touch
    for place, offset in zip(wanted, offsets, strict=True):
        blocks.append((place - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (last, m), (before, n) = blocks.pop(), blocks.pop()
            blocks.append(((before * n + last * m) / (n + m), n + m))
    return [mean + offset for mean, offset in zip(chain.from_iterable([mean] * n for mean, n in blocks), offsets, strict=True)]


def size_of(program: Program) -> tuple[float, float]:
    """Width and height, in inches, that the graph wants."""
    placed, _ = places(program.graph)
    columns, rows = ([place[axis] for place in placed.values()] for axis in (0, 1))
    return COLUMN * (max(columns) - min(columns) + 1), ROW * (max(rows) + 1) + 0.5


def draw_program(axis: Axes, program: Program, sizes: Mapping[str, int], title: str, theme: Theme = LIGHT) -> None:
    """Draw one graph into matplotlib axes: inputs above, the output below."""
    from matplotlib.patches import Patch

    placed, paths = places(program.graph)
    boxes = {}
    for node in program.graph:
        label, said, axes = words(program, node, sizes)
        text = "\n".join(filter(None, [label, said, f"[{axes}]"]))
        box = {"boxstyle": "round,pad=0.35", "facecolor": COLOURS[node.gives], "edgecolor": "#777777", "linewidth": 0.6}
        drawn = axis.text(*placed[node], text, ha="center", va="center", fontsize=FONT, family="monospace", bbox=box, zorder=2)
        boxes[node] = drawn.get_bbox_patch()
    for path in paths:
        across, up = zip(*(placed[thing] for thing in path[:-1]), strict=True)
        axis.plot(across, up, color=theme.line, linewidth=0.8, zorder=1)
        arrow = {
            "arrowstyle": "-|>",
            "color": theme.line,
            "linewidth": 0.8,
            "shrinkA": 0,
            "shrinkB": 1,
            "patchB": boxes[path[-1]],
        }
        axis.annotate("", xy=placed[path[-1]], xytext=placed[path[-2]], arrowprops=arrow, zorder=1)
    columns, rows = ([place[axis_] for place in placed.values()] for axis_ in (0, 1))
    axis.set_xlim(min(columns) - 0.6, max(columns) + 0.6)
    axis.set_ylim(-0.6, max(rows) + 0.6)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9, color=theme.text)
    given = {node.gives for node in program.graph}
    handles = [Patch(facecolor=colour, edgecolor="#777777", label=gives) for gives, colour in COLOURS.items() if gives in given]
    axis.legend(
        handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(handles), frameon=False,
        labelcolor=theme.text,
    )  # fmt: skip
