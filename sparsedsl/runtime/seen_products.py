"""A matrix product in which 0 times anything is 0, NaN and infinity too: what a weight of 0 keeps out has no effect. The dense
meaning of patterns and programs and the scan of linear attention multiply with it; differentiable any number of times."""

from __future__ import annotations

import math
from typing import Any

import torch

from sparsedsl.torch_private import is_batched

__all__ = ["seen_product"]

Tensor = torch.Tensor


def seen_product(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of ``(.., M, N)`` and ``(.., N, K)``, where 0 times NaN or infinity is 0, also in the products of its gradients.

    On a GPU it is the plain product: to look for NaN would be to wait.

    >>> seen_product(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[torch.nan], [2.0]]))
    tensor([[2.],
            [nan]])
    """
    x, y = (t.expand(*torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]), *t.shape[-2:]) for t in (x, y))
    return _SeenProduct.apply(x, y)


def _product(x: Tensor, y: Tensor) -> Tensor:
    plain = x @ y
    # NaN and infinity spread, so that one sum shows both.
    if is_batched(plain) or (plain.device.type == "cpu" and not math.isfinite(float(plain.sum()))):
        return _careful(x, y)
    return plain


def _careful(x: Tensor, y: Tensor) -> Tensor:
    """Bad numbers are put to 0; where one meets something that is not 0, the result is what the plain product says."""
    good_x, good_y = x.isfinite(), y.isfinite()
    clean = torch.where(good_x, x, 0.0) @ torch.where(good_y, y, 0.0)
    met = (~good_x).to(x.dtype) @ (y != 0).to(x.dtype) + (x != 0).to(x.dtype) @ (~good_y).to(x.dtype)
    return torch.where(met > 0, x @ y, clean)


class _SeenProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return _product(x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return _SeenProduct.apply(grad, y.mT), _SeenProduct.apply(x.mT, grad)

    @staticmethod
    def jvp(ctx: Any, x_slope: Tensor, y_slope: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return _SeenProduct.apply(x_slope, y) + _SeenProduct.apply(x, y_slope)
