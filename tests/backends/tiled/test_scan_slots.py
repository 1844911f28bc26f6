"""Gated slots against the recurrence that defines them, their quadratic form, and the joint softmax of slots and a window."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_slots import SlotState, slot_scan
from sparsedsl.errors import ShapeError, UnsupportedError

Tensor = torch.Tensor
WORDS: dict[str, Any] = {"temperature": 2.0, "scale": 0.7}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def problem(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 150, width: int = 4, v_width: int = 3, slots: int = 5
) -> list[Tensor]:
    """q, k, v, gate."""
    rest = [random(batch, kv_heads, length, size, seed=seed) for seed, size in ((1, width), (2, v_width), (3, slots))]
    return [random(batch, heads, length, width), *rest]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, delay: int, temperature: float, scale: float, empty: str = "zero_sink",
    q_offset: int = 0, state: SlotState | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor, SlotState]:  # fmt: skip
    """Token by token, one batch entry and head after the other; every state is kept."""
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len, slots = k.shape[1], k.shape[2], gate.shape[3]
    a = gate.sigmoid() ** (1 / temperature)
    zeros = SlotState(*(q.new_zeros(batch, kv_heads, slots, t.shape[3]) for t in (k, v)), torch.zeros(batch, kv_heads).bool())
    ids = torch.zeros(batch, kv_len).long() if documents is None else documents.expand(batch, kv_len)
    outs, lses, lasts = [], [], []
    for n, head in itertools.product(range(batch), range(kv_heads)):
        nothing = (zeros.keys[n, head], zeros.values[n, head], False)
        given = nothing if state is None else (state.keys[n, head], state.values[n, head], bool(state.written[n, head]))
        history, begin, begins = [], 0, []
        now = given
        for j in range(kv_len):
            if j and ids[n, j] != ids[n, j - 1]:
                now, begin = nothing, j
            keep = a[n, head, j, :, None]
            now = (keep * now[0] + (1 - keep) * k[n, head, j], keep * now[1] + (1 - keep) * v[n, head, j], True)
            history.append(now)
            begins.append(begin)
        lasts.append(now)
        for member, row in itertools.product(range(heads // kv_heads), range(q_len)):
            at = q_offset + row
            begin = begins[at] if at < kv_len else 0
            seen = history[at - delay] if at - delay >= begin else nothing if begin else given
            logits = scale * seen[0] @ q[n, head * (heads // kv_heads) + member, row]
            alone = empty == "masked" and not seen[2]
            outs.append(logits.softmax(0) @ seen[1] * (0 if alone else 1))
            lses.append(torch.full_like(logits[0], -math.inf) if alone else logits.logsumexp(0))
    out = torch.stack(outs).view(batch, heads, q_len, -1) if outs else q.new_zeros(batch, heads, q_len, v.shape[3])
    lse = torch.stack(lses).view(batch, heads, q_len) if lses else q.new_zeros(batch, heads, q_len)
    keys, values = (torch.stack([one[part] for one in lasts]).view(batch, kv_heads, slots, -1) for part in (0, 1))
    return out, lse, SlotState(keys, values, torch.tensor([one[2] for one in lasts]).view(batch, kv_heads))


def written_by_pairs(gate: Tensor, temperature: float, delay: int) -> Tensor:
    """What is left at query ``t`` in slot ``m`` of key ``j``: (B, H, t, j, m)."""
    log_keep = logsigmoid(gate) / temperature
    total = log_keep.cumsum(2)
    row = torch.arange(gate.shape[2])
    last = (row - delay).clamp(min=0)
    left = (total[:, :, last, None] - total[:, :, None]).clamp(max=0).exp() * (1 - log_keep.exp())[:, :, None]
    return torch.where((row[:, None] - delay >= row)[..., None], left, 0.0)


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, delay: int, temperature: float, scale: float, window: int = 0
) -> tuple[Tensor, Tensor]:
    """One softmax over slots and the last ``window`` tokens; out and the logarithm of the denominator."""
    group, row = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    k, v, gate = (t.repeat_interleave(group, dim=1) for t in (k, v, gate))
    pairs, left = scale * q @ k.transpose(2, 3), written_by_pairs(gate, temperature, delay)
    near = (row[:, None] - row >= 0) & (row[:, None] - row < window)
    logits = torch.cat([torch.einsum("bhtj,bhtjm->bhtm", pairs, left), torch.where(near, pairs, -math.inf)], dim=3)
    weights = logits.softmax(dim=3)
    slots = weights.shape[3] - q.shape[2]
    far = torch.einsum("bhtm,bhtjm->bhtj", weights[..., :slots], left)
    return (far + weights[..., slots:]) @ v, logits.logsumexp(dim=3)


def near_tokens(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float) -> tuple[Tensor, Tensor]:
    group, row = q.shape[1] // k.shape[1], torch.arange(q.shape[2])
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    near = (row[:, None] - row >= 0) & (row[:, None] - row < window)
    logits = torch.where(near, scale * q @ k.transpose(2, 3), -math.inf)
    return logits.softmax(dim=3) @ v, logits.logsumexp(dim=3)


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(one[1], other[1])
    return sum(out * (own - lse).exp()[..., None] for out, own in (one, other)), lse  # type: ignore[return-value]


def assert_close(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == wanted.shape
    if got.dtype == torch.bool or not got.numel():
        assert torch.equal(got, wanted)
        return
    finite = torch.isfinite(wanted)
    assert torch.equal(got[~finite], wanted[~finite])
    error, size = ((t.detach()[finite].abs().amax() if finite.any() else 0.0) for t in (got - wanted, wanted))
    assert float(error) <= tolerance * (1 + float(size))


def assert_same(got: tuple[Tensor, Tensor, SlotState], wanted: tuple[Tensor, Tensor, SlotState]) -> None:
    for one, other in zip((*got[:2], *got[2]), (*wanted[:2], *wanted[2]), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("delay", [0, 3, 64])
def test_N1_chunks_recurrence_and_quadratic_form(options: Any, chunk: int, delay: int) -> None:
    options(LIMITS, scan_chunk=chunk, scan_rows=1)
    inputs = problem()
    got = slot_scan(*inputs, delay=delay, **WORDS)
    assert_same(got, recurrence(*inputs, delay=delay, **WORDS))
    for one, other in zip(got, quadratic(*inputs, delay=delay, **WORDS), strict=False):
        assert_close(one, other)


@pytest.mark.parametrize("window", [1, 32])
def test_N1_merged_with_a_window_it_is_one_softmax(window: int) -> None:
    q, k, v, gate = problem()
    out, lse, _ = slot_scan(q, k, v, gate, delay=window, **WORDS)
    got = merged((out, lse), near_tokens(q, k, v, window=window, scale=0.7))
    for one, other in zip(got, quadratic(q, k, v, gate, delay=window, window=window, **WORDS), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("delay", [150, 151, 10_000])
def test_N2_a_window_over_everything_leaves_sinks_of_zeros(delay: int) -> None:
    q, k, v, gate = problem()
    out, lse, state = slot_scan(q, k, v, gate, delay=delay, **WORDS)
    assert bool((out == 0).all())
    assert_close(lse, torch.full_like(lse, math.log(5)))
    near = near_tokens(q, k, v, window=delay, scale=0.7)
    assert_close(merged((out, lse), near)[0], (near[1] - math.log(5)).sigmoid()[..., None] * near[0])
    assert_same((out, lse, state), recurrence(q, k, v, gate, delay=delay, **WORDS))  # the state holds all keys all the same
    masked = slot_scan(q, k, v, gate, delay=delay, empty="masked", **WORDS)
    assert bool((masked[0] == 0).all()) and bool((masked[1] == -math.inf).all())


def test_N3_without_delay_it_is_gated_slot_attention() -> None:
    q, k, v, gate = problem(1, 2, 2, 90)
    keep = gate.sigmoid() ** 0.5
    keys, values = (q.new_zeros(1, 2, 5, t.shape[3]) for t in (k, v))
    rows = []
    for t in range(90):
        a = keep[:, :, t, :, None]
        keys, values = (a * slots + (1 - a) * x[:, :, t, None] for slots, x in ((keys, k), (values, v)))
        weights = (0.7 * keys @ q[:, :, t, :, None]).softmax(dim=2)
        rows.append((weights * values).sum(dim=2))
    assert_close(slot_scan(q, k, v, gate, delay=0, **WORDS)[0], torch.stack(rows, dim=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate_at", [50.0, 200.0, math.inf])
def test_N4_gates_that_are_open_or_shut(dtype: torch.dtype, gate_at: float) -> None:
    q, k, v, gate = (t.to(dtype) for t in problem(kv_heads=4))
    words = {"delay": 3, "temperature": 1.0, "scale": 0.7}
    tiny = 1e-12 if dtype == torch.float64 else 1e-5
    kept = slot_scan(q, k, v, torch.full_like(gate, gate_at), **words)
    assert_close(kept[0], torch.zeros_like(v), tiny)
    assert_close(kept[1], torch.full_like(kept[1], math.log(5)), tiny)
    shut = slot_scan(q, k, v, torch.full_like(gate, -gate_at), **words)
    assert_close(shut[0][:, :, 3:], v[:, :, :-3], tiny)  # every slot is the token that was written last
    assert_close(shut[2].keys, k[:, :, -1:].expand(-1, -1, 5, -1), tiny)


def test_N4_gates_that_jump_neither_overflow_nor_lose_gradients() -> None:
    q, k, v, gate = problem()
    gate = torch.where(random(*gate.shape, seed=11) > 0, 50.0, -50.0)
    inputs = [t.float().requires_grad_() for t in (q, k, v, gate)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    words = {"delay": 2, "temperature": 1.0, "scale": 0.7}
    got, wanted = slot_scan(*inputs, **words), recurrence(*exact, **words)
    for one, other in zip((*got[:2], *got[2]), (*wanted[:2], *wanted[2]), strict=True):
        assert_close(one.double() if one.is_floating_point() else one, other, 1e-5)
    for one, other in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
        assert_close(one.double(), other, 1e-4)
    inputs[3] = torch.full_like(inputs[3], -math.inf).detach().requires_grad_()
    assert all(bool(torch.isfinite(t).all()) for t in gradients(slot_scan(*inputs, **words), inputs))


@pytest.mark.parametrize("delay, first", [(0, 64), (5, 1), (5, 4), (5, 5), (5, 6), (5, 100)])
def test_N5_a_prefill_goes_on_from_its_state(delay: int, first: int) -> None:
    """The state covers the tokens that left the window, a ring holds those of the window."""
    q, k, v, gate = problem()
    whole = slot_scan(q, k, v, gate, delay=delay, **WORDS)
    left = max(0, first - delay)
    one = slot_scan(q[:, :, :first], *(t[:, :, :left] for t in (k, v, gate)), delay=delay, **WORDS)
    assert one[2].written.all() == (left > 0)
    two = slot_scan(
        q[:, :, first:], *(t[:, :, left:] for t in (k, v, gate)), delay=delay, q_offset=first - left, state=one[2], **WORDS
    )
    assert_same((torch.cat([one[0], two[0]], dim=2), torch.cat([one[1], two[1]], dim=2), two[2]), whole)


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("empty", ["zero_sink", "masked"])
def test_N5_token_by_token_is_a_prefill(delay: int, empty: Any) -> None:
    q, k, v, gate = problem(length=70)
    words = {**WORDS, "delay": delay, "empty": empty}
    whole, whole_lse, last = slot_scan(q, k, v, gate, **words)
    state = None
    for t in range(70):
        begin = max(0, t - delay)  # the ring: delay tokens, and this one
        ring = [x[:, :, begin : t + 1] for x in (k, v, gate)]
        out, lse, _ = slot_scan(q[:, :, t : t + 1], *ring, q_offset=t - begin, state=state, **words)
        assert_close(out, whole[:, :, t : t + 1])
        assert_close(lse, whole_lse[:, :, t : t + 1])
        # a query with all keys before it, and no state: the same
        assert_close(slot_scan(q[:, :, t : t + 1], k, v, gate, q_offset=t, **words)[0], out)
        if t >= delay:
            _, _, state = slot_scan(q[:, :, :0], *(x[:, :, :1] for x in ring), state=state, **words)
    assert state is not None
    _, _, state = slot_scan(q[:, :, :0], *(x[:, :, 70 - delay :] for x in (k, v, gate)), state=state, **words)
    assert_same((whole, whole_lse, state), (whole, whole_lse, last))


@pytest.mark.parametrize("delay", [0, 3, 66])
@pytest.mark.parametrize("empty", ["zero_sink", "masked"])
def test_N6_documents_are_separate_runs(delay: int, empty: Any) -> None:
    q, k, v, gate = problem()
    ends = [0, 1, 4, 70, 150]
    documents = torch.tensor([n for n in range(4) for _ in range(ends[n], ends[n + 1])])[None]
    out, lse, last = slot_scan(q, k, v, gate, delay=delay, empty=empty, documents=documents, **WORDS)
    for begin, end in itertools.pairwise(ends):
        one = slot_scan(*(t[:, :, begin:end] for t in (q, k, v, gate)), delay=delay, empty=empty, **WORDS)
        assert_close(out[:, :, begin:end], one[0])
        assert_close(lse[:, :, begin:end], one[1])
    assert_same((out, lse, last), (out, lse, one[2]))


def test_N7_results_lie_between_nothing_and_the_values() -> None:
    q, k, v, gate = problem()
    out = slot_scan(q, k, torch.ones_like(v), gate, delay=3, **WORDS)[0]
    assert bool((out >= 0).all()) and bool((out <= 1 + 1e-12).all()) and float(out.max()) > 0.5
    mixed = slot_scan(q, k, v, gate, delay=3, **WORDS)[0]
    low, high = (t.repeat_interleave(2, dim=1)[:, :, None] for t in (v.amin(dim=2).clamp(max=0), v.amax(dim=2).clamp(min=0)))
    assert bool(((mixed >= low) & (mixed <= high)).all())


def gradients(results: tuple[Any, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of out, lse where it is finite, and the state, along fixed directions; zeros where nothing depends on a leaf."""
    floats = [torch.where(torch.isfinite(t), t, 0.0) for t in (*results[:2], *results[2][:2])]
    total = sum((t * random(*t.shape, seed=5).to(t)).sum() for t in floats) + sum(0 * t.nan_to_num(0, 0, 0).sum() for t in leaves)
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("window", [1, 40])
def test_N8_gradients_of_the_joint_softmax(window: int) -> None:
    leaves = [t.requires_grad_() for t in problem()]
    q, k, v, gate = leaves
    along, along_lse = random(2, 4, 150, 3, seed=7), random(2, 4, 150, seed=7)
    got = merged(slot_scan(q, k, v, gate, delay=window, **WORDS)[:2], near_tokens(q, k, v, window=window, scale=0.7))
    wanted = quadratic(q, k, v, gate, delay=window, window=window, **WORDS)
    found, exact = (
        torch.autograd.grad((out * along).sum() + (lse * along_lse).sum(), leaves) for out, lse in (got, wanted)
    )  # fmt: skip
    for one, other in zip(found, exact, strict=True):
        assert_close(one, other)


