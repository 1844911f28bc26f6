"""Ring-linear attention as a compiled program: the reference tests R1 to R10 of its specification."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl import testing as kit
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.program.decays import slopes

Tensor = torch.Tensor
B, HQ, H, T, D = 2, 4, 2, 37, 6
DECAY = (0.5, 0.9, 1.0, 0.2)


@pytest.fixture(scope="module")
def problem(draw: Any) -> Any:
    """q, k, v."""

    def make(length: int = T, heads: int = HQ, kv_heads: int = H) -> dict[str, Tensor]:
        return {
            name: draw(B, n, length, D, seed=i) for i, (name, n) in enumerate({"q": heads, "k": kv_heads, "v": kv_heads}.items())
        }

    return make


def quadratic(t: dict[str, Tensor], decay: Any = DECAY) -> Tensor:
    group, length = t["q"].shape[1] // t["k"].shape[1], t["q"].shape[2]
    k, v = (t[name].repeat_interleave(group, 1) for name in "kv")
    distance = torch.arange(length)[:, None] - torch.arange(length)
    fade = torch.tensor(decay, dtype=torch.float64)[:, None, None] ** distance.clamp(min=0)
    return ((t["q"] @ k.transpose(2, 3)) * torch.where(distance >= 0, fade, 0.0) * t["q"].shape[3] ** -0.5) @ v


def test_golden_values(backend: str, assert_close: Any) -> None:
    i, j = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(2.0, dtype=torch.float64)
    q, k, v = (torch.sin(a + 0.7 * i + 1.3 * j)[None, None] for a in (0.1, 0.5, 0.9))
    attn = sd.compile(sd.linear(log_decay=[-(2**-0.5)]), backend=backend)
    out, state = attn(q, k, v, return_state=True)
    wanted = [[0.558072, 0.576004], [1.161225, 0.534414], [0.989619, -0.083162], [0.366369, -0.521984]]
    assert_close(out[0, 0], torch.tensor(wanted, dtype=torch.float64), 1e-6)
    (last,) = state.recurrent.values()
    assert_close(last[0, 0].double(), torch.tensor([[0.692203, -0.578084], [0.118360, 0.772038]], dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_R1_chunks_recurrence_and_quadratic_form(problem: Any, assert_close: Any, options: Any, chunk: int) -> None:
    options(LIMITS, scan_chunk=chunk)
    t, attn = problem(), sd.compile(sd.patterns.ring_linear(DECAY), backend="tiled")
    assert_close(attn(**t), quadratic(t))
    first, rest = ({name: x[:, :, part] for name, x in t.items()} for part in (slice(0, 11), slice(11, None)))
    _, state = attn(**first, return_state=True)
    assert_close(attn(**rest, state=state), quadratic(t)[:, :, 11:])


def test_R1_quadratic_form(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    assert_close(sd.compile(sd.patterns.ring_linear(DECAY), backend=backend)(**t), quadratic(t))


def test_R2_slopes() -> None:
    found = slopes(16)
    assert [round(found[n], 8) for n in (0, 1, 15)] == [0.70710678, 0.5, 0.00390625]
    assert slopes(12) == slopes(8) + tuple(slopes(16)[n] for n in (0, 2, 4, 6))


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [("hf", {0: 1.05264, 1: 1.00001, 18: 0.10527, 19: 0.05264}), ("serve", {0: 1.00001, 1: 0.94738, 18: 0.05264, 19: 1e-5})],
)
def test_R3_depth_factors(depth: str, wanted: dict[int, float]) -> None:
    for layer, factor in wanted.items():
        table = sd.decay_table(16, layer, 20, depth=depth)
        assert [-x / s for x, s in zip(table.log_decay, slopes(16), strict=True)] == pytest.approx([factor] * 16, abs=1e-5)


@pytest.mark.parametrize(
    ("layers", "group", "full"), [(20, 5, [4, 9, 14, 19]), (32, 8, [7, 15, 23, 31]), (22, 5, [4, 9, 14, 19, 20, 21])]
)
def test_R4_full_layers(layers: int, group: int, full: list[int]) -> None:
    causal = sd.attend(sd.kv_idx <= sd.q_idx)
    plan = sd.schedule(layers, group, full=causal, other=lambda layer: sd.patterns.ring_linear(sd.decay_table(4, layer, layers)))
    assert [layer for layer, kind in plan.items() if kind is causal] == full
    assert plan[0].decay == sd.decay_table(4, 0, layers).log_decay


def test_R7_prefill_and_decode(backend: str) -> None:
    case = kit.AttentionCase(batch=2, heads=4, kv_heads=2, q_len=23, kv_len=23)
    done = kit.assert_prefill_equals_decode(sd.compile(sd.patterns.ring_linear(DECAY), backend=backend), case, chunks=(5, 16))
    assert {"growing cache", "state, chunks of 5", "state, chunks of 16", "state, token by token"} <= set(done)


def test_R7_the_state_is_float32_and_does_not_drift(draw: Any) -> None:
    q, k, v = (draw(1, 1, 600, 4, seed=i).bfloat16() for i in range(3))
    attn = sd.compile(sd.linear([0.999]), backend="tiled")
    exact = attn(q.double(), k.double(), v.double())
    size = exact[:, :, 500:].abs().max()

    def off(low: bool) -> float:
        state, worst = None, 0.0
        for start in range(0, 600, 4):
            rows = slice(start, start + 4)
            out, state = attn(q[:, :, rows], k[:, :, rows], v[:, :, rows], state=state, return_state=True)
            (label, value), *_ = state.recurrent.items()
            assert value.dtype == torch.float32
            if low:
                state = type(state)(state.program, state.tokens, state.recent, {label: value.bfloat16().float()})
            worst = max(worst, float((out - exact[:, :, rows]).abs().max() / size))
        return worst

    assert off(low=False) <= torch.finfo(torch.bfloat16).eps < off(low=True)


def test_R8_a_tree_row_is_linear_decode_along_its_path(problem: Any, assert_close: Any) -> None:
    """The state is handed to every path and stays as it was; a token's row is the last one of its path."""
    t = problem(20)
    attn = sd.compile(sd.patterns.ring_linear(DECAY), backend="tiled")
    prompt, drafts = ({name: x[:, :, part] for name, x in t.items()} for part in (slice(0, 15), slice(15, 20)))
    _, state = attn(**prompt, return_state=True)
    (before,) = (x.clone() for x in state.recurrent.values())
    for path in ([0], [0, 1], [0, 2], [0, 2, 3], [4]):
        row = attn(**{name: x[:, :, path] for name, x in drafts.items()}, state=state)[:, :, -1]
        whole = {name: torch.cat([prompt[name], drafts[name][:, :, path]], 2) for name in t}
        assert_close(row, quadratic(whole)[:, :, -1])
    assert torch.equal(before, *state.recurrent.values())


