"""How a row chooses among its blocks, as data; and what a backend may offer that does all of it in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from sparsedsl.selection.candidates import Candidates, PairRule
from sparsedsl.selection.scores import ScoreSource

__all__ = ["Choose", "Rule"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class Rule:
    """``top_k``: the ``k`` best, and with ``extra`` what is forced beside them. ``top_p``: as many as hold ``share`` of the mass.
    ``threshold``: those of ``share`` at least. What the rest means: :func:`~sparsedsl.selection.mass.top_p`; but ``scores``: whether those
    of what is chosen are kept."""

    name: Literal["top_k", "top_p", "threshold"]
    k: int = 0
    extra: bool = False
    share: float = 0.0
    measure: Literal["score", "softmax", "share"] = "score"
    inclusive: bool = True
    unmet: Literal["all", "none"] = "all"
    forced_in_mass: bool = False
    scores: bool = False


class Choose(Protocol):
    """A backend's own way to choose, in one pass."""

    def __call__(
        self,
        source: ScoreSource,
        candidates: Candidates,
        forced: PairRule | None,
        rule: Rule,
        rows: slice,
        start: int,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The lists of some rows, ascending, ``(B, H, r, width)`` int32, -1 after the end; how many each has, ``(B, H, r)`` int32; and, if
        they are to be kept, the scores of what was chosen, like the lists, -inf after the end. ``start``: what the first block is called.

        None: it cannot make scores or follow rules of this kind itself; then it is asked again with the scores as they are
        (``TensorScores``) and a table of what is forced, and may say None again.
        """
