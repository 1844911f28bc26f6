"""Calls in which nothing attends to anything: no batch entries, no queries, or no keys. Out is 0, the LSE that of what needs no keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Mix, Recall
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["EMPTY_RULES", "attend_empty", "run_empty"]

Tensor = torch.Tensor


def attend_empty(pattern: Pattern, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a call with a batch size or length of 0: out 0; lse -inf, or the sink's logit. Gradients are zero."""
    return _nothing_attended(call, _sink_lse(pattern, call), (call.q, call.k, call.v, *call.tables.values()))


def run_empty(call: ProgramCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, with gradients of zero; an LSE of -inf where the program is no softmax."""
    root = call.program.root
    lse = EMPTY_RULES[type(root)](root, call)
    return _nothing_attended(call, lse, (*call.inputs.values(), *call.tables.values()))


def _nothing_attended(call: Call | ProgramCall, lse: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """An output of 0, and this LSE, ``(B, Hq, Sq)``; both with a gradient of zero for ``leaves``."""
    heads = call.out_heads if isinstance(call, ProgramCall) else call.q.shape[1]
    out = call.q.new_zeros((call.q.shape[0], heads, call.q.shape[2], call.v.shape[3]))
    if not call.needs_grad:
        return out, lse
    # A sum of no elements is 0 whatever the tensor holds, and autograd gives it a gradient of the right shape.
    nothing = sum(t[:0].sum().to(lse.dtype) for t in leaves if t.is_floating_point())
    return out + nothing, lse + nothing


def _sink_lse(pattern: Pattern, call: Call | ProgramCall) -> Tensor:
    """The LSE of rows that see no key, ``(B, Hq, Sq)``: the logit of the sink, or -inf."""
    q = call.q
    shape, kind = q.shape[:3], accumulated(q.dtype)
    lse = q.new_full(shape, float("-inf"), dtype=kind)
    if pattern.sink is None or not lse.numel():
        return lse
    batch = torch.arange(shape[0], device=q.device)[:, None, None]
    heads = torch.arange(shape[1], device=q.device)[:, None]
    return evaluate(pattern.sink.expr, {"b": batch, "h": heads, **call.tables}, dtype=kind).to(kind).expand(shape).clone()


# ---- rules: the LSE of a branch without keys, (B, Hq, Sq) ------------------------------------------------------------------------


def _filled(call: ProgramCall, value: float) -> Tensor:
    return call.q.new_full((call.q.shape[0], call.out_heads, call.q.shape[2]), value, dtype=call.dtype)


def _nothing(node: Branch, call: ProgramCall) -> Tensor:
    """There is nothing that a weight could go to."""
    return _filled(call, -math.inf)


def _attend(node: Attend, call: ProgramCall) -> Tensor:
    """Its sink; of a softmax per chunk the logit of 0 that takes part in its weights, if one does."""
    if node.normaliser is not None:
        return _filled(call, 0.0 if node.normaliser.weights == "softmax1" else -math.inf)
    return _sink_lse(node.pattern, call)


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
