"""A call of a scan, checked: what torch and the kernels start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_checks import check_number, check_position, check_qkv, check_rows, check_tensor, count_documents

__all__ = ["GatedCall", "LinearCall", "SlotCall", "SlotState", "check_gated", "check_linear", "check_slots", "sparing"]

Tensor = torch.Tensor


class SlotState(NamedTuple):
    """What slots hold: ``keys (B, Hkv, M, D)`` and ``values (B, Hkv, M, Dv)`` in float32 (float64), and ``written (B, Hkv)``, whether any
    key was written."""

    keys: torch.Tensor
    values: torch.Tensor
    written: torch.Tensor


@dataclass(frozen=True, eq=False)
class LinearCall:
    """Numbers of a checked call; ``begins (1 or B, Skv)``: the keys that begin a document, ``number``: that of each key's document,
    counted from 0; None where there are no documents.
    """

    scale: float
    q_offset: int
    begins: Tensor | None
    number: Tensor | None


@dataclass(frozen=True, eq=False)
class GatedCall(LinearCall):
    """The same where decays come with the data. ``states``: heads with a state of their own."""

    states: int


@dataclass(frozen=True, eq=False)
class SlotCall:
    """The same for slots. ``seen (1 or B, 1 or Hkv, Sq)``: which queries see any key or state, None: all, or slots that are empty zeros."""

    scale: float
    temperature: float
    delay: int
    q_offset: int
    masked: bool
    before: SlotState
    begins: Tensor | None
    number: Tensor | None
    seen: Tensor | None


# The logit of a gate that keeps all and writes nothing: its sigmoid is 1 in every dtype, and the logarithm of that exactly 0.
_SHUT = 1e4


def sparing(gate: Tensor, first: int) -> Tensor:
    """Gates ``(B, Hkv, Skv, M)`` by which the first tokens write nothing and fade nothing."""
    if not first:
        return gate
    return torch.cat([torch.full_like(gate[:, :, :first], _SHUT), gate[:, :, first:]], dim=2)


def check_linear(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, *, scale: Any, q_offset: Any, state: Any, documents: Any
) -> LinearCall:
    """What ``linear_scan`` is given.

    Raises:
        ShapeError: arguments that do not fit each other, a query after the last key, a positive log_decay.
        UnsupportedError: log_decay requires gradients.
    """
    check_qkv(q, k, v)
    scale, q_offset = check_number("scale", scale), check_position("q_offset", q_offset)
    check_rows(q, k, q_offset)
    check_tensor("log_decay", log_decay, (q.shape[1],), "(Hq,)", like=q)
    if log_decay.requires_grad:
        raise UnsupportedError("log_decay requires gradients, but the decay is a constant: pass log_decay.detach()")
    # On another device a look at the values would make every call wait for it.
    if log_decay.device.type == "cpu" and not bool((log_decay <= 0).all()):
        raise ShapeError(f"log_decay must be at most 0, a decay of at most 1; got {log_decay.tolist()}. Pass its logarithm")
    if state is not None:
        check_tensor("state", state, (*q.shape[:2], q.shape[3], v.shape[3]), "(B, Hq, D, Dv)", like=q)
    begins, number = (None, None) if documents is None else count_documents(documents, q, k, q_offset)
    return LinearCall(scale, q_offset, begins, number)


def check_gated(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Any, beta: Any, erase: Any, *, scale: Any, q_offset: Any, state: Any,
    documents: Any,
) -> GatedCall:  # fmt: skip
    """What ``gated_scan`` is given.

    Raises:
        ShapeError: arguments that do not fit each other, a query after the last key.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, (None, None, None, None), "(batch, heads, length, head_dim)")
    check_tensor("k", k, (q.shape[0], None, None, q.shape[3]), "(B, Hk, Skv, D)", like=q)
    check_tensor("v", v, (q.shape[0], None, k.shape[2], None), "(B, Hv, Skv, Dv)", like=q)
    scale, q_offset = check_number("scale", scale), check_position("q_offset", q_offset)
    check_rows(q, k, q_offset)
    vector = isinstance(log_decay, Tensor) and log_decay.ndim == 4
    shape, words = (
        ((None, None, k.shape[2], q.shape[3]), "(B, Hg, Skv, D)") if vector else ((None, None, k.shape[2]), "(B, Hg, Skv)")
    )
    check_tensor("log_decay", log_decay, shape, words, like=q)
    heads = [k.shape[1], v.shape[1], log_decay.shape[1]]
    if beta is not None:
        check_tensor("beta", beta, (None, None, k.shape[2]), "(B, Hb, Skv)", like=q)
        heads.append(beta.shape[1])
    if erase is not None:
        if beta is None:
            raise ShapeError("erase is a key of the delta rule, which has beta; got erase without beta")
        check_tensor("erase", erase, (None, None, k.shape[2], q.shape[3]), "(B, He, Skv, D)", like=q)
        heads.append(erase.shape[1])
    states = max(heads)
    if any(states % one for one in heads) or (q.shape[1] % states and states % q.shape[1]):
        raise ShapeError(
            f"k, v, log_decay, beta and erase have {heads} heads and q {q.shape[1]}: each must divide the most, or be divided by it"
        )
    if state is not None:
        check_tensor("state", state, (q.shape[0], states, q.shape[3], v.shape[3]), "(B, H, D, Dv)", like=q)
    begins, number = (None, None) if documents is None else count_documents(documents, q, k, q_offset)
    return GatedCall(scale, q_offset, begins, number, states)


