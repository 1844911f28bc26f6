"""How scores become logits, or weights, tile by tile, forward and backward: one rule for each form of the score expression.

A rule takes the products of a tile and gives logits in units of ``log2``, so that one ``exp2`` follows. It also names the factor that q
is multiplied by beforehand, which holds the scale, ``log2(e)`` or the inverse of a cap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from sparsedsl.lang.normalisers import POINTWISE
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import SCORE

__all__ = ["LN2", "LOG2E", "ScoreRule", "clamped", "rule_of", "score_rule"]

Tensor = torch.Tensor
Env = Mapping[str, Any]
LOG2E, LN2 = math.log2(math.e), math.log(2.0)


def clamped(logits: Tensor) -> Tensor:
    """In units of log2; what would leave the range of floats stays just inside it, -inf stays -inf."""
    most = torch.finfo(logits.dtype).max / 2
    return torch.where(logits == float("-inf"), logits, (logits * LOG2E).clamp(-most, most))


class ScoreRule:
    """The plain score: a logit is the scaled product. ``tanh``: the products are wanted with tanh taken.

    ``bias``: what is added to the score, an expression without the score in it; its tiles are made and kept by the caller.
    ``price_ns``: what a logit costs beyond the softmax, for the cost model.
    """

    bias: sympy.Expr | None = None
    tanh = False
    price_ns = 0.0
    # Whether a logit is more than the product, as it is scaled before.
    changes = False
    # Whether it may be anything, or have any derivative, where a pair is masked.
    arbitrary = False
    # What stands where a pair is masked.
    masked = float("-inf")

    def factor(self, scale: float) -> float:
        """What q is multiplied by before the product."""
        return scale * LOG2E

    def logits(self, s: Tensor, env: Env) -> Tensor:
        """Logits in units of log2, in place where possible; ``s``: products ``(X, .., .., G)`` that broadcast against ``env``."""
        return s

    def logits_kept(self, s: Tensor, env: Env, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """The same, and what :meth:`gradients` needs."""
        return s, None

    def gradients(self, grad: Tensor, kept: Any, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """From the gradient by the logit, in place where possible: by the scaled product, and by learned tables."""
        return grad, {}


class _Biased(ScoreRule):
    price_ns = 0.06

    def __init__(self, bias: sympy.Expr) -> None:
        self.bias = bias


class _Capped(ScoreRule):
    """``cap * tanh(slope * score)``."""

    tanh = True
    changes = True
    price_ns = 0.2

    def __init__(self, cap: float, slope: float) -> None:
        self.cap, self.slope = cap, slope

    def factor(self, scale: float) -> float:
        return scale * self.slope

    def logits(self, s: Tensor, env: Env) -> Tensor:
        return s.mul_(self.cap * LOG2E)

    def logits_kept(self, s: Tensor, env: Env, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        return s * (self.cap * LOG2E), s

    def gradients(self, grad: Tensor, kept: Any, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.ops.aten.tanh_backward(grad, kept).mul_(self.cap * self.slope), {}


class _General(ScoreRule):
    """Any expression: evaluated on the tile, and differentiated by autograd."""

    price_ns = 4.0
    changes = True
    arbitrary = True

    def __init__(self, expr: sympy.Expr) -> None:
        self.expr = expr

    def factor(self, scale: float) -> float:
        return scale

    def _evaluate(self, s: Tensor, env: Env) -> Tensor:
        return evaluate(self.expr, {**env, "score": s}, dtype=s.dtype).to(s.dtype).expand(s.shape)

    def logits(self, s: Tensor, env: Env) -> Tensor:
        return clamped(self._evaluate(s, env))

    def logits_kept(self, s: Tensor, env: Env, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            raw = s.detach().requires_grad_()
            modified = self._evaluate(raw, {**env, **leaves})
        return clamped(modified.detach()), (raw, modified)

    def gradients(self, grad: Tensor, kept: Any, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        raw, modified = kept
        if not modified.requires_grad:  # the score drops the product altogether
            return torch.zeros_like(grad), {}
        found = torch.autograd.grad(modified, [raw, *leaves.values()], grad, allow_unused=True)
        tables = {name: g for name, g in zip(leaves, found[1:], strict=True) if g is not None}
        return torch.zeros_like(grad) if found[0] is None else found[0], tables


class _Weights(_General):
    """Any expression, whose values are the weights of pairs."""

    masked = 0.0

    def logits(self, s: Tensor, env: Env) -> Tensor:
        return self._evaluate(s, env).clone()

    def logits_kept(self, s: Tensor, env: Env, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            raw = s.detach().requires_grad_()
            modified = self._evaluate(raw, {**env, **leaves})
        return modified.detach().clone(), (raw, modified)


def rule_of(pattern: Pattern) -> ScoreRule:
    """The rule of a pattern: of its score, which gives logits or, pointwise, weights."""
    return _Weights(pattern.score.expr) if pattern.normaliser == POINTWISE else score_rule(pattern.score.expr)


@functools.lru_cache(maxsize=1024)
def score_rule(expr: sympy.Expr) -> ScoreRule:
    """The rule for a score expression in a softmax.

    >>> import sparsedsl as sd
    >>> type(score_rule((sd.tanh(sd.score / 30) * 30).expr)).__name__, score_rule((sd.score - sd.kv_idx).expr).bias
    ('_Capped', -kv_idx)
    """
    if expr == SCORE:
        return ScoreRule()
    bias = expr - SCORE
    if SCORE not in bias.free_symbols:
        return _Biased(bias)
    cap, inner = expr.as_coeff_Mul()
    if isinstance(inner, sympy.tanh) and cap.is_number and cap > 0:
        slope = inner.args[0].coeff(SCORE)
        if slope.is_number and slope > 0 and inner.args[0] - slope * SCORE == 0:
            return _Capped(float(cap), float(slope))
    return _General(expr)
