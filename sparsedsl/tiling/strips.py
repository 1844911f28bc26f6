"""Cut a residue into strips and solve each strip for its key tiles. Cost O(strips x clauses), plus O(queries) where bounds jump.

1. *Cuts*: strips end where the interval of keys jumps (a new document, a new chunk), so that a strip needs no keys its neighbours
   want; between jumps they have equal heights.
2. *Key tiles*: per strip, the keys are cut at the ends of all outer and inner intervals; what a key tile leaves open is its residual.
3. *Families*: consecutive strips of one shape become one progression.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.mask_clauses import Clause, KeyBound, clauses
from sparsedsl.analysis.runs import solve_clause
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.tiling.schedule import KeyTile, StridedSeries

__all__ = ["ResidueSpace", "jumps", "strided_series", "strip_edges"]

# Queries solved at once when looking for jumps.
ROWS = 1 << 14
# Codes of key tiles are bit sets in an int64; a mask with more clauses and bounds than this is asked whole.
MAX_BITS = 60
OUTSIDE, ALL, WHOLE = -1, 0, -2


@dataclass(frozen=True, eq=False)
class ResidueSpace:
    """Where a residue is solved: queries ``first .. first + rows - 1`` and ``kv_len`` keys, in residue coordinates.

    ``env``: values of b and h, the lengths, the tables.
    """

    mask: Boolean
    first: int
    rows: int
    kv_len: int
    env: Mapping[str, Any]

    def solve(self, clause: Clause, q_low: torch.Tensor, q_high: torch.Tensor) -> Any:
        """Outer and inner key intervals, see :func:`sparsedsl.analysis.runs.solve_clause`."""
        return solve_clause(clause, q_low, q_high, self.first + self.rows, self.kv_len, self.env)


def jumps(space: ResidueSpace, least: int = 16) -> list[int]:
    """Queries at which the keys of some clause move by ``least`` or more from those of the query before; empty if there are too many."""
    moving = [clause for clause in clauses(space.mask) if not all(_smooth(bound) for bound in clause.bounds)]
    if not moving:
        return []
    found: list[torch.Tensor] = []
    last: list[torch.Tensor | None] = [None] * len(moving)
    for begin in range(space.first, space.first + space.rows, ROWS):
        q = torch.arange(begin, min(begin + ROWS, space.first + space.rows))
        for number, clause in enumerate(moving):
            runs = space.solve(clause, q, q)
            low, high = runs.outer_low.clamp(0, space.kv_len), (runs.outer_high + 1).clamp(0, space.kv_len)
            ends = torch.stack([torch.where(low < high, low, -1), torch.where(low < high, high, -1)])
            before = last[number]
            joined = ends if before is None else torch.cat([before, ends], dim=1)
            moved = (joined.diff(dim=1).abs() >= least).any(dim=0).nonzero()[:, 0]
            found.append(moved + begin + (1 if before is None else 0))
            last[number] = ends[:, -1:]
    places = torch.cat(found).unique()
    return [] if places.numel() * 8 > space.rows else places.tolist()


@functools.lru_cache(maxsize=1024)
def _smooth(bound: KeyBound) -> bool:
    """Whether the solved interval moves with the query by a constant slope, or not at all."""
    affine = all(
        part == 0 or (part - part.coeff(symbol) * symbol).is_Integer
        for part, symbol in ((bound.q_part, Q_IDX), (bound.kv_part, KV_IDX))
    )
    return affine or bound.q_part == 0


def strip_edges(space: ResidueSpace, height: int, jump_places: list[int]) -> torch.Tensor:
    """First query of every strip, and the one after the last: at jumps, and in equal parts of at most ``height`` between them.

    Parts shorter than an eighth of ``height`` are joined with the next: a mask costs less than another strip.
    """
    end = space.first + space.rows
    edges = [space.first]
    kept = space.first
    for place in [*jump_places, end]:
        length = place - kept
        if place < end and length < max(1, height // 8):
            continue
        parts = max(1, -(-length // height))
        if length % parts and parts > 1 and place - kept == space.rows:
            # Nothing to fit in between: whole strips, the last one shorter.
            edges += [*range(kept + height, place, height), place]
        else:
            edges += [kept + length * part // parts for part in range(1, parts + 1)]
        kept = place
    return torch.tensor(edges)


def strided_series(space: ResidueSpace, edges: torch.Tensor, group: int) -> tuple[StridedSeries, ...]:
    """The strips between ``edges`` with their key tiles, as progressions."""
    q_low, q_high = edges[:-1], edges[1:] - 1
    starts, lengths, codes, decode = _key_tiles(space, q_low, q_high)
    return _progressions(q_low, q_high - q_low + 1, starts, lengths, codes, decode, group)


def _key_tiles(space: ResidueSpace, q_low: torch.Tensor, q_high: torch.Tensor) -> Any:
    """Pieces of each strip: starts, lengths and codes ``(strips, key_tiles)``, and what a code means."""
    parts = clauses(space.mask)
    touched, satisfied = [], []
    for clause in parts:
        runs = space.solve(clause, q_low, q_high)
        touched.append(_interval(space, runs.outer_low, runs.outer_high))
        inner = []
        for bound in clause.bounds:
            alone = space.solve(Clause((bound,), ()), q_low, q_high)
            inner.append(_interval(space, alone.inner_low, alone.inner_high))
        satisfied.append(inner)
    if not parts:
        none = torch.zeros((q_low.numel(), 0), dtype=torch.int64)
        return none, none, none, {}
    every = touched + [interval for inner in satisfied for interval in inner]
    cuts = torch.stack([end for interval in every for end in interval], dim=-1).sort(dim=-1).values
    starts, lengths = cuts[:, :-1], cuts.diff(dim=-1)

    def within(interval: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (starts >= interval[0][:, None]) & (starts < interval[1][:, None])

    whole = len(every) > MAX_BITS
    code = torch.zeros_like(starts)
    full = torch.zeros_like(starts, dtype=torch.bool)
    any_touch = full
    meaning: list[tuple[int, KeyBound | None]] = []
    for number, clause in enumerate(parts):
        inside = within(touched[number]) & (lengths > 0)
        any_touch = any_touch | inside
        open_ = torch.zeros_like(inside)
        bits: list[tuple[torch.Tensor, KeyBound | None]] = [(inside, None)]
        for bound, interval in zip(clause.bounds, satisfied[number], strict=True):
            asked = inside & ~within(interval)
            open_ = open_ | asked
            bits.append((asked, bound))
        full = full | (inside & ~open_)
        for flag, asked_for in bits:
            if not whole:
                code = code + flag * (1 << len(meaning))
            meaning.append((number, asked_for))
    code = torch.where(full, ALL, code if not whole else WHOLE)
    code = torch.where(any_touch, code, OUTSIDE)
    shown = code != OUTSIDE
    return starts * shown, lengths * shown, code, _Codes(space.mask, tuple(meaning))


def _interval(space: ResidueSpace, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A half-open interval inside the keys."""
    low, high = low.clamp(min=0), high.clamp(max=space.kv_len - 1)
    start = low.clamp(max=space.kv_len)
    return start, torch.where(low <= high, high + 1, start)


