"""Patterns as modules of torch: :class:`Attention` owns the tables of a pattern, learned ones as parameters."""

from __future__ import annotations

from sparsedsl.lang.advice import public_only
from sparsedsl.nn.attention_module import Attention

__all__ = ["Attention"]

__getattr__, __dir__ = public_only(__name__, __all__)
