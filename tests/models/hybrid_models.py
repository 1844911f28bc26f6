"""Tiny donors in float64 and the hybrid layers that tests put into them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import Glm4Config, Glm4ForCausalLM

import sparsedsl as sd
from tests.models.families import VOCABULARY, build

DONORS = ["llama", "qwen3", "gemma3", "gpt_oss", "glm4"]
NHA = functools.partial(sd.models.NHA, slots=3, window=4)
PUBLISHED_NHA = functools.partial(sd.models.NHA, slots=3, window=4, first=0, slot_bias=None)
MOBA = functools.partial(sd.models.MoBA, chunk=4, top_k=2)
NSA = functools.partial(sd.models.NSA, block=2, select=4, top_k=3, window=5)
HSA = functools.partial(sd.models.HSA, chunk=4, top_k=2, window=5)
DSA = functools.partial(sd.models.DSA, top_k=5, index_heads=2)
LOLCATS = functools.partial(sd.models.LoLCATs, window=4, features=3)
DELTA = functools.partial(sd.models.GatedDelta, channels=True)
RING = functools.partial(sd.models.RingLinear, groups=2)
LAYERS = {
    "nha": NHA,
    "published_nha": PUBLISHED_NHA,
    "moba": MOBA,
    "nsa": NSA,
    "hsa": HSA,
    "dsa": DSA,
    "lolcats": LOLCATS,
    "ring": RING,
    "delta": DELTA,
}
# Compiles nothing: tests of C++ are elsewhere.
convert = functools.partial(sd.models.convert, backend="tiled")


def donor(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model in eval mode; layer 1 is the one that tests convert."""
    if name == "glm4":
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Glm4Config(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None, **sizes)
        model = Glm4ForCausalLM(config).eval()
    else:
        model = build(name)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # grouped products know no float64
    return model.to(dtype)


def spread(handle: Any) -> None:
    """New parameters that show: gates and biases that differ by token, slot and head."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.new_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.5)
        for layer in handle.layers.values():
            if getattr(layer, "slot_bias", None) is not None:
                layer.slot_bias.fill_(-0.5)
