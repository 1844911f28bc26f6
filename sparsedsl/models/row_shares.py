"""What is kept of the rows of a batch, together of those that have had equally many real tokens: states, rows of keys, summaries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = ["RowShares", "tensors_of"]

Tensor = torch.Tensor


class _Share(Protocol):
    """``each(change)``: the same with every tensor, whose first axis counts rows, replaced."""

    @property
    def tokens(self) -> int: ...

    def each(self, change: Callable[[Tensor], Tensor], /) -> Any: ...


T = TypeVar("T", bound=_Share)


def tensors_of(share: _Share) -> list[Tensor]:
    """All tensors of a share."""
    found: list[Tensor] = []
    share.each(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
    return found


class RowShares(Generic[T]):
    """``shares``: each of some rows. ``where``: of each row of the batch, the number of its share and its place in it; None before its
    first real token, and no list at all before anybody's.

    >>> import torch, sparsedsl as sd
    >>> from sparsedsl.execute.state import ProgramState
    >>> kept = RowShares()
    >>> kept.put([0, 2], ProgramState("p", 5, {"k": torch.tensor([[1], [2]])}, {}), batch=3)
    >>> kept.select([2, 2])
    >>> kept.take([0, 1]).recent["k"].tolist(), kept.tokens([0])
    ([[2], [2]], {5})
    """

    def __init__(self) -> None:
        self.shares: list[T] = []
        self.where: list[tuple[int, int] | None] = []
        self._sizes: list[int] = []  # rows in each share, those included that have gone on to another

    def tokens(self, rows: Sequence[int]) -> set[int]:
        """How many tokens these rows have had."""
        places = [self.where[row] for row in rows] if self.where else [None]
        return {0 if place is None else self.shares[place[0]].tokens for place in places}

    def take(self, rows: Sequence[int]) -> T | None:
        """What is kept of rows that have had equally many tokens, in this order; None: nothing yet."""
        found = [place for row in rows if self.where and (place := self.where[row]) is not None]
        if not found:
            return None
        first = found[0][0]
        if found == [(first, place) for place in range(self._sizes[first])]:
            return self.shares[first]
        parts = [self.shares[number].each(functools.partial(_picked, torch.tensor([place]))) for number, place in found]
        columns = iter([torch.cat(column) for column in zip(*map(tensors_of, parts), strict=True)])
        joined: T = parts[0].each(lambda x: next(columns))
        return joined

    def put(self, rows: Sequence[int], share: T, batch: int) -> None:
        """Keep this of these rows, in place of what was kept."""
        self.where = self.where or [None] * batch
        self.shares.append(share)
        self._sizes.append(len(rows))
        for place, row in enumerate(rows):
            self.where[row] = (len(self.shares) - 1, place)
        used = sorted({place[0] for place in self.where if place is not None})
        self.shares, self._sizes = [self.shares[number] for number in used], [self._sizes[number] for number in used]
        self.where = [None if place is None else (used.index(place[0]), place[1]) for place in self.where]

    def select(self, rows: Sequence[int]) -> None:
        """The batch becomes these of its rows; one may stand there more than once, or not at all."""
        if not self.where:
            return
        where = [self.where[row] for row in rows]
        shares, sizes, places = list[T](), list[int](), list[tuple[int, int] | None]([None] * len(rows))
        for number in sorted({place[0] for place in where if place is not None}):
            mine = [(row, place[1]) for row, place in enumerate(where) if place is not None and place[0] == number]
            index = torch.tensor([old for _, old in mine])
            for new, (row, _) in enumerate(mine):
                places[row] = (len(shares), new)
            shares.append(self.shares[number].each(functools.partial(_picked, index)))
            sizes.append(len(mine))
        self.shares, self._sizes, self.where = shares, sizes, places

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(x.numel() * x.element_size() for share in self.shares for x in tensors_of(share))


def _picked(index: Tensor, x: Tensor) -> Tensor:
    return x.index_select(0, index.to(x.device))
