"""The pattern a model was made with, read from its configuration and its attention modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.expressions import Mask, b, h, kv_idx, q_idx, score
from sparsedsl.lang.numeric import tanh
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.table_reads import table
from sparsedsl.models.layers import attention_layers, is_told_causal, passes_argument, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["Facts", "left_padding", "masks_of", "native_facts", "native_pattern", "native_patterns", "sinks"]

# A mask in transformers' words: causal, bidirectional, (window, w), (distance, w), (chunk, c)
Facts = frozenset[tuple[str, int | None]]

# Layers with a recurrence beside their attention (FalconH1, Zamba): what the attention is.
_ATTENTION_OF_HYBRID = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}

# Tables that models.apply binds at every call, for native patterns and the user's own alike.
sinks = table("sinks", dtype=float, learned=True)  # sinks[h]: the layer's sink logits (GPT-OSS)
# left_padding[b]: slots before the one where a pattern's indices are 0: with indices="slots" the padding before a row, else 0.
left_padding = table("left_padding", values_in=(0, 2**31 - 1))


def native_patterns(model: PreTrainedModel) -> dict[int, Pattern]:
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
    {0: <Pattern attend((kv_idx <= q_idx) & (q_idx - kv_idx < 4))>}
    """
    config, told = text_config(model), is_told_causal(model, text_config(model))
    return {i: native_pattern(module, i, config, told) for i, module in attention_layers(model).items()}


def native_pattern(module: Any, index: int, config: PreTrainedConfig, told_causal: bool = False) -> Pattern:
    """The pattern of one attention module."""
    if passes_argument(module, "position_bias"):
        raise UnsupportedError(
            f"layer {index} ({type(module).__name__}) adds a position bias that it computes itself, which a pattern would drop; "
            "leave this layer native (patterns={...} without it)"
        )
    mask = _mask(native_facts(module, index, config, told_causal))
    if mask is None:
        raise UnsupportedError(
            f"layer {index} ({type(module).__name__}) is of type {_layer_type(config, index)!r}, which has no form as a pattern "
            "here; native patterns know full_attention, sliding_attention and causal chunked_attention. Leave it native"
        )
    cap = getattr(module, "attn_logit_softcapping", None) if passes_argument(module, "softcap") else None
    cap = int(cap) if cap is not None and float(cap).is_integer() else cap  # as a user would write it
    logit = None if cap is None else tanh(score / cap) * cap
    has_sinks = passes_argument(module, "s_aux") and getattr(module, "sinks", None) is not None
    return attend(mask, logit, sink=sinks[h] if has_sinks else None)


def native_facts(module: Any, index: int, config: PreTrainedConfig, told_causal: bool = False) -> Facts:
    """What the configuration says about a layer's mask, in the words that :mod:`sparsedsl.models.mask_arguments` finds in a request."""
    # transformers: a decoder's mask functions turn bidirectional when the configuration says is_causal=False
    causal = (bool(getattr(module, "is_causal", True)) or told_causal) and bool(getattr(config, "is_causal", True))
    direction = ("causal" if causal else "bidirectional", None)
    kind = _layer_type(config, index)
    if kind == "full_attention":
        return frozenset({direction})
    if kind == "sliding_attention":
        window = int(config.sliding_window)
        if not causal and getattr(config, "use_bidirectional_attention", False):  # Gemma 3: without the window's end
            window -= 1
        return frozenset({direction, ("window" if causal else "distance", window)})
    return frozenset({direction, ("chunk", int(config.attention_chunk_size))} if kind == "chunked_attention" else {(kind, None)})


def masks_of(modules: dict[int, Any], config: PreTrainedConfig, told_causal: bool = False) -> frozenset[Facts] | None:
    """What the masks of these layers say; None where the configuration does not tell."""
    facts = frozenset(native_facts(module, index, config, told_causal) for index, module in modules.items())
    return None if any(_mask(one) is None for one in facts) else facts


def _mask(facts: Facts) -> Mask | bool | None:
    found = dict(facts)
    match sorted(found):
        case ["causal"]:
            return kv_idx <= q_idx
        case ["bidirectional"]:
            return True
        case ["causal", "window"]:
            return (kv_idx <= q_idx) & (q_idx - kv_idx < found["window"])
        case ["bidirectional", "distance"]:
            return (q_idx - kv_idx <= found["distance"]) & (kv_idx - q_idx <= found["distance"])
        case ["causal", "chunk"]:
            start = left_padding[b]  # chunks are counted from the first real token
            return (kv_idx <= q_idx) & ((kv_idx - start) // found["chunk"] == (q_idx - start) // found["chunk"])
    return None


def _layer_type(config: PreTrainedConfig, index: int) -> str:
    """The layer's type, by the same rules as transformers' caches."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return _ATTENTION_OF_HYBRID.get(str(types[index]), str(types[index]))
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"
