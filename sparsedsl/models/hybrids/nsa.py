"""Native sparse attention in the place of a donor's attention (arXiv 2502.11089)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from sparsedsl.errors import UnsupportedError
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer
from sparsedsl.patterns.systems import nsa

__all__ = ["NSA"]

# Gates of 1 - 5e-9 and 5e-9: of what a layer gives, no more is lost than float32 rounds.
_OPEN = 20.0


class NSA(Layer):
    """Means of blocks, picked blocks and a window, each with its own softmax, weighed by gates ``sigmoid(W x + b)`` of each query head.

    Block keys are means of rotated keys. With sink logits there is no one softmax for them: such donors are refused.

    Args:
        block: tokens in a mean.
        select: tokens in a block that is picked; a multiple of ``block``, or ``block`` itself.
        top_k: blocks picked, the first and the two latest included.
        window: last keys seen, the query included.

    Initialisation: ``"published"``: ``W`` normal with a deviation of 0.02 and ``b`` 0: each branch has about half a weight, all three one
    and a half. ``"calibrated"``: ``W`` 0 and ``b`` such that the window alone speaks; with a window of all keys that is the donor.

    Source: native sparse attention (arXiv 2502.11089); no conversion of a donor is published.

    >>> import functools, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> sd.models.convert(model, {1: functools.partial(sd.models.NSA, block=2, select=4, top_k=4, window=8)})
    <Conversion of LlamaForCausalLM: layer 1 NSA(block=2, select=4, top_k=4, window=8); native: layer 0>
    """

    undecayed = ("sd_gate",)

    def __init__(self, donor: Donor, block: int = 32, select: int = 64, top_k: int = 16, window: int = 512) -> None:
        if donor.sinks is not None:
            raise UnsupportedError(
                f"layer {donor.layer_idx} has sink logits, and NSA three softmaxes, none of which they belong to; leave it as it is, or "
                "give it sd.models.MoBA or sd.models.NHA"
            )
        super().__init__(donor, nsa(block, select, top_k, window))
        self.sd_gate = nn.Linear(donor.hidden_size, donor.heads * 3)

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """Gates of these tokens."""
        kind = torch.promote_types(x.dtype, torch.float32)
        gate = functional.linear(x.to(kind), self.sd_gate.weight.to(kind), self.sd_gate.bias.to(kind))
        return {"gate": torch.sigmoid(self.heads(gate, self.query_heads)).to(x.dtype)}

    def init(self, donor: Donor, how: str) -> None:
        """As published, or the window alone; see the class."""
        super().init(donor, how)
        self.sd_gate.bias.zero_()
        if how == "published":
            nn.init.normal_(self.sd_gate.weight, std=0.02)
            return
        self.sd_gate.weight.zero_()
        self.sd_gate.bias.copy_(torch.tensor([-_OPEN, -_OPEN, _OPEN]).repeat(self.query_heads))
