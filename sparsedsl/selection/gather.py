"""Rows of a table at given numbers, and back: gradients that are added up in a fixed order, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.runtime.dtypes import accumulated

__all__ = ["repeat_kv", "take"]

Tensor = torch.Tensor


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """``x (B, H, ...)`` for ``heads`` heads: head ``h`` is ``x``'s ``h * H // heads``. No copy of a single head.

    >>> repeat_kv(torch.tensor([[1, 2]]), 4)
    tensor([[1, 1, 2, 2]])
    """
    if x.shape[1] in (1, heads):
        return x.expand(-1, heads, *x.shape[2:])
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def take(table: Tensor, indices: Tensor) -> Tensor:
    """The rows ``indices (B|1, Hi, R, W)`` of ``table (B, Ht, U, D)``: ``(B, H, R, W, D)`` with H the greater of Hi and Ht.

    Comes in float32 (float64 for a float64 table). The gradient of a row is the sum over its uses in a fixed order; of a row that
    is not used exactly 0.

    >>> take(torch.eye(3)[None, None], torch.tensor([[[[2, 0]]]]))
    tensor([[[[[0., 0., 1.],
               [1., 0., 0.]]]]])
    """
    return _Taken.apply(table, indices)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, indices: Tensor) -> Tensor:
        places = _places(table, indices)
        ctx.save_for_backward(*places)
        ctx.table_shape = table.shape
        return table[places].to(accumulated(table.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        batch, head, block = ctx.saved_tensors
        _, heads, blocks, width = ctx.table_shape
        keys = ((batch * heads + head) * blocks + block).reshape(-1)
        sums = _sums_by_key(grads[0].reshape(-1, width), keys, ctx.table_shape[:3].numel())
        return sums.view(ctx.table_shape), None


def _places(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch entry, head and row of ``table`` that are read."""
    heads = max(table.shape[1], indices.shape[1])
    block = repeat_kv(indices.long(), heads)
    batch = torch.arange(table.shape[0], device=table.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=table.device).view(-1, 1, 1) * table.shape[1] // heads
    return batch, head, block


def _sums_by_key(rows: Tensor, keys: Tensor, count: int) -> Tensor:
    """Row ``n`` of ``(count, D)`` is the sum of ``rows`` whose key is ``n``, in their order."""
    keys, order = torch.sort(keys, stable=True)
    offsets = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device))
    return torch.segment_reduce(rows[order], "sum", offsets=offsets, axis=0, unsafe=True, initial=0)
