"""Tiny random models of the transformers families the tests run: name -> how to build one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers

WINDOW = 8
VOCABULARY = 89
_ALTERNATE = ["sliding_attention", "full_attention"]
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_MIXED = {**_HEADS, "sliding_window": WINDOW, "layer_types": _ALTERNATE}


def _family(kind: str, head: str, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **changes})
        return getattr(transformers, head)(config)

    return make


# Decoders: rotary and learned positions, full, sliding and chunked layers, soft cap, sinks, MQA, groups of 3, Dv != D.
DECODERS = {
    "llama": _family("Llama", "LlamaForCausalLM", **_GROUPED),
    "llama_groups_of_3": _family("Llama", "LlamaForCausalLM", hidden_size=48, num_attention_heads=6, num_key_value_heads=2),
    "llama_mqa": _family("Llama", "LlamaForCausalLM", num_key_value_heads=1),
    "mistral": _family("Mistral", "MistralForCausalLM", **_HEADS, sliding_window=WINDOW),
    "ministral": _family("Ministral", "MinistralForCausalLM", **_MIXED),
    "qwen2": _family(
        "Qwen2",
        "Qwen2ForCausalLM",
        **_GROUPED,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
    ),
    "qwen3": _family("Qwen3", "Qwen3ForCausalLM", **_HEADS),
    "gemma2": _family("Gemma2", "Gemma2ForCausalLM", **_MIXED, attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    "gemma3": _family("Gemma3Text", "Gemma3ForCausalLM", **_MIXED, query_pre_attn_scalar=16),
    "gpt_oss": _family("GptOss", "GptOssForCausalLM", **_MIXED, num_local_experts=2, num_experts_per_tok=1),
    "phi": _family("Phi", "PhiForCausalLM", **_GROUPED),
    "phi3": _family("Phi3", "Phi3ForCausalLM", **_GROUPED, sliding_window=WINDOW),
    "cohere2": _family("Cohere2", "Cohere2ForCausalLM", **_MIXED),
    "olmo2": _family("Olmo2", "Olmo2ForCausalLM", **_GROUPED),
    "olmo3": _family("Olmo3", "Olmo3ForCausalLM", **_GROUPED, sliding_window=WINDOW, layer_types=_ALTERNATE),
    "granite": _family("Granite", "GraniteForCausalLM", **_GROUPED, attention_multiplier=0.3),
    "starcoder2": _family("Starcoder2", "Starcoder2ForCausalLM", **_GROUPED, sliding_window=WINDOW),
    "smollm3": _family("SmolLM3", "SmolLM3ForCausalLM", **_GROUPED),
    "exaone4": _family("Exaone4", "Exaone4ForCausalLM", **_MIXED),
    "llama4": _family(
        "Llama4Text",
        "Llama4ForCausalLM",
        **_HEADS,
        attention_chunk_size=WINDOW,
        no_rope_layers=[1, 0],
        intermediate_size_mlp=48,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "gemma4": _family("Gemma4Text", "Gemma4ForCausalLM", **_MIXED),
    "mixtral": _family("Mixtral", "MixtralForCausalLM", **_GROUPED, sliding_window=WINDOW, num_local_experts=2),
    "granite_swa": _family("GraniteSWA", "GraniteSWAForCausalLM", **_GROUPED, sliding_window=WINDOW, layer_types=_ALTERNATE),
    "gpt2": _family("GPT2", "GPT2LMHeadModel", n_embd=32, n_head=4, n_layer=2, n_positions=128),
    "opt": _family("OPT", "OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "deepseek_v3": _family(
        "DeepseekV3",
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=2,
    ),
}
ENCODERS = {
    "bert": _family("Bert", "BertForMaskedLM"),
    "roberta": _family("Roberta", "RobertaForMaskedLM"),
    "gemma3_bidirectional": _family(
        "Gemma3Text", "Gemma3ForCausalLM", **_MIXED, query_pre_attn_scalar=16, use_bidirectional_attention=True
    ),
    "modernbert": _family("ModernBert", "ModernBertForMaskedLM", local_attention=8, global_attn_every_n_layers=2),
}
FAMILIES = {**DECODERS, **ENCODERS}
NO_SDPA = {"gemma2", "gpt_oss", "granite_swa"}  # transformers has these in eager only


def made(kind: str, config: str, **sizes: Any) -> Any:
    """A model of these classes in eval mode, whose weights are large enough that every mask shows."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
    return model


def build(name: str, implementation: str | None = None) -> Any:
    """A model in eval mode whose weights are large enough that every mask shows in the logits."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
            elif parameter.ndim == 1 and parameter.numel() <= 8:
                parameter.normal_()  # sink logits
    model.set_attn_implementation(implementation or ("eager" if name in NO_SDPA else "sdpa"))
    return model.eval()


def tokens(batch: int = 2, length: int = 21) -> torch.Tensor:
    """Token ids that are no special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def left_padded(batch: int = 2, length: int = 21, padding: int = 5) -> dict[str, torch.Tensor]:
    """Model inputs whose first row starts with padding."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
