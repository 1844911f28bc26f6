"""DeepSeek sparse attention in the place of a donor's attention (arXiv 2512.02556): a lightning indexer picks keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer
from sparsedsl.patterns.checked_arguments import check_whole
from sparsedsl.patterns.indexed import dsa

__all__ = ["DSA"]

Tensor = torch.Tensor


class DSA(Layer):
    """Attention to the ``top_k`` keys that a lightning indexer likes best, the same in all heads: a few small heads with one key for all.

    ``I_ts = sum_h w_th relu(q_th . k_s / sqrt(Di)) / sqrt(index_heads)`` for ``s <= t``, with ``q = W_q x``, ``k = LayerNorm(W_k x)`` and
    ``w = W_w x + b`` of the token's hidden state. Queries and keys are rotated as the donor's, in as many channels as its heads have;
    narrower ones are not. As many keys as there are make it the donor.

    Args:
        top_k: keys a query attends to.
        index_heads: heads of the indexer.
        index_dim: their width; None: that of the donor's heads.

    What a query picks has no gradient, so the indexer learns from a loss of its own: ``lesson.loss()`` is ``KL(p_t || softmax(I_t))``, the
    mean over tokens, ``p_t`` the mean over heads of what the donor pays to each key. Published are two stages: a warm-up of the indexer
    alone, then all weights on next tokens, with the same loss over the keys that are picked:

    - ``sum(one.loss() for one in handle.lessons(ids).values())``, after ``handle.freeze()``; about 2,000 sequences of 128K tokens, 1e-3.
    - ``model(ids, labels=ids).loss + sum(one.loss(chosen=True) for one in handle.lessons(ids, student=True).values())``: hidden states do
      not get a gradient from it.

    Initialisation: ``"published"``: weights normal with a deviation of 0.02, ``b`` 0. ``"calibrated"``: the means of the donor's query and
    key heads, each index head those of some query heads, ``W_w`` 0 and ``b`` 1; where the donor norms its queries, or ``index_dim`` is
    another, as published. The published indexer has no ``b``.

    Source: DeepSeek-V3.2 (arXiv 2512.02556).

    >>> import functools, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> handle = sd.models.convert(model, {1: functools.partial(sd.models.DSA, top_k=4, index_heads=2)})
    >>> handle
    <Conversion of LlamaForCausalLM: layer 1 DSA(top_k=4, index_heads=2, index_dim=None); native: layer 0>
    >>> handle.freeze()
    >>> lesson = handle.teacher(layer=1)(torch.arange(8)[None])
    >>> lesson.loss().backward()
    >>> all(parameter.grad is not None for parameter in handle.new_parameters())
    True
    """

    undecayed = ("norm", "sd_weight.bias")
    has_index = True

    def __init__(self, donor: Donor, top_k: int = 2048, index_heads: int = 4, index_dim: int | None = None) -> None:
        heads = check_whole("DSA", "index_heads", index_heads, 1)
        width = donor.head_dim if index_dim is None else check_whole("DSA", "index_dim", index_dim, 1)
        super().__init__(donor, dsa(top_k))
        self.index_heads, self.width, self.top_k = heads, width, top_k
        self.sd_query = nn.Linear(donor.hidden_size, heads * width, bias=False)
        self.sd_key = nn.Linear(donor.hidden_size, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.sd_weight = nn.Linear(donor.hidden_size, heads)

    def index(self, x: Tensor, rotate: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Index queries ``(B, index_heads, T, width)``, keys ``(B, 1, T, width)`` and weights ``(B, index_heads, T)`` of hidden states, to
        which no gradient goes; in float32 or more."""
        x = x.detach().to(torch.promote_types(x.dtype, self.sd_query.weight.dtype))
        queries, keys = self.heads(self.sd_query(x), self.index_heads), self.norm(self.sd_key(x))[:, None]
        if self.width >= self.head_dim:
            queries, keys = (
                torch.cat([rotate(rows[..., : self.head_dim]), rows[..., self.head_dim :]], dim=-1) for rows in (queries, keys)
            )
        weights = self.sd_weight(x).transpose(1, 2) * self.index_heads**-0.5
        return {"index_q": queries, "index_k": keys, "index_weights": weights}

    def index_scores(self, rows: dict[str, Tensor]) -> Tensor:
        """``I``, ``(B, queries, keys)``, of what :meth:`index` gives of some queries and of some keys."""
        products = torch.relu(rows["index_q"] @ rows["index_k"].transpose(2, 3) * self.width**-0.5)
        return (products * rows["index_weights"][..., None]).sum(1)

    def inputs(self, x: Tensor, raw: Heads, rope: Heads) -> dict[str, Tensor]:
        """The index of these tokens, in the type of the model."""
        return {name: rows.to(x.dtype) for name, rows in self.index(x, rope.rotate).items()}

    def init(self, donor: Donor, how: str) -> None:
        """As published, or by the donor's queries and keys; see the class."""
        super().init(donor, how)
        module: Any = donor.module
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)
        nn.init.zeros_(self.sd_weight.bias)
        if how == "published" or self.width != donor.head_dim or hasattr(module, "q_norm"):
            for part in (self.sd_query, self.sd_key, self.sd_weight):
                nn.init.normal_(part.weight, std=0.02)
            return
        queries = module.q_proj.weight.to(self.sd_query.weight.dtype).unflatten(0, (donor.heads, -1))
        parts = queries.tensor_split(min(self.index_heads, donor.heads))
        heads = [parts[head % len(parts)].mean(0) for head in range(self.index_heads)]
        self.sd_query.weight.copy_(torch.stack(heads).flatten(0, 1))
        self.sd_key.weight.copy_(module.k_proj.weight.to(self.sd_key.weight.dtype).unflatten(0, (donor.kv_heads, -1)).mean(0))
        nn.init.zeros_(self.sd_weight.weight)
        nn.init.ones_(self.sd_weight.bias)
