"""Parts of the keys merged by their LSE: as one softmax over all of them, in values and gradients."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd

NEVER = float("-inf")


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and LSE by hand; a row without keys gives NaN and -inf, as engines do."""
    logits = torch.where(keep, q @ k.transpose(-1, -2), NEVER)
    return torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1)


def test_parts_are_one_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 15, 15))
    keep = torch.rand(6, 15) < 0.7
    keep[2, 5:] = False  # a row that sees the first part alone
    part = torch.arange(15) // 5
    want = dense(q, k, v, keep)
    gradient = [torch.randn_like(x) for x in want]
    expected = torch.autograd.grad(want, (q, k, v), gradient)
    # Attention of our own for the parts: an empty row's gradient by hand would be NaN.
    table = sd.table("keep")[sd.q_idx, sd.kv_idx] == 1
    parts = [
        sd.attention(q, k, v, table, keep=(keep & (part == n)).long(), scale=1.0, return_lse=True, backend="reference")
        for n in range(3)
    ]
    assert parts[1][1].isneginf().any()
    found = sd.merge(*parts)
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), gradient), expected, rtol=1e-12, atol=1e-12)


def test_empty_parts_are_zero_and_never_nan() -> None:
    out, lse = torch.full((1, 2, 3, 4), float("nan")), torch.full((1, 2, 3), NEVER)
    out.requires_grad_()
    lse.requires_grad_()
    merged, total = sd.merge((out, lse), (out, lse))
    assert merged.eq(0).all() and total.isneginf().all()
    merged.sum().backward()
    assert out.grad is not None and out.grad.eq(0).all() and lse.grad is not None and lse.grad.eq(0).all()
    # Beside a part with keys it counts for nothing.
    torch.testing.assert_close(sd.merge((out, lse), (torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3)))[0], torch.ones(1, 2, 3, 4))


def test_narrow_types_are_merged_in_float32() -> None:
    out = [torch.randn(1, 1, 4, 8, dtype=torch.bfloat16) for _ in range(3)]
    lse = [torch.randn(1, 1, 4, dtype=torch.bfloat16) for _ in range(3)]
    merged, total = sd.merge(*zip(out, lse, strict=True))
    wide, expected = sd.merge(*((o.double(), x.double()) for o, x in zip(out, lse, strict=True)))
    assert (merged.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(merged, wide.to(torch.bfloat16), rtol=2**-8, atol=0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one"),
        ([torch.zeros(2, 3, 4)], r"part 0 must be a pair of tensors"),
        ([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2))], r"out \(1, 2, 3, 4\) and lse \(1, 3, 2\)"),
        ([(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))], r"part 0 has \(2, 3\).*part 1 \(2, 4\)"),
        ([(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))], r"floating-point; part 0"),
    ],
)
def test_what_does_not_fit_is_refused(parts: list, message: str) -> None:
    with pytest.raises(sd.ShapeError, match=message):
        sd.merge(*parts)
