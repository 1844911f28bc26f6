"""Rows of tensors by number: copied out, put back, and who sees whom where a call says where its rows lie (:class:`Places`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sparsedsl.runtime.heads import NEVER, repeat_kv, together
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.unseen import Sight

__all__ = ["gather_rows", "placed_sight", "scatter_rows"]

Tensor = torch.Tensor


def gather_rows(x: Tensor, places: Tensor) -> Tensor:
    """The rows ``places (B|1, H', N)`` of ``x (B, H, S, D)``: ``(B, max(H, H'), N, D)``.

    >>> gather_rows(torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[1, 0], [0, 0]]])).flatten()
    tensor([2., 1., 1., 1.])
    """
    if places.shape[:2] == (1, 1):  # whole rows of all heads, side by side as they often lie
        return x.transpose(1, 2).index_select(1, places.view(-1)).transpose(1, 2)
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
