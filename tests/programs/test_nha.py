"""Native hybrid attention as a compiled program: the reference tests N1 to N9 of its specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.backends.tiled.limits import LIMITS

Tensor = torch.Tensor
B, HQ, H, T, D, M = 2, 4, 2, 29, 6, 5


@pytest.fixture(scope="module")
def problem(draw: Any) -> Any:
    """q, k, v, gate."""

    def make(length: int = T, *, heads: int = HQ, kv_heads: int = H, slots: int = M) -> dict[str, Tensor]:
        sizes = {"q": (heads, D), "k": (kv_heads, D), "v": (kv_heads, D), "gate": (kv_heads, slots)}
        return {name: draw(B, n, length, size, seed=i) for i, (name, (n, size)) in enumerate(sizes.items())}

    return make


def rotated(x: Tensor) -> Tensor:
    """Rotary positions, theta 1e4, over all of the last dimension."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 1e4 ** (-torch.arange(half, dtype=x.dtype) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def recurrence(t: dict[str, Tensor], window: int, delay: int | None = None, temperature: float = 8.0) -> tuple[Tensor, Tensor]:
    """Token by token: slots take in what left the window, and one softmax reads both; out and the slots' share."""
    q, gate = t["q"], t["gate"]
    near_q, near_k = t.get("q_rope", q), t.get("k_rope", t["k"])
    group, delay = q.shape[1] // gate.shape[1], window if delay is None else delay
    keep = gate.sigmoid() ** (1 / temperature)
    keys = torch.zeros(*gate.shape[:2], gate.shape[3], q.shape[3], dtype=q.dtype)
    values = torch.zeros_like(keys)
    outs, shares = [], []
    for row in range(q.shape[2]):
        if row >= delay:
            a, e = keep[:, :, row - delay, :, None], row - delay
            keys = a * keys + (1 - a) * t["k"][:, :, e, None]
            values = a * values + (1 - a) * t["v"][:, :, e, None]
        near = slice(max(0, row - window + 1), row + 1 if window else 0)
        repeat_kv = [x.repeat_interleave(group, 1) for x in (keys, values, near_k[:, :, near], t["v"][:, :, near])]
        far = torch.einsum("bhd,bhmd->bhm", q[:, :, row], repeat_kv[0])
        here = torch.einsum("bhd,bhjd->bhj", near_q[:, :, row], repeat_kv[2])
        p = (torch.cat([far, here], -1) * q.shape[3] ** -0.5).softmax(-1)
        outs.append(torch.einsum("bhj,bhjd->bhd", p, torch.cat([repeat_kv[1], repeat_kv[3]], 2)))
        shares.append(p[..., : far.shape[-1]].sum(-1))
    return torch.stack(outs, 2), torch.stack(shares, 2)


def trigonometric(a: float) -> Tensor:
    """``x_ij = sin(a + 0.7 i + 1.3 j)``, six rows of two."""
    i, j = torch.arange(6.0, dtype=torch.float64)[:, None], torch.arange(2.0, dtype=torch.float64)
    return torch.sin(a + 0.7 * i + 1.3 * j)[None, None]


GOLDEN = {"q": trigonometric(0.1), "k": trigonometric(0.5), "v": trigonometric(0.9), "gate": trigonometric(1.7)}


def test_golden_values(backend: str, assert_close: Any) -> None:
    wanted = torch.tensor(
        [[0.395441, 0.408147], [0.622258, 0.365622], [0.603461, -0.035955], [0.329678, -0.388988], [-0.062028, -0.597169],
         [-0.466787, -0.557507]], dtype=torch.float64,
    )  # fmt: skip
    attn = sd.compile(sd.patterns.nha(slots=2, window=2), backend=backend)
    out, lse = attn(**GOLDEN, return_lse=True)
    assert_close(out[0, 0], wanted, 1e-6)
    near = sd.compile(sd.patterns.sliding_window(2), backend=backend)(*(GOLDEN[n] for n in "qkv"), return_lse=True)[1]
    share = torch.tensor([0.495177, 0.301990, 0.332564, 0.382825, 0.362271, 0.302169], dtype=torch.float64)
    assert_close(1 - torch.exp(near - lse)[0, 0], share, 1e-6)
    turned = GOLDEN | {"q_rope": rotated(GOLDEN["q"]), "k_rope": rotated(GOLDEN["k"])}
    out, lse = attn(**turned, return_lse=True)
    assert_close(out[0, 0, 5], torch.tensor([-0.463282, -0.535192], dtype=torch.float64), 1e-6)
    doubled = sd.joint(
        sd.recall(sd.slots(sd.input("gate", "batch kv_heads keys 2"), delay=0, temperature=8.0)), sd.patterns.sliding_window(2)
    )
    out = sd.compile(doubled, backend=backend)(**GOLDEN)
    assert_close(out[0, 0, 5], torch.tensor([-0.499544, -0.581816], dtype=torch.float64), 1e-6)


