"""What depends on the program alone is worked out once: Python calls of warm calls, torch's own included, are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd

CAUSAL = sd.kv_idx <= sd.q_idx
WINDOW = CAUSAL & (sd.q_idx - sd.kv_idx < 256)
CHOICE = CAUSAL & ((sd.q_idx - sd.kv_idx < 64) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4))


def python_calls(call: Callable[[], Any]) -> int:
    """How many Python functions are entered."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count


# `tiled` computes strip by strip in Python: a narrow window has many. `cpp` makes the same calls whatever the length.
@pytest.mark.parametrize(
    ("backend", "pattern", "rows", "most"),
    [
        ("tiled", WINDOW, 1024, 850), ("tiled", WINDOW, 1, 120), ("tiled", CHOICE, 1024, 2600), ("tiled", CHOICE, 1, 400),
        ("cpp", WINDOW, 1024, 15), ("cpp", WINDOW, 1, 15), ("cpp", CHOICE, 1024, 300), ("cpp", CHOICE, 1, 300),
    ],
)  # fmt: skip
def test_a_warm_call_makes_few_python_calls(backend: str, pattern: Any, rows: int, most: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k = torch.randn(1, 4, rows, 64), torch.randn(1, 2, 1024, 64)
        attn = sd.compile(pattern, backend=backend)
        for _ in range(3):
            attn(q, k, k, q_offset="end")
        assert python_calls(lambda: attn(q, k, k, q_offset=1024 - rows)) <= most
    finally:
        torch.set_num_threads(threads)


def test_a_decode_step_of_another_length_is_as_cheap() -> None:
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1100, 64)
    attn = sd.compile(CHOICE, backend="tiled")
    for length in range(1024, 1028):
        attn(q, k[:, :, :length], k[:, :, :length], q_offset="end")
    counts = [python_calls(lambda n=n: attn(q, k[:, :, :n], k[:, :, :n], q_offset=n - 1)) for n in (1028, 1029, 1030)]
    assert max(counts) <= 420
