"""Tile lists: for every row of query tiles the key tiles that are full, and those that are partial. O(listed tiles) memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.plain_values import Reported
from sparsedsl.quantities import bytes_text

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "UNKNOWN",
    "BlockLists",
    "TileRows",
    "check_room",
    "expand_runs",
    "memory",
    "run_numbers",
]

# Classes of tiles; UNKNOWN stands only while a tile is being decided.
EMPTY, PARTIAL, FULL, UNKNOWN = 0, 1, 2, 3


def expand_runs(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten runs ``start, start + 1, ...``: the run number and the value of every element, in order."""
    owner = run_numbers(lengths)
    base = starts - (lengths.cumsum(0) - lengths)
    return owner, torch.arange(owner.numel(), device=owner.device) + base.index_select(0, owner)


def run_numbers(lengths: torch.Tensor) -> torch.Tensor:
    """``0, 0, 1, 2, 2, 2, ..``: the number of every run, ``lengths`` times; an element's run is the count of runs that end before it.

    ``torch.repeat_interleave`` and indexing with ``[]`` wake all threads for a few thousand elements, which costs more than the work
    itself, and on a busy machine a hundred times more. Hence this, and ``index_select`` wherever tiles are listed.
    """
    return torch.bincount(lengths.cumsum(0), minlength=1)[:-1].cumsum(0)


def memory(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 35


def check_room(count: int, device: torch.device, what: str, way: str) -> None:
    """Raise :class:`UnsupportedError` before over half of a device's memory is asked for: at least ``count`` bytes, for ``what``."""
    if count >= 1 << 28 and 2 * count > (whole := memory(device)):
        raise UnsupportedError(
            f"{what} would take at least {bytes_text(count)}, over half of the {bytes_text(whole)} of {device.type}. {way}"
        )


@dataclass(frozen=True)
class TileRows:
    """One kind of tile, row by row: ``counts (batch, heads, rows)`` int32 and ``columns`` int32, flat, ascending within a row."""

    counts: torch.Tensor
    columns: torch.Tensor

    @property
    def total(self) -> int:
        """Number of tiles listed."""
        return self.columns.numel()

    @property
    def width(self) -> int:
        """Most tiles in any row."""
        return int(self.counts.max()) if self.counts.numel() else 0

    @property
    def nbytes(self) -> int:
        """Bytes of counts and columns."""
        return self.counts.nbytes + self.columns.nbytes

    def owners(self) -> torch.Tensor:
        """The flat row number (over batch, heads, rows) of every listed tile."""
        return run_numbers(self.counts.reshape(-1))

    def padded(self, width: int | None = None) -> torch.Tensor:
        """Columns as ``(batch, heads, rows, width)`` int32, zero-filled on the right; width defaults to the longest row."""
        width = max(self.width, 1) if width is None else width
        counts = self.counts.reshape(-1)
        out = torch.zeros(counts.numel() * width, dtype=torch.int32, device=counts.device)
        starts = torch.arange(counts.numel(), device=counts.device) * width
        _, place = expand_runs(starts, counts)
        out[place] = self.columns
        return out.view(*self.counts.shape, width)

    def transposed(self, columns: int) -> TileRows:
        """The same tiles listed by key tile: counts ``(batch, heads, columns)``."""
        batch, heads, rows = self.counts.shape
        owner, column = self.owners(), self.columns.to(torch.int64)
        group, row = owner // rows, owner % rows
        flat = group * columns + column
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=batch * heads * columns).to(torch.int32)
        return TileRows(counts.view(batch, heads, columns), row[order].to(torch.int32))


@dataclass(frozen=True)
class BlockLists(Reported):
    """The tiles of ``rows x kv_len`` pairs in blocks of ``block = (q, kv)`` tokens.

    Sound: every allowed pair lies in a listed tile, and a full tile has no masked pair inside the lengths. Minimal: every listed
    tile has an allowed pair. Batch and head dimensions have size 1 where the pattern does not depend on them.
    """

    _adds = ("shape", "listed", "nbytes")

    full: TileRows
    partial: TileRows
    block: tuple[int, int]
    q_rows: int
    kv_len: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, tile rows, tile columns)``."""
        batch, heads, rows = self.full.counts.shape
        return batch, heads, rows, -(-self.kv_len // self.block[1])

    @property
    def listed(self) -> int:
        """Number of tiles listed."""
        return self.full.total + self.partial.total

    @property
    def nbytes(self) -> int:
        """Bytes held by the lists."""
        return self.full.nbytes + self.partial.nbytes

    def classes(self) -> torch.Tensor:
        """Dense classes ``(batch, heads, rows, columns)`` int8: 0 empty, 1 partial, 2 full. For small pictures and tests."""
        out = torch.zeros(self.shape, dtype=torch.int8, device=self.full.counts.device)
        flat = out.view(-1, self.shape[-1])
        for value, part in ((1, self.partial), (2, self.full)):
            flat[part.owners(), part.columns.to(torch.int64)] = value
        return out

    def __repr__(self) -> str:
        batch, heads, rows, columns = self.shape
        return (
            f"BlockLists({rows} x {columns} tiles of {self.block[0]} x {self.block[1]}, groups {batch} x {heads}: "
            f"{self.full.total} full, {self.partial.total} partial, {bytes_text(self.nbytes)})"
        )
