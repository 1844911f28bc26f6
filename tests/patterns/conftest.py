"""What the tests of the library share: a pattern's allowed pairs beside a definition written as plain Python loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsedsl.lang.evaluation import evaluate


def _values(expression: Any, q_len: int, kv_len: int, **env: Any) -> torch.Tensor:
    """``expression`` at every pair, shape ``(q_len, kv_len)``; ``env`` has tables, ``b`` and ``h``."""
    given = {"b": 0, "h": 0, "q_len": q_len, "kv_len": kv_len} | env
    given |= {"q_idx": torch.arange(q_len)[:, None], "kv_idx": torch.arange(kv_len)[None, :]}
    return evaluate(expression.expr, given).broadcast_to(q_len, kv_len)


def _assert_pairs(mask: Any, allowed: Callable[[int, int], bool], q_len: int, kv_len: int | None = None, **env: Any) -> None:
    """``mask`` holds exactly where ``allowed(q, kv)`` does."""
    kv_len = q_len if kv_len is None else kv_len
    wanted = torch.tensor([[bool(allowed(q, kv)) for kv in range(kv_len)] for q in range(q_len)])
    got = _values(mask, q_len, kv_len, **env)
    wrong = (got != wanted).nonzero()
    assert got.dtype == torch.bool
    assert not len(wrong), (
        f"{len(wrong)} pairs differ from the definition, the first at (q, kv) = {tuple(wrong[0].tolist())}: {mask}"
    )


@pytest.fixture(scope="session")
def values() -> Callable[..., torch.Tensor]:
    """``values(expression, q_len, kv_len, **env)``."""
    return _values


@pytest.fixture(scope="session")
def assert_pairs() -> Callable[..., None]:
    """``assert_pairs(mask, allowed, q_len, kv_len, **env)``."""
    return _assert_pairs