def test_N8_finite_differences(options: Any) -> None:
    options(LIMITS, scan_chunk=2, scan_rows=1)
    q, k, v, gate = problem(1, 2, 1, 6, 2, 2, 2)
    before = [random(1, 1, 2, 2, seed=seed) for seed in (4, 5)]

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        given = SlotState(*state, torch.ones(1, 1).bool())
        out, lse, after = slot_scan(q[:, :, 1:5], k, v, gate, delay=2, q_offset=1, state=given, **WORDS)
        return out, lse, after.keys, after.values

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (q, k, v, gate, *before)])


def test_N8_tokens_in_the_window_get_nothing_through_the_slots() -> None:
    q, k, v, gate = leaves = [t.requires_grad_() for t in problem()]
    out, lse, _ = slot_scan(q, k, v, gate, delay=20, **WORDS)
    for grad in torch.autograd.grad(out.square().sum() + lse.sum(), leaves)[1:]:
        assert bool((grad[:, :, -20:] == 0).all()) and bool((grad[:, :, :-20] != 0).all())


def test_N8_only_what_requires_gradients_gets_them() -> None:
    q, k, v, gate = problem(length=20)
    out, lse, _ = slot_scan(q.requires_grad_(), k, v, gate, delay=1, **WORDS)
    lse.sum().backward()
    assert q.grad is not None and out.requires_grad and k.grad is None
    _, _, state = slot_scan(q.detach(), k, v, gate.requires_grad_(), delay=1, **WORDS)
    state.keys.sum().backward()
    assert gate.grad is not None and bool((gate.grad != 0).all())


