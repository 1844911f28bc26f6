"""Which units each row may choose: limits, which spare the work outside them, and a rule within."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsedsl.selection.chunking import PIECE_BYTES, cut, few_widths, rows_at_once
from sparsedsl.selection.gather import spread
from sparsedsl.selection.scores import ScoreSource

__all__ = ["Candidates", "PairRule"]

Tensor = torch.Tensor
CAST_BYTES = 4 * 2**20  # scratch memory of units that are cast at a time
PairRule = Callable[[Tensor, Tensor], Tensor]
"""Row numbers ``(r,)`` and unit numbers ``(u,)``, int64 on the scores' device -> bool that broadcasts to ``(B, Hs, r, u)``."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Row ``i`` of the scores may choose the units ``begin[i] <= unit < end[i]`` that ``allowed`` allows.

    Limits bound everything, forced units too; ``allowed`` bounds what is scored and may leave out units that are forced.

    Args:
        begin: int ``(R,)`` or ``(B|1, Hs|1, R)``, or None for 0.
        end: the same, or None for all units.
        allowed: a :data:`PairRule`, or None. Rows are counted from the first row of the scores, units from 0.
        reach: from a slice of rows to ``(least begin, greatest end)`` of these, on the host. Units outside the reach of a tile of
            rows are never looked at. Not needed where the limits lie on the CPU; limits on a GPU are not read back, so that without
            it every unit is scored there.

    >>> Candidates(end=torch.tensor([0, 1, 3])).span(slice(1, 3), units=8)
    (0, 3)
    """

    begin: Tensor | None = None
    end: Tensor | None = None
    allowed: PairRule | None = None
    reach: Callable[[slice], tuple[int, int]] | None = None

    def span(self, rows: slice, units: int) -> tuple[int, int]:
        """First unit and the one after the last that any row of ``rows`` may choose."""
        if self.reach is not None:
            low, high = self.reach(rows)
        else:
            low = 0 if self.begin is None or self.begin.device.type != "cpu" else int(self.begin[..., rows].min())
            high = units if self.end is None or self.end.device.type != "cpu" else int(self.end[..., rows].max())
        low = min(max(0, low), units)
        return low, max(low, min(high, units))

    def scored(self, source: ScoreSource, rows: slice, units: slice) -> Tensor:
        """The scores of some rows and units, -inf where a row may not choose. Up to an eighth more is computed and not looked at."""
        parts = []
        # On a CPU in pieces that its caches hold: larger ones are new memory every time, a page fault for every 4 KiB.
        most = CAST_BYTES if source.device.type == "cpu" else PIECE_BYTES
        for tile in cut(units.start, units.stop, max(1, most // max(1, source.unit_bytes))):
            stop = min(source.shape[3], tile.start + few_widths(tile.stop - tile.start))
            parts.append(source.block(rows, slice(tile.start, stop))[..., : tile.stop - tile.start])
        return self.mask_(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), rows, units)

    def mask_(self, scores: Tensor, rows: slice, units: slice) -> Tensor:
        """-inf in ``scores (B, Hs, r, u)`` where a row may not choose; in place."""
        if self.allowed is not None:
            scores.masked_fill_(~self.allowed(*_numbers(rows, units, scores.device)), float("-inf"))
        return self._outside_(scores, rows, units, float("-inf"))

    def at(self, places: Tensor, rows: slice, units: slice, heads: int) -> Tensor | None:
        """Whether each row may choose the units ``places (B|1, Hi, r, W)``, which lie in ``units``: bool ``(B, H, r, W)``, H the greater of
        Hi and ``heads``, those of the scores. None: all may.
        """
        if self.allowed is None and self.begin is None and self.end is None:
            return None
        heads = max(heads, places.shape[1])
        verdict = torch.ones((), dtype=torch.bool, device=places.device)
        wanted = spread(places.long(), heads)
        for limit, name in ((self.begin, "ge"), (self.end, "lt")):
            if limit is not None:
                here = limit[..., rows].to(places.device, non_blocking=True)[..., None]
                here = here if here.ndim < 4 else spread(here, heads)
                verdict = verdict & getattr(wanted, name)(here)
        if self.allowed is None:
            return verdict
        # The rule is of rows and units: it is asked for all units of a few rows at a time.
        width, found = units.stop - units.start, []
        step = rows_at_once(16 * wanted.shape[0] * heads * max(1, width))
        for some in cut(rows.start, rows.stop, step):
            flags = self.allowed(*_numbers(some, units, places.device))
            flags = flags[(None,) * (4 - flags.ndim)]
            here = wanted[:, :, some.start - rows.start : some.stop - rows.start] - units.start
            lead = max(flags.shape[0], here.shape[0])
            flags = spread(flags, heads).expand(lead, heads, here.shape[2], width)
            found.append(flags.gather(3, here.expand(lead, -1, -1, -1)))
        return verdict & torch.cat(found, dim=2)

    def within(self, rule: PairRule, rows: slice, units: slice, like: Tensor) -> Tensor:
        """Which pairs ``rule`` names within the limits: bool of the shape of ``like (B, Hs, r, u)``."""
        named = rule(*_numbers(rows, units, like.device)).expand(like.shape).clone()
        return self._outside_(named, rows, units, False)

    def _outside_(self, table: Tensor, rows: slice, units: slice, value: float | bool) -> Tensor:
        """``value`` outside the limits, in place: only columns that lie outside for some row are touched, where limits can be read."""
        unit = torch.arange(units.start, units.stop, device=table.device)
        size = len(unit)
        if self.begin is not None:
            begin = self.begin[..., rows]
            stop = min(max(0, int(begin.max()) - units.start), size) if begin.device.type == "cpu" else size
            limit = begin.to(table.device, non_blocking=True)[..., None]
            table[..., :stop].masked_fill_(unit[:stop] < limit, value)
        if self.end is not None:
            end = self.end[..., rows]
            start = min(max(0, int(end.min()) - units.start), size) if end.device.type == "cpu" else 0
            limit = end.to(table.device, non_blocking=True)[..., None]
            table[..., start:].masked_fill_(unit[start:] >= limit, value)
        return table


def _numbers(rows: slice, units: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(rows.start, rows.stop, device=device), torch.arange(units.start, units.stop, device=device)
