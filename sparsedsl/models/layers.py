"""Finding the attention modules of a transformers model. Input: a model; output: layer index -> attention module."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "attention_layers",
    "closed_layers",
    "file_mentions",
    "has_cross_attention",
    "is_told_causal",
    "key_owners",
    "layer_words",
    "mentions",
    "native_implementation",
    "passes_argument",
    "text_config",
]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface("
# How decoders name the attention to an encoder's output, within a layer. Its class is often that of the layer's self-attention.
_CROSS = re.compile(r"cross_?att|encoder_att|enc(oder)?_?dec(oder)?_?att", re.IGNORECASE)


_NATIVE = ("sdpa", "eager", "flex_attention")


def native_implementation(config: PreTrainedConfig, what: str) -> str:
    """The implementation that a model runs by itself, over which ``what`` ("patterns are put") happens; refuses others."""
    native = str(config._attn_implementation or "sdpa")
    if native not in _NATIVE:
        raise UnsupportedError(
            f"the model runs attn_implementation={native!r}; {what} over {', '.join(_NATIVE)}: "
            "call model.set_attn_implementation('sdpa') first"
        )
    return native


def layer_words(indices: list[int]) -> str:
    """``layer 1``, ``layers 1, 2``."""
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def check_model(model: Any) -> Any:
    """The configuration of a transformers model.

    Raises:
        PatternError: it is none.
    """
    config = getattr(model, "config", None)
    if isinstance(model, type) or not hasattr(config, "get_text_config"):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise PatternError(
            f"sd.models wants a transformers model (a PreTrainedModel); got {kind}. For other modules "
            "compile the pattern and call it in your forward: attn = sd.compile(pattern); attn(q, k, v)"
        )
    return config


def check_module(model: Any) -> None:
    """Whether something is a model, or holds one.

    Raises:
        PatternError: it is no module of torch.
    """
    if not isinstance(model, torch.nn.Module):
        check_model(model)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The configuration of the part of ``model`` that reads text; refuses what is no transformers model."""
    config = check_model(model)
    if getattr(config, "is_encoder_decoder", False) and model.get_encoder() is not model and model.get_decoder() is not model:
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder model, whose layer indices name two layers each; give patterns to one of its "
            "stacks: sd.models.apply(model.get_encoder(), ...), sd.models.apply(model.get_decoder(), ...), or both one after the other"
        )
    return config.get_text_config()


def closed_layers(model: PreTrainedModel) -> dict[int, str]:
    """Layer index -> class, for attention modules whose own ``forward`` no longer calls the interface that the inherited one calls."""
    config, found = text_config(model), {}
    for module in model.modules():
        inherits = any(_INTERFACE in _source(vars(base).get("forward")) for base in type(module).__mro__)
        if _reads(module, config) and inherits and not mentions(module, _INTERFACE) and hasattr(module, "layer_idx"):
            found[int(module.layer_idx)] = type(module).__name__
    return found


def attention_layers(model: PreTrainedModel) -> dict[int, Any]:
    """Layer index -> self-attention module, for every layer of the text stack that calls transformers' attention interface."""
    config = text_config(model)
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not _reads(module, config) or _is_cross(name, module) or not mentions(module, _INTERFACE):
            continue
        index = getattr(module, "layer_idx", None)
        index = len(found) if index is None else int(index)
        if index in found:
            raise UnsupportedError(
                f"{type(model).__name__} has two attention modules for layer {index} (the second is {name}); "
                "apply patterns to a model with one attention module a layer"
            )
        found[index] = module
    if not found and not closed_layers(model):
        raise UnsupportedError(
            f"{type(model).__name__} has no layer that calls transformers' attention interface (AttentionInterface), so patterns "
            "cannot reach its attention; sd.compile(pattern) can be called in a forward of your own"
        )
    return dict(sorted(found.items()))


def has_cross_attention(model: PreTrainedModel) -> bool:
    """Whether layers attend to the output of an encoder, too."""
    return any(_is_cross(name, module) for name, module in model.named_modules())


def _is_cross(name: str, module: Any) -> bool:
    within = re.split(r"(?:^|\.)\d+\.", name)[-1]  # the name within its layer
    return getattr(module, "is_cross_attention", False) is True or bool(
        _CROSS.search(within) or _CROSS.search(type(module).__name__)
    )


def is_told_causal(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether a module of the text stack overrules its layers with ``is_causal=True`` at the call, as CLIP's text model does."""
    stack = (module for module in model.modules() if _reads(module, config))
    return any(mentions(module, "is_causal=True") for module in stack)


def passes_argument(module: Any, name: str) -> bool:
    """Whether the module's forward hands ``name=`` to the attention function."""
    return mentions(module, f"{name}=")


def key_owners(layers: dict[int, Any]) -> dict[int, int]:
    """Layer index -> the layer whose keys it attends to: its own, but for layers that share those of an earlier one (Gemma 3n, Gemma 4)."""
    owners = {index: index for index in layers}
    for index, module in layers.items():
        if getattr(module, "is_kv_shared_layer", False):
            stored = [
                i
                for i, m in layers.items()
                if i < index and getattr(m, "store_full_length_kv", False) and _kind(m) == _kind(module)
            ]
            owners[index] = max(stored, default=index)
    return owners


def _kind(module: Any) -> Any:
    return getattr(module, "layer_type", None), getattr(module, "use_rope", None)


def _reads(module: Any, config: PreTrainedConfig) -> bool:
    """Whether a module has this configuration, or a view of it."""
    own = getattr(module, "config", None)
    return own is config or (hasattr(own, "__dict__") and vars(own) is vars(config))


def mentions(module: Any, text: str) -> bool:
    """Whether ``text`` stands in the source of the module's forward."""
    forward = inspect.unwrap(module.forward)
    kind: Any = type(module)
    return _forward_contains(kind, getattr(forward, "__func__", forward), text)


def file_mentions(module: Any, text: str) -> bool:
    """Whether ``text`` stands in the file that the module's class is written in, or that cannot be read."""
    source = _source(inspect.getmodule(type(module)))
    return not source or text in source


@functools.cache
def _forward_contains(kind: Any, forward: Any, text: str) -> bool:
    """Whether ``text`` stands in the source of the ``forward`` that runs, or in one that it calls as ``super().forward``."""
    source = _source(forward)
    if text in source or not re.search(r"\bsuper\([^)]*\)\.forward\(", source):
        return text in source
    classes = [base for base in kind.__mro__ if "forward" in vars(base)]
    own = next((i for i, base in enumerate(classes) if inspect.unwrap(vars(base)["forward"]) is forward), len(classes))
    return any(_forward_contains(kind, inspect.unwrap(vars(base)["forward"]), text) for base in classes[own + 1 : own + 2])


@functools.cache
def _source(forward: Any) -> str:
    try:
        return "" if forward is None else inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return ""