def golden_inputs() -> list[Tensor]:
    row, column = torch.arange(6, dtype=torch.float64)[:, None], torch.arange(2, dtype=torch.float64)
    return [torch.sin(a + 0.7 * row + 1.3 * column)[None, None] for a in (0.1, 0.5, 0.9, 1.7)]


def turned(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None]
    return x * angle.cos() + torch.stack([-x[..., 1], x[..., 0]], dim=3) * angle.sin()


def test_N1_golden_values() -> None:
    q, k, v, gate = golden_inputs()
    words = {"temperature": 8.0, "scale": 2**-0.5}

    def joint(delay: int, near: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out, lse, _ = slot_scan(q, k, v, gate, delay=delay, **words)
        both, total = merged((out, lse), near)
        return both[0, 0], (lse - total).exp()[0, 0]

    def assert_golden(got: Tensor, wanted: Any) -> None:
        assert torch.allclose(got, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)

    plain = near_tokens(q, k, v, window=2, scale=2**-0.5)
    out, share = joint(2, plain)
    assert_golden(
        out,
        [
            [0.395441, 0.408147], [0.622258, 0.365622], [0.603461, -0.035955],
            [0.329678, -0.388988], [-0.062028, -0.597169], [-0.466787, -0.557507],
        ],
    )  # fmt: skip
    assert_golden(share, [0.495177, 0.301990, 0.332564, 0.382825, 0.362271, 0.302169])
    _, _, state = slot_scan(q[:, :, :0], *(t[:, :, :4] for t in (k, v, gate)), delay=2, **words)
    assert_golden(state.keys[0, 0], [[0.181992, -0.035300], [0.296850, -0.009619]])
    assert_golden(state.values[0, 0], [[0.133684, -0.109881], [0.237437, -0.129870]])
    out, share = joint(2, near_tokens(turned(q), turned(k), v, window=2, scale=2**-0.5))
    assert_golden(out[5], [-0.463282, -0.535192])
    assert_golden(share[5], 0.318967)
    assert_golden(joint(0, plain)[0][5], [-0.499544, -0.581816])


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any], int, int]:
    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    batch, kv_heads, group, width, v_width, slots = (number(1, high) for high in (2, 2, 3, 3, 3, 4))
    kv_len = number(0, 30)
    delay = draw(st.sampled_from([0, 0, 1, 2, 7, 40]))
    documents = None
    if draw(st.booleans()):
        steps = random(draw(st.sampled_from([1, batch])), kv_len, seed=number(0, 99)) > draw(st.sampled_from([0.0, 1.5]))
        documents = steps.long().cumsum(1)
    last = kv_len + (0 if documents is not None else delay)  # positions that see the last key, or none beyond
    q_offset = number(0, last)
    q_len, seed = number(0, min(12, last - q_offset)), number(0, 1000)
    tensors = [
        random(batch, kv_heads * group, q_len, width, seed=seed),
        random(batch, kv_heads, kv_len, width, seed=seed + 1),
        random(batch, kv_heads, kv_len, v_width, seed=seed + 2),
        random(batch, kv_heads, kv_len, slots, seed=seed + 3) * draw(st.sampled_from([1.0, 8.0])),
    ]
    state = None
    if draw(st.booleans()):
        written = random(batch, kv_heads, seed=seed) > 0
        state = SlotState(
            *(random(batch, kv_heads, slots, size, seed=seed + 4) * written[..., None, None] for size in (width, v_width)),
            written,
        )
    words = {
        "delay": delay, "temperature": draw(st.sampled_from([1.0, 8.0])), "scale": 0.5, "q_offset": q_offset, "state": state,
        "empty": draw(st.sampled_from(["zero_sink", "masked"])), "documents": documents,
    }  # fmt: skip
    return tensors, words, draw(st.sampled_from([1, 2, 8, 64])), draw(st.sampled_from([1, 50, 4096]))


