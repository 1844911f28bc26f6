"""Calls of a program with no batch entries, no queries or no keys: out 0, and the LSE of what needs no keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from sparsedsl.execute.empty import nothing_attended, sink_lse
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Linear, Mix, Recall
from sparsedsl.program.rules import Rules
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["EMPTY_RULES", "run_empty"]

Tensor = torch.Tensor


def run_empty(call: ProgramCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, with gradients of zero; an LSE of -inf where the program is no softmax."""
    root = call.program.root
    lse = EMPTY_RULES[type(root)](root, call)
    return nothing_attended(call, lse, (*call.inputs.values(), *call.tables.values()))


# ---- rules: the LSE of a branch without keys, (B, Hq, Sq) ------------------------------------------------------------------------


def _filled(call: ProgramCall, value: float) -> Tensor:
    return call.q.new_full(call.q.shape[:3], value, dtype=call.dtype)


def _nothing(node: Branch, call: ProgramCall) -> Tensor:
    """There is nothing that a weight could go to."""
    return _filled(call, -math.inf)


def _attend(node: Attend, call: ProgramCall) -> Tensor:
    """Its sink; of a softmax per chunk the logit of 0 that takes part in its weights, if one does."""
    if node.normaliser is not None:
        return _filled(call, 0.0 if node.normaliser.weights == "softmax1" else -math.inf)
    return sink_lse(node.pattern, call)


def _recall(node: Recall, call: ProgramCall) -> Tensor:
    """Slots that nothing was written to have a logit of 0 each, or take no part."""
    slots = int(node.memory.gate.axes[3])
    return _filled(call, math.log(slots) if node.memory.empty == "zero_sink" else -math.inf)


def _joint(node: Joint, call: ProgramCall) -> Tensor:
    return reduce(torch.logaddexp, [EMPTY_RULES[type(branch)](branch, call) for branch in node.branches])


EMPTY_RULES: Rules[Callable[[Any, ProgramCall], Tensor]] = Rules(
    "a call without keys",
    {Attend: _attend, Recall: _recall, Joint: _joint, **dict.fromkeys((Linear, Mix, Compact), _nothing)},
    base=Branch,
)