def test_golden_state(assert_close: Any) -> None:
    """Slots at the end of the golden run: what the state before the last two rows becomes with the rows up to 3."""
    attn = sd.compile(sd.patterns.nha(slots=2, window=2), backend="tiled")
    _, state = attn(**GOLDEN, return_state=True)
    (slots,) = state.recurrent.values()
    wanted = [[[0.181992, -0.035300], [0.296850, -0.009619]], [[0.133684, -0.109881], [0.237437, -0.129870]]]
    assert_close(torch.stack([slots.keys[0, 0], slots.values[0, 0]]).double(), torch.tensor(wanted, dtype=torch.float64), 1e-6)
    assert state.tokens == 6 and state.recent["k"].shape[2] == 2


@pytest.mark.parametrize("window", [1, 4, 28])
@pytest.mark.parametrize("rope", [False, True])
def test_N1_the_recurrence(problem: Any, backend: str, assert_close: Any, window: int, rope: bool) -> None:
    t = problem()
    if rope:
        t |= {"q_rope": rotated(t["q"]), "k_rope": rotated(t["k"])}
    out = sd.compile(sd.patterns.nha(M, window), backend=backend)(**t)
    assert_close(out, recurrence(t, window)[0])


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_N1_chunks_of_any_size(problem: Any, assert_close: Any, options: Any, chunk: int) -> None:
    options(LIMITS, scan_chunk=chunk)
    t = problem()
    assert_close(sd.compile(sd.patterns.nha(M, 4), backend="tiled")(**t), recurrence(t, 4)[0])


