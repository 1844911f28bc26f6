"""Decayed linear attention against the loop that defines it and against its quadratic form."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_linear import linear_scan
from sparsedsl.errors import ShapeError, UnsupportedError

Tensor = torch.Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def problem(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 150, width: int = 6, v_width: int = 5
) -> list[Tensor]:
    """q, k, v, log_decay."""
    kv = [random(batch, kv_heads, length, size, seed=seed) for seed, size in ((1, width), (2, v_width))]
    return [random(batch, heads, length, width), *kv, -random(heads, seed=3).abs() / 4]


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    q_offset: int = 0,
    state: Any = None,
    documents: Any = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    now = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    rows = [q.new_zeros(*q.shape[:2], 0, v.shape[3])]
    for j in range(k.shape[2]):
        if documents is not None and j:
            now = torch.where((documents[:, j] == documents[:, j - 1])[:, None, None, None], now, 0.0)
        now = log_decay.exp()[:, None, None] * now + k[:, :, j, :, None] * v[:, :, j, None, :]
        if q_offset <= j < q_offset + q.shape[2]:
            rows.append(scale * q[:, :, j - q_offset, None] @ now)
    return torch.cat(rows, dim=2), now


def quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    group, row = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    distance = row[:, None] - row
    decay = torch.where(distance >= 0, (log_decay[:, None, None] * distance.clamp(min=0)).exp(), 0.0)
    return scale * (q @ k.transpose(2, 3) * decay) @ v


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == wanted.shape
    assert got.numel() == 0 or float((got - wanted).detach().abs().max()) <= tolerance * (1 + float(wanted.detach().abs().max()))


@pytest.mark.parametrize("chunk", [1, 7, 32, 64])
@pytest.mark.parametrize("rows", [1, 4096])
def test_R1_chunks_of_any_size_are_the_recurrence(options: Any, chunk: int, rows: int) -> None:
    options(LIMITS, scan_chunk=chunk, scan_rows=rows)
    inputs, state = problem(), random(2, 4, 6, 5, seed=9)
    for got, wanted in zip(
        linear_scan(*inputs, scale=0.3, state=state), loop(*inputs, scale=0.3, state=state), strict=True
    ):  # fmt: skip
        assert_close(got, wanted)


def test_R1_quadratic_form() -> None:
    inputs = problem()
    assert_close(linear_scan(*inputs, scale=0.3)[0], quadratic(*inputs, 0.3))


def test_R1_golden_values() -> None:
    row, column = torch.arange(4, dtype=torch.float64)[:, None], torch.arange(2, dtype=torch.float64)
    q, k, v = (torch.sin(a + 0.7 * row + 1.3 * column)[None, None] for a in (0.1, 0.5, 0.9))
    out, state = linear_scan(q, k, v, torch.tensor([-(2**-0.5)], dtype=torch.float64), scale=2**-0.5)
    wanted = [[0.558072, 0.576004], [1.161225, 0.534414], [0.989619, -0.083162], [0.366369, -0.521984]]
    assert torch.allclose(out[0, 0], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.allclose(
        state[0, 0], torch.tensor([[0.692203, -0.578084], [0.118360, 0.772038]], dtype=torch.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("first", [1, 63, 64, 65, 149])
def test_R7_a_prefill_goes_on_from_its_state(first: int) -> None:
    q, k, v, log_decay = problem()
    whole, last = linear_scan(q, k, v, log_decay, scale=0.3)
    one, state = linear_scan(*(t[:, :, :first] for t in (q, k, v)), log_decay, scale=0.3)
    two, end = linear_scan(*(t[:, :, first:] for t in (q, k, v)), log_decay, scale=0.3, state=state)
    assert_close(torch.cat([one, two], dim=2), whole)
    assert_close(end, last)


def test_R7_token_by_token_is_a_prefill() -> None:
    q, k, v, log_decay = problem(length=70)
    whole, last = linear_scan(q, k, v, log_decay, scale=0.3)
    state = None
    for t in range(70):
        out, state = linear_scan(*(x[:, :, t : t + 1] for x in (q, k, v)), log_decay, scale=0.3, state=state)
        assert_close(out, whole[:, :, t : t + 1])
        # a query with all keys before it, and no state: the same
        assert_close(linear_scan(q[:, :, t : t + 1], k, v, log_decay, scale=0.3, q_offset=t)[0], out)
    assert state is not None
    assert_close(state, last)


def test_R7_a_state_of_bfloat16_drifts_and_ours_does_not() -> None:
    q, k, v, _ = (t.to(torch.bfloat16) for t in problem(1, 2, 2, 400, 16, 16))
    log_decay = torch.tensor([-1e-3, -1e-2], dtype=torch.float64)
    _, wanted = loop(*(t.double() for t in (q, k, v)), log_decay, scale=1.0)
    ours: Any = None
    rounded: Any = None
    for t in range(400):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        out, ours = linear_scan(*token, log_decay.float(), scale=1.0, state=ours)
        rounded = linear_scan(*token, log_decay.float(), scale=1.0, state=rounded)[1].to(torch.bfloat16)
    assert out.dtype == torch.bfloat16 and ours.dtype == torch.float32
    error, drift = (float((state.double() - wanted).norm() / wanted.norm()) for state in (ours, rounded))
    # each of 400 steps rounds once, and what was rounded decays: at most the sum of all roundings
    assert error <= 400 * torch.finfo(torch.float32).eps
    assert drift >= torch.finfo(torch.bfloat16).eps > 100 * error


def test_R9_linear_in_the_values() -> None:
    q, k, v, log_decay = problem()
    w = random(*v.shape, seed=8)
    mixed = linear_scan(q, k, 2 * v - 3 * w, log_decay, scale=0.3)[0]
    assert_close(mixed, 2 * linear_scan(q, k, v, log_decay, scale=0.3)[0] - 3 * linear_scan(q, k, w, log_decay, scale=0.3)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_R9_a_head_without_memory_sees_its_own_token(dtype: torch.dtype) -> None:
    q, k, v, log_decay = (t.to(dtype) for t in problem(kv_heads=4))
    wanted = 0.3 * (q * k).sum(dim=3, keepdim=True) * v
    for forgets in (-math.inf, -1e30):
        out, state = linear_scan(q, k, v, torch.full_like(log_decay, forgets), scale=0.3)
        assert_close(out, wanted, 1e-5 if dtype == torch.float32 else 1e-12)
        assert_close(state, k[:, :, -1, :, None] * v[:, :, -1, None], 1e-5 if dtype == torch.float32 else 1e-12)


def test_R9_without_decay_it_is_linear_attention() -> None:
    q, k, v, _ = problem(kv_heads=4)
    wanted = 0.3 * torch.tril(q @ k.transpose(2, 3)) @ v
    assert_close(linear_scan(q, k, v, torch.zeros(4, dtype=torch.float64), scale=0.3)[0], wanted)


def test_R10_gradients_of_the_quadratic_form() -> None:
    q, k, v, log_decay = problem()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    along = random(2, 4, 150, 5, seed=7)
    wanted = torch.autograd.grad((quadratic(q, k, v, log_decay, 0.3) * along).sum(), leaves)
    got = torch.autograd.grad((linear_scan(q, k, v, log_decay, scale=0.3)[0] * along).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)


def test_R10_finite_differences(options: Any) -> None:
    options(LIMITS, scan_chunk=2, scan_rows=1)
    q, k, v, log_decay = problem(1, 2, 1, 5, 2, 2)
    state = random(1, 2, 2, 2, seed=4)
    leaves = [t.requires_grad_() for t in (q, k, v, state)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, state: linear_scan(q[:, :, 1:4], k, v, log_decay, scale=0.7, state=state, q_offset=1), leaves
    )


def test_R10_only_what_requires_gradients_gets_them() -> None:
    q, k, v, log_decay = problem(length=20)
    out, state = linear_scan(q.requires_grad_(), k, v, log_decay, scale=0.3)
    assert out.requires_grad
    out.sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None
    out, state = linear_scan(q.detach(), k, v.requires_grad_(), log_decay, scale=0.3)
    state.sum().backward()  # from the state alone
    assert v.grad is not None and bool((v.grad != 0).all())


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any], int, int]:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    batch, kv_heads, group, width, v_width = number(1, 2), number(1, 2), number(1, 3), number(1, 4), number(1, 4)
    kv_len = number(0, 40)
    q_offset = number(0, kv_len)
    q_len, seed = number(0, kv_len - q_offset), number(0, 1000)
    heads = kv_heads * group
    tensors = [
        random(batch, heads, q_len, width, seed=seed),
        random(batch, kv_heads, kv_len, width, seed=seed + 1),
        random(batch, kv_heads, kv_len, v_width, seed=seed + 2),
        -random(heads, seed=seed + 3).abs() * draw(st.sampled_from([0.0, 0.1, 20.0])),
    ]
    words: dict[str, Any] = {"q_offset": q_offset, "scale": 0.5, "state": None, "documents": None}
    if draw(st.booleans()):
        words["state"] = random(batch, heads, width, v_width, seed=seed + 4)
    if draw(st.booleans()):
        steps = random(draw(st.sampled_from([1, batch])), kv_len, seed=seed + 5) > draw(st.sampled_from([0.0, 1.5]))
        words["documents"] = steps.long().cumsum(1)
    return tensors, words, draw(st.sampled_from([1, 2, 3, 8, 64])), draw(st.sampled_from([1, 50, 4096]))


@given(calls())
@settings(max_examples=60)
def test_random_calls_are_the_loop_with_gradients(call: tuple[list[Tensor], dict[str, Any], int, int]) -> None:
    tensors, words, chunk, rows = call
    leaves = [t.requires_grad_() for t in (*tensors[:3], *([] if words["state"] is None else [words["state"]]))]
    with LIMITS.using(scan_chunk=chunk, scan_rows=rows):
        got = linear_scan(*tensors, **words)
        wanted = loop(*tensors, **words)
        for one, two in zip(got, wanted, strict=True):
            assert_close(one, two)
        for one, two in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
            assert_close(one, two)


def gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Along fixed directions; zeros where nothing depends on a leaf."""
    total = sum((t * random(*t.shape, seed=5)).sum() for t in results) + sum(0 * t.sum() for t in leaves)
    return torch.autograd.grad(total, leaves)