def check_slots(
    q: Tensor, k: Tensor, v: Tensor, gate: Any, *, delay: Any, temperature: Any, scale: Any, empty: Any, q_offset: Any, state: Any,
    documents: Any,
) -> SlotCall:  # fmt: skip
    """What ``slot_scan`` is given.

    Raises:
        ShapeError: arguments that do not fit each other, a query that sees further than the last key.
        UnsupportedError: documents, and queries at positions that they do not reach.
    """
    check_qkv(q, k, v)
    scale, temperature = check_number("scale", scale), check_number("temperature", temperature)
    q_offset, delay = check_position("q_offset", q_offset), check_position("delay", delay)
    if empty not in ("zero_sink", "masked"):
        raise ShapeError(f"empty must be 'zero_sink' or 'masked'; got {empty!r}")
    check_tensor("gate", gate, (k.shape[0], k.shape[1], k.shape[2], None), "(B, Hkv, Skv, M)", like=q)
    if not gate.shape[3]:
        raise ShapeError(f"gate has no slots: shape {tuple(gate.shape)}; wanted (B, Hkv, Skv, M) with M at least 1")
    check_rows(q, k, q_offset - delay)
    before = _first_state(state, q, k, v, gate, accumulated(q.dtype))
    begins = number = seen = None
    if documents is not None:
        begins, number = count_documents(documents, q, k, q_offset)
        seen = _in_own_document(number, q_offset, q.shape[2], delay)
    if empty == "masked" and q_offset < delay:
        early = torch.arange(q_offset - delay, q_offset - delay + q.shape[2], device=q.device) < 0
        written = ~early | before.written[:, :, None]
        seen = written if seen is None else seen & written
    return SlotCall(scale, temperature, delay, q_offset, empty == "masked", before, begins, number, seen)


def _first_state(
    state: SlotState | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, kind: torch.dtype
) -> SlotState:
    lead = (k.shape[0], k.shape[1])
    shapes = ((*lead, gate.shape[3], k.shape[3]), (*lead, gate.shape[3], v.shape[3]))
    if state is None:
        written = torch.zeros(lead, dtype=torch.bool, device=q.device)
        keys, values = (torch.zeros(shape, dtype=kind, device=q.device) for shape in shapes)
        return SlotState(keys, values, written)
    if not isinstance(state, tuple) or len(state) != 3:
        raise ShapeError(f"state must be a SlotState (keys, values, written) or None; got {type(state).__name__}")
    check_tensor("state.keys", state[0], shapes[0], "(B, Hkv, M, D)", like=q)
    check_tensor("state.values", state[1], shapes[1], "(B, Hkv, M, Dv)", like=q)
    check_tensor("state.written", state[2], lead, "(B, Hkv)", like=q, dtypes=(torch.bool,))
    return SlotState(*state)


def _in_own_document(number: torch.Tensor, q_offset: int, q_len: int, delay: int) -> torch.Tensor | None:
    """Whether the last key a query sees lies in the query's document (B or 1, 1, Sq). ``number``: the document of each key."""
    if not delay or not q_len:
        return None
    at = torch.arange(q_offset, q_offset + q_len, device=number.device)
    return (number[:, at] == number[:, (at - delay).clamp(min=0)])[:, None]
