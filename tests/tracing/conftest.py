"""The oracle of tracing: the callable itself, run by torch on every index as FlexAttention runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from sparsedsl.lang.exact import evaluate_any
from sparsedsl.lang.text import parse
from sparsedsl.tracing import trace_mask, trace_score

SHAPE = (2, 3, 12, 17)  # batch, heads, queries, keys: no two alike


def _over_indices(function: Callable[..., Any], leading: int) -> Callable[..., Any]:
    """``vmap`` over b, h, q_idx and kv_idx, as in ``torch.nn.attention.flex_attention``; ``leading`` arguments have all four."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=(0,) * leading + dims)
    return function


def run_by_torch(function: Callable[..., Any], shape: tuple[int, ...], *leading: torch.Tensor, q_offset: int = 0) -> torch.Tensor:
    """The callable's values for every index."""

    def tensor_valued(*args: torch.Tensor) -> torch.Tensor:
        result = function(*args)
        # A result that no index enters has no batch dimensions in vmap: FlexAttention itself would expand it.
        return result if isinstance(result, torch.Tensor) else torch.tensor(result)

    batch, heads, queries, keys = (torch.arange(n) for n in shape)
    with TransformGetItemToIndex(), torch.no_grad():
        return _over_indices(tensor_valued, len(leading))(*leading, batch, heads, queries + q_offset, keys)


def run_by_us(
    expression: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, q_offset: int = 0, **more: Any
) -> torch.Tensor:
    """The expression's values for every index."""
    b, h, q_idx, kv_idx = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    tables = {name: table.detach() for name, table in expression.bound.items()}
    env = {"b": b, "h": h, "q_idx": q_idx + q_offset, "kv_idx": kv_idx, **tables, **more}
    return evaluate_any(expression.expr, env, dtype=dtype).expand(shape)


def reads_back(expression: Any) -> None:
    """The text form of a traced expression is the expression."""
    again = parse(expression.text)
    assert again.expr == expression.expr, expression.text


class Compare:
    """Traces a callable and compares every value with torch's."""

    @staticmethod
    def mask(mask_mod: Callable[..., Any], shape: tuple[int, ...] = SHAPE, note: str = "", q_offset: int = 0) -> Any:
        """Bit for bit; returns the mask."""
        mask = trace_mask(mask_mod)
        wanted, got = run_by_torch(mask_mod, shape, q_offset=q_offset), run_by_us(mask, shape, q_offset=q_offset)
        assert got.dtype == torch.bool
        wrong = (wanted != got).nonzero()
        assert not len(wrong), (
            f"{note or mask}: {len(wrong)} of {got.numel()} wrong, first at (b, h, q, kv) = {wrong[0].tolist()}"
        )
        reads_back(mask)
        return mask

    @staticmethod
    def score(score_mod: Callable[..., Any], shape: tuple[int, ...] = SHAPE, note: str = "") -> Any:
        """To the accuracy of float32; returns the score."""
        score = trace_score(score_mod)
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        wanted, got = run_by_torch(score_mod, shape, logits), run_by_us(score, shape, score=logits.double())
        # Sums of large penalties carry float32's error of their largest term.
        largest = float(wanted[wanted.isfinite()].abs().max()) if wanted.isfinite().any() else 0.0
        torch.testing.assert_close(
            got.float(),
            wanted.float(),
            rtol=1e-5,
            atol=1e-5 + 1e-6 * largest,
            equal_nan=True,
            msg=lambda m: f"{note or score}\n{m}",
        )
        reads_back(score)
        return score


@pytest.fixture(scope="session")
def compare() -> type[Compare]:
    """:class:`Compare`."""
    return Compare


@pytest.fixture
def same_mask() -> Callable[..., Any]:
    """``same_mask(mask_mod)`` traces, compares every value, and returns the mask."""
    return Compare.mask


@pytest.fixture
def same_score() -> Callable[..., Any]:
    """``same_score(score_mod)`` likewise for a score."""
    return Compare.score


@pytest.fixture(name="run_by_torch")
def _run_by_torch() -> Callable[..., torch.Tensor]:
    """:func:`run_by_torch` for test files."""
    return run_by_torch
