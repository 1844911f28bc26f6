"""What will be computed: frozen data, compact however long the sequence is, readable when printed.

A *strip* is a run of queries of one residue with the keys they need, as *key tiles*: intervals of keys that every query of the strip sees
(``residual`` None) or that some do (``residual``: what remains to be asked of a pair). A *series* is a progression of strips of one
shape: a sliding window over a million tokens is a handful of strided series.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.lang.printing import expression_text
from sparsedsl.plain_values import Reported
from sparsedsl.quantities import seconds_text
from sparsedsl.tiling.residues import ResidueClass

__all__ = ["KeyRange", "KeyTile", "ResiduePlan", "Schedule", "StridedSeries"]


# Runs of strips that are printed for each head.
MOST_SHOWN = 6


@dataclass(frozen=True)
class KeyTile(Reported):
    """Keys ``start .. start + length - 1`` of the first strip, ``step`` further in each following strip (residue coordinates)."""

    start: int
    length: int
    step: int
    residual: Boolean | None

    def _said(self) -> dict[str, Any]:
        residual = None if self.residual is None else expression_text(self.residual)
        return {"start": self.start, "length": self.length, "step": self.step, "residual": residual}

    def __str__(self) -> str:
        kind = "" if self.residual is None else ", masked"
        moves = f", {self.step:,} further in each strip" if self.step else ""
        return f"{'1 key' if self.length == 1 else f'{self.length:,} keys'} from key {self.start:,}{moves}{kind}"


@dataclass(frozen=True)
class KeyRange:
    """Neighbouring key tiles taken at once. ``masks``: ``(first, last + 1, residual)`` counted from ``start``."""

    start: int
    length: int
    step: int
    masks: tuple[tuple[int, int, Boolean], ...]


@dataclass(frozen=True)
class StridedSeries:
    """``count`` strips of ``height`` queries: the first at ``q_start``, each next ``step`` later (residue coordinates)."""

    group: int
    q_start: int
    height: int
    count: int
    step: int
    key_tiles: tuple[KeyTile, ...]

    @property
    def keys(self) -> int:
        """Keys of one strip."""
        return sum(key_tile.length for key_tile in self.key_tiles)

    @property
    def pairs(self) -> int:
        """Pairs computed, masked ones included."""
        return self.count * self.height * self.keys

    def adjacent(self) -> list[list[KeyTile]]:
        """Pieces that lie side by side and move together."""
        adjacent: list[list[KeyTile]] = []
        for key_tile in self.key_tiles:
            last = adjacent[-1][-1] if adjacent else None
            if last is not None and last.start + last.length == key_tile.start and last.step == key_tile.step:
                adjacent[-1].append(key_tile)
            else:
                adjacent.append([key_tile])
        return adjacent

    def key_ranges(self, most: int) -> list[KeyRange]:
        """The spans in parts of at most ``most`` keys."""
        found = []
        for side in self.adjacent():
            start, stop = side[0].start, side[-1].start + side[-1].length
            parts = -(-(stop - start) // most)
            ends = [start + (stop - start) * part // parts for part in range(parts + 1)]
            for low, high in itertools.pairwise(ends):
                masks = tuple(
                    (max(p.start, low) - low, min(p.start + p.length, high) - low, p.residual)
                    for p in side
                    if p.residual is not None and p.start < high and p.start + p.length > low
                )
                found.append(KeyRange(low, high - low, side[0].step, masks))
        return found

    def __str__(self) -> str:
        strips = f"{self.count:,} strips" if self.count > 1 else "1 strip"
        queries = "1 query" if self.height == 1 else f"{self.height:,} queries"
        return f"{strips} of {queries} from query {self.q_start:,}: " + "; ".join(map(str, self.key_tiles))


@dataclass(frozen=True, eq=False)
class ResiduePlan:
    """One residue over its queries ``first .. first + rows - 1`` (residue coordinates): ``strided_series``, or ``lists`` if it
    is scattered."""

    residue: ResidueClass
    first: int
    rows: int
    strided_series: tuple[StridedSeries, ...] = ()
    lists: BlockLists | None = None

    @functools.cached_property
    def keys(self) -> tuple[int, int]:
        """First key that is wanted and the one after the last, in residue coordinates."""
        if self.lists is not None:
            columns = torch.cat([self.lists.full.columns, self.lists.partial.columns])
            low, high = (int(x) for x in torch.aminmax(columns)) if columns.numel() else (0, -1)
            return low * self.lists.block[1], min((high + 1) * self.lists.block[1], self.lists.kv_len)
        ends = [
            (key_tile.start, key_tile.start + key_tile.length + (series.count - 1) * key_tile.step)
            for series in self.strided_series
            for key_tile in series.key_tiles
        ]
        return min(low for low, _ in ends), max(high for _, high in ends)

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs computed, a group of heads counted once."""
        if self.lists is not None:
            return self.lists.listed * self.lists.block[0] * self.lists.block[1]
        return sum(series.pairs for series in self.strided_series)


