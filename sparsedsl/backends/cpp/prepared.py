"""What calls of the same lengths and tables share in the ``cpp`` lowering: generated code, tables as it reads them, intervals, lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.key_intervals import interval_rows
from sparsedsl.analysis.lists import BlockLists, TileRows
from sparsedsl.backends.cpp.libraries import Native, native
from sparsedsl.backends.protocol import ListMaker
from sparsedsl.codegen.to_cpp import CppSource, CppVariant, cpp_source
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import HEAD
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.hoisted_tables import fill

__all__ = ["BLOCK_KEYS", "READY", "Prepared", "Preparer"]

Tensor = torch.Tensor
# Keys of a block, lanes of a strip at most: as in codegen/cpp/call.h.
BLOCK_KEYS, MOST_LANES = 64, 64
# Patterns that this process has compiled and called, each with whether in float64.
READY: set[tuple[Pattern, bool]] = set()
_STORED = {"int": torch.int64, "bool": torch.uint8}


@dataclass(frozen=True, eq=False)
class Prepared:
    """``own``: tables that the call does not have as they are read, by name; ``more``: the fields of the pattern (0 where the call's own
    tables go); ``lists``: pointers and steps; ``cut``: queries and heads of a strip, 0 where the compiled code chooses. ``held``: what
    these point at."""

    source: CppSource
    native: Native
    own: Mapping[str, Tensor]
    more: tuple[int, ...]
    lists: tuple[int, ...]
    cut: tuple[int, int]
    held: tuple[Tensor, ...]

    def without_mask(self) -> Prepared:
        """The same where every query sees every key of a block."""
        return replace(self, native=Native({**self.native.functions, "ends": 0, "mask": 0}))

    def fields(self, call: Call) -> tuple[list[int], list[Tensor]]:
        """The fields of the pattern for a call, and the tables that they point at."""
        more, held = list(self.more), []
        for slot in self.source.slots:
            if slot.kind == "table":
                table = self.own.get(slot.name)
                if table is None:
                    table = as_stored(call.tables[slot.name].detach(), self.source.pattern.tables[slot.name].dtype)
                held.append(table)
                more[slot.place : slot.place + slot.size] = table.data_ptr(), *table.shape
        return more, held


class Preparer:
    """Makes and remembers what calls of one pattern share. ``lists``: None where blocks are selected at the call; the mask may then ask
    about ``choices`` of them."""

    def __init__(self, pattern: Pattern, lists: ListMaker | None, choices: int = 0) -> None:
        self.pattern, self._lists, self._choices = pattern, lists, choices
        self._learned = frozenset(name for name, spec in pattern.tables.items() if spec.learned)
        self._simple: dict[bool, Prepared] = {}
        self._kept: Cache[Prepared] = Cache()

    def source(self, *, double: bool = False, doubles: frozenset[str] = frozenset()) -> CppSource:
        """The generated code."""
        return cpp_source(self.pattern, CppVariant(double, doubles, whole=self._lists is None, choices=self._choices))

    def of(self, call: Call) -> Prepared:
        """That of a call; tables that are learned may change their values."""
        double = call.q.dtype == torch.float64
        found = self._simple.get(double)
        if found is not None:
            return found
        domain, kinds = call.domain, self.pattern.tables
        doubles = frozenset(
            name for name, t in domain.tables.items() if kinds[name].dtype == "float" and t.dtype == torch.float64
        )
        source = self.source(double=double, doubles=doubles)
        fixed = [table for name, table in sorted(domain.tables.items()) if name not in self._learned]
        key: tuple[Any, ...] = (double, *((t.shape, t.dtype) for t in domain.tables.values()))
        if source.reads_lengths:
            key = (*key, domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, _alike(call), call.run)
        with torch.no_grad():
            made = self._kept.get(key, fixed, lambda: self._make(call, source, double))
        if not source.slots and not source.reads_lengths:
            self._simple[double] = made
        return made

    def _make(self, call: Call, source: CppSource, double: bool) -> Prepared:
        domain, kinds = call.domain, self.pattern.tables
        compiled = native(source, double=double, fixed="selected" if self._lists is None else "forward")
        READY.add((self.pattern, double))
        own: dict[str, Tensor] = {}
        for name, table in domain.tables.items():
            if name not in self._learned:
                stored = as_stored(table, kinds[name].dtype)
                if stored is not table:
                    own[name] = stored
        for one in source.prepared:
            table = fill(replace(one, double=one.double or double), domain)
            own[one.name] = as_stored(table, one.dtype)
        more, held = [0] * source.more, list(own.values())
        for slot in source.slots:
            if slot.kind == "interval":
                assert source.intervals is not None
                first, last = (end.long().contiguous() for end in interval_rows(source.intervals[slot.number], domain))
                held += [first, last]
                batch, heads, _ = first.shape
                steps = (heads if batch > 1 else 0, 1 if heads > 1 else 0)
                more[slot.place : slot.place + slot.size] = first.data_ptr(), last.data_ptr(), *steps
        place = 0
        for slot in source.slots:
            if slot.kind == "sums":
                more[slot.place] = place
                place += domain.tables[slot.name].numel()
        lists: tuple[int, ...] = (0,) * 7
        cut = self._cut(call)
        if source.intervals is None and self._lists is not None:
            lists, arrays = list_fields(self._lists(domain, (cut[0], BLOCK_KEYS)))
            held += arrays
        return Prepared(source, compiled, own, tuple(more), lists, cut, tuple(held))

    def _cut(self, call: Call) -> tuple[int, int]:
        """Queries and heads of a strip; 0 leaves them to the compiled code. Lists of one head serve no other if the mask reads the head."""
        if self._lists is not None and self.source().intervals is not None and call.run:
            return _cut_of_runs(call)
        if self._lists is None or self.source().intervals is not None:
            return 0, 0
        if HEAD in self.source().pattern.mask.expr.free_symbols:  # as the generated code takes it to be
            heads = 1
        else:
            heads = max(n for n in range(1, 5) if _alike(call) % n == 0)
        queries = MOST_LANES // heads
        return 1 << (queries.bit_length() - 1), heads


def _cut_of_runs(call: Call) -> tuple[int, int]:
    """Strips of one run of queries, which no other run joins: what one sees the others do not."""
    alike = _alike(call)
    heads = max(n for n in range(1, min(alike, MOST_LANES) + 1) if alike % n == 0)
    return min(call.run, MOST_LANES // heads), heads


def _alike(call: Call) -> int:
    """Query heads that share a key/value head and its places."""
    return call.group if call.places is None else call.q.shape[1] // max(call.k.shape[1], call.places.heads)


def as_stored(table: Tensor, kind: str) -> Tensor:
    """A table as generated code reads it: int64, bytes, float32 or float64; itself where it is so already."""
    if kind != "float":
        return table.to(_STORED[kind]).contiguous()
    return (table if table.dtype == torch.float64 else table.float()).contiguous()


def list_fields(lists: BlockLists) -> tuple[tuple[int, ...], list[Tensor]]:
    """Pointers to full and partial blocks and the steps between their lines, and the arrays pointed at."""
    arrays = [array for part in (lists.full, lists.partial) for array in (_starts(part), _columns(part))]
    batch, heads, rows, _ = lists.shape
    steps = (heads if batch > 1 else 0, 1 if heads > 1 else 0, rows)
    return (*(array.data_ptr() for array in arrays), *steps), arrays


def _starts(rows: TileRows) -> Tensor:
    if rows.total > torch.iinfo(torch.int32).max:
        raise UnsupportedError(f"{rows.total:,} blocks are more than a list of backend 'cpp' holds (2**31). Use backend='tiled'")
    return torch.nn.functional.pad(rows.counts.reshape(-1).cumsum(0), (1, 0)).to(torch.int32).contiguous()


def _columns(rows: TileRows) -> Tensor:
    return rows.columns.to(torch.int32).contiguous()
