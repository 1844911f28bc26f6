"""Attention along lists of selected blocks, as a backend is asked for it: which blocks, which of their pairs, what logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sympy
import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.lang.symbols import SCORE
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["Results", "SelectedAgain", "SelectedCall"]

Tensor = torch.Tensor
Results = tuple[Tensor, Tensor]
SelectedAgain = Callable[[Tensor, Tensor, Tensor, int, SelectedBlocks, "Tensor | None", "Results | None"], "Results | None"]
"""``(out, lse)`` of q, k, v, an offset, lists and weights; where results over other keys are given, of one softmax over both, which may
take their place. None: the ordinary call is to look at them."""


@dataclass(frozen=True, eq=False)
class SelectedCall:
    """What ``selected_attention(q, k, v, selected)`` of every backend that follows lists takes beside q, k and v.

    A query attends to the pairs of its listed blocks for which ``mask`` holds, with the logit that ``score`` makes of
    ``scale * <q, k>``: in one softmax over all of them, or with ``weights`` in one softmax for each block, whose results are added
    with these weights.

    Args:
        blocks: for each query (``q_block`` 1) the blocks of keys it looks at, ascending, a block once.
        scale: factor of the dot products.
        domain: lengths, and the position of the first query.
        mask: which pairs of a listed block attend, over ``b, h, q_idx, kv_idx, q_len, kv_len``, reads of ``tables`` and the symbols
            of ``choices``; ``sympy.true``: all.
        score: the modified logit over the same; ``SCORE`` itself: the scaled dot product.
        tables: all that mask and score read. Those that require gradients are learned and get them.
        choices: where several choices were joined into ``blocks``, names of the symbols that stand in ``mask`` for "choice i picked
            the block of this pair"; bit i of ``members`` is its value.
        members: ``(B|1, Hs, Sq, W)`` int32 along ``blocks.indices``; None where there is one choice, which picked all that is listed.
        weights: ``(B, Hw, Sq, W)`` along ``blocks.indices``, Hw divides the query heads: a softmax for each block; None: one over all.
        softmax1: each softmax has one logit 0 more, without a value (softmax1).
    """

    blocks: SelectedBlocks
    scale: float
    domain: Domain
    mask: sympy.Basic = sympy.true
    score: sympy.Expr = SCORE
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    members: Tensor | None = None
    weights: Tensor | None = None
    softmax1: bool = False

    @functools.cached_property
    def learned(self) -> tuple[str, ...]:
        """Names of the tables that get gradients."""
        return tuple(name for name in sorted(self.tables) if self.tables[name].requires_grad)
