"""A call of a scan, checked: what the kernels are launched with. The refusals are those of the torch path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.run.scan.checks import check_number, check_position, check_qkv, check_rows, check_tensor, count_documents
from sparsedsl.run.scan.slots import SlotState, _first_state, _in_own_document

__all__ = ["LinearCall", "SlotCall", "check_linear", "check_slots"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class LinearCall:
    """Numbers of a checked call; ``number (1 or B, Skv)``: the number of each key's document, counted from 0, or None."""

    scale: float
    q_offset: int
    number: Tensor | None


@dataclass(frozen=True, eq=False)
class SlotCall:
    """The same for slots. ``seen (1 or B, 1 or Hkv, Sq)``: which queries see any key or state, None: all, or slots that are empty zeros."""

    scale: float
    temperature: float
    delay: int
    q_offset: int
    masked: bool
    before: SlotState
    number: Tensor | None
    seen: Tensor | None


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
    return LinearCall(scale, q_offset, None if documents is None else count_documents(documents, q, k, q_offset)[1])


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
    before = _first_state(state, q, k, v, gate, torch.float32)
    number = seen = None
    if documents is not None:
        _, number = count_documents(documents, q, k, q_offset)
        seen = _in_own_document(number, q_offset, q.shape[2], delay)
    if empty == "masked" and q_offset < delay:
        early = torch.arange(q_offset - delay, q_offset - delay + q.shape[2], device=q.device) < 0
        written = ~early | before.written[:, :, None]
        seen = written if seen is None else seen & written
    return SlotCall(scale, temperature, delay, q_offset, empty == "masked", before, number, seen)
