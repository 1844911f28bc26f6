"""Many requests in one row: which row belongs to whom and where it stands, as tensors, whatever device the lengths are on.

Where lengths lie on the CPU they are looked at and refused if they are wrong. On another device nothing is: no call waits for numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.lang.advice import shown
from sparsedsl.program.packing import LAST_POSITION

__all__ = ["KeyRows", "Requests", "check_ends", "check_numbers", "requests_of"]

Tensor = torch.Tensor
WHOLE = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Requests:
    """What stands in a packed row of queries. Tensors are int64 on one device.

    ends: ``(R + 1,)``, where the queries of each begin and end. starts: ``(R,)``, the position of the first one. kv_lens: ``(R,)``, keys of
    each. rows: of q; those behind the last request are padding. looked_at: whether numbers may be looked at without waiting. numbers:
    which request of the call each is, which ``b`` means; None: all are there, in order.
    """

    ends: Tensor
    starts: Tensor
    kv_lens: Tensor
    rows: int
    looked_at: bool
    numbers: Tensor | None = None

    @property
    def count(self) -> int:
        """Requests."""
        return self.starts.numel()

    @property
    def q_lens(self) -> Tensor:
        """Queries of each."""
        return self.ends.diff()

    def to(self, device: torch.device) -> Requests:
        """The same on a device."""
        if self.ends.device == device:
            return self
        numbers = None if self.numbers is None else self.numbers.to(device)
        return replace(
            self, ends=self.ends.to(device), starts=self.starts.to(device), kv_lens=self.kv_lens.to(device), numbers=numbers
        )

    def owners(self) -> tuple[Tensor, Tensor]:
        """Of every row the request, which is ``count`` for padding; and a request that there is."""
        return _owners(self.ends, self.rows)

    def row_tables(self, span: int) -> dict[str, Tensor]:
        """What a :class:`~sparsedsl.program.packing.Packing` reads of queries, for every row of q."""
        owner, known = self.owners()
        at = torch.arange(self.rows, device=owner.device) - self.ends[known] + self.starts[known]
        at = torch.where(owner < self.count, at, 0)
        return {
            "q_place": owner * span + at, "q_row_request": owner, "q_position": at,
            "q_request": known if self.numbers is None else self.numbers[known],
            "q_end": (self.starts + self.q_lens)[known], "kv_end": self.kv_lens[known],
        }  # fmt: skip

    def among(self, chosen: Tensor) -> tuple[Requests, Tensor]:
        """Some of the requests, by their numbers, and their rows of q. Looks at numbers."""
        lens = self.q_lens[chosen]
        ends = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
        rows = torch.arange(int(ends[-1])) + (self.ends[chosen] - ends[:-1]).repeat_interleave(lens)
        return Requests(ends, self.starts[chosen], self.kv_lens[chosen], rows.numel(), self.looked_at, chosen), rows


def _owners(ends: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    owner = torch.searchsorted(ends[1:].contiguous(), torch.arange(rows, device=ends.device), right=True)
    return owner, owner.clamp(max=ends.numel() - 2)


@dataclass(frozen=True, eq=False)
class KeyRows:
    """Keys of a packed row: their places and positions, ``(N,)`` int64, as a :class:`~sparsedsl.program.packing.Packing` reads them."""

    place: Tensor
    position: Tensor

    @staticmethod
    def behind_each_other(ends: Tensor, rows: int, span: int) -> KeyRows:
        """Keys of requests that end at ``ends``; rows behind the last are nobody's."""
        owner, known = _owners(ends, rows)
        at = torch.arange(rows, device=ends.device) - ends[known]
        # Where padding of q stands there is no key.
        nobody = owner == ends.numel() - 1
        return KeyRows(torch.where(nobody, (owner + 1) * span, owner * span + at), torch.where(nobody, 0, at))

    @staticmethod
    def in_pages(owner: Tensor, page: Tensor, size: int, kv_lens: Tensor, span: int) -> tuple[KeyRows, Tensor]:
        """Keys of pages ``page`` of requests ``owner``, in order, and which row of its page each one has. Rows of a last page that hold no
        key are nobody's, and read the last row that does."""
        inside = torch.arange(size, device=page.device)
        left = (kv_lens[owner] - page * size)[:, None]
        at = page[:, None] * size + inside
        base = (owner * span)[:, None]
        place = torch.where(inside < left, base + at, base + span - 1)
        return KeyRows(place.flatten(), at.flatten()), torch.minimum(inside, (left - 1).clamp(min=0))


