"""The pattern a model was made with, read from its configuration and its attention modules."""

from __future__ import annotations

from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.expressions import Mask, b, h, kv_idx, q_idx, score, table
from sparsedsl.lang.numeric import tanh
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.models.layers import attention_layers, passes_argument, text_config

__all__ = ["left_padding", "native_pattern", "native_patterns", "sinks"]

# Tables that models.apply binds at every call, for native patterns and the user's own alike.
sinks = table("sinks", dtype=float, learned=True)  # sinks[h]: the layer's sink logits (GPT-OSS)
left_padding = table(
    "left_padding", values_in=(0, 2**31 - 1)
)  # left_padding[b]: padding tokens before the sequence


def native_patterns(model: Any) -> dict[int, Pattern]:
    """The pattern of every attention layer of a transformers model, as its configuration has it.

    Full, sliding-window and chunked layers, causal or bidirectional, with soft cap and sink logits where the model has them. The
    patterns are what :func:`sparsedsl.models.apply` puts in the layers' place without changing what the model computes; analyse,
    plot or edit them.

    Args:
        model: a transformers model.

    Returns:
        Layer index -> :class:`~sparsedsl.Pattern`. Layers without attention (linear attention, convolution) are missing.

    Raises:
        UnsupportedError: a layer's attention has no form as a pattern (a position bias computed in the layer, an attention
            compressed or indexed by its own rules), or the model does not use transformers' attention interface.

    >>> import sparsedsl as sd
    >>> from transformers import MistralConfig, MistralForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = MistralForCausalLM(MistralConfig(**tiny, num_key_value_heads=1, sliding_window=4))
    >>> sd.models.native_patterns(model)
    {0: <Pattern attend((q_idx >= kv_idx) & (q_idx - kv_idx <= 3))>}
    """
    config = text_config(model)
    return {index: native_pattern(module, index, config) for index, module in attention_layers(model).items()}


def native_pattern(module: Any, index: int, config: Any) -> Pattern:
    """The pattern of one attention module."""
    if passes_argument(module, "position_bias"):
        raise UnsupportedError(
            f"layer {index} ({type(module).__name__}) adds a position bias that it computes itself, which a pattern would drop; "
            "leave this layer native (patterns={...} without it)"
        )
    mask = _native_mask(module, index, config)
    cap = getattr(module, "attn_logit_softcapping", None) if passes_argument(module, "softcap") else None
    cap = int(cap) if cap is not None and float(cap).is_integer() else cap  # as a user would write it
    logit = None if cap is None else tanh(score / cap) * cap
    has_sinks = passes_argument(module, "s_aux") and getattr(module, "sinks", None) is not None
    return attend(mask, logit, sink=sinks[h] if has_sinks else None)


def _native_mask(module: Any, index: int, config: Any) -> Mask | bool:
    kind = _layer_type(config, index)
    # transformers: a decoder's mask functions turn bidirectional when the configuration says is_causal=False
    causal = bool(getattr(module, "is_causal", True)) and bool(getattr(config, "is_causal", True))
    if kind == "full_attention":
        return kv_idx <= q_idx if causal else True
    if kind == "sliding_attention":
        window = int(config.sliding_window)
        if causal:
            return (kv_idx <= q_idx) & (q_idx - kv_idx < window)
        if getattr(
            config, "use_bidirectional_attention", False
        ):  # Gemma 3: the window's end is not part of it
            window -= 1
        return (q_idx - kv_idx <= window) & (kv_idx - q_idx <= window)
    if kind == "chunked_attention" and causal:
        size = int(config.attention_chunk_size)
        start = left_padding[b]  # chunks are counted from the first real token
        return (kv_idx <= q_idx) & ((kv_idx - start) // size == (q_idx - start) // size)
    raise UnsupportedError(
        f"layer {index} ({type(module).__name__}) is of type {kind!r}{'' if causal else ', not causal'}, which has no form as a "
        "pattern here; native patterns know full_attention, sliding_attention and causal chunked_attention. Leave it native"
    )


def _layer_type(config: Any, index: int) -> str:
    """The layer's type, by the same rules as transformers' caches."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[index])
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"
