"""What the tests of programs share: inputs of one problem, and closeness in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

BACKENDS = ("reference", "tiled")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs all programs on a CPU."""
    return str(request.param)


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(scope="session")
def draw() -> Callable[..., torch.Tensor]:
    """``draw(*shape, seed=0)``: normal numbers in float64."""
    return _draw


def _assert_close(got: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    if isinstance(got, tuple):
        for one, other in zip(got, wanted, strict=True):
            _assert_close(one, other, tolerance)
        return
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Two tensors, or two tuples of them."""
    return _assert_close


@pytest.fixture(scope="session")
def grads() -> Callable[..., dict[str, torch.Tensor]]:
    """``grads(attn, tensors, lse=True)``: gradients of a function of out (and LSE) to every tensor of the call."""

    def found(attn: Any, tensors: dict[str, torch.Tensor], lse: bool = False) -> dict[str, torch.Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
        made = attn(**{**tensors, **leaves}, return_lse=lse)
        parts = made if lse else (made,)
        total = sum((torch.where(torch.isfinite(x), x, 0.0) * _draw(*x.shape, seed=9)).sum() for x in parts)
        slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
        return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), slopes, strict=True)}

    return found