def check_numbers(name: str, value: Any, size: int | None, device: torch.device) -> Tensor:
    """A tensor of whole numbers ``(size,)``, as int64 on its own device: that of the call, or the CPU.

    Raises:
        ShapeError: it is something else, or numbers that may be looked at are out of range.
    """
    wanted = "(R + 1,)" if size is None else f"({size},)"
    if not isinstance(value, Tensor):
        raise ShapeError(f"{name} must be a tensor of whole numbers {wanted}; got {shown(value)}. Write torch.as_tensor({name})")
    if value.ndim != 1 or value.dtype not in WHOLE or (size is not None and value.numel() != size):
        raise ShapeError(f"{name} must be int32 or int64 {wanted}; got {value.dtype} {tuple(value.shape)}")
    if value.device not in (device, torch.device("cpu")):
        raise ShapeError(f"{name} is on {value.device}, and the call runs on {device}: move it there, or to the CPU")
    found = value.detach().to(torch.int64)
    if found.is_cpu and found.numel():
        low, high = (int(x) for x in torch.aminmax(found))
        if low < 0 or high > LAST_POSITION:
            raise ShapeError(f"{name} must hold numbers from 0 to 2**31; got {low if low < 0 else high}")
    return found


def check_ends(name: str, value: Any, rows: int, device: torch.device, of: str) -> Tensor:
    """Where requests begin and end in ``rows`` rows of ``of``: ``(R + 1,)``, from 0 on, never falling."""
    found = check_numbers(name, value, None, device)
    if not found.numel():
        raise ShapeError(f"{name} must begin with 0 and say where each request ends, (R + 1,); got no numbers")
    if found.is_cpu:
        lens = found.diff()
        if int(found[0]) != 0 or bool((lens < 0).any()):
            raise ShapeError(
                f"{name} must begin with 0 and never fall, as lengths.cumsum(0) behind a 0 does; got {shown(found.tolist()[:8])}"
            )
        if int(found[-1]) > rows:
            raise ShapeError(f"{name} ends at {int(found[-1])}, and {of} has {rows} rows")
    return found


def requests_of(
    cu_seqlens_q: Any, kv_lens: Tensor, q_start: Any, rows: int, device: torch.device, kv_name: str = "kv_lens"
) -> Requests:
    """The requests of a call, checked. ``q_start`` None puts the last query of each at its last key.

    Raises:
        ShapeError: lengths do not fit each other.
    """
    ends = check_ends("cu_seqlens_q", cu_seqlens_q, rows, device, "q")
    count = ends.numel() - 1
    if kv_lens.numel() != count:
        raise ShapeError(f"cu_seqlens_q is of {count} requests, and {kv_name} of {kv_lens.numel()}")
    starts = None if q_start is None else check_numbers("q_start", q_start, count, device)
    known = [x for x in (ends, kv_lens, starts) if x is not None]
    looked_at = all(x.is_cpu for x in known)
    if not looked_at:
        ends, kv_lens, starts = (None if x is None else x.to(device) for x in (ends, kv_lens, starts))  # type: ignore[assignment]
    lens = ends.diff()
    if starts is None:
        starts = kv_lens - lens
        if looked_at and bool((starts < 0).any()):
            wrong = int((starts < 0).nonzero()[0])
            raise ShapeError(
                f"request {wrong} has {int(lens[wrong])} queries and {int(kv_lens[wrong])} keys: without q_start its queries are its last "
                "keys. Count the new keys too, or say where queries stand: q_start="
            )
    elif looked_at and count and int((starts + lens).max()) > LAST_POSITION:
        raise ShapeError(f"q_start and the lengths of cu_seqlens_q end at {int((starts + lens).max())}; positions go up to 2**31")
    return Requests(ends, starts, kv_lens, rows, looked_at)
