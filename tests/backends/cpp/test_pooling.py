"""Rows of blocks and weights of blocks that C++ makes are those of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.backends.cpp.pooling import pooled_rows
from sparsedsl.backends.cpp.weighing import weighed_blocks
from sparsedsl.selection.proxies import bounds, pooled
from sparsedsl.selection.weights import weights_of

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


@st.composite
def rows(draw: Any) -> Tensor:
    """Rows of any width and length as they may lie in memory, some of them no numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads, length = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 64, 200]))
    width = draw(st.sampled_from([1, 7, 16, 33, 64, 100]))
    x = torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
    for value in draw(st.lists(st.sampled_from([INF, -INF, NAN]), max_size=2)):
        x.view(-1)[int(torch.randint(0, x.numel(), (), generator=generator))] = value
    match draw(st.sampled_from(["plain", "tokens first", "columns", "negated"])):
        case "tokens first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "columns":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "negated":
            return torch._neg_view(x)
    return x


def assert_sums(got: Tensor, x: Tensor, block: int, how: str, pad: str) -> None:
    """Against float64, within what adding up so many numbers in any order may round, and one division."""
    wanted, size = pooled(x.double(), block, how, pad), pooled(x.double().abs(), block, how, pad)  # type: ignore[arg-type]
    bound = (block + 2) * torch.finfo(got.dtype).eps * size + torch.finfo(got.dtype).tiny
    finite = wanted.isfinite()
    assert ((got.double() - wanted).abs() <= bound)[finite].all()
    assert torch.equal(got.double()[~finite].nan_to_num(nan=7.0), wanted[~finite].nan_to_num(nan=7.0))


@settings(max_examples=150, deadline=None)
@given(
    rows(),
    st.sampled_from([1, 2, 16, 70, 300]),
    st.sampled_from(["mean", "sum", "max", "min"]),
    st.sampled_from(["valid", "zero"]),
)
def test_one_row_of_every_block(x: Tensor, block: int, how: str, pad: str) -> None:
    got = pooled_rows(x, block, how, pad)
    assert got is not None
    wanted = pooled(x, block, how, pad)  # type: ignore[arg-type]
    assert got.shape == wanted.shape and got.dtype == wanted.dtype and got.is_contiguous()
    if how in ("max", "min"):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    else:
        assert_sums(got, x, block, how, pad)


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from([1, 3, 16, 300]))
def test_the_least_and_the_greatest_come_of_one_reading(x: Tensor, block: int) -> None:
    got = pooled_rows(x, block, "bounds", "valid")
    assert got is not None
    for one, other in zip(got, bounds(x, block), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_long_sum_loses_few_digits() -> None:
    rows = 2**20
    x = torch.full((1, 1, rows, 1), 0.1)
    got = pooled_rows(x, rows, "mean", "valid")
    # 32 rows are added up by themselves; one after the other the sum would be off by a hundredth.
    bound = (32 + rows / 32) * torch.finfo(torch.float32).eps / 2
    assert got is not None and abs(float(got) / float(x[0, 0, 0, 0]) - 1) <= bound


def test_threads_share_the_work_without_changing_a_digit() -> None:
    x, before = torch.randn(2, 3, 5000, 40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(pooled_rows(x, 64, "mean", "valid"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_it_does_not_take_is_left_to_torch() -> None:
    x = torch.randn(1, 2, 10, 4)
    assert pooled_rows(x, 4, "first", "valid") is None
    assert pooled_rows(x[:, :, :0], 4, "mean", "valid") is None
    assert pooled_rows(x.int(), 4, "mean", "valid") is None


@pytest.mark.parametrize("how", ["mean", "sum", "max", "min", "first", "last"])
def test_summaries_of_calls_with_and_without_gradients_agree(how: Any) -> None:
    chosen = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8, how)), 2)
    attn = sd.compile(sd.attend((sd.kv_idx <= sd.q_idx) & chosen), backend="cpp")
    q, k, v = (
        torch.randn(1, 4, 50, 8, dtype=torch.float64),
        torch.randn(1, 2, 50, 8, dtype=torch.float64),
        torch.randn(1, 2, 50, 8).double(),
    )
    learned = attn(q.clone().requires_grad_(), k.clone().requires_grad_(), v)
    torch.testing.assert_close(attn(q, k, v), learned.detach())
    torch.testing.assert_close(attn(q, k, v), sd.compile(attn.program, backend="reference")(q, k, v))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 2, 7, 16]),
    st.sampled_from(["softmax", "softmax1", "stick_breaking", "sigmoid", "raw"]),
    st.lists(st.sampled_from([INF, NAN, 90.0, -90.0]), max_size=2),
)  # fmt: skip
def test_weights_of_the_blocks_of_a_list(seed: int, dtype: torch.dtype, slots: int, rule: Any, odd: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 4 * torch.randn(2, 3, 11, slots, generator=generator, dtype=dtype)
    for value in odd:
        scores.view(-1)[int(torch.randint(0, scores.numel(), (), generator=generator))] = value
    count = torch.randint(0, slots + 1, (2, 3, 11, 1), generator=generator)
    scores.masked_fill_(torch.arange(slots) >= count, -INF)
    got, wanted = weighed_blocks(scores, rule), weights_of(scores, rule)
    assert got is not None
    # Of sums of so many numbers and a function of each.
    tolerance = 16 * (slots + 4) * torch.finfo(dtype).eps
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
