"""Patterns inside engines that serve models: :mod:`sparsedsl.serve.vllm`.

The stages of one layer in vLLM, and the module of each:

1. ``layer_patterns``: the user's plug-in says which layer runs what.
2. ``layer_facts``: what the engine hands to a layer (window, soft cap, slopes, sinks, heads of a shard) and what was registered for it
   -> what it runs.
3. ``vllm_step``: what the engine says of a step -> lengths and pages; what layers that run the same have in common is made once.
4. ``vllm_layer``: keys into the cache, queries -> output.
5. ``vllm_classes``: 3 and 4 as subclasses of vLLM's abstract classes; ``vllm``: what users and vLLM import.

``vllm_flex`` is for vLLM's own FlexAttention back end: the mask in its form.
"""

from __future__ import annotations

from sparsedsl.lang.advice import public_only
from sparsedsl.serve import vllm

__all__ = ["vllm"]

__getattr__, __dir__ = public_only(__name__, __all__)
