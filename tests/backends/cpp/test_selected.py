"""Attention along selected blocks in C++ against the one in torch, which is compared with dense masks: results and all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.cpp import selected as cpp
from sparsedsl.backends.tiled import selected as tiled
from sparsedsl.errors import ShapeError
from sparsedsl.runtime.heads import lse_merge
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.selected_call import SelectedCall

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
bias = sd.table("bias", learned=True)
# Mask, score: one build each and type of arithmetic.
KINDS: dict[str, tuple[Any, Any]] = {
    "all": (True, score),
    "causal": (CAUSAL, score),
    "two intervals": (CAUSAL & ((q_idx - kv_idx < 9) | (kv_idx < 3)), score),
    "pair by pair": ((kv_idx * 3 + q_idx + h) % 4 != 0, score - (q_idx - kv_idx) * 0.1 * (h + 1)),
    "soft cap": (CAUSAL, 5 * sd.tanh(score / 5)),
    "learned": (CAUSAL, score + bias[h, sd.minimum(abs(q_idx - kv_idx), 7)]),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def random_lists(batch: int, heads: int, rows: int, slots: int, kv_len: int, block: int, seed: int) -> SelectedBlocks:
    """Ascending lists without duplicates, of random lengths, some empty."""
    blocks, generator = -(-kv_len // block), torch.Generator().manual_seed(seed)
    order = torch.rand(batch, heads, rows, blocks, generator=generator).argsort(-1)[..., :slots]
    length = torch.randint(0, order.shape[-1] + 1, (batch, heads, rows, 1), generator=generator)
    order = order.masked_fill(torch.arange(order.shape[-1]) >= length, blocks).sort(-1).values
    lists = order.masked_fill(order == blocks, -1).int()
    return SelectedBlocks(lists, (lists >= 0).sum(-1, dtype=torch.int32), q_block=1, kv_block=block, blocks=blocks)


@st.composite
def calls(draw: Any, dtypes: Any) -> dict[str, Any]:
    """Sizes and lists."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4, 5]))
    rows, kv_len = draw(st.sampled_from([1, 3, 17, 70])), draw(st.sampled_from([1, 5, 40, 129]))
    lists = random_lists(
        draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads, kv_heads * group])), rows,
        draw(st.sampled_from([0, 1, 3, 9])), kv_len, draw(st.sampled_from([1, 4, 16, 33, 64])), draw(st.integers(0, 99)),
    )  # fmt: skip
    return {
        "batch": batch, "kv_heads": kv_heads, "group": group, "rows": rows, "kv_len": kv_len, "lists": lists,
        "width": draw(st.sampled_from([1, 8, 20, 64])), "width_v": draw(st.sampled_from([3, 16, 40])), "dtype": draw(dtypes),
        "weighted": draw(st.sampled_from([None, 1, kv_heads * group])), "softmax1": draw(st.booleans()), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def made(kind: str, x: dict[str, Any]) -> tuple[list[Tensor], SelectedCall]:
    """q, k, v and what else a call is of; all of them leaves."""
    mask, modified = KINDS[kind]
    generator = torch.Generator().manual_seed(x["seed"])
    heads, real = x["kv_heads"] * x["group"], torch.float64 if x["dtype"] == torch.float64 else torch.float32
    shapes = (
        (x["batch"], heads, x["rows"], x["width"]), (x["batch"], x["kv_heads"], x["kv_len"], x["width"]),
        (x["batch"], x["kv_heads"], x["kv_len"], x["width_v"]),
    )  # fmt: skip
    leaves = [torch.randn(s, generator=generator).to(x["dtype"]).requires_grad_() for s in shapes]
    tables, weights = {}, None
    if kind == "learned":
        tables["bias"] = torch.randn(heads, 8, generator=generator).to(real).requires_grad_()
    if x["weighted"]:
        size = (x["batch"], x["weighted"], x["rows"], x["lists"].indices.shape[3])
        weights = torch.rand(size, generator=generator).to(real).requires_grad_()
    offset = max(0, x["kv_len"] - x["rows"])
    call = SelectedCall(
        x["lists"], 0.3, Domain(x["rows"], x["kv_len"], offset, x["batch"], heads), sympy.true if mask is True else mask.expr,
        modified.expr, tables, weights=weights, softmax1=x["softmax1"],
    )  # fmt: skip
    return leaves, call


def run(passes: Any, kind: str, x: dict[str, Any]) -> list[Tensor]:
    """Out, LSE and the gradients of q, k, v, weights and table."""
    leaves, call = made(kind, x)
    weights, tables = call.weights, call.tables
    out, lse = passes.selected_attention(*leaves, call)
    slopes = [torch.randn(t.shape, generator=torch.Generator().manual_seed(n)).to(t) for n, t in enumerate((out, lse))]
    total = (out * slopes[0]).sum() + torch.where(lse.isfinite(), lse * slopes[1], 0.0).sum()
    wanted = [*leaves, *([] if weights is None else [weights]), *tables.values()]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    return [out.detach(), lse.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True))]


