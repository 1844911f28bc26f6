"""How a generated kernel finds the tiles it must visit: intervals in closed form, or compact lists. Full tiles first, then partial ones.

Where the order of tiles matters there is one loop over all of them, as if they were partial.

A program owns one tile of *rows* (queries, or keys where gradients of K and V are made) and loops over tiles of the other axis, here
called *columns*. Each kind of loop writes three things: what is worked out before the loops, the number of the i-th tile, and the
condition of a pair in a partial tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import sympy

from sparsedsl.analysis.block_wise import block_sides
from sparsedsl.analysis.key_intervals import KeyInterval, exchanged
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_expression import TritonNames, write_expression
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.lang.tables import table_reads

__all__ = ["IntervalLoop", "ListLoop", "Loop"]


class Loop(Protocol):
    """What the writer of a kernel asks of a loop over columns."""

    def arguments(self) -> list[tuple[str, str]]:
        """Name and type of what the kernel is given for it."""

    def prepare(self, source: Source, names: TritonNames) -> None:
        """Write what comes before the loops; afterwards ``full_tiles`` and ``partial_tiles`` say how many there are, or ``every_tiles``."""

    def tile(self, source: Source, kind: str, number: str) -> None:
        """Write ``column = ...``: the number of the ``number``-th tile of this kind ("full", "partial", or "every", in ascending order)."""

    def condition(self, source: Source, names: TritonNames) -> str:
        """The condition of a pair in a partial tile, ``(rows, columns)``."""


@dataclass(frozen=True)
class IntervalLoop:
    """Tiles between two ends that every program works out for its own rows: no list in memory.

    ``of``: "keys" (columns are keys, ends are key positions) or "queries" (columns are rows of the call: positions less ``q_offset``).
    ``vectors``: the indices that are vectors over the program's rows, by symbol; ``wide``: positions need 64 bits; ``one_loop``: over tiles
    of the kind "every".
    """

    intervals: tuple[KeyInterval, ...]
    of: str
    block: str
    vectors: frozenset[sympy.Symbol]
    wide: bool = False
    one_loop: bool = False

    def arguments(self) -> list[tuple[str, str]]:
        """Two arrays for every interval that needs a search: they are filled before the kernel runs."""
        found = []
        for i, interval in enumerate(self.intervals):
            if interval.searched:
                found += [(f"first_{self.of}_{i}_ptr", "*i32"), (f"last_{self.of}_{i}_ptr", "*i32")]
                found += [(f"{self.of}_{i}_step_{index}", "i32") for index in self._indices(i)]
        return found

    def _indices(self, i: int) -> list[str]:
        """Which of batch entry and head a searched interval reads."""
        return [name for name in "bh" if reads(self.intervals[i].exprs)[name]]

    @property
    def _length(self) -> str:
        return "kv_len" if self.of == "keys" else "rows"

    @property
    def _column(self) -> str:
        return "kv_idx" if self.of == "keys" else "row"

    @property
    def _place(self) -> str:
        return "column_0" if self.of == "keys" else "row_0"

    def prepare(self, source: Source, names: TritonNames) -> None:
        what = (
            "The keys each query sees"
            if self.of == "keys"
            else "The queries that see each key, counted from the first of the call"
        )
        many = len(self.intervals) > 1
        kinds = ("every",) if self.one_loop else ("full", "partial")
        if not self.intervals:
            for kind in kinds:
                source.line(f"{kind}_tiles = 0")
            return
        source.line(f"# {what}: first <= {self._column} <= last{', in any of the intervals' if many else ''}.")
        for i in range(len(self.intervals)):
            self._ends(source, names, i, self._suffix(i))
        inside = "" if self.one_loop else f"; those from full_begin to full_end lie inside for all {self._rows}"
        source.line(f"# Tiles from begin to end are touched{inside}.")
        for i in range(len(self.intervals)):
            self._touched(source, i)
        if many:
            self._in_order(source)
        for i in range(len(self.intervals)):
            self._counts(source, i)
        if many:
            for kind in kinds:
                source.line(f"{kind}_tiles = {' + '.join(f'{kind}{self._suffix(i)}' for i in range(len(self.intervals)))}")

    def _counts(self, source: Source, i: int) -> None:
        """How many full and partial tiles an interval has; ``head``: partial ones before its full ones."""
        s = self._suffix(i)
        if self.one_loop:
            source.line(f"every{s or '_tiles'} = end{s}{'' if self._first_at_zero(i) else f' - begin{s}'}")
            return
        full, partial = (f"{kind}{s or '_tiles'}" for kind in ("full", "partial"))
        if self._first_at_zero(i):
            source.line(f"{full} = full_end{s}")
            source.line(f"{partial} = end{s} - full_end{s}")
            return
        source.line(f"head{s} = full_begin{s} - begin{s}")
        source.line(f"{full} = full_end{s} - full_begin{s}")
        source.line(f"{partial} = head{s} + end{s} - full_end{s}")

    @property
    def _rows(self) -> str:
        return "queries" if self.of == "keys" else "keys"

    def _suffix(self, i: int) -> str:
        return f"_{i}" if len(self.intervals) > 1 else ""

    def _end_exprs(self, i: int) -> tuple[sympy.Expr, sympy.Expr]:
        first, last = self.intervals[i].ends
        return (first, last) if self.of == "keys" else (exchanged(first), exchanged(last))

    def _is_vector(self, expr: sympy.Expr) -> bool:
        return bool(expr.free_symbols & self.vectors)

    def _ends(self, source: Source, names: TritonNames, i: int, s: str) -> None:
        interval = self.intervals[i]
        if interval.searched:
            index = "q_idx - q_offset" if self.of == "keys" else "kv_idx"
            length = "rows" if self.of == "keys" else "kv_len"
            line = " + ".join(f"{name} * {self.of}_{i}_step_{name}" for name in self._indices(i))
            at = f"tl.cast({line}, tl.int64) * {length} + {index}" if line else index
            for end in ("first", "last"):
                source.line(f"{end}{s} = tl.load({end}_{self.of}_{i}_ptr + {at})")
        else:
            first, last = self._end_exprs(i)
            if not self._starts_at_zero(i):
                source.line(f"first{s} = {write_expression(source, first, names, real='tl.float64')}")
            source.line(f"last{s} = {write_expression(source, last, names, real='tl.float64')}")
        if self.of == "queries":
            source.line(f"first{s} = tl.maximum(first{s} - q_offset, 0)")
            source.line(f"last{s} = tl.minimum(last{s} - q_offset, rows - 1)")
        conditions = () if interval.searched else interval.conditions
        if self.of == "queries":
            conditions = tuple(exchanged(c) for c in conditions)
        if conditions:
            holds = write_expression(source, sympy.And(*conditions), names, real="tl.float64")
            name = source.fresh("holds")
            source.line(f"{name} = {holds}")
            source.line(f"first{s} = tl.where({name}, first{s}, {self._length})")
            source.line(f"last{s} = tl.where({name}, last{s}, -1)")
        if not self.wide and not interval.searched and table_reads(interval.exprs):
            # What tables hold is computed with in 64 bits; the ends are positions, and pairs are compared with them.
            if not self._starts_at_zero(i):
                source.line(f"first{s} = tl.minimum(first{s}, {self._length}).to(tl.int32)")
            source.line(f"last{s} = tl.maximum(last{s}, -1).to(tl.int32)")

    def _vector_ends(self, i: int) -> tuple[bool, bool]:
        """Whether ``first`` and ``last`` are vectors over the rows."""
        interval = self.intervals[i]
        if interval.searched:
            return True, True
        conditions = [c if self.of == "keys" else exchanged(c) for c in interval.conditions]
        moved = any(self._is_vector(c) for c in conditions)
        first, last = (moved or self._is_vector(end) for end in self._end_exprs(i))
        return first, last

    def _starts_at_zero(self, i: int) -> bool:
        interval = self.intervals[i]
        return self.of == "keys" and not interval.searched and not interval.conditions and interval.ends[0] == 0

    def _first_at_zero(self, i: int) -> bool:
        """Whether it is the first interval and begins at key 0: then it begins with its full tiles."""
        return i == 0 and self._starts_at_zero(0)

    def _touched(self, source: Source, i: int) -> None:
        s, block = self._suffix(i), self.block
        first, last = self._vector_ends(i)

        def over(reduce: str, end: str, vector: bool) -> str:
            return f"tl.{reduce}({end}{s}, 0)" if vector else f"{end}{s}"

        begin = "0" if self._starts_at_zero(i) else f"{over('min', 'first', first)} // {block}"
        if not self._first_at_zero(i):
            source.line(f"begin{s} = {begin}")
        least = "0" if self._starts_at_zero(i) else f"begin{s}"
        source.line(f"end{s} = tl.maximum(({over('max', 'last', last)} + {block}) // {block}, {least})")
        if self.one_loop:
            return
        if self._first_at_zero(i):
            source.line(f"full_end{s} = tl.maximum(({over('min', 'last', last)} + 1) // {block}, 0)")
            return
        full_begin = "0" if self._starts_at_zero(i) else f"({over('max', 'first', first)} + {block} - 1) // {block}"
        source.line(f"full_begin{s} = {full_begin}")
        source.line(f"full_end{s} = ({over('min', 'last', last)} + 1) // {block}")
        source.line(f"full_begin{s} = tl.where(full_begin{s} < full_end{s}, full_begin{s}, end{s})")
        source.line(f"full_end{s} = tl.maximum(full_end{s}, full_begin{s})")

    def _in_order(self, source: Source) -> None:
        """Sort the intervals, then cut from each what those before it have visited."""
        parts = ("begin", "end") if self.one_loop else ("begin", "end", "full_begin", "full_end")
        zero = sum(self._starts_at_zero(i) for i in range(len(self.intervals)))
        rest = list(range(zero, len(self.intervals)))
        if len(rest) > 1:
            source.line("# Intervals in ascending order.")
        for stop in range(len(rest) - 1, 0, -1):
            for j in range(stop):
                low, high = self._suffix(rest[j]), self._suffix(rest[j + 1])
                source.line(f"swap = begin{high} < begin{low}")
                for part in parts:
                    left, right = f"{part}{low}", f"{part}{high}"
                    source.line(f"{left}, {right} = tl.where(swap, {right}, {left}), tl.where(swap, {left}, {right})")
        source.line("# Each begins where those before it end, so that no tile is visited twice.")
        for i in range(1, len(self.intervals)):
            s = self._suffix(i)
            before = "end_0" if i == 1 else "reached"
            source.line(f"begin{s} = tl.maximum(begin{s}, {before})")
            source.line(f"end{s} = tl.maximum(end{s}, begin{s})")
            if not self.one_loop:
                source.line(f"full_begin{s} = tl.minimum(tl.maximum(full_begin{s}, begin{s}), end{s})")
                source.line(f"full_end{s} = tl.minimum(tl.maximum(full_end{s}, full_begin{s}), end{s})")
            if i + 1 < len(self.intervals):
                source.line(f"reached = tl.maximum({before}, end{s})")

    def tile(self, source: Source, kind: str, number: str) -> None:
        for i in range(len(self.intervals)):
            s, j, before = self._suffix(i), number, " + ".join(f"{kind}{self._suffix(n)}" for n in range(i))
            if before:
                j = "j"
                source.line(f"j = {number} - {f'({before})' if i > 1 else before}")
            mine = j if self._first_at_zero(i) else f"{'begin' if kind == 'every' else 'full_begin'}{s} + {j}"
            if kind == "partial" and self._first_at_zero(i):
                mine = f"full_end{s} + {j}"
            elif kind == "partial":
                mine = f"tl.where({j} < head{s}, begin{s} + {j}, full_end{s} + {j} - head{s})"
            source.line(f"column = tl.where(j < 0, column, {mine})" if before else f"column = {mine}")
        if not self.intervals:
            source.line("column = 0")

    def condition(self, source: Source, names: TritonNames) -> str:
        parts = []
        for i in range(len(self.intervals)):
            s = self._suffix(i)
            # Places within the tile are the same in every turn; the ends of a row are moved instead: one number for many pairs.
            first, last = (
                f"({end}{s} - start){'[:, None]' * vector}"
                for end, vector in zip(("first", "last"), self._vector_ends(i), strict=True)
            )
            low = "" if self._starts_at_zero(i) else f"({self._place}[None, :] >= {first}) & "
            parts.append(f"{low}({self._place}[None, :] <= {last})")
        joined = " | ".join(f"({p})" if " & " in p else p for p in parts) if len(parts) > 1 else "".join(parts)
        return joined or f"{self._place}[None, :] < 0"


@dataclass(frozen=True)
class ListLoop:
    """Tiles read from compact lists: ``starts`` (one entry a line of tiles, and the end) and ``columns``, of full and of partial tiles.

    ``head``: the head whose lists these are; ``line``: from batch entry and head to the line of tiles, "" if there is one line each.
    ``square``: the rows of a tile are those of its lists, so that a tile may lie in one block of the mask. ``one_loop``: over tiles of the
    kind "every"; all are listed as partial.
    """

    mask: sympy.Basic
    of: str
    head: str
    line: str
    square: bool = True
    one_loop: bool = False

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("partial",) if self.one_loop else ("full", "partial")

    @property
    def block_wise(self) -> bool:
        """Whether the mask has one value in each of its blocks, and tiles may be parts of blocks."""
        return self.square and block_sides(self.mask) is not None

    def arguments(self) -> list[tuple[str, str]]:
        """Starts and columns of the two kinds of tiles, and how many lines of tiles one batch entry and one head have."""
        found = [(f"{kind}_{part}_{self.of}_ptr", "*i32") for kind in self._kinds for part in ("starts", "columns")]
        found += [(f"{self.of}_list_b", "i32"), (f"{self.of}_list_h", "i32")]
        return [*found, ("BLOCK_WISE", "constexpr")] if self.block_wise else found

    def prepare(self, source: Source, names: TritonNames) -> None:
        source.line("# The tiles to visit: lists made by the analysis of the pattern.")
        source.line(f"listed = b * {self.of}_list_b + {self.head} * {self.of}_list_h")
        if self.line:
            source.line(f"listed = {self.line}")
        for kind in self._kinds:
            source.line(f"{kind}_begin = tl.load({kind}_starts_{self.of}_ptr + listed)")
            count = "every" if self.one_loop else kind
            source.line(f"{count}_tiles = tl.load({kind}_starts_{self.of}_ptr + listed + 1) - {kind}_begin")

    def tile(self, source: Source, kind: str, number: str) -> None:
        kind = "partial" if kind == "every" else kind
        source.line(f"column = tl.load({kind}_columns_{self.of}_ptr + {kind}_begin + {number})")

    def condition(self, source: Source, names: TritonNames) -> str:
        inside = "column_0[None, :] < kv_len - start" if self.of == "keys" else "row_0[None, :] < rows - start"
        if self.mask in (sympy.true, sympy.false):
            return inside
        if not self.block_wise:
            return f"({write_expression(source, self.mask, names, real='tl.float64')}) & ({inside})"
        # A listed tile of a block is allowed as a whole: its pairs need not be looked up.
        with source.block("if BLOCK_WISE:"):
            source.line(f"cut = {inside}")
        with source.block("else:"), source.scope():
            source.line(f"cut = ({write_expression(source, self.mask, names, real='tl.float64')}) & ({inside})")
        return "cut"


def reads(expr: sympy.Basic) -> dict[str, bool]:
    """Which of the four indices ``expr`` reads."""
    free = expr.free_symbols
    return {"b": BATCH in free, "h": HEAD in free, "q_idx": Q_IDX in free, "kv_idx": KV_IDX in free}
