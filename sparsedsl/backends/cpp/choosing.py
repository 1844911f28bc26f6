"""Choosing blocks in C++: from what scores are made of to the lists of a row, a few rows at a time."""

from __future__ import annotations

import functools
import logging
import struct
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from sparsedsl.backends.cpp.attention import rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import KINDS, place_of
from sparsedsl.backends.cpp.libraries import fixed_library, parallel
from sparsedsl.errors import UnsupportedError
from sparsedsl.selection.candidates import Candidates, IntervalRule, PairRule, TableRule, Within
from sparsedsl.selection.choosing import Rule
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.selection.derived_scores import RegroupedScores, SoftmaxScores
from sparsedsl.selection.score_arithmetic import ReluScores, WeightedScores
from sparsedsl.selection.scores import DotScores, ScoreSource, TensorScores

__all__ = ["can_choose", "choose_blocks"]

log = logging.getLogger("sparsedsl")

Tensor = torch.Tensor
# As in codegen/cpp/choosing.cpp.
_DOT, _CELLS, _ADD, _GROUP, _REGROUP, _SHARES, _RELU, _TIMES = range(8)
_HOWS = {"sum": 0, "mean": 1, "max": 2}
_RULES = {"top_k": 0, "top_p": 1, "threshold": 2}
_MEASURES = {"score": 0, "softmax": 1, "share": 2}
_NO_SPANS = (0,) * 5
_NO_LIMITS = (0,) * 11
# What the steps follow in memory, and one of them.
_CALL, _STEP = struct.Struct("=34qd11q"), struct.Struct("=7q2d35q")
_FEW = 8  # rows that read the columns of a product, up to which these are not turned first
_COLUMNS = 64  # a multiple of those of a panel, on any processor

# Those of candidates that calls share, of the rows seen last: rows, fields, and what these point at.
_LIMITS: WeakKeyDictionary[Candidates, tuple[slice, tuple[int, ...], list[Tensor]]] = WeakKeyDictionary()


@functools.lru_cache(maxsize=8)
def can_choose(path: str | None) -> bool:
    """Whether it can be built here. ``path``: of the compiler."""
    try:
        fixed_library("choosing", False)
    except UnsupportedError as error:
        if path is not None:
            log.warning("blocks are chosen by torch, which takes longer: %s", error)
        return False
    return True


class _NotHere(Exception):
    """Scores or a rule of another kind."""


