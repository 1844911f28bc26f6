"""Hierarchical sparse attention and a window in the place of a donor's attention (arXiv 2511.23319, 2607.02980)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sparsedsl import program as sd
from sparsedsl.lang.expressions import kv_idx, q_idx
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer
from sparsedsl.patterns.checked_arguments import check_whole
from sparsedsl.patterns.local import causal

__all__ = ["HSA"]


class HSA(Layer):
    """A window, and chunks that a query picks by the products of its retrieval query with their landmarks, in one softmax.

    A chunk weighs ``exp`` of its score beside the keys of the window; within it keys share by their own softmax. The window begins where a
    chunk does, with at least ``window`` keys where there are as many, and chunks before it are picked from: no key is seen twice. Scores
    stand for the mass of a chunk, and learn through their weight.

    Args:
        chunk: tokens in a chunk.
        top_k: chunks a query picks.
        window: last keys seen as they are, the query's own included.
        retrieval_dim: width of retrieval queries and landmarks of a key/value head; default that of the donor's heads.

    A landmark is ``W`` of the mean hidden state of a chunk, a retrieval query ``W'`` of the token's, both without rotation; a trained bias
    of each key/value head is added to its scores.

    Initialisation: ``"published"``: normal with a deviation of 0.02, no bias. ``"calibrated"``: the donor's own keys, and the mean of the
    queries that share one, so that a score is the logit of the mean key, and a bias of ``log(chunk)``, which a chunk of equal logits weighs
    more than one of them; where the donor norms its queries, or ``retrieval_dim`` is another, as published.

    Source: HSA-UltraLong (arXiv 2511.23319); window and chunks in one softmax as in HiLS attention (arXiv 2607.02980).

    >>> import functools, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> sd.models.convert(model, {1: functools.partial(sd.models.HSA, chunk=4, top_k=2, window=8)})
    <Conversion of LlamaForCausalLM: layer 1 HSA(chunk=4, top_k=2, window=8, retrieval_dim=None); native: layer 0>
    """

    undecayed = ("bias",)

    def __init__(
        self, donor: Donor, chunk: int = 64, top_k: int = 16, window: int = 512, retrieval_dim: int | None = None
    ) -> None:
        chunk, top_k = check_whole("HSA", "chunk", chunk, 2), check_whole("HSA", "top_k", top_k, 1)
        window = check_whole("HSA", "window", window, 1)
        begin = (q_idx - (window - 1)) // chunk
        retrieval = sd.input("retrieval_q", "batch kv_heads queries retrieval_dim")
        landmarks = sd.input("landmarks", f"batch kv_heads keys/{chunk} retrieval_dim")
        before = kv_idx // chunk < begin
        selected = sd.top_k(sd.dot(retrieval, landmarks), top_k, among=before)
        far = sd.attend(before & selected, normaliser=sd.per_chunk(selected, "softmax"))
        super().__init__(donor, sd.joint(sd.attend(causal() & (kv_idx // chunk >= begin)), far))
        width = donor.head_dim if retrieval_dim is None else check_whole("HSA", "retrieval_dim", retrieval_dim, 1)
        self.chunk, self.width = chunk, width
        self.sd_query = nn.Linear(donor.hidden_size, donor.kv_heads * width, bias=False)
        self.sd_landmark = nn.Linear(donor.hidden_size, donor.kv_heads * width, bias=False)
        self.bias = nn.Parameter(torch.zeros(donor.kv_heads))

    def inputs(self, x: torch.Tensor, raw: Heads, rope: Heads) -> dict[str, torch.Tensor]:
        """Retrieval queries, with one more dimension that meets the bias in a landmark."""
        rows = self.heads(self.sd_query(x.to(self.sd_query.weight.dtype)))
        return {"retrieval_q": torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1).to(x.dtype)}

    def landmarks(self, chunks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the mean hidden state."""
        rows = self.heads(self.sd_landmark(chunks.to(self.sd_landmark.weight.dtype).mean(2)))
        # Scores are divided by the root of the width.
        bias = (self.bias * math.sqrt(self.width + 1))[None, :, None, None].expand(*rows.shape[:3], 1)
        return {"landmarks": torch.cat([rows, bias], dim=-1).to(chunks.dtype)}

    def init(self, donor: Donor, how: str) -> None:
        """As published, or by the donor's queries and keys; see the class."""
        super().init(donor, how)
        self.bias.zero_()
        if how == "published" or self.width != donor.head_dim or hasattr(donor.module, "q_norm"):
            nn.init.normal_(self.sd_query.weight, std=0.02)
            nn.init.normal_(self.sd_landmark.weight, std=0.02)
            return
        module: Any = donor.module
        heads = module.q_proj.weight.unflatten(0, (donor.kv_heads, -1, donor.head_dim))
        factor = donor.scale * math.sqrt(self.width + 1)  # what scores are divided by
        self.sd_query.weight.copy_(heads.to(self.bias.dtype).mean(1).flatten(0, 1) * factor)
        self.sd_landmark.weight.copy_(module.k_proj.weight)
        self.bias.fill_(math.log(self.chunk))