def test_R9_linear_in_the_values(problem: Any, backend: str, assert_close: Any) -> None:
    t, other = problem(), problem()["v"].flip(2)
    attn = sd.compile(sd.patterns.ring_linear(DECAY), backend=backend)
    both = attn(**(t | {"v": 2 * t["v"] - 3 * other}))
    assert_close(both, 2 * attn(**t) - 3 * attn(**(t | {"v": other})))


def test_R9_no_memory_and_no_decay(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem(heads=2)
    gone = sd.compile(sd.linear(log_decay=[-1e4] * 2), backend=backend)(**t)
    assert_close(gone, D**-0.5 * (t["q"] * t["k"]).sum(-1, keepdim=True) * t["v"])
    kept = sd.compile(sd.linear([1.0] * 2), backend=backend)(**t)
    sums = torch.einsum("bhtd,bhte->bhtde", t["k"], t["v"]).cumsum(2)
    assert_close(kept, D**-0.5 * torch.einsum("bhtd,bhtde->bhte", t["q"], sums))


def test_R10_gradients_of_the_quadratic_form(problem: Any, backend: str, assert_close: Any, grads: Any) -> None:
    t = problem()

    def formula(return_lse: bool, **t: Tensor) -> Tensor:
        return quadratic(t)

    got, wanted = grads(sd.compile(sd.patterns.ring_linear(DECAY), backend=backend), t), grads(formula, t)
    for name, slope in wanted.items():
        assert_close(got[name], slope)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_R10_every_precision(problem: Any, dtype: torch.dtype) -> None:
    t = {name: x.to(dtype) for name, x in problem().items()}
    done = kit.assert_matches_reference(sd.compile(sd.patterns.ring_linear(DECAY), backend="tiled"), **t)
    assert done == ("out", "dq", "dk", "dv")


def test_documents_are_separate_runs(problem: Any, backend: str, assert_close: Any) -> None:
    t, ids = problem(), (torch.arange(T) >= 13).long()
    attn = sd.compile(sd.linear(DECAY, documents=sd.input("documents", "batch keys")), backend=backend)
    out = attn(**t, documents=ids[None])
    for part in (slice(0, 13), slice(13, None)):
        assert_close(out[:, :, part], quadratic({name: x[:, :, part] for name, x in t.items()}))


def test_a_linear_branch_has_no_lse(problem: Any, backend: str) -> None:
    with pytest.raises(sd.UnsupportedError, match="no softmax"):
        sd.compile(sd.patterns.ring_linear(DECAY), backend=backend)(**problem(), return_lse=True)
    with pytest.raises(sd.PatternError, match="no weight"):
        sd.joint(sd.linear(DECAY), sd.kv_idx <= sd.q_idx)


def test_causal(backend: str) -> None:
    case = kit.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=19, kv_len=19)
    kit.assert_causal(sd.compile(sd.patterns.ring_linear(DECAY), backend=backend), case)


# ---- around the attention: the layers of the example ------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("ring_schedule")


def test_R5_positions_turn_the_first_half_of_a_head(example: Any, draw: Any) -> None:
    x = draw(1, 2, 9, 8)
    turned = example.rotate(x, 3, example.SHARE)
    assert torch.equal(turned[..., 4:], x[..., 4:]) and (turned[..., :4] != x[..., :4]).all()


def test_R6_groups_are_normalised_by_themselves(example: Any) -> None:
    """Ten times the values of one head leaves the others as they were, and the one too, being normalised; one group would mix them."""
    torch.manual_seed(0)
    layer = example.Linear(0)
    layer.out, layer.gate = torch.nn.Identity(), torch.nn.Linear(example.WIDTH, example.WIDTH, bias=False)
    x, attended = torch.randn(1, 7, example.WIDTH), layer.attended
    plain = layer(x, 7)
    width = example.WIDTH // example.HEADS
    scale = torch.ones(example.WIDTH)
    scale[:width] = 10
    layer.attended = lambda x, rows: attended(x, rows) * scale
    torch.testing.assert_close(layer(x, 7), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer(x, 7)[..., width:], plain[..., width:])
    whole = torch.nn.functional.rms_norm
    assert not torch.allclose(whole(attended(x, 7) * scale, (example.WIDTH,)), whole(attended(x, 7), (example.WIDTH,)), atol=0.1)
