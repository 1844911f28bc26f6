"""Calls of a program with no batch entries, no queries or no keys: out 0, and the LSE of what needs no keys."""

from __future__ import annotations

import math

import torch

from sparsedsl.execute.empty import attend_empty
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Recall
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["run_empty"]

Tensor = torch.Tensor


def run_empty(call: ProgramCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` with gradients of zero."""
    plain = check_call(attend(True), call.q, call.k, call.v, {}, q_offset=call.q_offset)
    out, lse = attend_empty(plain_pattern(call.program.root), plain)
    rest = [t for t in call.inputs.values() if t.requires_grad and t is not call.q and t is not call.k and t is not call.v]
    nothing = [t[:0].sum().to(lse.dtype) for t in rest]
    for part in nothing:
        out, lse = out + part, lse + part
    return out, torch.logaddexp(lse, torch.full_like(lse, without_keys(call.program.root))) if lse.numel() else lse


def plain_pattern(branch: Branch) -> Pattern:
    """A pattern with the sink of a branch that is one attention."""
    return attend(True, sink=branch.pattern.sink) if isinstance(branch, Attend) else attend(True)


def without_keys(branch: Branch) -> float:
    """The LSE of what a branch has without keys, beside a sink of its own: empty slots, a zero logit among the weights."""
    if isinstance(branch, Recall):
        return math.log(int(branch.memory.gate.axes[3])) if branch.memory.empty == "zero_sink" else -math.inf
    if isinstance(branch, Attend):
        rule = branch.normaliser
        return 0.0 if rule is not None and rule.weights == "softmax1" else -math.inf
    if isinstance(branch, Compact):
        return -math.inf
    parts = [without_keys(part) for part in branch.branches] if isinstance(branch, Joint) else []
    finite = [part for part in parts if part > -math.inf]
    return math.log(sum(map(math.exp, finite))) if finite else -math.inf
