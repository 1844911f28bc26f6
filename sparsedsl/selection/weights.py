"""Weights of picked blocks from their scores."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from sparsedsl.errors import PatternError

__all__ = ["Rule", "weights_of"]

Tensor = torch.Tensor
Rule = Literal["softmax", "softmax1", "stick_breaking", "sigmoid", "raw"]


def weights_of(scores: Tensor, rule: Rule = "softmax") -> tuple[Tensor, Tensor]:
    """Weights ``(B, H, R, W)`` of picked blocks and the log of their total ``(B, H, R)``, both differentiable.

    ``scores (B, H, R, W)``, ascending blocks, -inf where a slot is empty: its weight is 0. A row of empty slots:
    all 0, and -inf (0 for "softmax1").

    - "softmax": over the slots; the total is the sum of ``exp(score)``.
    - "softmax1": with a zero logit more that takes its share and gives nothing; the total has its 1.
    - "stick_breaking": the last, most recent slot takes ``sigmoid(score)`` of the whole, the one before of what is left, and so on; the
      total is the sum of the weights, as in the next two.
    - "sigmoid" of each score, and "raw": the scores themselves (a total that is not positive has the log -inf).

    >>> weights_of(torch.tensor([[[[0.0, 0.0, -torch.inf]]]]), "stick_breaking")[0]
    tensor([[[[0.2500, 0.5000, 0.0000]]]])
    >>> weights_of(torch.tensor([[[[0.0, 0.0, -torch.inf]]]]), "softmax1")[0]
    tensor([[[[0.3333, 0.3333, 0.0000]]]])
    """
    empty = scores == float("-inf")
    # The zero logit of softmax1 is there without slots too, as a sink is.
    none = empty.all(-1) & (rule != "softmax1")
    safe = scores.masked_fill(empty, 0.0)
    match rule:
        case "softmax" | "softmax1":
            slots = scores if rule == "softmax" else F.pad(scores, (0, 1))
            slots = slots.masked_fill(none[..., None], 0.0)
            total = torch.logsumexp(slots, dim=-1)
            weights = torch.softmax(slots, dim=-1)[..., : scores.shape[-1]]  # exp(score - total) is off where scores are great
        case "stick_breaking":
            later = F.pad(F.softplus(safe).masked_fill(empty, 0.0)[..., 1:], (0, 1))
            weights = (F.logsigmoid(safe) - later.flip(-1).cumsum(-1).flip(-1)).exp()
        case "sigmoid":
            weights = torch.sigmoid(safe)
        case "raw":
            weights = safe
        case _:
            raise PatternError(f"weights: rule is {rule!r}; wanted softmax, softmax1, stick_breaking, sigmoid or raw")
    weights = weights.masked_fill(empty, 0.0)
    if not rule.startswith("softmax"):
        sums = weights.sum(-1)
        none = sums <= 0
        total = sums.masked_fill(none, 1.0).log()
    return weights, total.masked_fill(none, float("-inf"))
