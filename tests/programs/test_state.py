"""States of programs: what they hold, how calls go on from them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

Tensor = torch.Tensor
B, HQ, H, T, D, M = 2, 4, 2, 31, 6, 5
DECAY = (0.5, 0.9, 1.0, 0.2)
WINDOW = sd.patterns.sliding_window(4)
GATED = sd.mix(sd.linear(DECAY), WINDOW, weights=sd.input("mixing", "batch heads queries 2"))


@pytest.fixture(scope="module")
def problem(draw: Any) -> dict[str, Tensor]:
    """q, k, v, gate."""
    sizes = {"q": (HQ, D), "k": (H, D), "v": (H, D), "gate": (H, M)}
    return {name: draw(B, n, T, size, seed=i) for i, (name, (n, size)) in enumerate(sizes.items())}


def part(t: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    return {name: x[:, :, start:stop] for name, x in t.items()}


@pytest.mark.parametrize(
    "program", [GATED, sd.joint(WINDOW, sd.recall(sd.slots(sd.input("gate", f"batch kv_heads keys {M}"), delay=9)))]
)
def test_several_branches_keep_a_state_each(program: Any, backend: str) -> None:
    case = kit.AttentionCase(batch=2, heads=HQ, kv_heads=H, q_len=T, kv_len=T)
    done = kit.assert_prefill_equals_decode(sd.compile(program, backend=backend), case, chunks=(3, 12))
    assert {"state, chunks of 3", "state, chunks of 12", "state, token by token"} <= set(done)


def test_its_size_does_not_grow(problem: Any) -> None:
    attn = sd.compile(sd.patterns.nha(M, 4), backend="tiled")
    sizes = set()
    state = None
    for start in range(0, 30, 6):
        _, state = attn(**part(problem, start, start + 6), state=state, return_state=True)
        sizes.add(state.nbytes)
        assert state.tokens == start + 6 and all(x.shape[2] == 4 for x in state.recent.values())
    assert len(sizes) == 1


def test_a_step_back_is_a_state_kept(problem: Any, assert_close: Any) -> None:
    """Drafts that are turned down: go on from the state before them."""
    attn = sd.compile(sd.patterns.nha(M, 4), backend="tiled")
    _, state = attn(**part(problem, 0, 13), return_state=True)
    attn(**part({name: x.flip(2) for name, x in problem.items()}, 13, 17), state=state, return_state=True)
    assert_close(attn(**part(problem, 13, 20), state=state), attn(**problem)[:, :, 13:20])


def test_gradients_run_through_a_state(problem: Any, backend: str, assert_close: Any) -> None:
    attn = sd.compile(sd.patterns.nha(M, 4), backend=backend)

    def slopes(cut: bool) -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in problem.items()}
        if cut:
            first, state = attn(**part(leaves, 0, 11), return_state=True)
            out = torch.cat([first, attn(**part(leaves, 11, T), state=state)], 2)
        else:
            out = attn(**leaves)
        return list(torch.autograd.grad(out.square().sum(), list(leaves.values())))

    for got, wanted in zip(slopes(True), slopes(False), strict=True):
        assert_close(got, wanted)


def test_what_is_given_once_is_given_always(problem: Any) -> None:
    attn = sd.compile(sd.patterns.nha(M, 4), backend="tiled")
    turned = problem | {"q_rope": problem["q"], "k_rope": problem["k"]}
    _, plain = attn(**part(problem, 0, 9), return_state=True)
    _, with_rope = attn(**part(turned, 0, 9), return_state=True)
    with pytest.raises(sd.ShapeError, match="'k_rope' was not given to the call that made the state"):
        attn(**part(turned, 9, 12), state=plain)
    with pytest.raises(sd.ShapeError, match="'k_rope' was given to the call that made the state"):
        attn(**part(problem, 9, 12), state=with_rope)


def test_a_state_belongs_to_its_program(problem: Any) -> None:
    _, state = sd.compile(sd.patterns.nha(M, 4), backend="tiled")(**part(problem, 0, 9), return_state=True)
    with pytest.raises(sd.ShapeError, match="same program"):
        sd.compile(sd.patterns.nha(M, 5), backend="tiled")(**part(problem, 9, 12), state=state)
    with pytest.raises(sd.ShapeError, match="q_offset must be 0"):
        sd.compile(sd.patterns.nha(M, 4), backend="tiled")(**part(problem, 9, 12), state=state, q_offset=1)


@pytest.mark.parametrize(
    "program",
    [
        sd.patterns.moba(4, 2),
        sd.mix(sd.linear(DECAY), sd.kv_idx <= sd.q_idx, weights=sd.input("mixing", "batch heads queries 2")),
    ],
)
def test_programs_that_look_at_everything_keep_none(problem: Any, draw: Any, program: Any) -> None:
    attn = sd.compile(program, backend="tiled")
    named = {"mixing": draw(B, HQ, T, 2)} if "mixing" in attn.program.inputs else {}
    with pytest.raises(sd.UnsupportedError, match=r"keeps no state.*q_offset="):
        attn(*(problem[name] for name in "qkv"), **named, return_state=True)
