"""Decayed linear attention with norm and gate in the place of a donor's attention (Ring-linear, arXiv 2510.19338)."""

from __future__ import annotations

import torch
from torch import nn

from sparsedsl.errors import PatternError
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer
from sparsedsl.patterns.systems import ring_linear
from sparsedsl.program.decays import decay_table

__all__ = ["RingLinear"]


class RingLinear(Layer):
    """``o_t = scale q_t S_t``, ``S_t = decay S_(t-1) + k_t^T v_t``; then a norm over groups of heads, times ``sigmoid(W x)``.

    Queries and keys are rotated. Linear layers have as many key heads as query heads: those of the donor are repeated, each for the query
    heads that it served. The donor's sink logits and soft cap have no place in a sum without a softmax, and are left out. Nothing of a
    softmax is left either: such a layer is trained before it is used.

    Args:
        groups: the norm is over the channels of ``heads / groups`` heads together.
        depth: how decays depend on the layer, see :func:`sparsedsl.decay_table`.
        eps: of the norm.

    Initialisation: norm weights 1, the gate's weights normal with a deviation of 0.02 (``"published"``), or 0, with norm weights 2 that
    undo the gate's one half (``"calibrated"``).

    Source: Ring-linear (arXiv 2510.19338).

    >>> import torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> sd.models.convert(model, {1: sd.models.RingLinear})
    <Conversion of LlamaForCausalLM: layer 1 RingLinear(groups=1, depth='hf', eps=1e-06); native: layer 0>
    """

    drops = frozenset({"sinks", "softcap"})
    undecayed = ("sd_gate", "norm")

    def __init__(self, donor: Donor, groups: int = 1, depth: str = "hf", eps: float = 1e-6) -> None:
        if groups < 1 or donor.heads % groups:
            raise PatternError(f"RingLinear(): groups must divide the {donor.heads} query heads; got {groups}")
        super().__init__(donor, ring_linear(decay_table(donor.heads, donor.layer_idx, max(donor.layers, 2), depth=depth)))
        self.groups, self.eps = groups, eps
        width = donor.heads * donor.value_dim
        self.sd_gate = nn.Linear(donor.hidden_size, width, bias=False)
        self.norm = nn.Parameter(torch.ones(width))

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """Keys and values of the donor's heads, each repeated."""
        group = self.query_heads // self.kv_heads
        return {"q": rope.q, "k": rope.k.repeat_interleave(group, dim=1), "v": rope.v.repeat_interleave(group, dim=1)}

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
