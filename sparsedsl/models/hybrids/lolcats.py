"""Linear attention with learned feature maps and a window in the place of a donor's attention (LoLCATs, arXiv 2410.10254)."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsedsl import program as sd
from sparsedsl.lang.expressions import h, kv_idx
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer
from sparsedsl.models.native import sinks
from sparsedsl.patterns.checked_arguments import check_whole
from sparsedsl.patterns.local import causal, sliding_window

__all__ = ["LoLCATs"]

Tensor = torch.Tensor


class LoLCATs(Layer):
    """One sum of weights over the last ``window`` keys and the ``first`` ones, by softmax, and all others, by linear attention.

    A key further back weighs ``e^b phi(q) . phi(k)`` beside the ``exp`` of logits in the window, with ``phi(x) = [exp(x W), exp(-x W)]`` of
    rotated queries and keys (the Hedgehog map), ``W`` and ``b`` learned for each head: of all that is further back, a state of constant
    size is left. With a window over all keys it is the donor.

    Args:
        window: last keys seen as they are, the query's own included.
        first: tokens at the beginning that stay in sight, and are in no state. 1 keeps most of a donor's quality (its attention sink).
        features: columns of ``W``; None: as many as a head is wide.

    Training as published: first ``W`` and ``b`` alone learn each layer's output from the donor (``lesson.loss()``, 1e-2), then low-rank
    adapters on ``q_proj, k_proj, v_proj, o_proj`` the next token (1e-4).

    Initialisation: ``"published"``: ``W`` uniform in ``+-sqrt(6 / head_dim)`` (Kaiming), ``b`` such that the window has a factor of 0.1.
    ``"calibrated"``: ``W`` the unit matrix times the root of the donor's scale, and ``b`` such that the window alone speaks, nearly.

    Not as published: the window slides, where theirs has two blocks of keys; the map is that of Hedgehog, where theirs is a softmax over
    its columns: both parts then have the unit of ``exp`` of a logit, and the largest logit of a window has no part in the result.

    Source: LoLCATs (arXiv 2410.10254), Hedgehog (arXiv 2402.04347).

    >>> import functools, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> sd.models.convert(model, {1: functools.partial(sd.models.LoLCATs, window=8)})
    <Conversion of LlamaForCausalLM: layer 1 LoLCATs(window=8, first=1, features=None); native: layer 0>
    """

    undecayed = ("bias",)

    def __init__(self, donor: Donor, window: int = 64, first: int = 1, features: int | None = None) -> None:
        window, first = check_whole("LoLCATs", "window", window, 1), check_whole("LoLCATs", "first", first, 0)
        width = donor.head_dim if features is None else check_whole("LoLCATs", "features", features, 1)
        queries = sd.input("feature_q", "batch heads queries feature_dim")
        keys = sd.input("feature_k", "batch kv_heads keys feature_dim")
        near = causal() & (sliding_window(window) | (kv_idx < first)) if first else sliding_window(window)
        far = sd.linear(
            1.0, q=queries, k=keys, features="exp", normalised="sum", eps=0.0, scale=1.0, delay=window, first=first
        )  # fmt: skip
        super().__init__(donor, sd.joint(sd.attend(near, sink=None if donor.sinks is None else sinks[h]), far))
        self.query_map = nn.Parameter(torch.zeros(donor.heads, donor.head_dim, width))
        self.key_map = nn.Parameter(torch.zeros(donor.kv_heads, donor.head_dim, width))
        self.bias = nn.Parameter(torch.zeros(donor.heads))

    def inputs(self, x: Tensor, raw: Heads, rope: Heads) -> dict[str, Tensor]:
        """Logarithms of the features of these tokens, in float32 or more."""
        kind = torch.promote_types(x.dtype, torch.float32)
        queries, keys = (rows.to(kind) @ weight.to(kind) for rows, weight in ((rope.q, self.query_map), (rope.k, self.key_map)))
        bias = self.bias.to(kind)[:, None, None]
        return {"feature_q": torch.cat([queries + bias, bias - queries], -1), "feature_k": torch.cat([keys, -keys], -1)}

    def init(self, donor: Donor, how: str) -> None:
        """Random maps as published, or unit ones that hardly speak; see the class."""
        super().init(donor, how)
        width = self.query_map.shape[2]
        if how == "published":
            reach = math.sqrt(6 / donor.head_dim)
            nn.init.uniform_(self.query_map, -reach, reach)
            nn.init.uniform_(self.key_map, -reach, reach)
            self.bias.fill_(math.log(10.0))
            return
        unit = torch.eye(donor.head_dim, width, dtype=self.query_map.dtype, device=self.query_map.device) * math.sqrt(donor.scale)
        self.query_map.copy_(unit.expand_as(self.query_map))
        self.key_map.copy_(unit.expand_as(self.key_map))
        self.bias.fill_(-6.0 - math.log(2 * width))
