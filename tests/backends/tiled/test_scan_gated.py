"""Scans whose decays come with the data against the recurrence, token by token: results, states, gradients, for chunks of any size."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_gated import gated_scan
from tests.programs.gated_loop import loop
from tests.programs.linear_recipe import checksum, l2, recipe

Tensor = torch.Tensor


def gradients(run: Any, inputs: dict[str, Tensor], **words: Any) -> dict[str, Tensor]:
    """Results, and the gradients of a function of both."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out, state = run(**leaves, **words)
    total = sum((t * torch.cos(torch.arange(t.numel()).to(t)).view_as(t)).sum() for t in (out, state))
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "state": state.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, x in wanted.items():
        assert got[name].shape == x.shape, name
        if x.numel():
            assert float((got[name] - x).abs().max()) <= tolerance * (1 + float(x.abs().max())), name


@st.composite
def calls(draw: Any) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Inputs, words and the size of a chunk."""
    batch, keys = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 5, 16, 33]))
    shapes = [
        (1, 1, 1, 1, 1),
        (2, 2, 2, 2, 2),
        (4, 2, 2, 2, 1),
        (2, 2, 4, 4, 2),
        (1, 1, 2, 2, 2),
        (4, 2, 2, 1, 2),
        (2, 1, 1, 2, 1),
    ]
    hq, hk, hv, hg, hb = draw(st.sampled_from(shapes))
    vector, rule = draw(st.booleans()), draw(st.sampled_from(["plain", "delta", "erase"]))
    offset = draw(st.integers(0, keys - 1))
    documents = draw(st.booleans())
    rows = draw(st.integers(1, keys - offset))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    strength = draw(st.sampled_from([0.0, 0.1, 1.0, 20.0]))
    x = {
        "q": random(batch, hq, rows, 4), "k": l2(random(batch, hk, keys, 4)), "v": random(batch, hv, keys, 3),
        "g": -strength * random(draw(st.sampled_from([1, batch])), hg, keys, *([4] if vector else [])).abs(),
    }  # fmt: skip
    if rule != "plain":
        x["beta"] = 2 * torch.sigmoid(random(batch, hb, keys))
    if rule == "erase":
        x["erase"] = l2(random(draw(st.sampled_from([1, batch])), hb, keys, 4))
    if draw(st.booleans()):
        x["state"] = random(batch, max(hk, hv, hg, 1 if rule == "plain" else hb), 4, 3)
    words: dict[str, Any] = {"scale": 0.3, "q_offset": offset}
    if documents:
        words["documents"] = torch.randint(0, 3, (batch, keys), generator=generator).sort(-1).values
    return x, words, draw(st.sampled_from([1, 2, 4, 8, 64]))


def run_gated(g: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    return gated_scan(log_decay=g, **inputs)


@given(calls(), st.sampled_from([1, 16384]))
@settings(max_examples=80)
def test_random_calls_are_the_recurrence(call: Any, at_once: int) -> None:
    inputs, words, chunk = call
    with LIMITS.using(scan_chunk=chunk, gated_rows=at_once, scan_tokens=0):
        assert_same(gradients(run_gated, inputs, **words), gradients(loop, inputs, **words))
    with torch.no_grad(), LIMITS.using(scan_tokens=100):
        for one, other in zip(run_gated(**inputs, **words), loop(**inputs, **words), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_T17_documents_and_a_state(options: Any) -> None:
    r = recipe()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3, 3, 3], [5] * 7 + [6] * 6])
    for chunk in (1, 4, 16):
        options(LIMITS, scan_chunk=chunk)
        leaves = [x.clone().requires_grad_() for x in (l2(r.q), l2(r.k), r.v, r.gv, r.beta, r.state)]
        out, last = gated_scan(*leaves[:5], scale=0.5, state=leaves[5], documents=documents)
        grads = torch.autograd.grad((r.w * out).sum() + (r.state.cos() * last).sum(), leaves)
        found = [checksum(out), float(out[1, -1, 7, 1].detach()), checksum(last), *map(checksum, grads)]
        wanted = [
            2.1959037593,
            0.2597792123,
            -0.1168525547,
            2.0824027692,
            0.4305915616,
            -0.3604831061,
            0.8268677508,
            0.6666908203,
        ]
        assert found == pytest.approx([*wanted, -0.1709186415], abs=6e-11)
        assert not grads[3][0, :, [3, 8, 9]].any() and not grads[3][1, :, 7].any()


def long(strength: float = 1.0) -> dict[str, Tensor]:
    r = recipe(batch=1, heads=3, length=130, width=8, width_v=5)
    return {"q": l2(r.q), "k": l2(r.k), "v": r.v, "gs": strength * r.gs, "gv": strength * r.gv, "beta": 2 * r.beta}


GOLDEN = {"gs": (5.7279880030, 0.0033793601, -0.2598908037), "gv": (4.5406154579, -0.0261789347, -0.6148663866)}


@pytest.mark.parametrize("chunk", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("gate", ["gs", "gv"])
def test_T24_chunks_of_any_size(options: Any, gate: str, chunk: int) -> None:
    options(LIMITS, scan_chunk=chunk)
    x = long()
    out, state = gated_scan(x["q"], x["k"], x["v"], x[gate], x["beta"], scale=8**-0.5)
    assert [checksum(out), float(out[0, 2, 129, 4]), checksum(state)] == pytest.approx(GOLDEN[gate], abs=6e-11)
    for length in (1, 63, 64, 65, 130):
        parts = (t[:, :, :length] for t in (x["q"], x["k"], x["v"], x[gate], x["beta"]))
        torch.testing.assert_close(gated_scan(*parts, scale=8**-0.5)[0], out[:, :, :length], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["gs", "gv"])
def test_T25_splits_are_one_call(gate: str) -> None:
    x = long()
    inputs = [x["q"], x["k"], x["v"], x[gate], x["beta"]]
    whole, last = gated_scan(*inputs, scale=0.3)
    for cuts in ([0, 5, 130], [0, 1, 2, 12, 130], list(range(131))):
        state, parts = None, []
        for begin, end in itertools.pairwise(cuts):
            out, state = gated_scan(*(t[:, :, begin:end] for t in inputs), scale=0.3, state=state)
            parts.append(out)
        assert state is not None
        torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gate", "wanted"), [("gs", 5.9521849226), ("gv", 5.6566253489)])
def test_T26_hard_gates_in_float32(gate: str, wanted: float) -> None:
    x = long(20.0)
    inputs = {"q": x["q"], "k": x["k"], "v": x["v"], "g": x[gate], "beta": x["beta"]}
    exact = gradients(loop, inputs, scale=8**-0.5)
    assert checksum(exact["out"]) == pytest.approx(wanted, abs=6e-11)
    got = gradients(run_gated, {name: t.float() for name, t in inputs.items()}, scale=8**-0.5)
    for name, t in exact.items():
        assert bool(got[name].isfinite().all())
        assert float((got[name] - t).abs().max()) < 5e-6 * max(1.0, float(t.abs().max())), name


@pytest.mark.parametrize("gate", ["gs", "gv"])
def test_T28_later_inputs_change_no_bit(gate: str) -> None:
    x = {name: t[:, :, :40] for name, t in long().items()}
    changed = {name: torch.cat([t[:, :, :7], 0.5 * t[:, :, 7:].flip(2)], 2) for name, t in x.items()}

    def rows(x: dict[str, Tensor], **words: Any) -> Tensor:
        return gated_scan(x["q"], x["k"], x["v"], x[gate], x["beta"], scale=0.3, **words)[0][:, :, :7]

    assert torch.equal(rows(x), rows(changed))
    for bad in (torch.nan, torch.inf):
        assert torch.equal(rows({n: torch.cat([t[:, :, :7], torch.full_like(t[:, :, 7:], bad if n in "kv" else -1.0)], 2) for n, t in
                                 x.items()}).isnan(), torch.zeros_like(rows(x), dtype=torch.bool))  # fmt: skip


def test_T30_linear_in_values_and_a_memory_of_one_token() -> None:
    x = long()

    def out(v: Tensor, g: Tensor = x["gv"]) -> Tensor:
        return gated_scan(x["q"], x["k"], v, g, x["beta"], scale=0.3)[0]

    torch.testing.assert_close(
        out(2 * x["v"] - 3 * x["v"].flip(2)), 2 * out(x["v"]) - 3 * out(x["v"].flip(2)), rtol=1e-11, atol=1e-11
    )
    gone = out(x["v"], torch.full_like(x["gv"], -torch.inf))
    alone = 0.3 * (x["q"] * x["k"]).sum(-1, keepdim=True) * x["beta"][..., None] * x["v"]
    torch.testing.assert_close(gone, alone, rtol=1e-11, atol=1e-11)


def test_a_step_of_decoding_is_no_second_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the state with the output."""
    from sparsedsl.backends.tiled import backend

    calls: list[int] = []
    monkeypatch.setattr(backend, "gated_scan", lambda *t, **w: (calls.append(t[1].shape[2]), gated_scan(*t, **w))[1])
    x = long()
    g = sd.input("g", "batch heads keys")
    attn = sd.compile(sd.linear(log_decay=g), backend="tiled")
    _, state = attn(x["q"], x["k"], x["v"], g=x["gs"], return_state=True)
    _, state = attn(*(x[n][:, :, :1] for n in "qkv"), g=x["gs"][:, :, :1], state=state, return_state=True)
    assert calls == [130, 1]


def test_half_precision_keeps_gates_and_states_in_float32() -> None:
    x = long()
    low = [x[name].bfloat16() for name in ("q", "k", "v")]
    out, state = gated_scan(*low, x["gs"].float(), x["beta"].float(), scale=0.3)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact = gated_scan(*(t.double() for t in low), x["gs"], x["beta"], scale=0.3)[0]
    assert float((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < 5e-3