def test_documents_are_separate_runs() -> None:
    q, k, v, log_decay = problem()
    ends = [0, 1, 64, 70, 150]
    documents = torch.tensor([n for n in range(4) for _ in range(ends[n], ends[n + 1])])[None]
    got, last = linear_scan(q, k, v, log_decay, scale=0.3, documents=documents)
    for begin, end in itertools.pairwise(ends):
        out, state = linear_scan(*(t[:, :, begin:end] for t in (q, k, v)), log_decay, scale=0.3)
        assert_close(got[:, :, begin:end], out)
    assert_close(last, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_float64_rounded_once(dtype: torch.dtype) -> None:
    q, k, v, log_decay = problem(width=16, v_width=16)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, state = linear_scan(q, k, v, log_decay.float(), scale=0.25)
    wanted = loop(*(t.double() for t in (q, k, v)), log_decay.float().double(), scale=0.25)
    sizes = loop(*(t.double().abs() for t in (q, k, v)), log_decay.float().double(), scale=0.25)  # before anything cancels
    fine = torch.finfo(torch.float32).eps * 16 * math.sqrt(150)
    assert out.dtype == dtype and state.dtype == torch.float32
    for got, exact, size, eps in zip((out, state), wanted, sizes, (torch.finfo(dtype).eps, 0.0), strict=True):
        assert bool(((got.double() - exact).abs() <= eps * exact.abs() + fine * size).all())


class Sizes(TorchDispatchMode):
    """The most numbers any operation makes a tensor of."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.largest = max(self.largest, result.numel())
        return result


def test_decode_copies_no_cache_and_no_gradient_keeps_nothing() -> None:
    q, k, v = (random(1, heads, length, 16, dtype=torch.bfloat16) for heads, length in ((4, 1), (1, 20_000), (1, 20_000)))
    log_decay = torch.tensor([-0.1, -0.01, -1e-4, 0.0])
    with Sizes() as sizes:
        linear_scan(q, k, v, log_decay, scale=0.25, q_offset=19_999)
    assert 0 < sizes.largest < k.numel() / 2
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        with torch.no_grad():
            linear_scan(q, k.requires_grad_(), v, log_decay, scale=0.25, q_offset=19_999)
        assert not kept
        linear_scan(q, k, v, log_decay, scale=0.25, q_offset=19_999)
    states = 4 * 16 * 16 * (20_000 * 4 // LIMITS.now.scan_rows + 3)
    assert 0 < sum(kept) <= q.numel() + k.numel() + v.numel() + states


def test_autocast_changes_nothing() -> None:
    q, k, v, log_decay = (t.float() for t in problem())
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run() -> list[Tensor]:
        out, state = linear_scan(q, k, v, log_decay, scale=0.3)
        return [out, state, *torch.autograd.grad(out.sum() + state.sum(), leaves)]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


@pytest.mark.parametrize("batch, q_len, kv_len", [(0, 3, 3), (1, 0, 3), (1, 0, 0), (1, 3, 3)])
def test_sizes_of_zero(batch: int, q_len: int, kv_len: int) -> None:
    q, k, v = (torch.ones(batch, 2, length, 4, requires_grad=True) for length in (q_len, kv_len, kv_len))
    given = torch.ones(batch, 2, 4, 4)
    out, state = linear_scan(q, k, v, torch.zeros(2), scale=1.0, state=given)
    assert out.shape == (batch, 2, q_len, 4) and state.shape == (batch, 2, 4, 4)
    assert (not state.numel() or state.data_ptr() != given.data_ptr()) and bool((state == 1 + kv_len).all())
    (out.sum() + state.sum()).backward()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": torch.zeros(2, 4, 10)}, "q must have the shape (batch, heads, length, head_dim)"),
        ({"q": [1]}, "q must be a torch tensor (batch, heads, length, head_dim); got list"),
        ({"k": torch.zeros(2, 2, 10, 6, dtype=torch.int64)}, "k must be float16, bfloat16, float32 or float64; got torch.int64"),
        ({"q": torch.zeros(2, 3, 10, 6)}, "3 is not a multiple of 2"),
        ({"q": torch.zeros(2, 4, 10, 6, dtype=torch.float64)}, "must have one dtype"),
        ({"q_offset": 1}, "sees keys up to position 10"),
        ({"q_offset": -1}, "q_offset must be a whole number of at least 0; got -1"),
        ({"scale": math.nan}, "scale must be a positive number; got nan"),
        ({"log_decay": torch.zeros(2)}, "log_decay must have the shape (Hq,), here (4); got (2,)"),
        ({"log_decay": torch.ones(4)}, "log_decay must be at most 0"),
        ({"state": torch.zeros(2, 2, 6, 5)}, "state must have the shape (B, Hq, D, Dv), here (2, 4, 6, 5); got (2, 2, 6, 5)"),
        (
            {"documents": torch.zeros(2, 9, dtype=torch.int64)},
            "documents must have the shape (1 or B, Skv), here (any, 10); got (2, 9)",
        ),
        ({"documents": torch.zeros(3, 10, dtype=torch.int64)}, "documents must have 1 row or one a batch entry, 2"),
        ({"documents": torch.zeros(2, 10)}, "documents must be an integer type; got torch.float32"),
        ({"documents": torch.zeros(2, 10, dtype=torch.int64, device="meta")}, "documents must be on cpu, as q is; got meta"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    q, k, v, log_decay = (t.float() for t in problem(length=10))
    words = {"q": q, "k": k, "v": v, "log_decay": log_decay, "scale": 0.3} | changes
    with pytest.raises(ShapeError) as caught:
        linear_scan(**words)
    assert message in str(caught.value)


def test_a_decay_that_is_learned_is_refused() -> None:
    q, k, v, log_decay = problem(length=10)
    with pytest.raises(UnsupportedError, match=r"log_decay requires gradients.*log_decay.detach\(\)"):
        linear_scan(q, k, v, log_decay.detach().requires_grad_(), scale=0.3)
