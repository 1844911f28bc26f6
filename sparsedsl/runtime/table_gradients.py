"""Gradients of learned tables out of what the kernels summed: spread over the entries of the table that were read.

``index_put_(accumulate=True)`` sorts before it adds: nothing depends on the order in which programs finish.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.analysis.bounds import allowed_range, index_ranges, value_ranges
from sparsedsl.analysis.domain import Domain
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead

__all__ = ["add_read_gradients", "allowed_differences", "joined_bands"]

Tensor = torch.Tensor


def add_read_gradients(total: Tensor, read: TableRead, sums: Tensor, domain: Domain, q: Tensor, kv: Tensor) -> None:
    """Add ``sums`` to the entries of ``total`` (the table's gradient, float64) that ``read`` reads.

    ``sums (B, H, ...)``: gradients of the read, at positions ``q`` and ``kv``, which broadcast against its last dimensions.
    """
    shape = sums.shape
    trail = (1,) * (sums.ndim - 2)
    env: dict[str, Any] = {
        "b": torch.arange(shape[0], device=sums.device).view(-1, 1, *trail),
        "h": torch.arange(shape[1], device=sums.device).view(-1, *trail),
        "q_idx": q, "kv_idx": kv, **domain.lengths, **domain.tables,
    }  # fmt: skip
    indices = []
    for index, size in zip(read.args, total.shape, strict=True):
        value = torch.as_tensor(evaluate(index, env), device=sums.device).clamp(0, size - 1)
        indices.append(value.expand(shape).reshape(-1))
    total.index_put_(tuple(indices), sums.reshape(-1).to(total.dtype), accumulate=True)


def allowed_differences(pattern: Pattern, domain: Domain) -> tuple[int, int]:
    """Least and greatest ``q_idx - kv_idx`` of the pairs that the mask allows, or somewhat more."""
    intervals = index_ranges(domain, value_ranges(domain))
    low, high = allowed_range(Q_IDX - KV_IDX, pattern.mask.expr, intervals)
    least, most = domain.q_offset - domain.kv_len + 1, domain.q_offset + domain.rows - 1
    return max(least, int(max(low, least))), min(most, int(min(high, most)))


def joined_bands(bands: Tensor, block: int) -> Tensor:
    """``(B, H, bands, 2 * block)`` sums along the diagonals of tiles -> one sum a diagonal, ``(B, H, (bands + 1) * block)``.

    The upper diagonals of one band are the lower ones of the next.
    """
    batch, heads, count, _ = bands.shape
    joined = bands.new_zeros(batch, heads, count + 1, block)
    joined[:, :, :-1] += bands[..., :block]
    joined[:, :, 1:] += bands[..., block:]
    return joined.view(batch, heads, -1)
