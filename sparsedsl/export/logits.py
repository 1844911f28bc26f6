"""What becomes of the logits: engines know a scale, some a soft cap, some a sink for each head; everything else would be lost."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from sparsedsl.export.export_case import Case
from sparsedsl.lang.normalisers import SOFTMAX
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, SCORE

__all__ = ["cap_of", "logit_args"]


def cap_of(pattern: Pattern) -> float | None:
    """``c`` where the score is ``c * tanh(score / c)``.

    >>> import sparsedsl as sd
    >>> cap_of(sd.attend(True, score=sd.patterns.softcap(30))), cap_of(sd.attend(True, score=2 * sd.tanh(sd.score)))
    (30.0, None)
    """
    cap, rest = pattern.score.expr.as_coeff_Mul()
    if not isinstance(rest, sympy.tanh) or not cap.is_positive:
        return None
    share, core = rest.args[0].as_coeff_Mul()
    # A cap that is no whole number is held as two floats, each rounded once.
    return float(cap) if core == SCORE and abs(float(cap) * float(share) - 1) <= 2**-51 else None


def logit_args(
    case: Case, *, scale: str | None, cap: str | None = None, sink: str | None = None, sink_dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Keywords of the engine's call by the engine's names, None for what it has not; refuses what would be lost.

    ``sink`` is ``(heads,)``, of a head that is exported alone ``(1,)``: a copy without gradients in ``sink_dtype``, which must hold it
    exactly. No scale is said where the pattern has the usual one, which is every engine's own.
    """
    pattern = case.pattern
    found: dict[str, Any] = {}
    if pattern.normaliser != SOFTMAX:
        case.refuse(f"normaliser={pattern.normaliser!r} would be lost, the engine has a softmax; sd.compile(pattern) runs it")
    value = cap_of(pattern) if pattern.has_score else None
    if pattern.has_score and (cap is None or value is None):
        text = " ".join(str(pattern.score).split())
        shown = text if len(text) <= 120 else f"{text[:117]}..."
        case.refuse(f"score={shown} would be lost; sd.compile(pattern) runs it")
    if value is not None and cap is not None:
        found[cap] = value
    if pattern.scale is not None and scale is not None:
        found[scale] = pattern.scale
    if pattern.sink is not None:
        if sink is None:
            case.refuse(f"sink={pattern.sink} would be lost; sd.compile(pattern) runs it")
        found[sink] = _sink(case, sink_dtype)
    return found


def _sink(case: Case, dtype: torch.dtype) -> torch.Tensor:
    pattern = case.pattern
    assert pattern.sink is not None
    if BATCH in pattern.sink.expr.free_symbols and (case.batch > 1 or case.packed):
        case.refuse(f"sink={pattern.sink} differs by batch entry, the engine has one a head; export one entry at a time")
    domain = case.parts[0].domain
    heads = torch.tensor(range(case.heads) if case.head is None else [case.head], device=domain.device)
    env = {"b": 0, "h": heads} | dict(domain.tables)
    value = torch.as_tensor(evaluate(pattern.sink.expr, env)).detach().expand(heads.numel())
    held = value.to(dtype)
    lost = (held.to(torch.float64) != value.to(torch.float64)).nonzero()[:, 0]
    if lost.numel():
        head, value, held = int(heads[lost[0]]), value[lost[0]], held[lost[0]]
        case.refuse(
            f"the sink of head {head} is {float(value)!r}, which this engine would round to {float(held)!r}: it takes sinks as "
            f"{str(dtype).removeprefix('torch.')}; round them before, or sd.compile(pattern) runs it"
        )
    return case.place(held, dtype)
