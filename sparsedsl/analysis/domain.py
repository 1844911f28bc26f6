"""The index ranges of one call and the tables bound in it: what turns a pattern into a finite question."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from sparsedsl.errors import ShapeError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.symbols import BATCH, HEAD

__all__ = ["Domain", "check_size"]

# The last position at most: integers are computed with up to here, and sums of a few of them are int64.
MOST = 2**60


def check_size(name: str, value: Any, least: int) -> int:
    """A length, size or offset: a whole number from ``least`` to 2**60."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        hint = ". Lengths and sizes are numbers: q.shape[2], k.shape[2]" if hasattr(value, "shape") else ""
        raise ShapeError(f"{name} must be a whole number of at least {least}; got {shown(value)}{hint}")
    if value > MOST:
        raise ShapeError(f"{name} must be at most 2**60, since positions are 64-bit integers that are added up; got {value}")
    return value


@dataclass(frozen=True, eq=False)
class Domain:
    """``rows`` queries at positions ``q_offset ..``, ``kv_len`` keys at ``0 ..``, and the tables of the call.

    ``tables``: name -> tensor. All lists and bounds are made on the device of the tables (CPU when there are none).
    """

    rows: int
    kv_len: int
    q_offset: int = 0
    batch: int = 1
    heads: int = 1
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.rows) is type(self.kv_len) is type(self.q_offset) is type(self.batch) is type(self.heads) is int and (
            0 < self.rows <= MOST - self.q_offset <= MOST
            and 0 < self.kv_len <= MOST
            and 0 < self.batch <= MOST
            and 0 < self.heads <= MOST
        ):
            return  # what nearly every call is, at the price of no call
        for name, value, least in (
            ("q_len", self.rows, 1), ("kv_len", self.kv_len, 1), ("q_offset", self.q_offset, 0),
            ("batch", self.batch, 1), ("heads", self.heads, 1),
        ):  # fmt: skip
            check_size(name, value, least)
        last = self.lengths["q_len"]
        if last > MOST:
            raise ShapeError(f"q_offset {self.q_offset} and {self.rows} queries end at {last}; positions go up to 2**60")

    @property
    def device(self) -> torch.device:
        """Where the tables live."""
        return next((t.device for t in self.tables.values()), torch.device("cpu"))

    @property
    def lengths(self) -> dict[str, int]:
        """Values of the length symbols."""
        return {"q_len": self.q_offset + self.rows, "kv_len": self.kv_len}

    def groups(self, expr: sympy.Basic) -> Groups:
        """The (batch, head) pairs that ``expr`` can tell apart: a dimension it does not read has size 1."""
        by_batch, by_head = told_apart(expr)
        return Groups(self.batch if by_batch else 1, self.heads if by_head else 1, self.device)


@functools.lru_cache(maxsize=4096)
def told_apart(expr: sympy.Basic) -> tuple[bool, bool]:
    """Whether an expression depends on the batch entry, and on the head."""
    free = expr.free_symbols
    return BATCH in free, HEAD in free


@dataclass(frozen=True)
class Groups:
    """``batch x heads`` groups, numbered row-major; size 1 where the pattern does not depend on the dimension."""

    batch: int
    heads: int
    device: torch.device

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.batch * self.heads

    def env(self, group: torch.Tensor | None = None) -> dict[str, Any]:
        """Values of ``b`` and ``h`` for the given group numbers; without numbers, for all groups as a column ``(count, 1)``."""
        if self.count == 1:
            return {"b": 0, "h": 0}
        if group is None:
            group = torch.arange(self.count, device=self.device)[:, None]
        return {"b": group // self.heads, "h": group % self.heads}

    def pairs(self) -> list[tuple[int, int]]:
        """All (b, h) pairs in order."""
        return list(itertools.product(range(self.batch), range(self.heads)))