def assert_as_in_torch(kind: str, x: dict[str, Any]) -> None:
    allowed = TOLERANCE[x["dtype"]]
    for number, (got, want) in enumerate(zip(run(cpp, kind, x), run(tiled, kind, x), strict=True)):
        size = 1 + (float(want[want.isfinite()].double().abs().max()) if want.isfinite().any() else 0.0)
        torch.testing.assert_close(
            got.double(), want.double(), atol=allowed * size, rtol=allowed, msg=lambda m, n=number: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
@given(x=calls(st.just(torch.float64)))
@settings(max_examples=12)
def test_results_and_gradients_are_those_in_torch(kind: str, x: dict[str, Any]) -> None:
    assert_as_in_torch(kind, x)


@pytest.mark.parametrize("kind", ["causal", "learned"])
@given(x=calls(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
@settings(max_examples=12)
def test_types_of_less_precision(kind: str, x: dict[str, Any]) -> None:
    assert_as_in_torch(kind, x)


@pytest.mark.parametrize("kind", ["all", "causal", "pair by pair"])
@given(x=calls(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])), empty=st.booleans())
@settings(max_examples=15)
def test_results_are_joined_with_those_over_other_keys(kind: str, x: dict[str, Any], empty: bool) -> None:
    leaves, call = made(kind, x | {"weighted": None})
    q, k, v = (t.detach() for t in leaves)
    with torch.no_grad():
        far = tiled.selected_attention(q, k, v, call)
        near = torch.randn(far[0].shape).to(far[0]), 3 * torch.randn(far[1].shape).to(far[1])
        if empty:  # nothing there for the first row
            near[0][:, :, 0], near[1][:, :, 0] = 0, -float("inf")
        wanted = lse_merge([(near[0].double(), near[1].double()), (far[0].double(), far[1].double())])
        before = [t.clone() for t in near]
        found = cpp.joined_attention(q, k, v, call, near)
        if not call.blocks.indices.numel():
            assert found is None
            return
        assert found is not None and all(map(torch.equal, near, before))
        again = cpp.selected_again(q, k, v, call)
        assert again is not None
        offset, lists = call.domain.q_offset, call.blocks
        places = again(q, k, v, offset, lists, None, near)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=4 * TOLERANCE[x["dtype"]], rtol=TOLERANCE[x["dtype"]])
    if not 0 < lists.indices.shape[3] <= lists.blocks:
        assert places is None
    else:  # in the place of what they are joined with
        assert places is not None and all(map(torch.equal, places, found)) and places[0] is near[0]


