"""Mixture of block attention in the place of a donor's attention (arXiv 2502.13189)."""

from __future__ import annotations

from sparsedsl.models.donor import Donor
from sparsedsl.models.layer import Layer
from sparsedsl.patterns.systems import moba

__all__ = ["MoBA"]


class MoBA(Layer):
    """A query's own chunk, causally, and the ``top_k - 1`` earlier ones whose mean rotated key it likes best. No parameters.

    As many chunks as there are make it the donor. It needs training nevertheless: an untrained donor does not gather what belongs together
    in chunks.

    Args:
        chunk: tokens in a chunk.
        top_k: chunks a query sees, its own included.

    Source: MoBA (arXiv 2502.13189).

    >>> import functools, torch, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> handle = sd.models.convert(model, {1: functools.partial(sd.models.MoBA, chunk=4, top_k=2)})
    >>> handle.new_parameters()
    []
    """

    def __init__(self, donor: Donor, chunk: int = 512, top_k: int = 3) -> None:
        super().__init__(donor, moba(chunk, top_k))
