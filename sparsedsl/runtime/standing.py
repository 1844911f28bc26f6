"""Where the rows and heads of a call stand in a whole of which it holds a part: what is said of it, checked."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import MOST
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.runtime.torch_modes import is_transformed

__all__ = ["MOST_RUNS", "Standing", "runs_of", "said_standing"]

Tensor = torch.Tensor
Run = tuple[int, int, int]
# Positions in more runs are looked up in a table.
MOST_RUNS = 8


@dataclass(frozen=True, eq=False)
class Standing:
    """``queries`` and ``keys``: positions ``(S,)`` or ``(B, S)``, or None. ``first_head`` of how many ``heads`` of the whole (None: not
    said). ``entry``: the first batch entry. ``lengths``: ``q_len`` and ``kv_len`` of the whole, or None. ``scanned``: what recurrences
    of the program give is known already."""

    queries: Tensor | None = None
    keys: Tensor | None = None
    first_head: int | None = None
    heads: int | None = None
    entry: int = 0
    lengths: tuple[int, int] | None = None
    scanned: bool = False


def said_standing(q_positions: Any, kv_positions: Any, head_offset: Any, heads: Any, whole: Any, *, q_offset: Any) -> Standing:
    """What a call says of it, of the right kinds.

    Raises:
        ShapeError: a word has a value that it cannot have, or two exclude each other.
    """
    for name, positions in (("q_positions", q_positions), ("kv_positions", kv_positions)):
        if positions is not None and not isinstance(positions, Tensor):
            raise ShapeError(
                f"{name} must be a tensor of whole numbers, (S,) or (B, S); got {shown(positions)}. Write torch.as_tensor({name})"
            )
    if q_positions is not None and q_offset is not None:
        raise ShapeError(f"q_offset and q_positions both say where queries stand; leave q_offset={shown(q_offset)} out")
    if kv_positions is not None and q_positions is None:
        raise ShapeError("kv_positions= says where the keys stand; say where the queries do, too: q_positions=")
    if whole is not None and not (
        isinstance(whole, (tuple, list)) and len(whole) == 2 and all(_is_whole(n) and n >= 1 for n in whole)
    ):
        raise ShapeError(f"whole must be (q_len, kv_len), the lengths of the whole in tokens; got {shown(whole)}")
    for name, number, least in (("head_offset", head_offset, 0), ("heads", heads, 1)):
        if number is not None and not (_is_whole(number) and number >= least):
            raise ShapeError(f"{name} must be a whole number of at least {least}; got {shown(number)}")
    return Standing(q_positions, kv_positions, head_offset, heads, 0, None if whole is None else (int(whole[0]), int(whole[1])))


def _is_whole(number: Any) -> bool:
    return isinstance(number, (numbers.Integral, torch.SymInt)) and not isinstance(number, bool)


_CHECKED: Cache[tuple[Run, ...]] = Cache()


def runs_of(name: str, positions: Tensor, batch: int, rows: int, device: torch.device, end: int | None) -> tuple[Run, ...]:
    """The positions as runs ``(first row, its position, distance of two rows)``; empty where they are more than :data:`MOST_RUNS`, or
    differ by batch entry. Looked at once while the tensor lives unchanged; on a GPU this waits for the numbers.

    Raises:
        ShapeError: they do not fit ``batch`` entries of so many ``rows``, do not rise, or are not in ``0 .. end - 1``.
    """
    if (
        positions.is_floating_point()
        or positions.is_complex()
        or positions.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64)
    ):
        raise ShapeError(f"{name} must be whole numbers, int32 or int64; got {positions.dtype}")
    if (
        positions.ndim not in (1, 2)
        or positions.shape[-1] != rows
        or (positions.ndim == 2 and positions.shape[0] not in (1, batch))
    ):
        raise ShapeError(
            f"{name} must have the shape ({rows},) or ({batch}, {rows}), a number for each row; got {tuple(positions.shape)}"
        )
    if positions.device != device:
        raise ShapeError(f"{name} is on {positions.device} but the call runs on {device}; move it: {name}.to({str(device)!r})")
    if is_transformed(positions):
        raise UnsupportedError(f"{name} must be the same for all samples of a torch.vmap: it is a tensor that is mapped over")
    if not positions.numel():
        return ()
    if positions.requires_grad:
        positions = positions.detach()
    runs: tuple[Run, ...] = _CHECKED.get((name, end), [positions], lambda: _runs(name, positions, end))
    return runs


def _runs(name: str, positions: Tensor, end: int | None) -> tuple[Run, ...]:
    wide = positions.to(torch.int64)
    steps = wide.diff(dim=-1)
    falls = (steps <= 0).nonzero()
    if falls.numel():
        place = falls[0].tolist()
        before, after = (int(wide[(*place[:-1], place[-1] + more)]) for more in (0, 1))
        raise ShapeError(
            f"{name} must rise from row to row; got {before} and then {after} at row {place[-1] + 1}. Sort the rows, each key once, "
            "and bring the output back into your order"
        )
    least, most = int(wide.min()), int(wide.max())
    last = MOST if end is None else end - 1
    if least < 0 or most > last:
        what = "up to 2**60" if end is None else f"below the whole length {end}"
        raise ShapeError(f"{name} must be positions from 0 on, {what}; got {least if least < 0 else most}")
    if wide.ndim == 2 and bool((wide != wide[:1]).any()):
        return ()
    return _in_runs(wide if wide.ndim == 1 else wide[0])


def _in_runs(positions: Tensor) -> tuple[Run, ...]:
    """A step between two runs belongs to neither; a run of one row has step 1.

    >>> _in_runs(torch.tensor([0, 1, 2, 9, 11, 13]))
    ((0, 0, 1), (3, 9, 2))
    """
    values, counts = (t.tolist() for t in positions.diff().unique_consecutive(return_counts=True))
    if len(values) > 3 * MOST_RUNS:
        return ()
    row, found, left = 0, [], [list(part) for part in zip(values, counts, strict=True)]
    while row < positions.numel():
        step, count = left[0] if left else (1, 0)
        if count == 1 and step != 1:  # more likely the way to the next run
            step, count = 1, 0
        found.append((row, step if count else 1))
        row += count + 1
        if count:
            left.pop(0)
        if left:
            left[0][1] -= 1
            left = left if left[0][1] else left[1:]
    if len(found) > MOST_RUNS:
        return ()
    places: list[int] = positions[[first for first, _ in found]].tolist()
    return tuple((first, place, step) for (first, step), place in zip(found, places, strict=True))
