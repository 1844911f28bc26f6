"""What linear layers share: a key/value head for each query head, and a norm and a gate after the sum."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from sparsedsl.errors import PatternError
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer

__all__ = ["LinearAttention"]


class LinearAttention(Layer):
    """A program of linear attention; then a norm over the channels of ``heads / groups`` heads together, times ``sigmoid(W x)``.

    Initialisation: norm weights 1, the gate's weights normal with a deviation of 0.02 (``"published"``), or 0, with norm weights 2 that
    undo the gate's one half (``"calibrated"``).
    """

    drops = frozenset({"sinks", "softcap"})
    undecayed: ClassVar[tuple[str, ...]] = ("sd_gate", "norm")

    def __init__(self, donor: Donor, program: Any, groups: int, eps: float) -> None:
        if groups < 1 or donor.heads % groups:
            raise PatternError(f"{type(self).__name__}(): groups must divide the {donor.heads} query heads; got {groups}")
        super().__init__(donor, program)
        self.groups, self.eps = groups, eps
        width = donor.heads * donor.value_dim
        self.sd_gate = nn.Linear(donor.hidden_size, width, bias=False)
        self.norm = nn.Parameter(torch.ones(width))

    def repeated(self, given: Heads) -> dict[str, torch.Tensor]:
        """Queries, and keys and values of the donor's heads, each repeated for the query heads that it served."""
        group = self.query_heads // self.kv_heads
        return {"q": given.q, "k": given.k.repeat_interleave(group, dim=1), "v": given.v.repeat_interleave(group, dim=1)}

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Norm, then gate; in float32 or more inside."""
        kind = torch.promote_types(o.dtype, torch.float32)
        parts = o.to(kind).unflatten(-1, (self.groups, -1))
        normed = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.norm
        gate = torch.sigmoid(nn.functional.linear(x.to(kind), self.sd_gate.weight.to(kind)))
        return (normed * gate).to(o.dtype)

    def init(self, donor: Donor, how: str) -> None:
        """As published, or with gates that do not depend on the token; see the class."""
        super().init(donor, how)
        self.norm.fill_(1.0 if how == "published" else 2.0)
        if how == "published":
            nn.init.normal_(self.sd_gate.weight, std=0.02)
        else:
            nn.init.zeros_(self.sd_gate.weight)
