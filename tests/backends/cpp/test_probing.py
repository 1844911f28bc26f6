"""How much the last queries attend to each key, as C++ works it out, against the softmax of all pairs in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.backends.cpp.probing import probed_keys
from sparsedsl.selection.proxies import probe

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def laid(x: Tensor, how: str) -> Tensor:
    """The same numbers, as they may lie in memory."""
    match how:
        case "tokens first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "columns":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "negated":
            return torch._neg_view(-x)
    return x


@st.composite
def problems(draw: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """q, k and what else is asked."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, (heads, kv_heads) = draw(st.integers(1, 2)), draw(st.sampled_from([(1, 1), (4, 2), (6, 6), (1, 3)]))
    q_len, kv_len = draw(st.sampled_from([1, 5, 40, 300])), draw(st.sampled_from([1, 7, 33, 64, 1500]))
    width = draw(st.sampled_from([1, 7, 16, 40, 64]))
    dtypes = [draw(st.sampled_from(DTYPES))] * 2 if draw(st.booleans()) else [draw(st.sampled_from(DTYPES)) for _ in range(2)]
    q, k = (
        laid(torch.randn(batch, n, length, width, generator=generator).double().to(dtype), draw(st.sampled_from(
            ["plain", "tokens first", "columns", "negated"]
        )))
        for n, length, dtype in ((heads, q_len, dtypes[0]), (kv_heads, kv_len, dtypes[1]))
    )  # fmt: skip
    normalised = draw(st.integers(1, kv_len))
    return q, k, {
        "rows": draw(st.integers(1, q_len)), "causal": draw(st.booleans()), "scale": draw(st.sampled_from([0.1, 0.5, 4.0])),
        "keys_normalised": normalised, "keys_kept": draw(st.integers(1, normalised)),
        "q_offset": draw(st.sampled_from([0, max(kv_len - q_len, 0), 2000])),
    }  # fmt: skip


def dense(q: Tensor, k: Tensor, words: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The mean over the rows, in float64, and a bound of the error of one that rounds to the type of the scores."""
    heads, rows, keys, scale = max(q.shape[1], k.shape[1]), words["rows"], words["keys_normalised"], words["scale"]
    eps = torch.finfo(torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32).eps
    q = q[:, :, -rows:].double().repeat_interleave(heads // q.shape[1], 1)
    k = k[:, :, :keys].double().repeat_interleave(heads // k.shape[1], 1)
    logits, sizes = scale * (q @ k.mT), scale * (q.abs() @ k.abs().mT)
    if words["causal"]:
        last = words["q_offset"] + torch.arange(rows) + (words["q_len"] - rows)
        logits = logits.masked_fill(torch.arange(keys) > last[:, None], -torch.inf)
    weights = logits.softmax(-1).nan_to_num(nan=0.0)
    # Of a logit: its product, two factors, the difference to the highest; of a weight: of its logit and of all those of the row, the
    # exponential, the sum of the row; of a sum: its terms.
    of_logits = (q.shape[3] + 4) * eps * sizes.amax(-1, keepdim=True)
    relative = (2 * of_logits).expm1() + (keys + rows + 16) * eps
    kept = slice(0, words["keys_kept"])
    # Weights below the smallest normal number have fewer digits, or none.
    return weights.mean(2)[..., kept], (weights * relative).mean(2)[..., kept] + 1e-37


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([0, 3]))
def test_the_mean_of_the_softmax_of_rows(problem: Any, more: int) -> None:
    q, k, words = problem
    length = words["keys_kept"] + more
    got = probed_keys(q, k, **words, length=length)
    assert got is not None and got.shape == (q.shape[0], max(q.shape[1], k.shape[1]), length)
    assert got.dtype == (torch.float64 if torch.float64 in (q.dtype, k.dtype) else torch.float32)
    wanted, bound = dense(q, k, words | {"q_len": q.shape[2]})
    assert ((got[..., : words["keys_kept"]].double() - wanted).abs() <= bound).all()
    assert (got[..., words["keys_kept"] :] == 0).all()


def test_threads_share_the_work_without_changing_a_digit() -> None:
    q, k, before = torch.randn(2, 3, 200, 40), torch.randn(2, 3, 5000, 40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            words = {"rows": 150, "causal": True, "scale": 0.3, "keys_normalised": 4900, "keys_kept": 4800, "q_offset": 4800}
            found.append(probed_keys(q, k, **words, length=5000))  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_no_number_stays_none(value: float, where: str) -> None:
    tensors = {"q": torch.rand(1, 1, 20, 8), "k": torch.rand(1, 1, 90, 8)}
    tensors[where][0, 0, 4 if where == "q" else 40, 0] = value
    words: dict[str, Any] = {"rows": 20, "causal": False, "scale": 0.5, "keys_normalised": 90, "keys_kept": 90}
    got = probed_keys(**tensors, **words, q_offset=0, length=90)
    logits = 0.5 * (tensors["q"].double() @ tensors["k"].double().mT)
    nowhere = (logits == -torch.inf).all(-1, keepdim=True)  # as a row that sees no key
    wanted = torch.where(nowhere, 0.0, logits.softmax(-1)).mean(2)
    torch.testing.assert_close(got.double(), wanted, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_large_logits_lose_no_digits_of_the_total() -> None:
    q, k = torch.full((1, 1, 1, 1), 3000.0), torch.full((1, 1, 1000, 1), 3.0)
    got = probed_keys(q, k, rows=1, causal=False, scale=1.0, keys_normalised=1000, keys_kept=1000, q_offset=0, length=1000)
    assert got is not None and ((got - 1e-3).abs() <= 1e-3 * 1000 * torch.finfo(torch.float32).eps).all()


def test_what_it_does_not_take_is_left_to_torch() -> None:
    words: dict[str, Any] = {"rows": 2, "causal": False, "scale": 1.0, "keys_normalised": 4, "q_offset": 0}
    q, k = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 4, 4)
    assert probed_keys(q, k, **words, keys_kept=0, length=4) is None
    assert probed_keys(q, torch.randn(1, 3, 4, 4), **words, keys_kept=4, length=4) is None
    assert probed_keys(q.int(), k.int(), **words, keys_kept=4, length=4) is None


@pytest.mark.parametrize("keep", ["all", "before"])
@pytest.mark.parametrize("causal", [False, True])
def test_programs_on_cpp_see_what_the_reference_sees(keep: str, causal: bool) -> None:
    scores = sd.probe(sd.q, sd.k, rows=9, causal=causal, complete=8, keep=keep)
    order = sd.segment_sort(scores, 8)
    program = sd.attend(order.origin(sd.kv_idx) <= sd.q_idx, k=sd.take(sd.k, order), v=sd.take(sd.v, order))
    q, k, v = (torch.randn(2, heads, 77, 12, dtype=torch.float64) for heads in (4, 2, 2))
    with torch.no_grad():
        found, wanted = (sd.compile(program, backend=backend).choices(q, k, v) for backend in ("cpp", "reference"))
    assert all(torch.equal(found[label], wanted[label]) for label in wanted)
    torch.testing.assert_close(
        probed_keys(q, k, rows=9, causal=causal, scale=0.3, keys_normalised=72, keys_kept=60, q_offset=0, length=60),
        probe(q, k, rows=9, causal=causal, scale=0.3, keys_normalised=72, keys_kept=60),
    )
