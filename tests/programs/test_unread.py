"""Programs that do not read all of q, k and v: lengths and heads are those of the call all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

CAUSAL = sd.kv_idx <= sd.q_idx
K = sd.input("keys", "batch kv_heads keys head_dim")
V = sd.input("values", "batch kv_heads keys value_dim")
Q = sd.input("queries_of_its_own", "batch heads queries head_dim")
GATE = sd.input("gate", "batch kv_heads keys 3")
PROGRAMS = {
    "attend k": sd.attend(CAUSAL, k=K),
    "attend v": sd.attend(CAUSAL, v=V),
    "attend k, v": sd.attend(CAUSAL, k=K, v=V),
    "attend nothing of the call": sd.attend(CAUSAL, q=Q, k=K, v=V),
    "linear q": sd.linear([0.5, 0.9], q=Q),
    "linear nothing of the call": sd.linear([0.5, 0.9], q=Q, k=K, v=V),
    "recall": sd.recall(sd.slots(GATE, y=K, z=V, delay=2), q=Q),
    "choice": sd.attend(CAUSAL & sd.top_k(sd.dot(Q, sd.summary(K, 4)), 1), q=Q, k=K, v=V),
    "joint": sd.joint(sd.attend(CAUSAL, k=K, v=V), sd.attend(CAUSAL, q=Q, k=K, v=V)),
}


def given(rows: int = 9) -> dict[str, torch.Tensor]:
    """Every tensor of a call, float64."""
    shapes = {
        "q": (2, 2, rows, 4), "k": (2, 1, rows, 4), "v": (2, 1, rows, 3), "keys": (2, 1, rows, 4), "values": (2, 1, rows, 3),
        "queries_of_its_own": (2, 2, rows, 4), "gate": (2, 1, rows, 3),
    }  # fmt: skip
    return {name: kit.tensor(*shape, seed=n, dtype=torch.float64) for n, (name, shape) in enumerate(shapes.items())}


def of(program: sd.Program, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a program is given."""
    return {name: x for name, x in tensors.items() if name in ("q", "k", "v") or name in program.inputs}


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_what_the_same_tensors_give_as_q_k_and_v(name: str, backend: str) -> None:
    tensors, program = given(), sd.Program(PROGRAMS[name])
    attn = sd.compile(program, backend=backend, allow=["selection reads later queries"])
    out = attn(**of(program, tensors))
    if name in ("attend k", "attend v", "attend k, v", "attend nothing of the call"):
        plain = {"q": "queries_of_its_own", "k": "keys", "v": "values"}
        swapped = {own: tensors[other] if other in program.inputs else tensors[own] for own, other in plain.items()}
        torch.testing.assert_close(out, sd.compile(CAUSAL, backend="reference")(**swapped))
    kit.assert_matches_reference(attn, **of(program, tensors))
    assert attn(**of(program, given(0))).shape == (2, 2, 0, 3)
    unread = [word for word in "qkv" if word not in {node.label for node in program.everything}]
    leaves = {word: tensors[word].clone().requires_grad_() for word in unread}
    assert unread and not attn(**(of(program, tensors) | leaves)).requires_grad


@pytest.mark.parametrize("name", ["linear q", "linear nothing of the call", "recall"])
def test_from_state_to_state(name: str, backend: str) -> None:
    tensors, program = given(), sd.Program(PROGRAMS[name])
    attn, named = sd.compile(program, backend=backend), of(sd.Program(PROGRAMS[name]), tensors)
    parts, state = [], None
    for rows in (slice(0, 5), slice(5, 6), slice(6, 9)):
        out, state = attn(**{word: x[:, :, rows] for word, x in named.items()}, state=state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), attn(**named))


def test_inside_a_graph() -> None:
    program = sd.Program(PROGRAMS["attend nothing of the call"])
    attn, named = sd.compile(program, backend="tiled"), of(program, given())
    named = {word: x.requires_grad_() for word, x in named.items()}
    traced: Any = torch.compile(lambda **words: attn(**words), backend="eager", fullgraph=True)
    found = torch.autograd.grad(traced(**named).sum(), [named["keys"], named["k"]], allow_unused=True)
    (wanted,) = torch.autograd.grad(attn(**named).sum(), [named["keys"]])
    torch.testing.assert_close(found[0], wanted)
    assert found[1] is None or not found[1].any()
