"""Patterns and programs in the layers of models that vLLM (v1) serves.

A plug-in of yours, installed where vLLM runs, says which layer runs what: :func:`register`. The classes that vLLM then imports from here,
``Backend``, ``MetadataBuilder`` and ``Impl``, are made when it does, as subclasses of its own.

Written against vLLM's plug-in interface as its sources state it, and tested with a stand-in of that interface: vLLM itself was not run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import answer_for, meant, public_only, shown
from sparsedsl.serve.layer_patterns import Registered, layer_index, set_registered
from sparsedsl.serve.vllm_classes import CUSTOM, NAMES, classes, vllm_modules
from sparsedsl.serve.vllm_flex import FlexHooks, attach_flex

__all__ = ["FlexHooks", "attach_flex", "layer_index", "register"]


def register(
    patterns: Any | Mapping[str | int, Any] | Callable[[str], Any], *, backend: str = "auto", slot: str = CUSTOM
) -> None:
    """Let layers of the model that vLLM serves run patterns or programs; call it in every process, from a plug-in of vLLM.

    - A *mask* says which pairs attend; soft cap, ALiBi slopes, sinks and scale stay the layer's own. A *pattern* says everything, but for
      its scale if it has none. A *program* takes the layer's scale, soft cap and sinks where it says nothing.
    - Layers that are given nothing run what vLLM hands in: causal attention, with the layer's window, soft cap, slopes and sinks.
    - ``q_idx`` and ``kv_idx`` are positions in a request; ``h`` is the query head among those of all tensor-parallel ranks. Tables must
      be bound, but for ``sinks`` and ``slopes``, which are the layer's own.
    - What the scheduler's cuts of prompts, or its order of requests, would change is refused here: choices by later queries, masks that
      are not proved to be causal, ``q_len``, ``kv_len`` and ``b``.
    - Of a layer with a sliding window vLLM lets old keys go: what runs there must provably ask for none of them.

    A second call takes the place of the first, for layers that are made after it.

    Args:
        patterns: one mask, pattern or program for all layers; a mapping from the name of a layer, or from its number; or a function of the
            name (:func:`layer_index` finds the number). None stands for nothing.
        backend: as in :func:`sparsedsl.compile`. On a CPU pages are read where they lie, or copied as ``attn.paged`` says; on a GPU the
            pages that are seen are copied, for all backends.
        slot: which of vLLM's names of back ends is to mean this one. ``"CUSTOM"`` is the one for others' back ends, and chosen with
            ``--attention-backend CUSTOM``. Where vLLM takes its own whatever is chosen, as on CPUs, give the name of that: ``"CPU_ATTN"``.

    Raises:
        UnsupportedError: vLLM is not installed, or a scheduler would change what a layer gives. PatternError: it is no pattern, by no name
            of a layer, or vLLM has no such slot. TableError: nothing binds a table.

    >>> import sparsedsl as sd
    >>> local = sd.patterns.streaming_llm(1024, sink_count=4)
    >>> sd.serve.vllm.register({"model.layers.0.self_attn.attn": local, 1: local})  # doctest: +SKIP
    >>> sd.serve.vllm.register(lambda name: None if sd.serve.vllm.layer_index(name) % 4 == 3 else local)  # doctest: +SKIP
    """
    made = Registered(patterns, backend)
    _, registry = vllm_modules()
    slots = registry.AttentionBackendEnum.__members__
    if slot not in slots:
        raise PatternError(f"register(): slot must be the name of a back end in vLLM; got {shown(slot)}{meant(slot, slots)}")
    set_registered(made)
    registry.register_backend(slots[slot], f"{__name__}.Backend")


answer_for(globals(), __all__)
_missing, __dir__ = public_only(__name__, __all__)


def __getattr__(name: str) -> Any:
    return classes()[name] if name in NAMES else _missing(name)
