"""What a report counts: tiles by class, pairs of listed tiles, allowed pairs, empty rows. From lists, or from what repeats in a mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.repeats import Square, Strip, strips
from sparsedsl.analysis.rows import RowCounts, count_rows, looked_at, row_counts
from sparsedsl.analysis.tiles import classify
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.strict import StrictFunction
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.lang.tables import table_reads
from sparsedsl.plain_values import Reported

__all__ = ["Totals", "counted_rows", "listed_totals", "numbers_alone", "repeated_totals"]

# Points that are evaluated in about the time in which what repeats in a mask is found.
_FEW_POINTS = 1 << 22


@dataclass(frozen=True)
class Totals(Reported):
    """Counts over all groups of a mask. ``shape``: as :attr:`BlockLists.shape`; ``most``: tiles listed in the row that lists the most;
    ``pairs``: pairs of listed tiles inside the lengths; ``loaded``: keys of all listed tiles. ``example``: a group, and rows and keys
    among which some pair is allowed, None if there is none or nobody looked.
    """

    _adds = ("listed", "nbytes", "imbalance")
    _leaves_out = ("example",)

    shape: tuple[int, int, int, int]
    full: int
    partial: int
    most: int
    pairs: int
    loaded: int
    rows: RowCounts
    example: tuple[int, Square] | None = None

    @property
    def listed(self) -> int:
        """Number of tiles listed."""
        return self.full + self.partial

    @property
    def nbytes(self) -> int:
        """Bytes that the lists hold, or would."""
        batch, heads, rows, _ = self.shape
        return 4 * (self.listed + 2 * batch * heads * rows)

    def pairs_of(self, batch: int, heads: int) -> int:
        """Pairs of listed tiles over batch x heads: each of those that share a list has its pairs."""
        return self.pairs * (batch * heads // (self.shape[0] * self.shape[1]))

    @property
    def imbalance(self) -> float:
        """Most / mean tiles of a row."""
        batch, heads, rows, _ = self.shape
        return self.most * batch * heads * rows / self.listed if self.listed else 1.0


def counted_rows(mask: Boolean, domain: Domain, lists: BlockLists) -> RowCounts:
    """The rows of a mask of which lists were made: from what repeats in it where that spares looking at many points."""
    repeated = repeated_totals(mask, domain, lists.block) if looked_at(mask, domain, lists) > _FEW_POINTS else None
    return count_rows(mask, domain, lists) if repeated is None else repeated.rows


def listed_totals(mask: Boolean, domain: Domain, lists: BlockLists, rows: RowCounts | None = None) -> Totals:
    """The totals of lists that were made; ``rows``: if they are counted already."""
    q_sizes, kv_sizes = (_sizes(n, b, domain) for n, b in ((domain.rows, lists.block[0]), (domain.kv_len, lists.block[1])))
    pairs = loaded = 0
    for part in (lists.full, lists.partial):
        row, column = part.owners() % lists.shape[2], part.columns.to(torch.int64)
        pairs += int((q_sizes[row] * kv_sizes[column]).sum())
        loaded += int(kv_sizes[column].sum())
    most = int((lists.full.counts + lists.partial.counts).max())
    return Totals(
        lists.shape, lists.full.total, lists.partial.total, most, pairs, loaded, rows or count_rows(mask, domain, lists)
    )


def _sizes(length: int, block: int, domain: Domain) -> torch.Tensor:
    sizes = torch.full((-(-length // block),), block, dtype=torch.int64, device=domain.device)
    sizes[-1] = length - (sizes.numel() - 1) * block
    return sizes


def repeated_totals(mask: Boolean, domain: Domain, block: tuple[int, int]) -> Totals | None:
    """The same totals without lists, at a cost that does not grow with the lengths; None where the mask does not repeat.

    >>> import sparsedsl as sd
    >>> found = repeated_totals((sd.kv_idx <= sd.q_idx).expr, Domain(2**40, 2**40), (128, 128))
    >>> found.full == 2**33 * (2**33 - 1) // 2, found.partial == 2**33
    (True, True)
    """
    groups = domain.groups(mask)
    if groups.count > 1 << 12:
        return None
    totals: dict[Boolean, _OneGroup] = {}
    found: list[_OneGroup] = []
    for b, h in groups.pairs():
        plain = numbers_alone(mask, domain, b, h)
        if plain is None:
            return None
        if plain not in totals:
            cut = strips(plain, domain.rows, domain.kv_len, block)
            one = None if cut is None else _OneGroup.of(plain, cut, block)
            if one is None:
                return None
            totals[plain] = one
        found.append(totals[plain])
    shape = (groups.batch, groups.heads, -(-domain.rows // block[0]), -(-domain.kv_len // block[1]))
    sums = [sum(one.sums[what] for one in found) for what in ("full", "partial", "pairs", "loaded", "allowed", "empty")]
    full, partial, pairs, loaded, allowed, empty = sums
    first = next(((i, one.first_empty) for i, one in enumerate(found) if one.first_empty is not None), None)
    example = next(((i, one.example) for i, one in enumerate(found) if one.example is not None), None)
    rows = RowCounts(groups.count * domain.rows, allowed, empty, first, True)
    return Totals(shape, full, partial, max(one.most for one in found), pairs, loaded, rows, example)


def numbers_alone(mask: Boolean, domain: Domain, b: int, h: int) -> Boolean | None:
    """``mask`` for one group with lengths, and entries of tables that no position chooses, as numbers, and ``q_idx`` counted from
    the first query; None if more is read."""
    names: dict[Any, Any] = {"b": b, "h": h} | domain.lengths
    mask = mask.xreplace({s: names[s.name] for s in mask.free_symbols if s.name in names})
    mask = mask.xreplace({Q_IDX: Q_IDX + domain.q_offset})
    while reads := table_reads(mask):
        known = {read: int(evaluate(read, dict(domain.tables))) for read in reads if all(i.is_Integer for i in read.args)}
        if not known or any(read.spec.dtype == "float" for read in known):
            return None
        mask = mask.xreplace(known)
    return None if mask.has(StrictFunction) or mask.free_symbols & {BATCH, HEAD} else mask


@dataclass(frozen=True)
class _Content:
    """What is in one kind of square: sums, tiles listed in each row of tiles, whether each row may attend to any of its keys."""

    sums: Counter[str]
    listed: torch.Tensor
    seen: torch.Tensor


def _content(mask: Boolean, square: Square, block: tuple[int, int]) -> _Content | None:
    domain = Domain(square.rows, square.keys)
    moved = mask.xreplace({Q_IDX: Q_IDX + square.row, KV_IDX: KV_IDX + square.column})
    lists = classify(moved, domain, block)
    counts = row_counts(moved, domain, lists)
    if counts is None:
        return None
    of = listed_totals(moved, domain, lists)
    sums = Counter(full=of.full, partial=of.partial, pairs=of.pairs, loaded=of.loaded, allowed=int(counts.sum()))
    return _Content(sums, (lists.full.counts + lists.partial.counts)[0, 0].to(torch.int64), counts > 0)


@dataclass(frozen=True)
class _OneGroup:
    sums: Counter[str]
    most: int
    first_empty: int | None
    example: Square | None

    @staticmethod
    def of(mask: Boolean, cut: tuple[Strip, ...], block: tuple[int, int]) -> _OneGroup | None:
        """Sums of arithmetic series over all strips; squares of one kind are looked at once."""
        kinds: dict[tuple[object, ...], _Content | None] = {}
        sums: Counter[str] = Counter()
        most, first_empty, example = 0, [], None
        for strip in cut:
            contents = []
            for run in strip.runs:
                if run.kind not in kinds:
                    kinds[run.kind] = _content(mask, run.square, block)
                content = kinds[run.kind]
                if content is None:
                    return None
                contents.append((run, content))
                number = strip.count * (run.first + run.last) // 2
                for what, value in content.sums.items():
                    sums[what] += number * value
                example = example or (run.square if content.sums["allowed"] else None)
            for end in ("first", "last"):
                most = max(most, int(sum(getattr(run, end) * content.listed for run, content in contents).max()))
            none = (~torch.stack([content.seen for _, content in contents]).any(dim=0)).nonzero()[:, 0]
            sums["empty"] += strip.count * none.numel()
            if none.numel():
                first_empty.append(strip.runs[0].square.row + int(none[0]))
        return _OneGroup(sums, most, min(first_empty, default=None), example)
