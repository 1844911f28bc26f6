"""Tiny random models of many more transformers families: every causal and masked language model that fits one set of small sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

# A size is given to a configuration that has it by default.
_SIZES: dict[str, Any] = {
    "vocab_size": 89, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "sliding_window": 8, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 48, "rotary_dim": 8,
    "d_model": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "attention_heads": 4, "n_heads": 4, "n_layers": 2, "dim": 32, "hidden_dim": 48, "embedding_size": 32, "type_vocab_size": 2,
    "num_local_experts": 2, "num_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_topk": 1, "moe_k": 1, "n_group": 1, "topk_group": 1,
    "expert_ffn_hidden_size": 16, "shared_intermediate_size": 16, "decoder_sparse_step": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "query_pre_attn_scalar": 8,
    "vocab_size_per_layer_input": 89, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "mamba_expand": 1, "mamba_dt_rank": 4, "n_mamba_heads": 1, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "n_groups": 1, "chunk_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "local_attention": 8, "global_attn_every_n_layers": 2, "attention_window": 8,
    "max_source_positions": 64, "max_target_positions": 128, "ffn_hidden_size": 48, "num_query_groups": 2, "block_size": 16,
    "attention_chunk_size": 8, "intermediate_size_mlp": 48, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8,
}  # fmt: skip
ENCODERS = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - {"bart", "mbart", "mvp", "xlm", "modernbert-decoder"}
NAMES = {
    **dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    **{name: MODEL_FOR_MASKED_LM_MAPPING_NAMES[name] for name in sorted(ENCODERS)},
}


def build(name: str) -> Any:
    """A model in eval mode, named as in transformers' auto classes; raises whatever its classes raise for these sizes."""
    torch.manual_seed(0)
    kind: Any = CONFIG_MAPPING[name]
    usual = kind()
    sizes = {key: value for key, value in _SIZES.items() if getattr(usual, key, None) is not None or key.endswith("token_id")}
    types = getattr(usual, "layer_types", None)
    if types is not None:
        first = list(dict.fromkeys(types))[:2]
        sizes["layer_types"] = (first * 2)[:2]
    model = getattr(transformers, NAMES[name])(kind(**sizes))
    if sum(parameter.numel() for parameter in model.parameters()) > 3_000_000:
        raise ValueError("not small")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / math.sqrt(parameter.shape[-1]))
            elif parameter.ndim == 1 and parameter.numel() <= 8:
                parameter.normal_()
    return model.eval()
