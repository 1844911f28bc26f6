"""Finding the attention modules of a transformers model. Input: a model; output: layer index -> attention module."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from sparsedsl.errors import PatternError, UnsupportedError

__all__ = ["attention_layers", "is_told_causal", "passes_argument", "text_config"]


def text_config(model: Any) -> Any:
    """The configuration of the part of ``model`` that reads text; refuses what is no transformers model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise PatternError(
            f"sd.models wants a transformers model (a PreTrainedModel); got {type(model).__name__}. For other modules "
            "compile the pattern and call it in your forward: attn = sd.compile(pattern); attn(q, k, v)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model, whose layer indices name two layers each; "
            "apply patterns to a model with one stack of layers (an encoder or a decoder)"
        )
    return config.get_text_config()


def attention_layers(model: Any) -> dict[int, Any]:
    """Layer index -> self-attention module, for every layer of the text stack that calls transformers' attention interface."""
    config = text_config(model)
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if getattr(module, "config", None) is not config or "CrossAttention" in type(module).__name__:
            continue
        if not _mentions(module, "ALL_ATTENTION_FUNCTIONS.get_interface("):
            continue
        index = getattr(module, "layer_idx", None)
        index = len(found) if index is None else int(index)
        if index in found:
            raise UnsupportedError(
                f"{type(model).__name__} has two attention modules for layer {index} (the second is {name}); "
                "apply patterns to a model with one attention module a layer"
            )
        found[index] = module
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no layer that calls transformers' attention interface (AttentionInterface), so patterns "
            "cannot reach its attention; sd.compile(pattern) can be called in a forward of your own"
        )
    return dict(sorted(found.items()))


def is_told_causal(model: Any, config: Any) -> bool:
    """Whether a module of the text stack overrules its layers with ``is_causal=True`` at the call, as CLIP's text model does."""
    stack = (module for module in model.modules() if getattr(module, "config", None) is config)
    return any(_mentions(module, "is_causal=True") for module in stack)


def passes_argument(module: Any, name: str) -> bool:
    """Whether the module's forward hands ``name=`` to the attention function."""
    return _mentions(module, f"{name}=")


def _mentions(module: Any, text: str) -> bool:
    kind: Any = type(module)
    return _forward_contains(kind, text)


@functools.cache
def _forward_contains(kind: Any, text: str) -> bool:
    """Whether ``text`` stands in the source of ``forward``, the class's own or one it inherits and may call."""
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            try:
                if text in inspect.getsource(inspect.unwrap(forward)):
                    return True
            except (OSError, TypeError):
                continue
    return False
