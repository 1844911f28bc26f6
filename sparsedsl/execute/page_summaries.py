"""Summaries of keys that lie in pages, kept beside their pool: a step of decoding reads one row for each block that is over, not its keys.

A row belongs to a block, or a window, of tokens of a request, and is kept where the block ends: with the page of its last token. Beside it
stands what it was made of: the pages that the block lies in, each as it was when it was last written. A row is read only for a block that
lies in the same pages, not written since, at the same place in them; else it is made anew. So no page size is a wrong one, requests that
share pages share rows, and a page that is given to another request brings nothing with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.execute.kept_summaries import Pooling, finished_blocks, stride_of
from sparsedsl.lang.advice import shown
from sparsedsl.program.graph import Program
from sparsedsl.runtime.packed_rows import WHOLE

__all__ = ["PageSummaries", "RequestPages"]

Tensor = torch.Tensor
# Has rows of keys, from one to another, hold what lies in the pages.
Read = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class RequestPages:
    """Where a request's keys lie: ``numbers``, the pages of the pool in order, int64, -1 for one that is not there; on the CPU. ``fresh``:
    tokens from this one on have come with the call, and may have been written since the last one."""

    numbers: Tensor
    fresh: int


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of one node. ``buffer (pages, most, .., H, D)``: of the blocks that end in a page. ``made_of (pages, most, 1 + span)``: how far
    from the beginning of its first page a block begins, plus one, and the writings of the pages it lies in, -1 behind the last; 0: no row.
    """

    buffer: Tensor
    made_of: Tensor


