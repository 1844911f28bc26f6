"""Dense matrix products for the ``tiled`` lowering: the quickest that torch has for a shape, type and device.

On CPU in float32 a single large product goes to oneDNN, which uses the widest registers of every processor; torch's own ``mm`` asks
MKL, which on some does not (measured: 450 against 190 GFLOP/s on two cores of an AMD EPYC with AVX-512). Small products go to
``bmm``, many at a time. All take and give ``(batch, rows, columns)``.
"""

from __future__ import annotations

import torch

from sparsedsl.tiling.cutting import CUTTING
from sparsedsl.torch_private import linear
from sparsedsl.tuning.rates import has_linear

__all__ = ["product", "product_nt", "product_tn"]

Tensor = torch.Tensor


def product_nt(x: Tensor, y: Tensor, *, tanh: bool = False) -> Tensor:
    """``x @ y^T`` of ``(X, M, D)`` and ``(X, N, D)``, rows contiguous; with ``tanh`` of every element (oneDNN's own is seven times
    quicker than torch's, and as accurate)."""
    if x.shape[0] == 1 and _linear_is_best(x, x.shape[1] * y.shape[1]):
        return linear(x[0], y[0], "tanh" if tanh else "none")[None]
    result = torch.bmm(x, y.mT) if x.shape[0] > 1 else torch.mm(x[0], y[0].T)[None]
    return result.tanh_() if tanh else result


def product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of ``(X, M, N)`` and ``(X, N, D)``, rows contiguous."""
    if _single(x, x.shape[1] * x.shape[2]):
        return linear(x[0], y[0].T)[None]
    return torch.bmm(x, y) if x.shape[0] > 1 else torch.mm(x[0], y[0])[None]


def product_tn(x: Tensor, y: Tensor) -> Tensor:
    """``x^T @ y`` of ``(X, N, M)`` and ``(X, N, D)``; the result need not be contiguous."""
    if _single(x, x.shape[1] * x.shape[2]):
        # oneDNN is slow where the left operand is a transposed view, not where the right one is.
        return linear(y[0].T.contiguous(), x[0].T).T[None]
    return torch.bmm(x.mT, y) if x.shape[0] > 1 else torch.mm(x[0].T, y[0])[None]


def _single(x: Tensor, results: int) -> bool:
    return x.shape[0] == 1 and _linear_is_best(x, results)


def _linear_is_best(x: Tensor, results: int) -> bool:
    return results >= CUTTING.now.single and x.dtype == torch.float32 and x.device.type == "cpu" and has_linear()