@given(calls())
@settings(max_examples=80)
def test_random_calls_are_the_recurrence_with_gradients(call: tuple[list[Tensor], dict[str, Any], int, int]) -> None:
    tensors, words, chunk, rows = call
    state = words["state"]
    leaves = [t.requires_grad_() for t in (*tensors, *(state[:2] if state else ()))]
    with LIMITS.using(scan_chunk=chunk, scan_rows=rows):
        got, wanted = slot_scan(*tensors, **words), recurrence(*tensors, **words)
        assert_same(got, wanted)
        for one, other in zip(gradients(got, leaves), gradients(wanted, leaves), strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_float64_rounded_once(dtype: torch.dtype) -> None:
    q, k, v, gate = (t.to(dtype) for t in problem())
    got = slot_scan(q, k, v, gate, delay=3, **WORDS)
    exact = recurrence(*(t.double() for t in (q, k, v, gate)), delay=3, **WORDS)
    plain = recurrence(*(t.float() for t in (q, k, v, gate)), delay=3, **WORDS)
    assert (got[0].dtype, got[1].dtype, got[2].keys.dtype) == (dtype, torch.float32, torch.float32)
    kinds = (dtype, torch.float32, torch.float32, torch.float32)
    for ours, theirs, wanted, kind in zip(*((*r[:2], *r[2][:2]) for r in (got, plain, exact)), kinds, strict=True):
        error = (theirs.double() - wanted).abs().max() + torch.finfo(torch.float32).eps * wanted.abs().max()
        assert bool(((ours.double() - wanted).abs() <= 2 * (error + torch.finfo(kind).eps * wanted.abs())).all())


class Sizes(TorchDispatchMode):
    """The most numbers any operation makes a tensor of."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.largest = max(self.largest, result.numel())
        return result


def test_decode_copies_no_cache_and_no_gradient_keeps_nothing() -> None:
    q, k, v, gate = (random(1, heads, n, 8, dtype=torch.bfloat16) for heads, n in ((4, 1), *[(1, 40_000)] * 3))
    words = {"delay": 7, "q_offset": 39_999, **WORDS}
    with Sizes() as sizes:
        slot_scan(q, k, v, gate, **words)
    assert 0 < sizes.largest < k.numel() / 2
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        with torch.no_grad():
            slot_scan(q, k.requires_grad_(), v, gate, **words)
        assert not kept
        slot_scan(q, k, v, gate, **words)
    states = 8 * 16 * (40_000 * 4 // LIMITS.now.scan_rows + 5)
    assert 0 < sum(kept) <= q.numel() + 3 * k.numel() + states


def test_autocast_changes_nothing() -> None:
    leaves = [t.float().requires_grad_() for t in problem()]

    def run() -> list[Tensor]:
        out, lse, state = slot_scan(*leaves, delay=2, **WORDS)
        return [out, lse, *state, *torch.autograd.grad(out.sum() + lse.sum() + state.values.sum(), leaves)]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def refused(**changes: Any) -> str:
    names = ("q", "k", "v", "gate")
    words = dict(zip(names, (t.float() for t in problem(length=10)), strict=True)) | {"delay": 2, **WORDS} | changes
    with pytest.raises((ShapeError, UnsupportedError)) as caught:
        slot_scan(**words)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gate": torch.zeros(2, 4, 10, 5)}, "gate must have the shape (B, Hkv, Skv, M), here (2, 2, 10, any); got (2, 4, 10, 5)"),
        ({"gate": torch.zeros(2, 2, 10, 0)}, "gate has no slots"),
        ({"gate": torch.zeros(2, 2, 10, 5, dtype=torch.int64)}, "gate must be float16, bfloat16, float32 or float64; got torch.int64"),
        ({"v": torch.zeros(2, 2, 9, 3)}, "k and v must have the same length"),
        ({"delay": -1}, "delay must be a whole number of at least 0; got -1"),
        ({"delay": 1.5}, "delay must be a whole number of at least 0; got 1.5"),
        ({"temperature": 0}, "temperature must be a positive number; got 0"),
        ({"empty": "none"}, "empty must be 'zero_sink' or 'masked'; got 'none'"),
        ({"q_offset": 3}, "the last of 10 queries sees keys up to position 10"),
        ({"state": torch.zeros(2, 2, 5, 4)}, "state must be a SlotState (keys, values, written) or None; got Tensor"),
        (
            {"state": SlotState(torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 5, 3), torch.ones(2, 2).bool())},
            "state.keys must have the shape (B, Hkv, M, D), here (2, 2, 5, 4); got (2, 2, 5, 3)",
        ),
        (
            {"state": SlotState(torch.zeros(2, 2, 5, 4), torch.zeros(2, 2, 5, 3), torch.ones(2, 2))},
            "state.written must be bool; got torch.float32",
        ),
        ({"documents": torch.zeros(1, 10).long(), "q_offset": 1}, "queries stand at positions up to 10"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refused(**changes)


@pytest.mark.parametrize("batch, q_len, kv_len", [(0, 3, 3), (1, 0, 3), (1, 0, 0), (1, 2, 0)])
def test_sizes_of_zero(batch: int, q_len: int, kv_len: int) -> None:
    leaves = [torch.ones(batch, 2, n, 4, requires_grad=True) for n in (q_len, kv_len, kv_len, kv_len)]
    out, lse, state = slot_scan(*leaves, delay=2, **WORDS)
    assert (
        out.shape == (batch, 2, q_len, 4)
        and lse.shape == (batch, 2, q_len)
        and bool(state.written.all()) == (kv_len > 0 or not batch)
    )
    (out.sum() + lse.sum() + state.keys.sum()).backward()
    assert all(t.grad is not None and bool(torch.isfinite(t.grad).all()) for t in leaves)
