"""A mask as one band a sequence, as flash kernels know it: queries end at the last key, so many keys to the left and to the right.

``i + off - left <= j <= i + off + right``, ends included, ``off = keys - queries``; None is no limit. A window of ``w`` keys with the
query's own has ``left = w - 1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsedsl.export.spans import Spans

__all__ = ["Band", "Lines", "Misfit", "band_mask", "find_band", "find_chunk", "find_documents", "lines_of"]


@dataclass(frozen=True)
class Band:
    """Keys to the left and to the right of a query's own, None without a limit."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        """Whether it ends at the query's own key."""
        return self.right == 0

    @property
    def holds_own_key(self) -> bool:
        """Whether every query sees the key where it stands: no number is negative, which engines take for other things."""
        return (self.left is None or self.left >= 0) and (self.right is None or self.right >= 0)

    def __str__(self) -> str:
        left, right = ("all" if end is None else str(end) for end in (self.left, self.right))
        return f"{left} keys to the left and {right} to the right"


@dataclass(frozen=True)
class Misfit:
    """A query of a sequence whose keys are not those of the band that others say: ``sees`` a key that it does not hold, or the reverse."""

    sequence: int
    query: int
    key: int
    sees: bool
    band: Band

    def __str__(self) -> str:
        return f"{'sees' if self.sees else 'does not see'} key {self.key}, no band of {self.band} as other queries have"


@dataclass(frozen=True, eq=False)
class Lines:
    """The first key and the last + 1 of every query that sees one run, in numbers of its sequence.

    ``low`` and ``high`` limit a query's keys.
    ``place`` is where the query stands among the keys; ``seen`` is False for those that see none.
    """

    start: torch.Tensor
    stop: torch.Tensor
    place: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    seen: torch.Tensor


def lines_of(rows: Spans, off: int) -> Lines | int:
    """The one run of every query, ``off`` keys before the first query; or the first query that sees several runs."""
    several = (rows.counts > 1).nonzero()[:, 0]
    if several.numel():
        return int(several[0])
    lines = rows.counts.numel()
    start = torch.zeros(lines, dtype=torch.int64, device=rows.counts.device)
    stop = start.clone()
    start[rows.owners], stop[rows.owners] = rows.starts, rows.stops
    place = torch.arange(lines, device=start.device) + off
    return Lines(start, stop, place, torch.zeros_like(start), torch.full_like(start, rows.length), rows.counts > 0)


def find_band(parts: list[Lines]) -> Band | Misfit:
    """The band that all sequences are, or the first query that no band agrees with.

    A query whose run begins where its keys begin says only that the band reaches so far; one whose run begins later says where it ends.
    """
    start, stop, place, low, high, seen = (
        torch.cat([getattr(part, name) for part in parts]) for name in Lines.__dataclass_fields__
    )
    band = Band(_reach(place - start, start > low, seen), _reach(stop - 1 - place, stop < high, seen))
    begin = low if band.left is None else torch.maximum(low, place - band.left)
    end = high if band.right is None else torch.minimum(high, place + band.right + 1)
    wrong = (((begin != start) | (end != stop)) & (seen | (begin < end))).nonzero()[:, 0]
    if not wrong.numel():
        return band
    at = int(wrong[0])
    ends = [(int(a[at]), int(z[at])) for a, z in ((start, stop), (begin, end))]
    mine, other = (set(pair) if pair[0] < pair[1] else set() for pair in ends)
    key = min(mine ^ other)  # up to the first end that differs both are the same
    sees = bool(seen[at]) and int(start[at]) <= key < int(stop[at])
    sizes = torch.tensor([part.start.numel() for part in parts]).cumsum(0)
    number = int(torch.searchsorted(sizes, at, right=True))
    return Misfit(number, at - (int(sizes[number - 1]) if number else 0), key, sees, band)


def _reach(distance: torch.Tensor, cut: torch.Tensor, seen: torch.Tensor) -> int | None:
    """How far the band reaches on one side: where some run is cut, so far; else without a limit."""
    found = distance[cut & seen]
    return int(found[0]) if found.numel() else None


def find_chunk(lines: Lines) -> tuple[int, Band] | None:
    """``c`` and the band where keys are those of the query's chunk of ``c`` and of the band.

    A query that shares no key with the one before begins a chunk: ``c`` divides the places of all such.
    """
    broken = (lines.start[1:] >= lines.stop[:-1]) & lines.seen[1:] & lines.seen[:-1]
    places = lines.place[1:][broken].tolist()
    if not places:
        return None
    candidates = {math.gcd(*places)}
    candidates |= (
        {place - start for place, start in zip(places, lines.start[:-1][broken].tolist(), strict=True)}
        if len(places) == 1
        else set()
    )
    for size in sorted(candidates - {0}):
        low = lines.place.div(size, rounding_mode="floor") * size
        inside = Lines(
            lines.start, lines.stop, lines.place, torch.maximum(lines.low, low), torch.minimum(lines.high, low + size), lines.seen
        )
        band = find_band([inside])
        if isinstance(band, Band):
            return size, band
    return None


def find_documents(lines: Lines, off: int) -> tuple[Band, list[int]] | None:
    """Band and lengths of documents that lie one behind the other and see only themselves; only of as many queries as keys."""
    if off:
        return None
    ends = _split(lines)
    if len(ends) < 3:
        return None
    begins = torch.tensor(ends, device=lines.start.device)
    number = torch.searchsorted(begins[:-1], lines.place, right=True) - 1
    band = find_band([Lines(lines.start, lines.stop, lines.place, begins[number], begins[number + 1], lines.seen)])
    return (band, begins.diff().tolist()) if isinstance(band, Band) and band.holds_own_key else None


def _split(lines: Lines) -> list[int]:
    """Where sequences that see only themselves begin, with the end: as many of them as there are."""
    stop = torch.where(lines.seen, lines.stop, lines.place + 1)
    start = torch.where(lines.seen, lines.start, lines.place)
    before = torch.maximum(stop, lines.place + 1).cummax(0).values
    after = torch.minimum(start, lines.place).flip(0).cummin(0).values.flip(0)
    cut = torch.ones_like(lines.seen)
    cut[1:] = (before[:-1] <= lines.place[1:]) & (after[1:] >= lines.place[1:])
    return [*cut.nonzero()[:, 0].tolist(), cut.numel()]


def band_mask(q_len: int, kv_len: int, band: Band, chunk: int = 0) -> torch.Tensor:
    """bool ``(q_len, kv_len)``.

    >>> band_mask(2, 4, Band(1, 0)).int().tolist()
    [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    place, key = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)
    out = torch.ones(q_len, kv_len, dtype=torch.bool)
    if band.left is not None:
        out &= key >= place - band.left
    if band.right is not None:
        out &= key <= place + band.right
    if chunk:
        out &= key.div(chunk, rounding_mode="floor") == place.div(chunk, rounding_mode="floor")
    return out
