"""A mask as one band a sequence, as flash kernels know it: queries end at the last key, so many keys to the left and to the right.

``i + off - left <= j <= i + off + right``, ends included, ``off = keys - queries``; None is no limit. A window of ``w`` keys with the
query's own has ``left = w - 1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsedsl.export.spans import Spans

__all__ = ["Band", "Lines", "band_mask", "find_band", "find_chunk", "lines_of", "split_sequences"]


@dataclass(frozen=True)
class Band:
    """Keys to the left and to the right of a query's own, None without a limit."""

    left: int | None
    right: int | None

    @property
    def causal(self) -> bool:
        """Whether it ends at the query's own key."""
        return self.right == 0


@dataclass(frozen=True, eq=False)
class Lines:
    """The first key and the last + 1 of every query that sees one run, in numbers of its sequence; ``low`` and ``high`` limit a query's keys.

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


def find_band(parts: list[Lines]) -> Band | tuple[int, int]:
    """The band that all sequences are, or the sequence and query that no band agrees with.

    A query whose run begins where its keys begin says only that the band reaches so far; one whose run begins later says where it ends.
    """
    start, stop, place, low, high, seen = (torch.cat([getattr(part, name) for part in parts]) for name in Lines.__dataclass_fields__)
    band = Band(_reach(place - start, start > low, seen), _reach(stop - 1 - place, stop < high, seen))
    begin = low if band.left is None else torch.maximum(low, place - band.left)
    end = high if band.right is None else torch.minimum(high, place + band.right + 1)
    wrong = ((begin != start) | (end != stop)) & (seen | (begin < end))
    if not bool(wrong.any()):
        return band
    at = int(wrong.nonzero()[0])
    for number, part in enumerate(parts):
        if at < part.start.numel():
            return number, at
        at -= part.start.numel()
    raise AssertionError("a query of no sequence")


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
    candidates |= {place - start for place, start in zip(places, lines.start[:-1][broken].tolist(), strict=True)} if len(places) == 1 else set()
    for size in sorted(candidates - {0}):
        low = lines.place.div(size, rounding_mode="floor") * size
        inside = Lines(
            lines.start, lines.stop, lines.place, torch.maximum(lines.low, low), torch.minimum(lines.high, low + size), lines.seen
        )
        band = find_band([inside])
        if isinstance(band, Band):
            return size, band
    return None


def split_sequences(lines: Lines) -> list[int]:
    """Where sequences that see only themselves begin, with the end: the most of them; of as many queries as keys, in the same order."""
    count = lines.start.numel()
    place = torch.arange(count, device=lines.start.device)
    stop = torch.where(lines.seen, lines.stop, place + 1)
    start = torch.where(lines.seen, lines.start, place)
    before = stop.cummax(0).values
    after = start.flip(0).cummin(0).values.flip(0)
    cut = torch.ones(count, dtype=torch.bool, device=place.device)
    cut[1:] = (before[:-1] <= place[1:]) & (after[1:] >= place[1:])
    return [*cut.nonzero()[:, 0].tolist(), count]


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
