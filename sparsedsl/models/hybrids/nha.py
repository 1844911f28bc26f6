"""Native hybrid attention in the place of a donor's attention (arXiv 2510.07019), with first tokens kept and a bias of the slots."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.expressions import h
from sparsedsl.lang.table_reads import table
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer
from sparsedsl.models.native import sinks
from sparsedsl.patterns.systems import nha

__all__ = ["NHA", "half_life_bias"]

_bias = table("slot_bias", dtype=float, learned=True)
# Half-lives of slots, in tokens, from the first slot to the last: longer than the window, as far as donors look.
_SHORTEST, _LONGEST = 8.0, 4096.0


def half_life_bias(tokens: float, temperature: float = 8.0) -> float:
    """The gate logit of a slot that loses half of what it holds in so many tokens: ``sigmoid(f) ** (1 / temperature) == 2 ** (-1 / n)``.

    >>> [round(half_life_bias(n), 4) for n in (8, 64, 512, 4096)]
    [0.0, 2.4023, 4.52, 6.6042]
    """
    kept = 2.0 ** (-temperature / tokens)
    return math.log(kept / (1 - kept))


class NHA(Layer):
    """Native hybrid attention: one softmax over the last ``window`` keys, the ``first`` ones, and ``slots`` that hold all others.

    Slots see queries and keys before rotation; the window sees them rotated. Gates are computed in float32.

    Args:
        slots: a key/value head has so many.
        window: last keys seen as they are, the query's own included.
        first: tokens at the beginning that stay in sight, and never go into a slot. 1 keeps most of a donor's quality (its attention sink).
        slot_bias: where the trained bias of each query head on the slots' logits begins; None: there is none, as published. Slots that
            hold nothing yet have logit 0, and take from whatever the donor's logits are lower than: at -6 they hardly do.
        temperature: of the gates.

    Initialisation: ``"published"``: gates are the means of the rows of ``k_proj`` (the authors say "from k_proj" and not how), their bias
    0. ``"calibrated"``: gates do not depend on the token yet, and half-lives go from 8 to 4,096 tokens.

    Source: native hybrid attention (arXiv 2510.07019).

    >>> import functools, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> sd.models.convert(model, {1: functools.partial(sd.models.NHA, slots=4, window=8)})
    <Conversion of LlamaForCausalLM: layer 1 NHA(slots=4, window=8, first=1, slot_bias=-6.0, temperature=8.0); native: layer 0>
    """

    undecayed = ("sd_gate",)

    def __init__(
        self,
        donor: Donor,
        slots: int = 32,
        window: int = 32,
        first: int = 1,
        slot_bias: float | None = -6.0,
        temperature: float = 8.0,
    ) -> None:
        if donor.softcap is not None:
            raise UnsupportedError(
                f"layer {donor.layer_idx} caps its logits at {donor.softcap}, and the logits of slots have no cap; leave it as it is, or "
                "give it a program of attention alone, such as sd.models.MoBA"
            )
        words: dict[str, Any] = {"temperature": temperature, "first": first, "sink": None if donor.sinks is None else sinks[h]}
        super().__init__(donor, nha(slots, window, slot_bias=None if slot_bias is None else _bias[h], **words))
        self.slots, self.temperature, self.begins = slots, temperature, slot_bias
        self.sd_gate = nn.Linear(donor.hidden_size, donor.kv_heads * slots)
        self.slot_bias = None if slot_bias is None else nn.Parameter(torch.full((donor.heads,), float(slot_bias)))

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """Gates of these tokens, in float32 or more: a half-life of 4,096 is a factor of 1 in half precision."""
        kind = torch.promote_types(x.dtype, torch.float32)
        gate = functional.linear(x.to(kind), self.sd_gate.weight.to(kind), self.sd_gate.bias.to(kind))
        found = {"q": raw.q, "k": raw.k, "q_rope": rope.q, "k_rope": rope.k, "gate": self.heads(gate)}
        return found if self.slot_bias is None else found | {"slot_bias": self.slot_bias}

    def init(self, donor: Donor, how: str) -> None:
        """Gates by the donor's keys, or by half-lives; see the class."""
        super().init(donor, how)
        if self.slot_bias is not None and self.begins is not None:
            self.slot_bias.fill_(self.begins)
        if how == "published":
            module: Any = donor.module
            rows = module.k_proj.weight.to(self.sd_gate.weight.dtype).unflatten(0, (self.kv_heads, -1))
            means = [part.mean(1) for part in rows.tensor_split(min(self.slots, rows.shape[1]), dim=1)]
            self.sd_gate.weight.copy_(torch.stack([means[slot % len(means)] for slot in range(self.slots)], dim=1).flatten(0, 1))
            self.sd_gate.bias.zero_()
            return
        self.sd_gate.weight.zero_()
        steps = [slot / max(self.slots - 1, 1) for slot in range(self.slots)]
        lives = [_SHORTEST * (_LONGEST / _SHORTEST) ** step for step in steps]
        bias = torch.tensor([half_life_bias(life, self.temperature) for life in lives], dtype=self.sd_gate.bias.dtype)
        self.sd_gate.bias.copy_(bias.repeat(self.kv_heads))
