"""Decayed linear attention with norm and gate in the place of a donor's attention (Ring-linear, arXiv 2510.19338)."""

from __future__ import annotations

import torch

from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.hybrids.linear_attention import LinearAttention
from sparsedsl.patterns.systems import ring_linear
from sparsedsl.program.decays import decay_table

__all__ = ["RingLinear"]


class RingLinear(LinearAttention):
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

    def __init__(self, donor: Donor, groups: int = 1, depth: str = "hf", eps: float = 1e-6) -> None:
        decay = decay_table(donor.heads, donor.layer_idx, max(donor.layers, 2), depth=depth)
        super().__init__(donor, ring_linear(decay), groups, eps)

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """Keys and values of the donor's heads, each repeated."""
        return self.repeated(rope)
