"""Rows of tensors by number: a call may say where its keys and queries lie instead of having them copied in another order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.runtime.heads import NEVER, repeat_kv, together
from sparsedsl.runtime.unseen import Sight

__all__ = ["Places", "gather_rows", "placed_sight", "scatter_rows"]

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


def gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """The rows ``places (B|1, H', N)`` of ``x (B, H, S, D)``: ``(B, max(H, H'), N, D)``.

    >>> gather_rows(torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[1, 0], [0, 0]]])).flatten()
    tensor([2., 1., 1., 1.])
    """
    x, places = together(x, places)
    return x.gather(2, places[..., None].expand(x.shape[0], -1, -1, x.shape[3]))


def scatter_rows(x: Tensor, places: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """``x (B, H, N, ..)`` as rows ``places (B|1, H', N)`` of ``length``; the others hold ``fill``.

    >>> scatter_rows(torch.tensor([[[3.0]]]), torch.tensor([[[1]]]), 2)
    tensor([[[0., 3.]]])
    """
    places = repeat_kv(places, x.shape[1]).expand(x.shape[:3])
    places = places if x.ndim == 3 else places[..., None].expand(x.shape)
    return x.new_full((*x.shape[:2], length, *x.shape[3:]), fill).scatter(2, places, x)


def placed_sight(places: Places, q: Tensor, k: Tensor, sight: Callable[[], Sight]) -> Sight:
    """Who sees whom, by numbers of rows of q and k; ``sight``: by positions in the call."""
    inner, keys, queries = sight(), places.keys, places.queries

    def forward(v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = inner.forward(v if keys is None else gather_rows(v, keys))
        if queries is None:
            return out, lse
        return scatter_rows(out, queries, q.shape[2]), scatter_rows(lse, queries, q.shape[2], NEVER)

    def backward(out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor:
        if queries is not None:
            out, grad_out = gather_rows(out, queries), gather_rows(grad_out, queries)
            lse = gather_rows(lse[..., None], queries)[..., 0]
        grad = inner.backward(out, lse, grad_out)
        if keys is None:
            return grad
        where = repeat_kv(keys, grad.shape[1]).expand(grad.shape[:3])[..., None]
        sums = grad.new_zeros((*grad.shape[:2], k.shape[2], 1)).scatter_add_(2, where, grad)
        return sums.unflatten(1, (k.shape[1], -1)).sum(2)

    return replace(inner, shape=k.shape[:3], forward=forward, backward=backward)
