"""What a text form's words for tensors and scores mean, in plain torch; see :mod:`tests.programs.plain_programs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.programs.plain_grid import Grid, Value, lifted

__all__ = ["NEVER", "SCORES", "Part", "PlainCall", "alike", "held", "shares", "starts", "wide"]

Tensor = torch.Tensor
NEVER = float("-inf")


@dataclass(eq=False)
class PlainCall:
    """What a program is run on."""

    q: Tensor
    k: Tensor
    v: Tensor
    given: Mapping[str, Tensor]
    offset: int = 0
    known: dict[Any, Any] = field(default_factory=dict)

    def grid(self, columns: int | None = None, score: Tensor | None = None) -> Grid:
        """All pairs of its queries and so many rows of keys."""
        rows = self.offset + torch.arange(self.q.shape[2])
        return Grid(self, rows, torch.arange(self.k.shape[2] if columns is None else columns), score)


@dataclass(eq=False)
class Part:
    """A node: what it is in a call, and how its rows and columns are counted: tokens in a block, or (length, stride) of windows."""

    make: Callable[[PlainCall], Any]
    rows: Any = 1
    columns: Any = 1
    mass: bool = False
    probing: int = 0
    distances: bool = False

    def at(self, call: PlainCall) -> Any:
        """Worked out once a call."""
        if self not in call.known:
            call.known[self] = self.make(call)
        return call.known[self]

    def __getitem__(self, indices: Any) -> Value:
        """Read as a table by index, within its bounds."""
        parts = [lifted(x) for x in (indices if isinstance(indices, tuple) else (indices,))]

        def read(grid: Grid) -> Tensor:
            table = self.at(grid.call)
            places = [part.of(grid) for part in parts]
            if len(places) > 1 and not isinstance(self.rows, str):
                places[1] = places[1] * table.shape[1] // grid.call.q.shape[1]
                if len(places) == 4:
                    places[2] = places[2] - grid.call.offset // self.rows
            return table[tuple(place.clamp(0, size - 1) for place, size in zip(places, table.shape, strict=True))]  # type: ignore[no-any-return]

        return Value(read)


# ---- tensors -------------------------------------------------------------------------------------------------------------------


def _counted(axis: str) -> Any:
    base, _, size = axis.partition("/")
    if base not in ("queries", "keys") or not size:
        return 1
    length, plus, stride = size.partition("+")
    return (int(length), int(stride)) if plus else int(length)


def _input(name: str, axes: str, default: Part | None = None) -> Part:
    counted = [_counted(axis) for axis in axes.split()]

    def make(call: PlainCall) -> Any:
        return call.given[name] if name in call.given else default.at(call)  # type: ignore[union-attr]

    return Part(make, counted[2] if len(counted) > 2 else 1, counted[-1])


def _table(name: str, **words: Any) -> Part:
    return Part(
        lambda call: call.given[name].double() if call.given[name].is_floating_point() else call.given[name], rows="a table"
    )


def starts(spec: Any, keys: int) -> list[tuple[int, int]]:
    """First and last token of every block or window."""
    if isinstance(spec, tuple):
        return [(n, n + spec[0]) for n in range(0, keys - spec[0] + 1, spec[1])]
    return [(n, min(n + spec, keys)) for n in range(0, keys, spec)]


_REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(2), "max": lambda x: x.max(2).values, "min": lambda x: x.min(2).values, "sum": lambda x: x.sum(2),
    "first": lambda x: x[:, :, 0], "last": lambda x: x[:, :, -1],
}  # fmt: skip


def _summary(x: Part, block: int, how: str = "mean", pad: str = "valid", stride: int | None = None) -> Part:
    def make(call: PlainCall) -> Tensor:
        rows = x.at(call)
        found = []
        for first, end in starts((block, stride) if stride else block, rows.shape[2]):
            part = rows[:, :, first:end]
            if pad == "zero" and end - first < block:
                part = torch.nn.functional.pad(part, (0, 0, 0, block - (end - first)))
            found.append(_REDUCED[how](part))
        return torch.stack(found, 2) if found else rows[:, :, :0]

    return Part(make, (block, stride) if stride else x.rows * block)


def wide(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    heads = max(x.shape[1], y.shape[1])
    return wide(x, heads), wide(y, heads)


def _take(x: Part, order: Part) -> Part:
    def make(call: PlainCall) -> Tensor:
        rows, places = alike(x.at(call), order.at(call))
        return rows.gather(2, places[..., None].expand(*places.shape, rows.shape[3]))

    return Part(make)


# ---- scores --------------------------------------------------------------------------------------------------------------------


def _all_columns(scores: Tensor, spec: Any, keys: int) -> Tensor:
    """With the columns of blocks that an input lacks."""
    return torch.nn.functional.pad(scores, (0, len(starts(spec, keys)) - scores.shape[3]), value=NEVER)


def _dot(x: Part, y: Part, scale: float | None = None) -> Part:
    def make(call: PlainCall) -> Tensor:
        a, b = alike(x.at(call), y.at(call))
        found = torch.einsum("bhqd,bhkd->bhqk", a, b) * (scale or a.shape[3] ** -0.5)
        return _all_columns(found, y.rows, call.k.shape[2])

    return Part(make, x.rows, y.rows)


def _bound(x: Part, y: Part, block: int, scale: float | None = None) -> Part:
    def make(call: PlainCall) -> Tensor:
        a, b = alike(x.at(call), y.at(call))
        best = []
        for first, end in starts(block, b.shape[2]):
            low, high = b[:, :, first:end].min(2).values[:, :, None], b[:, :, first:end].max(2).values[:, :, None]
            best.append((torch.where(a > 0, high, low) * a).sum(3))
        return _all_columns(torch.stack(best, 3) * (scale or a.shape[3] ** -0.5), y.rows * block, call.k.shape[2])

    return Part(make, x.rows, y.rows * block)


def _given_scores(x: Part) -> Part:
    return Part(lambda call: _all_columns(x.at(call), x.columns, call.k.shape[2]), x.rows, x.columns)


def _each(x: Part, change: Callable[[Tensor], Tensor], mass: bool) -> Part:
    """Scores changed one by one; a block that an input lacks stays none."""

    def make(call: PlainCall) -> Tensor:
        scores = x.at(call)
        there = scores > NEVER
        return torch.where(there, change(torch.where(there, scores, 0.0)), NEVER)

    return Part(make, x.rows, x.columns, mass)


def _plus(first: Part, second: Part) -> Part:
    return Part(lambda call: torch.add(*alike(first.at(call), second.at(call))), first.rows, first.columns)


def _weighted(x: Part, by: Part) -> Part:
    def make(call: PlainCall) -> Tensor:
        scores, factor = alike(x.at(call), by.at(call))
        return torch.where(scores > NEVER, torch.where(scores > NEVER, scores, 0.0) * factor[..., None], NEVER)

    return Part(make, x.rows, x.columns)


def held(mask: Value, call: PlainCall, scores: Part, heads: int, columns: int) -> Tensor:
    """Which blocks hold a pair of the mask, for one of the query heads of every head of the scores."""
    windows = isinstance(scores.columns, tuple)
    size, rows = 1 if windows else scores.columns, scores.rows
    grid = call.grid(columns if windows else None)
    pairs = grid.filled(lifted(mask).of(grid))
    found = torch.zeros(pairs.shape[0], heads, -(-pairs.shape[2] // rows), columns, dtype=torch.bool)
    group = pairs.shape[1] // heads
    for n in range(heads):
        for u in range(found.shape[2]):
            for c in range(columns):
                cell = pairs[:, n * group : (n + 1) * group, u * rows : (u + 1) * rows, c * size : (c + 1) * size]
                found[:, n, u, c] = cell.flatten(1).any(1)
    return found


def _softmax(scores: Part, among: Any = True) -> Part:
    def make(call: PlainCall) -> Tensor:
        x = scores.at(call)
        allowed = held(among, call, scores, x.shape[1], x.shape[3])
        return torch.where(x > NEVER, shares(torch.where(allowed, x, NEVER)), NEVER)

    return Part(make, scores.rows, scores.columns, mass=True)


def shares(x: Tensor) -> Tensor:
    """Softmax along the last axis, 0 in rows of nothing."""
    raised = (
        torch.where(x > NEVER, (x - x.detach().nan_to_num(neginf=0.0).amax(-1, keepdim=True)).exp(), 0.0) if x.shape[-1] else x
    )
    total = raised.sum(-1, keepdim=True)
    return raised / total.masked_fill(total == 0, 1.0)


def _regroup(scores: Part, block: int, how: str = "sum") -> Part:
    def make(call: PlainCall) -> Tensor:
        x = scores.at(call)
        found = []
        for first in range(0, x.shape[3], block):
            part = x[..., first : first + block]
            there = part > NEVER
            count = there.sum(3)
            total = torch.where(there, part, 0.0).sum(3)
            joined = {"sum": total, "mean": total / count.clamp(min=1), "max": part.max(3).values}[how]
            found.append(torch.where(count > 0, joined, NEVER))
        return torch.stack(found, 3)

    return Part(make, scores.rows, scores.columns * block, scores.mass and how == "sum")


def _overlap(x: Part, block: int, how: str = "strips") -> Part:
    def make(call: PlainCall) -> Tensor:
        mass, (_, stride) = x.at(call), x.columns
        found = []
        for first, _ in starts(block, call.k.shape[2]):
            total = mass.new_zeros(mass.shape[:3])
            for number, window in enumerate(starts(x.columns, call.k.shape[2])):
                inside = len(set(range(*window)) & set(range(first, first + block)))
                if how == "strips":
                    total = total + mass[..., number] * (inside // stride)
                elif inside:
                    total = torch.maximum(total, mass[..., number])
            found.append(total)
        return torch.stack(found, 3)

    return Part(make, x.rows, block, mass=True)


def _grouped(x: Part, heads: str, how: str) -> Part:
    def make(call: PlainCall) -> Tensor:
        scores = x.at(call)
        parts = scores.unflatten(1, (call.k.shape[1] if heads == "kv_heads" else 1, -1))
        return {"sum": parts.sum(2), "mean": parts.mean(2), "max": parts.max(2).values}[how]  # type: ignore[no-any-return]

    return Part(make, x.rows, x.columns, x.mass, x.probing, x.distances)


# ---- scores of keys ------------------------------------------------------------------------------------------------------------


def _probing(x: Tensor, rows: int, call: PlainCall) -> list[tuple[int, Tensor]]:
    """Position and row of the queries that probe."""
    return [(call.offset + n, x[:, :, n]) for n in range(max(0, x.shape[2] - rows), x.shape[2])]


def _probe(
    x: Part, y: Part, rows: int, causal: bool = False, complete: int = 1, keep: str = "all", scale: float | None = None,
    pooled: int | None = None,
) -> Part:  # fmt: skip
    def make(call: PlainCall) -> Tensor:
        a, b = alike(x.at(call), y.at(call))
        by = scale or a.shape[3] ** -0.5
        if pooled is not None:
            means = torch.stack([b[:, :, first:end].mean(2) for first, end in starts(pooled, b.shape[2])], 2)
            return shares(torch.einsum("bhd,bhkd->bhk", a[:, :, -rows:].mean(2), means) * by)
        probing, found = _probing(a, rows, call), []
        key = torch.arange(b.shape[2])
        for position, row in probing:
            seen = key < b.shape[2] // complete * complete
            seen = seen & (key <= position) if causal else seen
            found.append(shares(torch.where(seen, torch.einsum("bhd,bhkd->bhk", row, b) * by, NEVER)))
        paid = torch.stack(found).mean(0)
        return torch.where(key < probing[0][0], paid, 0.0) if keep == "before" else paid

    return Part(make, columns=pooled or 1, probing=rows if keep == "before" else 0)


def _diagonals(x: Part, y: Part, rows: int, scale: float | None = None) -> Part:
    def make(call: PlainCall) -> Tensor:
        a, b = alike(x.at(call), y.at(call))
        probing, keys = _probing(a, rows, call), b.shape[2]
        found = [b.new_zeros(a.shape[:2]) for _ in range(keys)]
        for position, row in probing:
            paid = shares(torch.einsum("bhd,bhkd->bhk", row, b[:, :, : position + 1]) * (scale or a.shape[3] ** -0.5))
            for key in range(min(position + 1, keys)):
                if position - key < keys:
                    found[position - key] = found[position - key] + paid[:, :, key] / len(probing)
        return torch.stack(found, 2)

    return Part(make, distances=True)


def _smooth(x: Part, pool: int, how: str = "mean") -> Part:
    def make(call: PlainCall) -> Tensor:
        scores = x.at(call)
        last = call.offset + call.q.shape[2] - min(x.probing, call.q.shape[2])
        ends = min(scores.shape[2], last) if x.probing else scores.shape[2]
        found = []
        for n in range(scores.shape[2]):
            places = range(n - pool // 2, n + pool // 2 + 1)
            near = torch.stack([scores[:, :, m] if 0 <= m < ends else torch.zeros_like(scores[:, :, 0]) for m in places])
            found.append(scores[:, :, n] if n >= ends else near.sum(0) / pool if how == "mean" else near.amax(0))
        return torch.stack(found, 2)

    return Part(make, probing=x.probing)


def _divergence(x: Part, y: Part) -> Part:
    def make(call: PlainCall) -> Tensor:
        size, found = max(x.columns, y.columns), []
        for part in (x, y):
            scores = part.at(call).detach()
            scores = torch.stack([piece.sum(2) for piece in scores.split(size // part.columns, 2)], 2)
            total = scores.sum(2, keepdim=True)
            found.append(scores / total.masked_fill(total == 0, 1.0))
        p, r = alike(*found)
        middle = (p + r) / 2
        apart = sum((torch.special.xlogy(one, one) - torch.special.xlogy(one, middle)).sum(2) for one in (p, r)) / 2
        return torch.as_tensor(apart).clamp(min=0).sqrt()

    return Part(make)


SCORES: dict[str, Callable[..., Part]] = {
    "input": _input,
    "table": _table,
    "summary": _summary,
    "take": _take,
    "dot": _dot,
    "bound": _bound,
    "given_scores": _given_scores,
    "given_key_scores": lambda x: Part(lambda call: x.at(call).expand(call.q.shape[0], -1, -1)),
    "rectified": lambda x: _each(x, torch.relu, x.mass),
    "scaled": lambda x, factor=1.0, offset=0.0: _each(x, lambda s: factor * s + offset, x.mass and factor > 0 and not offset),
    "plus": _plus,
    "weighted": _weighted,
    "softmax": _softmax,
    "regroup": _regroup,
    "overlap": _overlap,
    "grouped": _grouped,
    "probe": _probe,
    "diagonals": _diagonals,
    "smooth": _smooth,
    "divergence": _divergence,
}
