"""Choose how a mask is cut. Input: mask, domain, machine, the sizes of a head. Output: a :class:`Schedule`, made in O(strips)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.errors import UnsupportedError
from sparsedsl.tiling.cost import class_seconds, merge_seconds, scattered_seconds, series_seconds
from sparsedsl.tiling.cutting import CUTTING
from sparsedsl.tiling.residues import ResidueClass, residue_classes
from sparsedsl.tiling.schedule import ResiduePlan, Schedule, StridedSeries
from sparsedsl.tiling.strips import ResidueSpace, jumps, strided_series, strip_edges
from sparsedsl.tuning.machine import Machine

__all__ = ["HeadShape", "make_schedule"]

# Queries at most: strips are cut one by one.
LONGEST = 1 << 27
HEIGHTS = (64, 128, 256, 512, 1024)
# Queries that heights are tried on.
TRIAL = 1 << 14


@dataclass(frozen=True)
class HeadShape:
    """``group`` query heads share one strip, ``strips_of`` such strips are computed for each group of the mask; ``mod_ns``: the price
    of modifying one logit, in nanoseconds."""

    group: int
    strips_of: int
    head_dim: int
    head_dim_v: int
    mod_ns: float = 0.0


def make_schedule(
    mask: Boolean, domain: Domain, machine: Machine, shape: HeadShape, height: int | None = None, *, minimal: bool = True
) -> Schedule:
    """The cheapest schedule by the cost model; with ``height`` the one with strips of that height. ``minimal``: as :func:`classify`.

    Raises :class:`~sparsedsl.UnsupportedError` for more queries than strips are cut for.
    """
    if domain.rows > LONGEST:
        raise UnsupportedError(
            f"backend='tiled' cuts queries into strips one by one, {LONGEST:,} queries at most; got {domain.rows:,}. Call it on parts of "
            "them, with q_offset"
        )
    height = CUTTING.now.height if height is None else height
    groups = domain.groups(mask)
    plans, seconds, heights = [], 0.0, [0]
    for residue in residue_classes(mask):
        first, rows, kv_len = _extent(residue, domain)
        if rows < 1 or kv_len < 1:
            continue
        if residue.scattered:
            plan, cost = _scattered(residue, domain, machine, shape, minimal)
        else:
            spaces = [
                ResidueSpace(residue.mask, first, rows, kv_len, {"b": b, "h": h} | domain.lengths | dict(domain.tables))
                for b, h in groups.pairs()
            ]
            plan, cost, chosen = _strips(residue, spaces, machine, shape, height)
            heights.append(chosen)
        plans.append(plan)
        seconds += cost
    kept = tuple(plan for plan in plans if plan.strided_series or (plan.lists is not None and plan.lists.listed))
    overlap = _overlap(kept)
    if overlap:
        joining = [series for plan in kept[1:] for series in plan.strided_series]
        seconds += sum(merge_seconds(machine, f, shape.group, shape.strips_of, shape.head_dim_v) for f in joining)
    return Schedule(kept, (groups.batch, groups.heads), overlap, _covers(kept, groups.count, domain), max(heights), seconds)


def _extent(residue: ResidueClass, domain: Domain) -> tuple[int, int, int]:
    """First query, number of queries, number of keys, in residue coordinates."""
    first = max(0, -(-(domain.q_offset - residue.q_start) // residue.q_step))
    last = (domain.q_offset + domain.rows - 1 - residue.q_start) // residue.q_step
    return first, last - first + 1, -(-(domain.kv_len - residue.kv_start) // residue.kv_step)


def _strips(
    residue: ResidueClass, spaces: list[ResidueSpace], machine: Machine, shape: HeadShape, height: int | None
) -> tuple[ResiduePlan, float, int]:
    places = [jumps(space) for space in spaces]
    rows = spaces[0].rows

    def cut(tall: int, number: int) -> tuple[StridedSeries, ...]:
        space = spaces[number]
        return strided_series(space, strip_edges(space, tall, places[number]), number)

    def cost(found: tuple[StridedSeries, ...]) -> float:
        return sum(
            series_seconds(machine, f, shape.group, shape.strips_of, shape.head_dim, shape.head_dim_v, shape.mod_ns)
            for f in found
        )

    if height is None:
        candidates = [tall for tall in HEIGHTS if tall < 2 * rows] or [HEIGHTS[0]]
        # A part in the middle stands for all of a long residue.
        short = max(0, (rows - TRIAL) // 2)
        trial = replace(spaces[0], first=spaces[0].first + short, rows=min(rows, TRIAL))
        edges = [place for place in places[0] if trial.first <= place < trial.first + trial.rows]
        height = min(candidates, key=lambda tall: cost(strided_series(trial, strip_edges(trial, tall, edges), 0)))
    found = [cut(height, number) for number in range(len(spaces))]
    joined = tuple(series for part in found for series in part)
    apart = 0.0
    if residue.kv_step > 1 and joined:
        each = len(spaces) * shape.strips_of
        sizes = (rows, spaces[0].kv_len, each * shape.group, each, shape.head_dim, shape.head_dim_v)
        apart = class_seconds(machine, *sizes)
    return ResiduePlan(residue, spaces[0].first, rows, joined), cost(joined) + apart, height


def _scattered(
    residue: ResidueClass, domain: Domain, machine: Machine, shape: HeadShape, minimal: bool
) -> tuple[ResiduePlan, float]:
    with torch.no_grad():
        for block in CUTTING.now.blocks:
            lists = classify(residue.mask, domain, block, minimal=minimal)
            if not minimal or lists.partial.total * 2 <= lists.listed:
                break
    cost = scattered_seconds(
        machine, lists.full.counts + lists.partial.counts, lists.block, shape.group, shape.strips_of, shape.head_dim, shape.head_dim_v,
        shape.mod_ns,
    )  # fmt: skip
    return ResiduePlan(residue, domain.q_offset, domain.rows, lists=lists), cost


def _overlap(plans: tuple[ResiduePlan, ...]) -> bool:
    """Whether a query can be in two residue classes: residue classes with different remainders of one modulus are apart."""
    seen: set[tuple[int, int]] = set()
    for plan in plans:
        place = (plan.residue.q_start, plan.residue.q_step)
        if any(place == other or 1 in (place[1], other[1]) or place[1] != other[1] for other in seen):
            return True
        seen.add(place)
    return False


def _covers(plans: tuple[ResiduePlan, ...], groups: int, domain: Domain) -> bool:
    """Whether every query of every group is in some strip; of residue classes that share queries, in some strip of the first."""
    if _overlap(plans):
        return _covers(plans[:1], groups, domain)
    queries = 0
    for plan in plans:
        if plan.lists is None:
            queries += sum(series.count * series.height for series in plan.strided_series)
        else:
            listed = (plan.lists.full.counts + plan.lists.partial.counts).reshape(-1, plan.lists.shape[2])
            queries += domain.rows * listed.shape[0] if bool((listed > 0).all()) else 0
    return queries == domain.rows * groups
