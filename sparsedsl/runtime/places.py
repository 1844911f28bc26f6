"""Rows by number: a call may say where its keys and queries lie instead of having them copied in another order."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sparsedsl.errors import ShapeError

__all__ = ["Places"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """Where the rows of a call lie, as whole numbers ``(B|1, H', length)`` for each position; None: in their order.

    keys: of k and v; their heads join those of the numbers, the larger count is that of the call.
    queries: of q, no number twice in a head. Results are as long as q: they go to the rows of the queries, the others are 0 (LSE -inf).
    """

    keys: Tensor | None = None
    queries: Tensor | None = None

    def lengths(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """How many queries and keys a call has.

        Raises:
            ShapeError: heads or batch entries do not fit those of the tensors.
        """
        return _length("q", q, self.queries, q.shape[1]), _length("k", k, self.keys, q.shape[1])

    def kv_heads(self, k: Tensor) -> int:
        """Heads of keys that differ."""
        return k.shape[1] if self.keys is None else max(k.shape[1], self.keys.shape[1])

    @property
    def heads(self) -> int:
        """Heads that differ in it."""
        return max(1 if places is None else places.shape[1] for places in (self.keys, self.queries))

    @property
    def batch(self) -> int:
        """Batch entries that differ in it."""
        return max(1 if places is None else places.shape[0] for places in (self.keys, self.queries))

    @functools.cached_property
    def narrow(self) -> tuple[Tensor | None, Tensor | None]:
        """Of keys and queries, as int32 without gaps."""
        return _narrow(self.keys), _narrow(self.queries)


def _narrow(places: Tensor | None) -> Tensor | None:
    return None if places is None else places.to(torch.int32).contiguous()


def _length(name: str, x: Tensor, places: Tensor | None, heads: int) -> int:
    if places is None:
        return x.shape[2]
    most, least = max(x.shape[1], places.shape[1]), min(x.shape[1], places.shape[1])
    if places.shape[0] not in (1, x.shape[0]) or heads % most or most % least:
        raise ShapeError(
            f"places {tuple(places.shape)} do not fit {name} {tuple(x.shape)} for {heads} query heads: wanted (batch or 1, heads, length), "
            "where one number of heads is a multiple of the other, and divides that of the queries"
        )
    return places.shape[2]