@dataclass(frozen=True, eq=False)
class Schedule(Reported):
    """The residue classes of one call.

    ``groups``: (batch, heads) that the mask tells apart. ``overlap``: some query is in several residue classes. ``covers``:
    every query is in some strip, of the first residue if residue classes overlap. ``seconds``: what the cost model expects of
    the forward pass, all heads, on the machine it was made for. ``masks``: tiles of the mask, made when they are first wanted.
    """

    _adds = ("pairs",)
    _leaves_out = ("masks",)

    residue_classes: tuple[ResiduePlan, ...]
    groups: tuple[int, int]
    overlap: bool
    covers: bool
    height: int
    seconds: float
    masks: Cache[torch.Tensor] = field(default_factory=lambda: Cache(tiles=True), repr=False)

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs computed for one head of each group."""
        return sum(residue.pairs for residue in self.residue_classes)

    def __str__(self) -> str:
        if not self.residue_classes:
            return "nothing to compute: no query sees a key"
        cut = f"strips of up to {self.height:,} queries" if self.height else "tiles, each for itself"
        each = " for one head of each kind" if self.groups != (1, 1) else ""
        lines = [f"{cut}, {self.pairs:,} pairs computed{each}, {seconds_text(self.seconds)} expected"]
        alike: dict[tuple[Any, ...], list[ResiduePlan]] = {}
        for plan in self.residue_classes:
            key = (plan.residue.q_step, plan.residue.kv_step, plan.strided_series) if plan.lists is None else (id(plan),)
            alike.setdefault(key, []).append(plan)
        for plan, *others in alike.values():
            more = f", and {len(others)} more such classes" if others else ""
            if plan.lists is not None:
                lines.append(f"{plan.residue}: scattered tiles, {plan.lists!r}")
                continue
            lines += [] if plan.residue.plain and len(self.residue_classes) == 1 else [f"{plan.residue}{more}:"]
            for groups, series in _alike(plan.strided_series).items():
                who = self._named(groups)
                lines += [f"  {who}:"] if who else []
                shown = [f"  {'  ' if who else ''}{one}" for one in series[:MOST_SHOWN]]
                shown += [f"  .. {len(series) - len(shown):,} more of such runs"] if len(series) > len(shown) else []
                lines += shown
        return "\n".join(lines)

    def _named(self, groups: tuple[int, ...]) -> str:
        """The batch entries and heads that a strip is of; nothing where the mask tells none apart."""
        batch, heads = self.groups
        entries, of = ([*dict.fromkeys(part)] for part in zip(*(divmod(group, heads) for group in groups), strict=True))
        whole = len(groups) == len(entries) * len(of)
        if not whole:
            return "; ".join(self._named((group,)) for group in groups)
        words = [_numbers("batch entry", "batch entries", entries)] if batch > 1 else []
        return ", ".join(words + ([_numbers("head", "heads", of)] if heads > 1 else []))


def _numbers(one: str, many: str, numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == [*range(numbers[0], numbers[-1] + 1)]:
        return f"{many} {numbers[0]} to {numbers[-1]}"
    return f"{one if len(numbers) == 1 else many} {', '.join(map(str, numbers))}"


def _alike(series: tuple[StridedSeries, ...]) -> dict[tuple[int, ...], list[StridedSeries]]:
    """Groups whose strips are the same -> these strips."""
    by_group: dict[int, list[StridedSeries]] = {}
    for one in series:
        by_group.setdefault(one.group, []).append(one)
    alike: dict[tuple[StridedSeries, ...], list[int]] = {}
    for group, found in by_group.items():
        alike.setdefault(tuple(replace(one, group=0) for one in found), []).append(group)
    return {tuple(groups): list(found) for found, groups in alike.items()}
