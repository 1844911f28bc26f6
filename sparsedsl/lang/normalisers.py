"""How the scores of a row become weights: the names that ``attend(normaliser=)`` takes, and why others are refused."""

from __future__ import annotations

from typing import Any

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.lang.advice import shown

__all__ = ["NORMALISERS", "POINTWISE", "SOFTMAX", "SOFTPICK", "STICK_BREAKING", "check_normaliser"]

SOFTMAX, POINTWISE, SOFTPICK, STICK_BREAKING = "softmax", "pointwise", "softpick", "stick_breaking"
NORMALISERS = (SOFTMAX, POINTWISE, SOFTPICK, STICK_BREAKING)

_POINTWISE_WAY = "attend(mask, score=sd.{}, normaliser='pointwise') weighs each pair by itself"
# Names that people look for here -> what to write, or why there is nothing to write.
_ENTMAX = (
    "its threshold depends on all scores of a row together, and those of two parts of the keys do not tell that of both, so that no "
    "kernel can go through the keys tile by tile. " + _POINTWISE_WAY.format("relu(sd.score) ** 2") + " and drops pairs as well"
)
_REFUSED = {
    **dict.fromkeys(("entmax", "entmax15", "sparsemax"), _ENTMAX),
    "talking_heads": "it mixes the logits of all heads of a pair, and kernels hold those of one head. Mix the outputs of the heads "
    "instead, by a linear layer after the attention",
}
_MEANT = {
    "sigmoid": "sd.patterns.sigmoid(mask), or " + _POINTWISE_WAY.format("sigmoid(sd.score)"),
    "silu": "sd.patterns.hstu(mask), or " + _POINTWISE_WAY.format("score * sd.sigmoid(sd.score)"),
    "relu": _POINTWISE_WAY.format("relu(sd.score)"),
    "relu_squared": "sd.patterns.relu_squared(mask), or " + _POINTWISE_WAY.format("relu(sd.score) ** 2"),
    "softmax1": "attend(mask, sink=0.0), which has one more logit of 0 in the softmax",
    "none": "attend(mask, normaliser='pointwise'), which takes the scores themselves as weights",
}


def check_normaliser(name: Any, *, has_sink: bool) -> None:
    """Whether ``name`` is one of :data:`NORMALISERS`, and fits a sink if there is one.

    Raises :class:`~sparsedsl.PatternError`, or :class:`~sparsedsl.UnsupportedError` for what nothing can work out tile by tile.
    """
    if isinstance(name, str) and name in _REFUSED:
        raise UnsupportedError(f"attend(): there is no normaliser {name!r}: {_REFUSED[name]}")
    if name not in NORMALISERS:
        instead = f". Write {_MEANT[name]}" if isinstance(name, str) and name in _MEANT else ""
        raise PatternError(
            f"attend(): normaliser must be one of {', '.join(map(repr, NORMALISERS))}, or come from per_chunk(); got {shown(name)}{instead}"
        )
    if has_sink and name != SOFTMAX:
        raise PatternError(
            f"attend(): a sink is a logit in a softmax's sum, and normaliser={name!r} has no such sum; leave the sink out"
        )
