"""What will be computed: frozen data, compact however long the sequence is, readable when printed.

A *strip* is a run of queries of one lane with the keys they need, as *pieces*: intervals of keys that every query of the strip sees
(``residual`` None) or that some do (``residual``: what remains to be asked of a pair). A *family* is a progression of strips of one
shape: a sliding window over a million tokens is a handful of families.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.lists import TileLists
from sparsedsl.tiling.lanes import Lane

__all__ = ["Family", "LanePlan", "Piece", "Schedule", "Segment"]


@dataclass(frozen=True)
class Piece:
    """Keys ``start .. start + length - 1`` of the first strip, ``step`` further in each following strip (lane coordinates)."""

    start: int
    length: int
    step: int
    residual: Boolean | None

    def __str__(self) -> str:
        kind = "all" if self.residual is None else "masked"
        return f"{self.length} keys from {self.start} {kind}" + (f", {self.step:+} each" if self.step else "")


@dataclass(frozen=True)
class Segment:
    """Neighbouring pieces taken at once. ``masks``: ``(first, last + 1, residual)`` counted from ``start``."""

    start: int
    length: int
    step: int
    masks: tuple[tuple[int, int, Boolean], ...]


@dataclass(frozen=True)
class Family:
    """``count`` strips of ``height`` queries: the first at ``q_start``, each next ``step`` later (lane coordinates)."""

    group: int
    q_start: int
    height: int
    count: int
    step: int
    pieces: tuple[Piece, ...]

    @property
    def keys(self) -> int:
        """Keys of one strip."""
        return sum(piece.length for piece in self.pieces)

    @property
    def pairs(self) -> int:
        """Pairs computed, masked ones included."""
        return self.count * self.height * self.keys

    def spans(self) -> list[list[Piece]]:
        """Pieces that lie side by side and move together."""
        spans: list[list[Piece]] = []
        for piece in self.pieces:
            last = spans[-1][-1] if spans else None
            if last is not None and last.start + last.length == piece.start and last.step == piece.step:
                spans[-1].append(piece)
            else:
                spans.append([piece])
        return spans

    def segments(self, most: int) -> list[Segment]:
        """The spans in parts of at most ``most`` keys."""
        found = []
        for span in self.spans():
            start, stop = span[0].start, span[-1].start + span[-1].length
            parts = -(-(stop - start) // most)
            ends = [start + (stop - start) * part // parts for part in range(parts + 1)]
            for low, high in itertools.pairwise(ends):
                masks = tuple(
                    (max(p.start, low) - low, min(p.start + p.length, high) - low, p.residual)
                    for p in span
                    if p.residual is not None and p.start < high and p.start + p.length > low
                )
                found.append(Segment(low, high - low, span[0].step, masks))
        return found

    def __str__(self) -> str:
        strips = f"{self.count} strips" if self.count > 1 else "1 strip"
        return f"{strips} of {self.height} queries from {self.q_start}: " + "; ".join(map(str, self.pieces))


@dataclass(frozen=True, eq=False)
class LanePlan:
    """One lane over its queries ``first .. first + rows - 1`` (lane coordinates): ``families``, or ``lists`` if it is scattered."""

    lane: Lane
    first: int
    rows: int
    families: tuple[Family, ...] = ()
    lists: TileLists | None = None

    @functools.cached_property
    def keys(self) -> tuple[int, int]:
        """First key that is wanted and the one after the last, in lane coordinates."""
        if self.lists is not None:
            columns = torch.cat([self.lists.full.columns, self.lists.partial.columns])
            low, high = (int(x) for x in torch.aminmax(columns)) if columns.numel() else (0, -1)
            return low * self.lists.block[1], min((high + 1) * self.lists.block[1], self.lists.kv_len)
        ends = [
            (piece.start, piece.start + piece.length + (family.count - 1) * piece.step)
            for family in self.families
            for piece in family.pieces
        ]
        return min(low for low, _ in ends), max(high for _, high in ends)

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs computed, a group of heads counted once."""
        if self.lists is not None:
            return self.lists.listed * self.lists.block[0] * self.lists.block[1]
        return sum(family.pairs for family in self.families)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The lanes of one call.

    ``groups``: (batch, heads) that the mask tells apart. ``overlap``: some query is in several lanes. ``covers``: every query is in
    some strip, of the first lane if lanes overlap. ``seconds``: what the cost model expects of the forward pass, all heads, on the
    machine it was made for. ``masks``: tiles of the mask, made when they are first wanted.
    """

    lanes: tuple[LanePlan, ...]
    groups: tuple[int, int]
    overlap: bool
    covers: bool
    height: int
    seconds: float
    masks: Cache[torch.Tensor] = field(default_factory=lambda: Cache(tiles=True), repr=False)

    @functools.cached_property
    def pairs(self) -> int:
        """Pairs computed for one head of each group."""
        return sum(lane.pairs for lane in self.lanes)

    def __str__(self) -> str:
        lines = [f"strips of up to {self.height} queries, {self.pairs:,} pairs computed, {self.seconds * 1e3:.3g} ms expected"]
        for plan in self.lanes:
            if plan.lists is not None:
                lines.append(f"{plan.lane}: scattered tiles, {plan.lists!r}")
                continue
            lines.append(f"{plan.lane}:")
            shown = [f"  {family}" for family in plan.families[:6]]
            if len(plan.families) > len(shown):
                shown.append(f"  .. {len(plan.families) - len(shown)} more families")
            lines += shown
        return "\n".join(lines)
