"""Attention that weighs by something else than a softmax. Each takes the mask it is laid over, and the logit it is applied to.

``softpick(sliding_window(512))``, ``sigmoid(causal(), 4096, logit=alibi(8))``. :func:`sparsedsl.attend` says what each normaliser means.
"""

from __future__ import annotations

import math
from typing import Any

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Score, kv_idx, q_idx, score
from sparsedsl.lang.numeric import relu, where
from sparsedsl.lang.numeric import sigmoid as logistic
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.patterns.checked_arguments import check_logit, check_positive

__all__ = ["hstu", "relu_squared", "sigmoid", "softpick", "stick_breaking"]


def sigmoid(mask: Any, length: float, *, logit: Score = score) -> Pattern:
    """Sigmoid attention, without a sum to divide by: ``out_i = sum_j sigmoid(logit_ij - log(length)) v_j``.

    What a pair weighs depends on no other pair. At the start of training a row of ``length`` keys then weighs about 1 in all.

    Args:
        mask: pairs that attend.
        length: keys of a row in training; a positive number. It stays what it was at other lengths.
        logit: what it is applied to; default the scaled dot product.

    Raises:
        PatternError: ``length`` is not a positive number.

    Source: Ramapuram et al. 2024, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (arXiv 2409.04431).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.sigmoid(sd.patterns.causal(), 1))
    attend(kv_idx <= q_idx, score=sigmoid(score), normaliser='pointwise')
    """
    bias = math.log(check_positive("sigmoid", "length", length))
    logit = check_logit("sigmoid", logit)
    return attend(mask, score=logistic(logit - bias if bias else logit), normaliser="pointwise")


def relu_squared(mask: Any, divisor: float = 1, *, logit: Score = score) -> Pattern:
    """Squared ReLU: ``out_i = sum_j relu(logit_ij) ** 2 v_j / divisor``. Pairs with a logit below 0 weigh exactly nothing.

    Args:
        mask: pairs that attend.
        divisor: of all weights, for example the length in training; a positive number.
        logit: what it is applied to; default the scaled dot product.

    Raises:
        PatternError: ``divisor`` is not a positive number.

    Source: Hua et al. 2022, "Transformer Quality in Linear Time" (arXiv 2202.10447), the quadratic attention of FLASH.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.relu_squared(sd.patterns.causal()))
    attend(kv_idx <= q_idx, score=relu(score)**2, normaliser='pointwise')
    """
    divisor = check_positive("relu_squared", "divisor", divisor)
    weight = relu(check_logit("relu_squared", logit)) ** 2
    return attend(mask, score=weight if divisor == 1 else weight / divisor, normaliser="pointwise")


def hstu(mask: Any, divisor: float, *, logit: Score = score) -> Pattern:
    """HSTU, the attention of generative recommenders: ``out_i = sum_j silu(logit_ij) v_j / divisor``; weights may be negative.

    Args:
        mask: pairs that attend.
        divisor: of all weights; a positive number. Published code takes the longest length of the batch unless it is told, so that the
            weights of a sequence depend on its neighbours; here it is always told.
        logit: what it is applied to; default the scaled dot product. Add the relative bias here: ``logit=relative_bias(128)``.

    Raises:
        PatternError: ``divisor`` is not a positive number.

    Source: Zhai et al. 2024, "Actions Speak Louder than Words" (arXiv 2402.17152).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.hstu(sd.patterns.causal(), 4096))
    attend(kv_idx <= q_idx, score=score*sigmoid(score) / 4096, normaliser='pointwise')
    """
    divisor = check_positive("hstu", "divisor", divisor)
    logit = check_logit("hstu", logit)
    return attend(mask, score=logit * logistic(logit) / divisor, normaliser="pointwise")


def softpick(mask: Any, *, logit: Score = score) -> Pattern:
    """Softpick: ``w_ij = relu(exp(logit_ij) - 1) / sum_l |exp(logit_il) - 1|``. Weights are 0 where a logit is at most 0, and may all be.

    Nothing is left for a first token to take: there are no attention sinks. A row whose logits are all 0 gives 0; the paper adds ``1e-6``
    to the sum instead.

    Args:
        mask: pairs that attend.
        logit: what it is applied to; default the scaled dot product.

    Source: Zuhri et al. 2025, "Softpick: No Attention Sink, No Massive Activations with Rectified Softmax" (arXiv 2504.20966).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.softpick(sd.patterns.causal()))
    attend(kv_idx <= q_idx, normaliser='softpick')
    """
    return attend(mask, score=check_logit("softpick", logit), normaliser="softpick")


def stick_breaking(mask: Any = True, *, logit: Score = score, rest: str | None = None) -> Pattern:
    """Stick-breaking over earlier keys ``j < i``: ``w_ij = s_ij prod_{j < l < i} (1 - s_il)`` with ``s = sigmoid(logit)``.

    The nearest key takes its share of a stick, the next one its share of what is left: recent keys win ties, and no position encoding is
    needed. Weights add up to less than 1. Kernels stop where nothing is left that a float could hold, so that a row costs what it looks at.

    Args:
        mask: of the earlier keys, those that attend; others take nothing and leave all.
        logit: what it is applied to; default the scaled dot product.
        rest: who gets what all keys have left. None: nobody. ``"first"``: key 0, whatever its logit and the mask; put a learned vector
            there, or the token that begins a text. Weights then add up to 1 in all rows but the first.

    Raises:
        PatternError: ``rest`` is none of these.
        UnsupportedError: ``rest="own"``. The own value would be last in line, and keys are in line by their position.

    Source: Tan et al. 2024, "Scaling Stick-Breaking Attention" (arXiv 2410.17980).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.stick_breaking())
    attend(kv_idx < q_idx, normaliser='stick_breaking')
    >>> print(sd.patterns.stick_breaking(rest="first"))
    attend(kv_idx < q_idx, score=where(kv_idx == 0, inf, score), normaliser='stick_breaking')
    """
    logit, earlier = check_logit("stick_breaking", logit), kv_idx < q_idx
    if rest == "own":
        raise UnsupportedError(
            "stick_breaking(): rest='own' would give what is left to the value of the query's own position, which would have to be last in "
            "line, and keys are in line by position. Add it outside: out + (1 - attn(q, k, ones)) * v, with ones of the shape of "
            "v[..., :1]; or take rest='first'"
        )
    if rest is None:
        return attend(earlier & mask, score=logit, normaliser="stick_breaking")
    if rest != "first":
        raise PatternError(f"stick_breaking(): rest must be None or 'first'; got {shown(rest)}")
    return attend(earlier & (mask | (kv_idx == 0)), score=where(kv_idx == 0, math.inf, logit), normaliser="stick_breaking")