class PageSummaries:
    """What paged calls of one program have made of blocks of keys that are over; made by :meth:`sparsedsl.Attention.page_summaries`.

    Pass it to every paged call over its pools as ``summaries=``. Between a write to a page and the next call :meth:`mark_written` has to be
    told of it: what was made of the page is then forgotten. A call after a write by torch that was not told of is an error; what kernels
    write, or anybody to pools made in ``torch.inference_mode()``, torch does not count. Blocks that reach into the new tokens of a call are
    made anew in any case.

    ``pages_read``: pages of keys, and pages of values, that the last call read. ``nbytes``: memory of the rows, taken at the first call.

    >>> import torch, sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.moba(chunk=16, top_k=2))
    >>> k_pool, v_pool = torch.randn(2, 64, 16, 2, 32).unbind(0)  # 64 pages of 16 keys
    >>> kept = attn.page_summaries(k_pool, v_pool)
    >>> words = dict(block_table=torch.arange(64)[None], cu_seqlens_q=torch.tensor([0, 1]), summaries=kept)
    >>> for keys in (1000, 1001):  # a token comes: its key and value go to row 7, then 8, of page 62
    ...     k_pool[62, keys - 993] = v_pool[62, keys - 993] = torch.randn(2, 32)
    ...     kept.mark_written(slots=torch.tensor([keys - 1]))
    ...     out = attn.paged(torch.randn(1, 4, 32), k_pool, v_pool, kv_lens=torch.tensor([keys]), **words)
    >>> all(pages <= 5 for pages in kept.pages_read)  # one for each of four heads, and its own
    True
    """

    def __init__(self, program: Program, k_pool: Tensor, v_pool: Tensor, page: int) -> None:
        self.program, self.page, self.pages = program.key, page, k_pool.shape[0]
        self.pages_read = (0, 0)
        self._pools = (k_pool, v_pool)
        self._rows: dict[tuple[str, torch.dtype], _Rows] = {}
        # When each page was written last, as far as is known: never the same for two pages.
        self._written = torch.arange(1, self.pages + 1)
        self._writings = self.pages
        self._scales: tuple[Tensor | None, ...] | None = None
        self._versions = self._now()

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(rows.buffer.nbytes + rows.made_of.nbytes for rows in self._rows.values())

    def mark_written(self, slots: Tensor | None = None, *, pages: Tensor | None = None) -> None:
        """These rows of the pools were written since the last call, or these pages: what was made of them is forgotten.

        Args:
            slots: whole numbers of any shape, ``page * page size + row`` for each row that was written; negative ones are padding.
            pages: numbers of pages that were written, or may hold other keys from now on: copied, swapped in, given new scales.

        Raises:
            ShapeError: neither is given, or numbers that the pools do not have.
        """
        if slots is None and pages is None:
            raise ShapeError("mark_written() wants slots=, rows of the pool that were written, or pages=")
        for name, value, size in (("slots", slots, self.page), ("pages", pages, 1)):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype not in WHOLE:
                raise ShapeError(f"mark_written(): {name} must be a tensor of int32 or int64; got {shown(value)}")
            told = value.detach().flatten().cpu().long()
            told = told[told >= 0].div(size, rounding_mode="floor").unique()
            if told.numel() and int(told[-1]) >= self.pages:
                raise ShapeError(
                    f"mark_written(): {name} go up to {self.pages * size - 1} in pools of {self.pages} pages; got {int(value.max())}"
                )
            self._written[told] = torch.arange(1, told.numel() + 1) + self._writings
            self._writings += told.numel()
        self._versions = self._now()

    def reset(self) -> None:
        """Forget everything, as if all pages were written."""
        for rows in self._rows.values():
            rows.made_of.zero_()
        self._versions = self._now()

    # ---- what a call asks --------------------------------------------------------------------------------------------------------

    def begin(self, program: Program, k_pool: Tensor, v_pool: Tensor, scales: tuple[Tensor | None, Tensor | None]) -> None:
        """A call of a program over these pools begins.

        Raises:
            ShapeError: it is of others, or they were written and nobody said where.
        """
        if self.program != program.key:
            raise ShapeError(f"summaries must be what page_summaries() of this program made; got {shown(self)}")
        for name, own, given in zip(("k_pool", "v_pool"), self._pools, (k_pool, v_pool), strict=True):
            facts = [(x.data_ptr(), tuple(x.shape), x.stride(), x.dtype) for x in (own, given)]
            if facts[0] != facts[1]:
                raise ShapeError(
                    f"summaries= were made for another {name}, {tuple(own.shape)} {own.dtype}; got {tuple(given.shape)} {given.dtype}. "
                    "Pools keep their memory: make summaries for each pair by attn.page_summaries(k_pool, v_pool)"
                )
        if self._rows and self._now() != self._versions:
            raise ShapeError(
                "k_pool or v_pool was written since mark_written() was called last, so that summaries= may be of keys that are gone. Call "
                "summaries.mark_written(slots=...) behind the last write, or mark_written(pages=...), or reset()"
            )
        self._follow(scales)
        self.pages_read = (0, 0)

    def _follow(self, scales: tuple[Tensor | None, Tensor | None]) -> None:
        """Pages whose scales are others than in the call before are as good as written."""
        for before, scale in zip(self._scales or scales, scales, strict=True):
            if before is None or scale is None or before.shape != scale.shape:
                if before is not scale:
                    self.reset()
            elif not torch.equal(before, scale):
                self.mark_written(pages=(before != scale).any(1).nonzero()[:, 0])
        self._scales = tuple(None if scale is None else scale.clone() for scale in scales)

    def _now(self) -> tuple[int | None, ...]:
        """How often torch has written to the pools; None of tensors that do not count it."""
        return tuple(None if pool.is_inference() else pool._version for pool in self._pools)

    def rows(self, node: Any, x: Tensor, where: RequestPages, read: Read, pool: Pooling) -> Tensor:
        """One row for every block of a request's keys ``x (1, H, N, D)``, by ``pool``, the unfinished one included; of windows there is
        none of that kind. ``read``: has rows of x hold what they are to hold.
        """
        tokens, block = x.shape[2], int(node.block)
        done = finished_blocks(node, tokens)
        parts = []
        if done:
            blocks = _Blocks.of(node, done, where, self.page, self._written)
            parts.append(self._finished(blocks, x, (node.key, x.dtype), read, pool))
        if getattr(node, "stride", None) is None and done * block < tokens:
            read(done * block, tokens)
            parts.append(pool(x[:, :, done * block :]))
        if not parts:
            return pool(x)  # no window is complete: nothing is read
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _finished(self, blocks: _Blocks, x: Tensor, key: tuple[str, torch.dtype], read: Read, pool: Pooling) -> Tensor:
        known = self._rows.get(key)
        missing = (~blocks.known(known)).nonzero()[:, 0]
        made = []
        for begin, stop in _runs(missing.tolist()):
            first, last = begin * blocks.stride, (stop - 1) * blocks.stride + blocks.block
            read(first, last)
            made.append(pool(x[:, :, first:last]).movedim(-2, 0))
        if known is None:
            most = -(-self.page // blocks.stride)
            made_of = torch.zeros((self.pages, most, blocks.made_of.shape[1]), dtype=torch.int64)
            known = self._rows[key] = _Rows(made[0].new_zeros((self.pages, most, *made[0].shape[1:])), made_of)
        found = known.buffer[blocks.home.to(x.device), blocks.place.to(x.device)]
        if made:
            found[missing.to(x.device)] = torch.cat(made)
            self._keep(known, blocks, missing, found)
        return found.movedim(0, -2)

    def _keep(self, known: _Rows, blocks: _Blocks, made: Tensor, rows: Tensor) -> None:
        """Of the ``rows`` of all blocks keep those that were ``made``."""
        kept = made[blocks.there[made]]
        home, place = blocks.home[kept], blocks.place[kept]
        # A page may stand twice in a table: of blocks that end in one place none is kept.
        _, number, times = (home * known.made_of.shape[1] + place).unique(return_inverse=True, return_counts=True)
        alone = times[number] == 1
        kept, home, place = kept[alone], home[alone], place[alone]
        known.made_of[home, place] = blocks.made_of[kept]
        device = rows.device
        known.buffer[home.to(device), place.to(device)] = rows[kept.to(device)]


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The blocks of a request that are over, of ``block`` tokens, one every ``stride``; tensors have a row for each. ``home``, ``place``:
    the page that a block ends in, and its number among those that do. ``made_of``: as in :class:`_Rows`, as things are now. ``there``:
    whether its pages are; ``old``: and no token of it is new.
    """

    block: int
    stride: int
    home: Tensor
    place: Tensor
    made_of: Tensor
    there: Tensor
    old: Tensor

    @staticmethod
    def of(node: Any, count: int, where: RequestPages, page: int, written: Tensor) -> _Blocks:
        """``count`` of them. ``written``: when each page of the pool was."""
        block, stride = int(node.block), stride_of(node)
        first = torch.arange(count) * stride
        of_first, of_last = first // page, (first + block - 1) // page
        # The first block to end in a page is the first one that reaches into it.
        place = first // stride - (of_last * page - block + stride).div(stride, rounding_mode="floor").clamp(min=0)
        covered = of_first[:, None] + torch.arange((block + page - 2) // page + 1)
        inside = covered <= of_last[:, None]
        numbers = where.numbers[torch.where(inside, covered, of_last[:, None])]
        there = (numbers >= 0).all(1)
        numbers = numbers.clamp(min=0)
        writings = written[numbers].masked_fill(~inside, -1)
        made_of = torch.cat([(first - of_first * page + 1)[:, None], writings], 1)
        home = where.numbers[of_last].clamp(min=0)
        return _Blocks(block, stride, home, place, made_of, there, there & (first + block <= where.fresh))

    def known(self, rows: _Rows | None) -> Tensor:
        """Whether there is a row for each, made of what there is now."""
        if rows is None:
            return torch.zeros_like(self.old)
        return self.old & (rows.made_of[self.home, self.place] == self.made_of).all(1)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Rising numbers as ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = found[-1][0], number + 1
        else:
            found.append((number, number + 1))
    return found
