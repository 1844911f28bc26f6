"""One step of vLLM: whose tokens lie in which rows, and where their keys lie. What layers that run the same have in common is made once.

Input: vLLM's ``CommonAttentionMetadata``. Output: a :class:`Step`, which is the metadata that every layer of the group is handed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.packed_face import reads_pages
from sparsedsl.execute.paged_plan import PagedPlan
from sparsedsl.serve.layer_facts import LayerRun
from sparsedsl.serve.layer_patterns import registered

__all__ = ["Step", "StepBuilder"]

Tensor = torch.Tensor


@dataclass(eq=False)
class Step:
    """``q_ends (R + 1,)``: where the new tokens of each request end. ``kv_lens (R,)``: its keys, the new ones included. Both int64 on the
    CPU. ``block_table (R, width)``: its pages. ``window``: keys that the engine keeps of each request, None: all. ``plans``: by what is
    run and on which pools."""

    q_ends: Tensor
    kv_lens: Tensor
    block_table: Tensor
    window: int | None
    plans: dict[Any, PagedPlan] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """New tokens of all requests; rows behind them are padding."""
        return int(self.q_ends[-1])

    def plan(self, run: LayerRun, heads: int, pages: int, page: int, device: torch.device) -> PagedPlan:
        """Made by the first layer that runs this."""
        key = (id(run.attention), heads, pages, page)
        if key not in self.plans:
            self.plans[key] = run.attention.plan_paged(
                self.block_table, self.kv_lens, self.q_ends, heads=heads, page=page, pages=pages, rows=self.rows, device=device,
                copy=not reads_pages(run.attention.backend, device), tables=run.tables,
            )  # fmt: skip
        return self.plans[key]


class StepBuilder:
    """What vLLM calls once a step for each group of layers that share their pages; of :class:`MetadataBuilder`, which says the rest."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.layer_names, self.vllm_config, self.device = kv_cache_spec, layer_names, vllm_config, device
        given = registered()
        if getattr(vllm_config.parallel_config, "pipeline_parallel_size", 1) == 1:  # (else the other layers are elsewhere)
            given.check_names(vllm_config.compilation_config.static_forward_context)
        chunk = getattr(kv_cache_spec, "attention_chunk_size", None)
        told = [name for name in layer_names if given.of(name) is not None]
        if chunk is not None and told:
            raise UnsupportedError(
                f"layer {told[0]}: vLLM runs this layer in chunks of {chunk} tokens, each as a request of its own, so that positions are "
                "not those of the prompt. Leave layers with chunks out of what you register"
            )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        """The lengths and pages of a step.

        Raises:
            UnsupportedError: the step asks for another attention than that of a decoder.
        """
        told = common_attn_metadata
        if common_prefix_len:
            raise UnsupportedError(
                f"cascade attention (a common prefix of {common_prefix_len} tokens, computed apart) is not part of this back end: "
                "use_cascade_attention() says so. Set disable_cascade_attn=True"
            )
        if getattr(told, "causal", True) is not True:
            raise UnsupportedError(
                f"the step asks for attention that is not causal (causal={told.causal}), as parallel drafting does; patterns are run over "
                "what was decoded. Serve without that kind of drafting"
            )
        if getattr(told, "mm_req_doc_ranges", None):
            raise UnsupportedError(
                "the step asks for attention in both directions among the tokens of images (mm_req_doc_ranges), which patterns would drop. "
                "Serve this model by another attention backend"
            )
        if getattr(told, "dcp_local_seq_lens", None) is not None:
            raise UnsupportedError(
                "keys of a request are spread over ranks (decode context parallel), and a pattern needs them in one place. Set "
                "decode_context_parallel_size=1"
            )
        count = told.num_reqs
        # Tensors of inference mode do not count the writes to them, by which lists that were made of them are known again; and vLLM
        # writes the next step into these.
        with torch.inference_mode(False):
            ends = told.query_start_loc[: count + 1].to("cpu", torch.int64, copy=True)
            lens = told.seq_lens[:count].to("cpu", torch.int64, copy=True)
            table = told.block_table_tensor[:count].to(torch.int64, copy=True)
        return Step(ends, lens, table, getattr(self.kv_cache_spec, "sliding_window", None))