def test_what_cannot_be_joined_is_said_before_anything_is_written() -> None:
    lists = random_lists(1, 2, 20, 3, 40, 8, 1)
    q, k, v = (torch.randn(1, heads, size, 16) for heads, size in ((4, 20), (2, 40), (2, 40)))
    call = SelectedCall(lists, 0.25, Domain(20, 40, 20, 1, 4), CAUSAL.expr)
    out, lse = torch.randn(1, 4, 20, 16), torch.randn(1, 4, 20)
    assert cpp.joined_attention(q, k, v, call, (out.double(), lse)) is None
    assert cpp.joined_attention(q, k, v, call, (out.transpose(2, 3).contiguous().transpose(2, 3), lse)) is None
    again = cpp.selected_again(q, k, v, call)
    assert again is not None and again(torch._neg_view(q), k, v, 20, lists, None, None) is None
    assert again(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, 20, lists, None, None) is None


@pytest.mark.parametrize("kind", ["all", "causal", "soft cap"])
@pytest.mark.parametrize(("block", "slots"), [(1, 300), (2, 150), (16, 40), (700, 5), (3000, 3), (5000, 2)])
@pytest.mark.parametrize("weighted", [None, 4])
def test_lists_over_several_rounds_and_blocks_that_are_cut(kind: str, block: int, slots: int, weighted: int | None) -> None:
    """A round is of 4,096 keys, and of 2,048 of a block at most, unless the block has a softmax of its own; of the smallest blocks 128 keys
    are gathered at a time."""
    lists = random_lists(1, 4, 20, slots, 9001, block, 3)
    x: dict[str, Any] = {
        "batch": 1, "kv_heads": 2, "group": 2, "rows": 20, "kv_len": 9001, "lists": lists, "width": 16, "width_v": 24,
        "dtype": torch.float64, "weighted": weighted, "softmax1": False, "seed": 0,
    }  # fmt: skip
    assert_as_in_torch(kind, x)


@pytest.mark.parametrize(("block", "slots"), [(1, 90), (16, 6)])
def test_digits_do_not_depend_on_threads_or_on_other_queries(block: int, slots: int) -> None:
    lists = random_lists(1, 2, 300, slots, 300, block, 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 16, generator=generator) for heads in (4, 2, 2))
    call = SelectedCall(lists, 0.25, Domain(300, 300, 0, 1, 4), CAUSAL.expr)
    threads, found, leaves = torch.get_num_threads(), [], [x.clone().requires_grad_() for x in (q, k, v)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([cpp.selected_attention(q, k, v, call)[0]])
            found[-1] += torch.autograd.grad(cpp.selected_attention(*leaves, call)[0].sum(), leaves)
    finally:
        torch.set_num_threads(threads)
    for other in found:
        assert all(map(torch.equal, found[0], other))
    part = SelectedCall(lists.rows(slice(90, 200)), 0.25, Domain(110, 300, 90, 1, 4), CAUSAL.expr)
    assert torch.equal(cpp.selected_attention(q[:, :, 90:200], k, v, part)[0], found[0][0][:, :, 90:200])


def test_keys_that_nobody_sees_may_hold_anything() -> None:
    lists = random_lists(1, 1, 20, 3, 64, 16, 1)
    q, k, v = (torch.randn(1, 1, n, 8) for n in (20, 64, 64))
    call = SelectedCall(lists, 0.25, Domain(20, 64, 10, 1, 1), CAUSAL.expr)
    want = cpp.selected_attention(q, k, v, call)
    k, v = k.clone(), v.clone()
    k[:, :, 40:] = v[:, :, 40:] = float("nan")  # after every query, in blocks that some of them have in their lists
    for got, wanted in zip(cpp.selected_attention(q, k, v, call), want, strict=True):
        torch.testing.assert_close(got, wanted)


def test_blocks_that_are_not_there_are_refused() -> None:
    lists = random_lists(1, 1, 4, 3, 64, 16, 1)
    q, k, v = (torch.randn(1, 1, n, 8) for n in (4, 64, 64))
    wrong = SelectedBlocks(torch.full_like(lists.indices, 4), lists.counts, q_block=1, kv_block=16, blocks=4)
    with pytest.raises(ShapeError, match="hold chunk 4, and there are 4"):
        cpp.selected_attention(q, k, v, SelectedCall(wrong, 0.25, Domain(4, 64, 60, 1, 1)))