@dataclass(frozen=True, eq=False)
class _Codes:
    """What the bits of a code stand for: clause number, and the bound that is open (None: the clause touches the key tile)."""

    mask: Boolean
    meaning: tuple[tuple[int, KeyBound | None], ...]

    def residual(self, code: int) -> Boolean | None:
        """The condition a key tile leaves open."""
        if code == ALL:
            return None
        if code == WHOLE:
            return self.mask
        open_: dict[int, list[Boolean]] = {}
        for bit, (clause, bound) in enumerate(self.meaning):
            if not code >> bit & 1:
                continue
            conditions = open_.setdefault(clause, [])
            if bound is not None:
                form = bound.q_part + bound.kv_part
                conditions += [] if bound.low is None else [sympy.Le(bound.low - form, 0)]
                conditions += [] if bound.high is None else [sympy.Le(form - bound.high, 0)]
        return sympy.Or(*(sympy.And(*conditions) for conditions in open_.values()))


@functools.lru_cache(maxsize=4096)
def _one_object(condition: Boolean | None) -> Boolean | None:
    """Of all that are equal the first: each call looks things up by them, and what is the same object is not compared part by part."""
    return condition


def _progressions(
    q_start: torch.Tensor, heights: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, codes: torch.Tensor, decode: Any,
    group: int,
) -> tuple[StridedSeries, ...]:  # fmt: skip
    """Group consecutive strips of one shape whose key tiles move by constant steps."""
    used = (lengths > 0).any(dim=1)
    like_last = (heights.diff() == 0) & (lengths.diff(dim=0) == 0).all(dim=1) & (codes.diff(dim=0) == 0).all(dim=1)
    steps = torch.cat([q_start[:, None], starts], dim=1).diff(dim=0)
    same_step = (steps.diff(dim=0) == 0).all(dim=1).tolist()
    alike = (like_last & (steps >= 0).all(dim=1)).tolist()  # no view runs backwards
    used_list, step_list = used.tolist(), steps.tolist()
    start_list, length_list, code_list = starts.tolist(), lengths.tolist(), codes.tolist()
    q_list, height_list = q_start.tolist(), heights.tolist()
    known: dict[int, Boolean | None] = {}
    result: list[StridedSeries] = []
    begin = 0
    total = len(q_list)
    while begin < total:
        end = begin + 1
        while end < total and alike[end - 1] and (end == begin + 1 or same_step[end - 2]):
            end += 1
        if used_list[begin]:
            count = end - begin
            moves = step_list[begin] if count > 1 else [0] * (len(start_list[begin]) + 1)
            key_tiles = []
            for start, length, code, move in zip(start_list[begin], length_list[begin], code_list[begin], moves[1:], strict=True):
                if length:
                    if code not in known:
                        known[code] = _one_object(decode.residual(code))
                    key_tiles.append(KeyTile(start, length, move, known[code]))
            result.append(StridedSeries(group, q_list[begin], height_list[begin], count, moves[0], _joined(key_tiles)))
        begin = end
    return tuple(result)


def _joined(key_tiles: list[KeyTile]) -> tuple[KeyTile, ...]:
    """Neighbours with one residual that move together are one key tile."""
    joined: list[KeyTile] = []
    for key_tile in sorted(key_tiles, key=lambda p: p.start):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.start + last.length == key_tile.start
            and (last.step, last.residual) == (key_tile.step, key_tile.residual)
        ):
            joined[-1] = KeyTile(last.start, last.length + key_tile.length, last.step, last.residual)
        else:
            joined.append(key_tile)
    return tuple(joined)