def test_N2_a_window_over_everything_leaves_zero_sinks(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    qkv = [t[name] for name in "qkv"]
    plain, lse = sd.compile(sd.kv_idx <= sd.q_idx, backend="reference")(*qkv, return_lse=True)
    share = torch.sigmoid(lse - math.log(M))[..., None] * plain
    assert_close(sd.compile(sd.patterns.nha(M, T + 3), backend=backend)(**t), share)
    assert_close(sd.compile(sd.patterns.nha(M, None), backend=backend)(*qkv), share)
    sinks = torch.softmax(torch.cat([torch.zeros(M, dtype=torch.float64).expand(*lse.shape, M), lse[..., None]], -1), -1)
    assert_close(sinks[..., -1:] * plain, share)
    assert_close(sd.compile(sd.patterns.nha(M, None, "masked"), backend=backend)(*qkv), plain)


def test_N3_without_a_window_it_is_gated_slot_attention(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    assert_close(sd.compile(sd.patterns.nha(M, 0), backend=backend)(**t), recurrence(t, 0, delay=0)[0])


def test_N4_gates_that_are_open_or_shut(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    attn = sd.compile(sd.patterns.nha(M, 4), backend=backend)
    near, lse = sd.compile(sd.patterns.sliding_window(4), backend="reference")(*(t[n] for n in "qkv"), return_lse=True)
    shut = attn(**(t | {"gate": torch.full_like(t["gate"], 1e4)}))  # nothing is ever written
    assert_close(shut, torch.sigmoid(lse - math.log(M))[..., None] * near)
    wide = t | {"gate": torch.full_like(t["gate"], -1e4)}  # every slot is the token that left the window last
    last = sd.compile(sd.attend(sd.q_idx - sd.kv_idx == 4, sd.score + math.log(M)), backend="reference")
    evicted = last(*(t[n] for n in "qkv"), return_lse=True)
    total = torch.logaddexp(evicted[1], lse)
    parts = evicted[0] * (evicted[1] - total).exp()[..., None] + near * (lse - total).exp()[..., None]
    assert_close(attn(**wide)[:, :, 4:], parts[:, :, 4:])


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("empty", ["zero_sink", "masked"])
def test_N5_prefill_and_decode(window: int, empty: str) -> None:
    """Chunks of 3 (less than the window), 7 (the window), 11, and single tokens, each going on from a state."""
    case = kit.AttentionCase(batch=2, heads=4, kv_heads=2, q_len=23, kv_len=23)
    attn = sd.compile(sd.patterns.nha(M, window, empty), backend="tiled")
    done = kit.assert_prefill_equals_decode(attn, case, chunks=(3, 7, 11))
    assert {"growing cache", "state, chunks of 3", "state, chunks of 7", "state, token by token"} <= set(done)


def with_documents(window: int, empty: str = "zero_sink") -> Any:
    ids = sd.table("ids", monotone=True)
    named = sd.input("documents", "batch keys")
    memory = sd.slots(sd.input("gate", f"batch kv_heads keys {M}"), delay=window, temperature=8.0, empty=empty, documents=named)
    return sd.joint(sd.recall(memory), sd.patterns.sliding_window(window) & (ids[sd.q_idx] == ids[sd.kv_idx]))


@pytest.mark.parametrize("empty", ["zero_sink", "masked"])
def test_N6_packed_documents_are_separate_runs(problem: Any, backend: str, assert_close: Any, empty: str) -> None:
    t, lengths = problem(), (3, 4, 1, 21)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    out = sd.compile(with_documents(4, empty), backend=backend)(**t, documents=ids[None], ids=ids)
    alone = sd.compile(sd.patterns.nha(M, 4, empty), backend=backend)
    start = 0
    for length in lengths:
        part = {name: x[:, :, start : start + length] for name, x in t.items()}
        assert_close(out[:, :, start : start + length], alone(**part))
        start += length


def test_N6_left_pads_are_a_document_of_their_own(problem: Any, backend: str, assert_close: Any) -> None:
    t, pads = problem(), 6
    ids = (torch.arange(T) >= pads).long()
    out = sd.compile(with_documents(4), backend=backend)(**t, documents=ids[None], ids=ids)
    assert_close(
        out[:, :, pads:], sd.compile(sd.patterns.nha(M, 4), backend=backend)(**{n: x[:, :, pads:] for n, x in t.items()})
    )


def test_N7_results_lie_between_nothing_and_the_values(problem: Any, backend: str) -> None:
    t = problem() | {"v": torch.ones(B, H, T, 1, dtype=torch.float64)}
    out = sd.compile(sd.patterns.nha(M, 4), backend=backend)(**t)
    assert ((out > 0) & (out < 1)).all()
    t = problem()
    out = sd.compile(sd.patterns.nha(M, 4), backend=backend)(**t)
    seen = torch.cummax(t["v"].clamp(min=0), 2).values, torch.cummin(t["v"].clamp(max=0), 2).values
    high, low = (x.repeat_interleave(HQ // H, 1) for x in seen)
    assert ((out <= high) & (out >= low)).all()


def test_N8_gradients_of_the_joint_softmax(problem: Any, backend: str, assert_close: Any, grads: Any) -> None:
    t = problem(17)
    t |= {"q_rope": rotated(t["q"]), "k_rope": rotated(t["k"])}

    def formula(return_lse: bool, **t: Tensor) -> Tensor:
        return recurrence(t, 4)[0]

    got, wanted = grads(sd.compile(sd.patterns.nha(M, 4), backend=backend), t), grads(formula, t)
    for name, slope in wanted.items():
        assert_close(got[name], slope)
        assert (slope != 0).any(), name


def test_N8_the_last_tokens_learn_nothing_through_slots(problem: Any, backend: str, grads: Any) -> None:
    slopes = grads(sd.compile(sd.patterns.nha(M, 4), backend=backend), problem())
    assert (slopes["gate"][:, :, -4:] == 0).all() and (slopes["gate"][:, :, :-4] != 0).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "slots", "window"), [(1, 1, 16, 32), (4, 1, 64, 32), (8, 1, 80, 64), (4, 4, 64, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_N9_low_precision(problem: Any, heads: int, kv_heads: int, slots: int, window: int, dtype: torch.dtype) -> None:
    t = {name: x.to(dtype) for name, x in problem(90, heads=heads, kv_heads=kv_heads, slots=slots).items()}
    attn = sd.compile(sd.patterns.nha(slots, window), backend="tiled")
    exact = recurrence({name: x.double() for name, x in t.items()}, window)[0]
    error = (attn(**t).double() - exact).norm() / exact.norm()
    assert error <= (2e-2 if dtype == torch.bfloat16 else 3e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "empty"), [(0, "masked"), (3, "zero_sink"), (3, "masked")])
def test_N9_gradients_in_every_precision(problem: Any, dtype: torch.dtype, window: int, empty: str) -> None:
    t = {name: x.to(dtype) for name, x in problem(20).items()}
    done = kit.assert_matches_reference(sd.compile(sd.patterns.nha(M, window, empty), backend="tiled"), **t)
    assert done == ("out", "lse", "dq", "dk", "dv", "dgate")


def test_causal(backend: str) -> None:
    case = kit.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=19, kv_len=19)
    kit.assert_causal(sd.compile(sd.patterns.nha(M, 4), backend=backend), case)


def test_flex_refuses_recurrences(problem: Any) -> None:
    with pytest.raises(sd.UnsupportedError, match="no state that runs along the keys"):
        sd.compile(sd.patterns.nha(M, 4), backend="flex")(**{name: x.float() for name, x in problem().items()})
