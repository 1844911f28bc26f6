"""The best blocks of rows in C++ are those that torch finds: equal scores, what is no number, what is no candidate, more for some rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.backends.cpp.ranking import lists_of_rows as in_cpp
from sparsedsl.selection.stable_topk import lists_of_rows as in_torch

INF = float("inf")


@given(
    seed=st.integers(0, 2**31),
    blocks=st.sampled_from([1, 2, 5, 16, 33, 130]),
    k=st.sampled_from([1, 2, 3, 8, 32]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(["any", "equal", "few", "infinite", "no numbers"]),
    extra=st.booleans(),
)
@settings(max_examples=200)
def test_lists_are_those_of_torch(seed: int, blocks: int, k: int, dtype: torch.dtype, kind: str, extra: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def some(share: float) -> torch.Tensor:
        return torch.rand(scores.shape, generator=generator) < share

    scores = torch.randn(2, 2, 1 + seed % 5, blocks, dtype=dtype, generator=generator)
    if kind == "equal":
        scores = scores.round() * torch.where(some(0.5), 1.0, -1.0).to(dtype)  # 0 and -0 among them
    if kind in ("few", "infinite", "no numbers"):
        scores.masked_fill_(some(0.5), -INF)
    if kind == "infinite":
        scores.masked_fill_(some(0.2), INF)
    if kind == "no numbers":
        scores.masked_fill_(some(0.2), float("nan"))
    more = torch.randint(0, 3, scores.shape[:3], dtype=torch.int32, generator=generator) if extra else None
    width = min(k, blocks) + (min(2, blocks) if extra else 0)
    for got, want in zip(in_cpp(scores, k, width, 4, more), in_torch(scores, k, width, 4, more), strict=True):
        assert torch.equal(got, want)


def test_rows_that_grow_from_call_to_call() -> None:
    """A thread's memory is kept; a sanitizer sees where it is too small by less than what it is aligned by."""
    for blocks in range(100, 700):
        scores = torch.arange(2.0 * blocks).view(1, 1, 2, blocks)
        assert in_cpp(scores, 2, 2, 0)[0][0, 0].tolist() == [[blocks - 2, blocks - 1]] * 2
