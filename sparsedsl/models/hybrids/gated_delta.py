"""The gated delta rule with norm and gate in the place of a donor's attention (arXiv 2412.06464, 2510.26692)."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.hybrids.linear_attention import LinearAttention
from sparsedsl.patterns.recurrent import gated_delta, kda

__all__ = ["GatedDelta"]

# Steps of a decay that is published, least and largest, and the half-lives in tokens between which calibrated heads lie.
STEPS, HALF_LIVES = (1e-3, 1e-1), (8.0, 2048.0)


class GatedDelta(LinearAttention):
    """``S = e^g_t S_(t-1)``, ``S_t = S + beta_t k_t^T (v_t - k_t S)``, ``o_t = scale q_t S_t``; then a norm a head, times ``sigmoid(W x)``.

    Queries and keys are those before rotation, of length 1: decays say how long ago a token was. ``g = -exp(A) softplus(W' x + dt)`` and
    ``beta = sigmoid(W'' x)``, both in float32 or more. Keys and values of the donor are repeated for the query heads that they served; its
    sink logits and soft cap have no place in a sum without a softmax, and are left out. There is no short convolution before: a layer sees
    the hidden states of new tokens alone. Nothing of a softmax is left: such a layer is trained before it is used.

    Args:
        channels: a decay for every channel of a key (Kimi delta attention), or one for every head (Gated DeltaNet).
        eps: of the norm.

    Initialisation: ``"published"``: ``exp(A)`` uniform in 1 to 16, ``softplus(dt)`` between 0.001 and 0.1 by its logarithm, weights normal
    with a deviation of 0.02, norm weights 1. ``"calibrated"``: weights 0, so that nothing depends on the token yet: half-lives from 8
    tokens in the first head to 2,048 in the last, ``beta`` one half, norm weights 2 that undo the gate's one half.

    Source: Gated DeltaNet (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692).

    >>> import torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> sd.models.convert(model, {1: sd.models.GatedDelta})
    <Conversion of LlamaForCausalLM: layer 1 GatedDelta(channels=False, eps=1e-06); native: layer 0>
    """

    undecayed = (*LinearAttention.undecayed, "log_rate", "step")

    def __init__(self, donor: Donor, channels: bool = False, eps: float = 1e-6) -> None:
        super().__init__(donor, kda() if channels else gated_delta(), donor.heads, eps)
        self.channels = bool(channels)
        width = donor.heads * (donor.head_dim if channels else 1)
        self.sd_decay = nn.Linear(donor.hidden_size, width, bias=False)
        self.sd_beta = nn.Linear(donor.hidden_size, donor.heads, bias=False)
        self.log_rate = nn.Parameter(torch.zeros(donor.heads))
        self.step = nn.Parameter(torch.zeros(width))

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """Queries, keys and values before rotation; decays and write strengths."""
        x = x.to(torch.promote_types(x.dtype, self.step.dtype))
        steps = self.heads(nn.functional.softplus(self.sd_decay(x) + self.step), self.query_heads)
        g = -self.log_rate.exp()[:, None, None] * steps
        beta = torch.sigmoid(self.heads(self.sd_beta(x), self.query_heads))[..., 0]
        return self.repeated(raw) | {"g": g if self.channels else g[..., 0], "beta": beta}

    def init(self, donor: Donor, how: str) -> None:
        """As published, or with decays that do not depend on the token; see the class."""
        super().init(donor, how)
        if how == "published":
            nn.init.normal_(self.sd_decay.weight, std=0.02)
            nn.init.normal_(self.sd_beta.weight, std=0.02)
            self.log_rate.uniform_(1.0, 16.0).log_()
            steps = torch.empty_like(self.step).uniform_(*map(math.log, STEPS)).exp()
        else:
            nn.init.zeros_(self.sd_decay.weight)
            nn.init.zeros_(self.sd_beta.weight)
            self.log_rate.zero_()
            first, last = map(math.log, HALF_LIVES)
            lives = torch.linspace(first, last, donor.heads).exp().to(self.step)
            steps = (math.log(2) / lives).repeat_interleave(self.step.numel() // donor.heads)
        self.step.copy_(steps + torch.log(-torch.expm1(-steps)))  # whose softplus they are
