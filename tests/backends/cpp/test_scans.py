"""Scans in C++ against those in torch, which are compared with plain loops: results, states and all gradients, from state to state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.backends.cpp import scan_gated as gated_cpp
from sparsedsl.backends.cpp import scan_linear as linear_cpp
from sparsedsl.backends.cpp import scan_slots as slots_cpp
from sparsedsl.backends.tiled import scan_gated as gated_torch
from sparsedsl.backends.tiled import scan_linear as linear_torch
from sparsedsl.backends.tiled import scan_slots as slots_torch
from sparsedsl.runtime.scan_calls import SlotState

Tensor = torch.Tensor
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 8e-2}


@st.composite
def sizes(draw: Any) -> dict[str, Any]:
    """Of a call, which may begin late and end early."""
    kv_len = draw(st.sampled_from([1, 7, 64, 65, 150]))
    documents = draw(st.booleans())
    offset = 0 if documents else min(draw(st.sampled_from([0, 3, 60])), kv_len - 1)
    return {
        "batch": draw(st.integers(1, 2)), "kv_heads": draw(st.integers(1, 2)), "group": draw(st.integers(1, 3)), "kv_len": kv_len,
        "offset": offset, "rows": draw(st.sampled_from(sorted({1, kv_len - offset, max(1, (kv_len - offset) // 2)}))),
        "width": draw(st.sampled_from([1, 8, 20, 64])), "width_v": draw(st.sampled_from([3, 16, 64])),
        "dtype": draw(st.sampled_from(list(TOLERANCE))), "state": draw(st.booleans()), "documents": documents,
        "seed": draw(st.integers(0, 999)),
    }  # fmt: skip


def qkv(x: dict[str, Any], generator: torch.Generator) -> list[Tensor]:
    heads = x["kv_heads"] * x["group"]
    shapes = (heads, x["rows"], x["width"]), (x["kv_heads"], x["kv_len"], x["width"]), (x["kv_heads"], x["kv_len"], x["width_v"])
    return [torch.randn(x["batch"], *shape, generator=generator).to(x["dtype"]) for shape in shapes]


def documents(x: dict[str, Any], generator: torch.Generator) -> Tensor | None:
    if not x["documents"]:
        return None
    return torch.randint(0, 4, (x["batch"], x["kv_len"]), generator=generator).sort(-1).values


def with_gradients(run: Callable[..., list[Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of a function of all of them."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    results = run(*leaves)
    total = sum(
        torch.where(t.isfinite(), t * torch.randn(t.shape, generator=torch.Generator().manual_seed(n)).to(t), 0.0).sum()
        for n, t in enumerate(results)
    )
    grads = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [
        *(t.detach() for t in results),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)),
    ]


def assert_alike(got: list[Tensor], want: list[Tensor], allowed: float) -> None:
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        size = 1 + (float(b[b.isfinite()].double().abs().max()) if b.isfinite().any() else 0.0)
        torch.testing.assert_close(a.double(), b.double(), atol=allowed * size, rtol=allowed, msg=lambda m, n=number: f"{n}: {m}")


@given(x=sizes(), decays=st.lists(st.sampled_from([0.0, -0.01, -0.5, -5.0, -math.inf]), min_size=6, max_size=6))
@settings(max_examples=60)
def test_linear_attention(x: dict[str, Any], decays: list[float]) -> None:
    generator = torch.Generator().manual_seed(x["seed"])
    heads, real = x["kv_heads"] * x["group"], torch.float64 if x["dtype"] == torch.float64 else torch.float32
    inputs, decay = qkv(x, generator), torch.tensor(decays[:heads], dtype=real)
    if x["state"]:
        inputs.append(torch.randn(x["batch"], heads, x["width"], x["width_v"], generator=generator).to(real))
    words = {"scale": 0.3, "q_offset": x["offset"], "documents": documents(x, generator)}

    def by(module: Any) -> list[Tensor]:
        return with_gradients(
            lambda q, k, v, state=None: list(module.linear_scan(q, k, v, decay, state=state, **words)), inputs
        )  # fmt: skip

    assert_alike(by(linear_cpp), by(linear_torch), TOLERANCE[x["dtype"]])


@given(
    x=sizes(), vector=st.booleans(), rule=st.sampled_from(["sum", "delta", "erase"]),
    strength=st.sampled_from([0.0, 0.1, 1.0, 20.0, math.inf]),
    values=st.sampled_from([1, 2]), gates=st.sampled_from(["kv", "values", "one"]),
)  # fmt: skip
@settings(max_examples=60)
def test_decays_that_come_with_the_data(
    x: dict[str, Any], vector: bool, rule: str, strength: float, values: int, gates: str
) -> None:
    generator = torch.Generator().manual_seed(x["seed"])
    real = torch.float64 if x["dtype"] == torch.float64 else torch.float32
    q, k, v = qkv(x, generator)
    if x["group"] == 1 and values > 1:  # values with more heads than keys
        v = torch.randn(x["batch"], values * x["kv_heads"], *v.shape[2:], generator=generator).to(v)
    heads = {"kv": x["kv_heads"], "values": v.shape[1], "one": 1}[gates]
    shape = (x["batch"] if x["seed"] % 2 else 1, heads, x["kv_len"])
    g = torch.randn(*shape, *([x["width"]] if vector else []), generator=generator).abs().mul(-min(strength, 1e3))
    if strength == math.inf:  # some forget all, the others nothing
        g = torch.where(g < -1e3, -math.inf, 0.0)
    inputs = [q, torch.nn.functional.normalize(k.double(), dim=-1).to(k), v, g.to(real)]
    if rule != "sum":
        inputs.append(2 * torch.rand(shape, generator=generator).to(real))
    if rule == "erase":
        erase = torch.randn(*shape, x["width"], generator=generator)
        inputs.append(torch.nn.functional.normalize(erase, dim=-1).to(k))
    if x["state"]:
        inputs.append(torch.randn(x["batch"], max(v.shape[1], heads), x["width"], x["width_v"], generator=generator).to(real))
    words = {"scale": 0.3, "q_offset": x["offset"], "documents": documents(x, generator)}

    def by(module: Any) -> list[Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *more: Tensor) -> list[Tensor]:
            by_rule, state = more[: ("sum", "delta", "erase").index(rule)], more[-1] if x["state"] else None
            return list(module.gated_scan(q, k, v, g, *by_rule, state=state, **words))

        return with_gradients(run, inputs)

    wanted = by(gated_torch)
    assert_alike(by(gated_cpp), wanted, TOLERANCE[x["dtype"]])
    if x["kv_len"] <= 64:  # a step of decoding, as long as it can be
        state, last = (inputs[-1], -1) if x["state"] else (None, None)
        with torch.no_grad(), gated_cpp.LIMITS.using(scan_steps=64):
            steps = gated_cpp.gated_scan(*inputs[:last], state=state, **words)
        assert_alike(list(steps), wanted[:2], TOLERANCE[x["dtype"]])


def test_decays_that_come_with_the_data_run_in_C() -> None:
    """And not in torch, which takes over where numbers are not finite: what is later then stays unseen."""
    x = [torch.randn(1, 2, 70, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    g = torch.full((1, 2, 70), -0.1)
    with gated_torch.LIMITS.using(scan_chunk=0):  # torch could not
        out, _ = gated_cpp.gated_scan(*x, g, scale=0.3)
    x[1][:, :, 40:], x[2][:, :, 50:] = math.nan, math.inf
    bad, _ = gated_cpp.gated_scan(*x, g, scale=0.3)
    torch.testing.assert_close(bad[:, :, :40], out[:, :, :40], rtol=1e-4, atol=1e-5)


@given(
    x=sizes(), slots=st.sampled_from([1, 4, 16, 33]), delay=st.sampled_from([0, 1, 5, 40]), sharp=st.sampled_from([1.0, 5.0, 30.0]),
    temperature=st.sampled_from([1.0, 8.0]), empty=st.sampled_from(["zero_sink", "masked"]),
)  # fmt: skip
@settings(max_examples=60)
def test_gated_slots(x: dict[str, Any], slots: int, delay: int, sharp: float, temperature: float, empty: str) -> None:
    generator = torch.Generator().manual_seed(x["seed"])
    real = torch.float64 if x["dtype"] == torch.float64 else torch.float32
    lead = (x["batch"], x["kv_heads"])
    inputs = [*qkv(x, generator), (torch.randn(*lead, x["kv_len"], slots, generator=generator) * sharp).to(x["dtype"])]
    if x["state"]:
        inputs += [torch.randn(*lead, slots, width, generator=generator).to(real) for width in (x["width"], x["width_v"])]
    written = torch.rand(lead, generator=generator) < 0.5
    words = {
        "delay": delay, "temperature": temperature, "scale": 0.3, "empty": empty, "q_offset": x["offset"],
        "documents": documents(x, generator),
    }  # fmt: skip

    def by(module: Any) -> list[Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *state: Tensor) -> list[Tensor]:
            before = SlotState(*state, written) if state else None
            out, lse, after = module.slot_scan(q, k, v, gate, state=before, **words)
            return [out, lse, after.keys, after.values]

        return with_gradients(run, inputs)

    assert_alike(by(slots_cpp), by(slots_torch), TOLERANCE[x["dtype"]])


def test_a_key_that_is_not_seen_may_hold_anything() -> None:
    q, k, v = (torch.randn(1, 1, 70, 8) for _ in range(3))
    decay, gate = torch.tensor([-0.1]), torch.randn(1, 1, 70, 4)
    bad = k.clone()
    bad[:, :, 60:] = float("nan")
    want = linear_cpp.linear_scan(q, k, v, decay, scale=0.3)[0]
    torch.testing.assert_close(linear_cpp.linear_scan(q, bad, v, decay, scale=0.3)[0][:, :, :60], want[:, :, :60])
    words: dict[str, Any] = {"delay": 1, "temperature": 1.0, "scale": 0.3}
    want = slots_cpp.slot_scan(q, k, v, gate, **words)[0]
    torch.testing.assert_close(slots_cpp.slot_scan(q, bad, v, gate, **words)[0][:, :, :61], want[:, :, :61])
