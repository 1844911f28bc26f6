"""Choose how a mask is cut. Input: mask, domain, machine, the sizes of a head. Output: a :class:`Schedule`, made in O(strips)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.errors import UnsupportedError
from sparsedsl.tiling.cost import family_seconds, scattered_seconds
from sparsedsl.tiling.lanes import Lane, lanes
from sparsedsl.tiling.schedule import Family, LanePlan, Schedule
from sparsedsl.tiling.strips import LaneSpace, families, jumps, strip_edges
from sparsedsl.tuning.machine import Machine

__all__ = ["HeadShape", "make_schedule"]

# Queries at most: strips are cut one by one.
LONGEST = 1 << 27
HEIGHTS = (64, 128, 256, 512, 1024)
# Queries that heights are tried on.
TRIAL = 1 << 14
# Tiles of the scattered rest, in the order in which they are tried: the second where most tiles of the first are cut by the mask.
BLOCKS = ((128, 128), (64, 64))


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
    groups = domain.groups(mask)
    plans, seconds, heights = [], 0.0, [0]
    for lane in lanes(mask):
        first, rows, kv_len = _extent(lane, domain)
        if rows < 1 or kv_len < 1:
            continue
        if lane.scattered:
            plan, cost = _scattered(lane, domain, machine, shape, minimal)
        else:
            spaces = [
                LaneSpace(lane.mask, first, rows, kv_len, {"b": b, "h": h} | domain.lengths | dict(domain.tables))
                for b, h in groups.pairs()
            ]
            plan, cost, chosen = _strips(lane, spaces, machine, shape, height)
            heights.append(chosen)
        plans.append(plan)
        seconds += cost
    kept = tuple(plan for plan in plans if plan.families or (plan.lists is not None and plan.lists.listed))
    return Schedule(
        kept, (groups.batch, groups.heads), _overlap(kept), _covers(kept, groups.count, domain), max(heights), seconds
    )


def _extent(lane: Lane, domain: Domain) -> tuple[int, int, int]:
    """First query, number of queries, number of keys, in lane coordinates."""
    first = max(0, -(-(domain.q_offset - lane.q_start) // lane.q_step))
    last = (domain.q_offset + domain.rows - 1 - lane.q_start) // lane.q_step
    return first, last - first + 1, -(-(domain.kv_len - lane.kv_start) // lane.kv_step)


def _strips(
    lane: Lane, spaces: list[LaneSpace], machine: Machine, shape: HeadShape, height: int | None
) -> tuple[LanePlan, float, int]:
    places = [jumps(space) for space in spaces]
    rows = spaces[0].rows

    def cut(tall: int, number: int) -> tuple[Family, ...]:
        space = spaces[number]
        return families(space, strip_edges(space, tall, places[number]), number)

    def cost(found: tuple[Family, ...]) -> float:
        return sum(
            family_seconds(machine, f, shape.group, shape.strips_of, shape.head_dim, shape.head_dim_v, shape.mod_ns)
            for f in found
        )

    if height is None:
        candidates = [tall for tall in HEIGHTS if tall < 2 * rows] or [HEIGHTS[0]]
        # A part in the middle stands for all of a long lane.
        short = max(0, (rows - TRIAL) // 2)
        trial = replace(spaces[0], first=spaces[0].first + short, rows=min(rows, TRIAL))
        edges = [place for place in places[0] if trial.first <= place < trial.first + trial.rows]
        height = min(candidates, key=lambda tall: cost(families(trial, strip_edges(trial, tall, edges), 0)))
    found = [cut(height, number) for number in range(len(spaces))]
    joined = tuple(family for part in found for family in part)
    return LanePlan(lane, spaces[0].first, rows, joined), cost(joined), height


def _scattered(lane: Lane, domain: Domain, machine: Machine, shape: HeadShape, minimal: bool) -> tuple[LanePlan, float]:
    with torch.no_grad():
        for block in BLOCKS:
            lists = classify(lane.mask, domain, block, minimal=minimal)
            if not minimal or lists.partial.total * 2 <= lists.listed:
                break
    cost = scattered_seconds(
        machine, lists.listed, lists.full.counts.numel(), lists.block, shape.group, shape.strips_of, shape.head_dim, shape.head_dim_v,
        shape.mod_ns,
    )  # fmt: skip
    return LanePlan(lane, domain.q_offset, domain.rows, lists=lists), cost


def _overlap(plans: tuple[LanePlan, ...]) -> bool:
    """Whether a query can be in two lanes: lanes with different remainders of one modulus are apart."""
    seen: set[tuple[int, int]] = set()
    for plan in plans:
        place = (plan.lane.q_start, plan.lane.q_step)
        if any(place == other or 1 in (place[1], other[1]) or place[1] != other[1] for other in seen):
            return True
        seen.add(place)
    return False


def _covers(plans: tuple[LanePlan, ...], groups: int, domain: Domain) -> bool:
    """Whether every query of every group is in some strip; of lanes that share queries, in some strip of the first."""
    if _overlap(plans):
        return _covers(plans[:1], groups, domain)
    queries = 0
    for plan in plans:
        if plan.lists is None:
            queries += sum(family.count * family.height for family in plan.families)
        else:
            listed = (plan.lists.full.counts + plan.lists.partial.counts).reshape(-1, plan.lists.shape[2])
            queries += domain.rows * listed.shape[0] if bool((listed > 0).all()) else 0
    return queries == domain.rows * groups
