"""The rectangles that the ``tiled`` lowering computes, drawn on matplotlib axes in positions of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.tiled.attention import HeadSizes, TiledKernel
from sparsedsl.lang.pattern import Pattern
from sparsedsl.picture_style import Theme
from sparsedsl.tiling.schedule import ResiduePlan, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_strips", "rectangles"]

# More rectangles than this are not told apart on paper; the rest is left out, and the note says so.
DRAWN = 4000

Rectangle = tuple[float, float, float, float, bool]


def rectangles(plan: ResiduePlan) -> Iterator[Rectangle]:
    """``(first key, first query, keys, queries, masked)`` of a residue, in positions; of a residue in steps what it spans."""
    residue = plan.residue
    if plan.lists is not None:
        height, width = plan.lists.block
        for part, masked in ((plan.lists.full, False), (plan.lists.partial, True)):
            for row, column in zip(part.owners().tolist(), part.columns.tolist(), strict=True):
                row %= plan.lists.shape[2]
                keys = min(width, plan.lists.kv_len - column * width)
                yield column * width, plan.first + row * height, keys, min(height, plan.rows - row * height), masked
        return
    for series in plan.strided_series:
        for turn in range(series.count):
            q = residue.q_start + residue.q_step * (series.q_start + turn * series.step)
            for key_tile in series.key_tiles:
                kv = residue.kv_start + residue.kv_step * (key_tile.start + turn * key_tile.step)
                width, height = residue.kv_step * key_tile.length, residue.q_step * series.height
                yield kv, q, width, height, key_tile.residual is not None


def draw_strips(axis: Axes, pattern: Pattern, domain: Domain, theme: Theme) -> str:
    """Draw what one head of the pattern computes; returns a note about it."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle as Patch

    schedule: Schedule = TiledKernel(pattern).schedule_of(domain, HeadSizes(1, 64, 64))
    drawn: dict[bool, list[Any]] = {False: [], True: []}
    total = 0
    for plan in schedule.residue_classes:
        for kv, q, width, height, masked in rectangles(plan):
            total += 1
            if total <= DRAWN:
                drawn[masked].append(Patch((kv - 0.5, q - 0.5), width, height))
    # Lanes in steps lie over each other: see-through.
    alpha = 0.9 if all(plan.residue.plain for plan in schedule.residue_classes) else 0.25
    for masked, patches in drawn.items():
        colour = theme.partial if masked else theme.full
        axis.add_collection(PatchCollection(patches, facecolor=colour, edgecolor=theme.page, linewidth=0.4, alpha=alpha))
    residue_classes = f" in {len(schedule.residue_classes)} residue classes" if len(schedule.residue_classes) > 1 else ""
    note = f"{schedule.pairs:,} pairs computed{residue_classes}, strips of up to {schedule.height} queries"
    return note if total <= DRAWN else f"{note}; the first {DRAWN:,} of {total:,} rectangles drawn"