@dataclass
class _Writer:
    """What the compiled code is told of some rows. ``turned``: entries of the columns of products, for which it makes room. ``held``: the
    tensors that the numbers point at."""

    real: torch.dtype
    batch: int
    turned: int = 0
    steps: list[bytes] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)

    def place(self, t: Tensor) -> int:
        """Where a tensor lies, which is kept until the call is over."""
        self.held.append(t)
        return t.data_ptr()

    # ---- limits --------------------------------------------------------------------------------------------------------------------

    def limits(self, candidates: Candidates, rows: slice) -> tuple[int, ...]:
        """The fields of ``Limits``."""
        found = _LIMITS.get(candidates)
        if found is not None and found[0] == rows:
            self.held += found[2]
            return found[1]
        before = len(self.held)
        fields = (*self.limit(candidates.begin, rows), *self.limit(candidates.end, rows), *self.spans(candidates.allowed, rows))
        _LIMITS[candidates] = rows, fields, self.held[before:]
        return fields

    def limit(self, limit: Tensor | None, rows: slice) -> tuple[int, int, int]:
        """Where the limits of rows lie, and from one batch entry and head to the next."""
        if limit is None:
            return 0, 0, 0
        if limit.ndim != 3 or limit.dtype is not torch.int32 or limit.stride(2) != 1:
            limit = limit[(None,) * (3 - limit.ndim)].to(torch.int32).contiguous()
        return (self.place(limit) + 4 * rows.start, *_steps(limit))

    def spans(self, rule: PairRule | None, rows: slice) -> tuple[int, int, int, int, int]:
        """The last fields of ``Limits``: ranges of blocks, of each row as many."""
        if rule is None:
            return _NO_SPANS
        if not isinstance(rule, IntervalRule):
            raise _NotHere
        first, last = rule.blocks
        count = first.shape[3]
        skipped = 4 * rows.start * count
        return (self.place(first) + skipped, self.place(last) + skipped, count, *_steps(first))

    # ---- scores --------------------------------------------------------------------------------------------------------------------

    def step(
        self, kind: int, heads: int, blocks: int, *, of: tuple[int, int] = (0, 0), how: str = "sum", size: int = 0,
        scales: tuple[float, float] = (1.0, 1.0), rest: tuple[int, ...] = (0,) * 24, limits: tuple[int, ...] = _NO_LIMITS,
    ) -> int:  # fmt: skip
        """One more, and its number."""
        self.steps.append(_STEP.pack(kind, *of, heads, blocks, _HOWS[how], size, *scales, *rest, *limits))
        return len(self.steps) - 1

    def scores(self, source: ScoreSource, rows: slice, blocks: int) -> int:
        """The steps of some rows of a source; ``blocks``: how many are asked of it. The number of the last step."""
        write = _STEPS.get(type(source))
        if write is None:
            raise _NotHere
        return write(self, source, rows, blocks)

    def dot(self, a: Tensor, b: Tensor, other: Tensor | None, scale: float, rows: slice, blocks: int) -> int:
        """Products of rows and columns. ``other``: the columns for what is below 0."""
        (batch, heads, known, width), (a_batch, a_heads, a_rows, _) = b.shape, a.shape
        if a_batch != self.batch or a_rows < rows.stop or known < blocks:  # one serves all
            raise _NotHere
        if rows.stop - rows.start < a_rows:
            a = a[:, :, rows]
        parts = 1 if other is None else 2
        turned = -1
        if (rows.stop - rows.start) * max(a_heads, heads) > _FEW * heads:
            turned = self.turned
            self.turned += batch * heads * -(-blocks // _COLUMNS) * _COLUMNS * parts * width
        a, b = self.rows(a), self.rows(b)
        other = b if other is None else self.rows(other)
        step = _STEP.pack(
            _DOT, 0, 0, max(a_heads, heads), blocks, 0, 0, scale, 1.0, *place_of(a), KINDS[a.dtype], a_heads, width, parts - 1,
            *place_of(b), *place_of(other), KINDS[b.dtype], heads, turned, *(0,) * 16,
        )  # fmt: skip
        self.steps.append(step)
        return len(self.steps) - 1

    def rows(self, x: Tensor) -> Tensor:
        """As the compiled code reads it: 16 bits wide, or as wide as the scores; rows without gaps."""
        if x.dtype is not self.real and not (KINDS.get(x.dtype, 0) and self.real is torch.float32):
            x = x.to(self.real)
        x = rows_without_gaps(x)
        self.held.append(x)
        return x


def _dot(writer: _Writer, source: DotScores, rows: slice, blocks: int) -> int:
    return writer.dot(source.a, source.b, None, source.scale, rows, blocks)


def _bound(writer: _Writer, source: BoundScores, rows: slice, blocks: int) -> int:
    return writer.dot(source.q, source.high, source.low, source.scale, rows, blocks)


def _cells(writer: _Writer, source: TensorScores, rows: slice, blocks: int) -> int:
    return writer.step(_CELLS, source.values.shape[1], blocks, rest=_table(writer, source.values, rows))


def _table(writer: _Writer, values: Tensor, rows: slice) -> tuple[int, ...]:
    """What a step is told of numbers (batch, heads, rows, blocks), of which one may serve all."""
    cells = values.to(writer.real).resolve_neg()
    cells = cells if cells.shape[2] == 1 else cells[:, :, rows]
    strides = [0 if size == 1 else stride for size, stride in zip(cells.shape, cells.stride(), strict=True)]
    return (*(0,) * 19, writer.place(cells), *strides)


def _relu(writer: _Writer, source: ReluScores, rows: slice, blocks: int) -> int:
    return writer.step(_RELU, source.shape[1], blocks, of=(writer.scores(source.source, rows, blocks), 0))


def _times(writer: _Writer, source: WeightedScores, rows: slice, blocks: int) -> int:
    of = writer.scores(source.source, rows, blocks), source.factors.shape[1]
    return writer.step(_TIMES, source.shape[1], blocks, of=of, rest=_table(writer, source.factors, rows))


def _sum(writer: _Writer, source: SumScores, rows: slice, blocks: int) -> int:
    sources, factors = source.sources, source.factors or (1.0,) * len(source.sources)
    number, heads, scale = writer.scores(sources[0], rows, blocks), sources[0].shape[1], factors[0]
    if len(sources) == 1:
        zero = writer.scores(TensorScores(torch.zeros((1, 1, 1, 1), dtype=writer.real)), rows, blocks)
        return writer.step(_ADD, heads, blocks, of=(number, zero), scales=(scale, 1.0))
    for other, factor in zip(sources[1:], factors[1:], strict=True):
        second, heads = writer.scores(other, rows, blocks), max(heads, other.shape[1])
        number = writer.step(_ADD, heads, blocks, of=(number, second), scales=(scale, factor))
        scale = 1.0
    return number


def _grouped(writer: _Writer, source: GroupedScores, rows: slice, blocks: int) -> int:
    return writer.step(_GROUP, source.heads_out, blocks, of=(writer.scores(source.source, rows, blocks), 0), how=source.how)


def _regrouped(writer: _Writer, source: RegroupedScores, rows: slice, blocks: int) -> int:
    fine = min(blocks * source.size, source.source.shape[3])
    number = writer.scores(source.source, rows, fine)
    return writer.step(_REGROUP, source.shape[1], blocks, of=(number, 0), how=source.how, size=source.size)


def _softmax(writer: _Writer, source: SoftmaxScores, rows: slice, blocks: int) -> int:
    if source.totals is not None or source.first != (0, 0):
        raise _NotHere
    number = writer.scores(source.source, rows, blocks)
    return writer.step(_SHARES, source.shape[1], blocks, of=(number, 0), limits=writer.limits(source.candidates, rows))


# How scores of each kind are told of.
_STEPS: dict[type[ScoreSource], Any] = {
    DotScores: _dot, BoundScores: _bound, TensorScores: _cells, SumScores: _sum, GroupedScores: _grouped, RegroupedScores: _regrouped,
    SoftmaxScores: _softmax, ReluScores: _relu, WeightedScores: _times,
}  # fmt: skip


def _steps(t: Tensor) -> tuple[int, int]:
    """From one batch entry and head to the next; 0 where one serves all."""
    (batch, heads, *_), (by_batch, by_head, *_) = t.shape, t.stride()
    return 0 if batch == 1 else by_batch, 0 if heads == 1 else by_head


def choose_blocks(
    source: ScoreSource, candidates: Candidates, forced: PairRule | None, rule: Rule, rows: slice, start: int, width: int
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """See :data:`sparsedsl.selection.choosing.Choose`."""
    batch, heads, _, blocks = source.shape
    real, count = source.dtype, rows.stop - rows.start
    size = (batch, heads, count)
    writer = _Writer(real, batch)
    named, within, spans = 0, False, _NO_SPANS
    try:
        limits = writer.limits(candidates, rows)
        if isinstance(forced, TableRule):
            named = writer.place(forced.table.expand(*size, blocks).contiguous())
        elif forced is not None:
            within = isinstance(forced, Within) and forced.allowed is candidates.allowed
            spans = writer.spans(forced.rule if isinstance(forced, Within) and within else forced, rows)
        writer.scores(source, rows, blocks)
    except _NotHere:
        return None
    indices, counts = torch.empty((*size, width), dtype=torch.int32), torch.empty(size, dtype=torch.int32)
    picked = torch.empty((*size, width), dtype=real) if rule.scores else None
    if not counts.numel():
        return indices, counts, picked
    call = _CALL.pack(
        len(writer.steps), writer.turned, batch, count, blocks, heads, *limits, forced is not None, *_NO_LIMITS[:6], *spans, named,
        within, _RULES[rule.name], rule.k, rule.extra, rule.share, _MEASURES[rule.measure], rule.inclusive, rule.unmet == "all",
        rule.forced_in_mass, start, width, indices.data_ptr(), counts.data_ptr(), 0 if picked is None else picked.data_ptr(),
        torch.get_num_threads(), parallel(),
    )  # fmt: skip
    if fixed_library("choosing", real == torch.float64).choose_blocks(b"".join((call, *writer.steps))) < 0:
        raise MemoryError("choosing blocks found no memory for a row of scores")
    return indices, counts, picked
