"""What a call gives a linear attention, checked: how many heads its states have, and decays that are decays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.program.recurrences import Linear

__all__ = ["LinearHeads", "check_decays", "linear_heads"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class LinearHeads:
    """``states``: heads with a state of their own; ``out``: heads of the output, as many or a multiple."""

    states: int
    out: int


def linear_heads(node: Linear, q: int, k: int, v: int, gates: Mapping[str, int]) -> LinearHeads:
    """How the heads of a call share states: head ``h`` of a tensor with fewer serves neighbouring ones. ``gates``: name -> heads.

    Raises:
        ShapeError: heads that do not divide, or another number of constant decays than heads of the output.
    """
    served = {"k": k, "v": v, **gates}
    states = max(served.values())
    out = max(q, states)
    if node.gate is None:  # a decay for every head of the output, and so a state
        states = out
    for name, heads in served.items():
        if states % heads:
            raise ShapeError(
                f"linear(): {name} has {heads} heads, which do not divide the {states} heads with a state; give it {states}, or a number "
                "that divides them"
            )
    if out % q or out % states:
        raise ShapeError(
            f"linear(): q has {q} heads and {states} have a state: one must be a multiple of the other. Repeat the heads of q, or of the "
            "gates and values"
        )
    decays = len(node.log_decays)
    if (decays > 1 and decays != out) or (decays == 1 and isinstance(node.decay, tuple) and out != 1):
        raise ShapeError(f"linear() was declared with {decays} decays; q has {out} heads: one for each is wanted")
    return LinearHeads(states, out)


# Strengths are powers of e: sums of those of many keys are to stay numbers.
STRONGEST = {torch.float32: 60.0, torch.float64: 600.0}


def check_decays(node: Linear, gate: Tensor | None, write: Tensor | None, real: torch.dtype) -> None:
    """Whether the values of gates are such; looked at on CPU only, where nobody waits for them. ``real``: what is computed in.

    Raises:
        ShapeError: a decay above 1 or below 0, or NaN; a strength beyond what numbers hold.
    """
    if gate is not None and gate.device.type == "cpu" and gate.numel():
        low, high = (float(x) for x in gate.detach().aminmax())
        if node.factor is not None and not (low >= 0 and high <= 1):
            raise ShapeError(
                f"linear(): decay must hold factors from 0 to 1; got values from {low:g} to {high:g}. Logarithms go by log_decay="
            )
        if node.factor is None and not high <= 0:
            raise ShapeError(
                f"linear(): log_decay must be at most 0, the logarithm of a decay of at most 1; got values up to {high:g}. Pass its "
                "logarithm, as logsigmoid(gate)"
            )
    if write is not None and write.device.type == "cpu" and write.numel():
        high = float(write.detach().max())
        if not high <= STRONGEST[real]:
            raise ShapeError(
                f"linear(): write is a logarithm, of at most {STRONGEST[real]:g} in {str(real).removeprefix('torch.')}; got {high:g}. Cap "
                "it, as cap * tanh(write / cap), or call in float64"
            )
