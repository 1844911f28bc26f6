"""Queries, keys and values of a full-attention layer of Gemma 3 270M on real text, as its attention sees them (positions applied).

Random numbers have no structure, and what chooses by structure chooses nearly everything then. Captured once for a length and kept
in the cache folder of sparsedsl; a shorter text is a prefix of it, as the model is causal.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from parts import gemma
from sparsedsl.settings import settings

__all__ = ["LAYER", "captured"]

LAYER = 11  # the second of three that see everything; 270M has 18 layers


class _Seen(Exception):
    """The layer was reached: what comes after it need not be computed."""


def captured(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``q (1, 4, length, 256)``, ``k, v (1, 1, length, 256)``, float32."""
    folder, key = settings().cache / "activations", hashlib.sha256(gemma.real_text().encode()).hexdigest()[:12]
    for path in sorted(folder.glob(f"{gemma.NAME}-layer{LAYER}-{key}-*.pt")):
        if int(path.stem.rpartition("-")[2]) >= length:
            kept = torch.load(path, weights_only=True, mmap=True)
            return _qkv(kept, length)
    kept = capture(length)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
    with os.fdopen(handle, "wb") as file:
        torch.save(kept, file)
    os.replace(name, folder / f"{gemma.NAME}-layer{LAYER}-{key}-{length}.pt")
    return _qkv(kept, length)


def _qkv(kept: dict[str, torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (kept[name][:, :, :length].contiguous() for name in "qkv")
    return q, k, v


def capture(length: int) -> dict[str, torch.Tensor]:
    """Read ``length`` tokens of real text and stop at the layer."""
    import sparsedsl as sd

    model, tokenizer = gemma.load()
    ids = tokenizer(gemma.real_text(), return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise ValueError(f"the text has {ids.shape[1]:,} tokens; got a length of {length:,}")
    sd.models.apply(model, sd.models.native_patterns(model))
    return seen_by(model, ids, LAYER)


def seen_by(model: Any, ids: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """q, k and v that the attention function of a layer is called with."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.model.layers[layer].self_attn.config._attn_implementation  # layers with a pattern call a function of their own
    run = ALL_ATTENTION_FUNCTIONS[name]
    kept: dict[str, torch.Tensor] = {}

    def watched(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any, **words: Any) -> Any:
        if module.layer_idx == layer:
            kept.update(q=q.contiguous(), k=k.contiguous(), v=v.contiguous())
            raise _Seen
        return run(module, q, k, v, *mask, **words)

    AttentionInterface.register(name, watched)
    try:
        with torch.no_grad(), gemma.layer_bar(model, f"activations of {ids.shape[1]:,} tokens"):
            model.model(ids, use_cache=False)
    except _Seen:
        return kept
    finally:
        AttentionInterface.register(name, run)
    raise RuntimeError(f"layer {layer} was never reached: the model has {model.config.num_hidden_layers}")
