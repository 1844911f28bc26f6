"""Putting patterns and programs into a model and taking them out again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsedsl.errors import PatternError, TableError, UnsupportedError
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.attention import BINDING, Binding, Compiled, make_attention_function
from sparsedsl.models.derived import PROVIDED
from sparsedsl.models.layers import attention_layers, is_told_causal, text_config
from sparsedsl.models.masks import make_mask_function
from sparsedsl.models.native import native_facts, native_pattern
from sparsedsl.models.programs import check_program, is_for_prefill
from sparsedsl.program.graph import Program, as_program

__all__ = ["AppliedPatterns", "apply"]

_PREFIX = "sparsedsl_over_"
_NATIVE = ("sdpa", "eager", "flex_attention")
_users: dict[int, int] = {}  # id of a config object -> models that have patterns through it


def apply(model: Any, patterns: Any, *, backend: str = "auto", allow: Sequence[str] = ()) -> AppliedPatterns:
    """Run patterns, or programs, in the attention layers of a transformers model.

    The model stays the module it was: forward, ``generate()`` with its cache, padding masks, packed positions and training
    work as before, with the patterns in place of the layers' own causal, sliding or chunked masks.

    - A *mask* says which pairs attend; soft cap, sink logits and scale stay the layer's own. A *pattern* says everything (its
      scale, if it has none, is the layer's). Layers that are given nothing stay native.
    - ``q_idx`` and ``kv_idx`` are slots of the KV cache, as in transformers' mask functions: with left padding, slot 0 is
      padding. Padded keys never attend.
    - Two tables are bound at every call: ``sd.models.left_padding[b]``, the number of padding slots before a sequence, and
      ``sd.models.sinks[h]``, the layer's sink logits. Others must be bound before: ``pattern.bind(name=tensor)``.
    - In packed batches (``position_ids`` that start again; no attention mask, no cache) a query sees its own sequence only and
      the indices count within the sequence, again as in transformers.
    - A layer whose native cache keeps a window only gets one that keeps everything, unless the pattern provably needs no more.

    A *program*, such as ``sd.patterns.pbs()`` or ``sd.patterns.moba()``, over q, k and v:

    - takes the layer's scale for every dot product of queries without one of its own, those it chooses by included; the layer's soft
      cap for attentions that leave logits as they are; the layer's sink logits if it has none;
    - with the effect ``"selection reads later queries"`` (``pbs``, ``token_sparse``) runs where the queries are those of a whole prompt.
      Decoding, and a chunk that continues a prompt, run the layer's native pattern over the whole cache. Other programs run there too;
    - takes no padding and no packed positions.

    Args:
        model: a transformers model with one stack of layers, running ``sdpa``, ``eager`` or ``flex_attention``.
        patterns: one mask, pattern or program for all layers; or a mapping from layer index; or a function of the layer index, where a
            missing index and None mean native.
        backend, allow: as in :func:`sparsedsl.compile`.

    Returns:
        :class:`AppliedPatterns`, whose ``restore()`` (or leaving its ``with`` block) gives the model back as it was.

    Raises:
        PatternError: no layer has such an index, or what was given is no pattern.
        TableError: a pattern reads a table that nothing binds.
        UnsupportedError: the model's attention cannot be reached or would lose something, or a program reads inputs beside q, k and v.
            Calls that ask for what patterns cannot give raise it too: 4-D masks, attention dropout, attention weights, position biases,
            paged caches; padding and packed positions in a layer with a program; gradients of a program that reads later queries.

    >>> import sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> local = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4)
    >>> with sd.models.apply(model, {1: local}, backend="reference") as applied:
    ...     print(applied)
    <AppliedPatterns on LlamaForCausalLM: layer 1 attend((q_idx >= kv_idx) & (q_idx - kv_idx <= 3)); native: layer 0>
    >>> sparse = sd.patterns.token_sparse(coverage=0.1, probe=8, min_tokens=16)
    >>> with sd.models.apply(model, {1: sparse}) as applied:
    ...     applied.patterns[1].root is sparse
    True
    """
    config = text_config(model)
    layers = attention_layers(model)
    chosen = _choose(patterns, layers)
    native = config._attn_implementation or "sdpa"
    native = native.removeprefix(_PREFIX)
    if native not in _NATIVE:
        raise UnsupportedError(
            f"the model runs attn_implementation={native!r}; patterns are put over {', '.join(_NATIVE)}: "
            "call model.set_attn_implementation('sdpa') first"
        )
    if any(hasattr(module, BINDING) for module in layers.values()):
        raise PatternError("this model has patterns already; call restore() on what the first models.apply returned")
    told, compiled = is_told_causal(model, config), Compiled(backend, tuple(allow))
    bindings = {index: _bind(layers[index], index, given, config, told, compiled) for index, given in chosen.items()}
    return AppliedPatterns(model, config, native, layers, bindings)


class AppliedPatterns:
    """Patterns at work in a model; made by :func:`apply`, ended by :meth:`restore` or by leaving its ``with`` block.

    ``patterns``: layer index -> the pattern or :class:`~sparsedsl.Program` the layer runs. ``layers``: the indices of all attention layers.

    >>> import sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> applied = sd.models.apply(LlamaForCausalLM(LlamaConfig(**tiny)), sd.kv_idx <= sd.q_idx)
    >>> sorted(applied.patterns)
    [0, 1]
    >>> applied.restore()
    """

    def __init__(self, model: Any, config: Any, native: str, layers: dict[int, Any], bindings: dict[int, Binding]) -> None:
        self.model, self.layers = model, tuple(layers)
        self.patterns = {index: binding.program or binding.pattern for index, binding in bindings.items()}
        self._config, self._native = config, native
        self._modules = [layers[index] for index in bindings]
        self._bindings = bindings
        self._active = True
        name = _PREFIX + native
        AttentionInterface.register(name, make_attention_function(native))
        AttentionMaskInterface.register(name, make_mask_function())
        for index, binding in bindings.items():
            setattr(layers[index], BINDING, binding)
        _users[id(config)] = _users.get(id(config), 0) + 1
        config._attn_implementation_internal = name
        hook = functools.partial(_before_forward, name, tuple(bindings.values()))
        self._hook = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)

    def restore(self) -> None:
        """Give the model back its own attention. Doing so twice is no error."""
        if not self._active:
            return
        self._active = False
        self._hook.remove()
        for module in self._modules:
            delattr(module, BINDING)
        _users[id(self._config)] -= 1
        if not _users[id(self._config)]:  # another model may share the config object
            del _users[id(self._config)]
            if self._config._attn_implementation_internal == _PREFIX + self._native:
                self._config._attn_implementation_internal = self._native

    def cache(self) -> DynamicCache:
        """An empty KV cache that keeps the keys these patterns ask for; pass it as ``past_key_values``."""
        cache = DynamicCache(config=self.model.config)
        _widen(cache, tuple(self._bindings.values()))
        return cache

    def __enter__(self) -> AppliedPatterns:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        groups: dict[str, list[int]] = {}
        for index, pattern in self.patterns.items():
            groups.setdefault(_words(pattern), []).append(index)
        words = [f"{_layer_words(indices)} {text}" for text, indices in groups.items()]
        left = [index for index in self.layers if index not in self.patterns]
        words += [f"native: {_layer_words(left)}"] if left else []
        state = "" if self._active else ", restored"
        return f"<AppliedPatterns on {type(self.model).__name__}{state}: {'; '.join(words)}>"


def _words(pattern: Pattern | Program) -> str:
    if isinstance(pattern, Program):
        return f"{pattern.root.label}{', prompts only' if is_for_prefill(pattern) else ''}"
    return pattern.text.splitlines()[-1]


def _layer_words(indices: list[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


def _choose(patterns: Any, layers: dict[int, Any]) -> dict[int, Any]:
    """Layer index -> what the user gave for it."""
    if isinstance(patterns, Mapping):
        unknown = sorted(set(patterns) - set(layers), key=str)
        if unknown:
            raise PatternError(f"no attention layer has the index {unknown}; the model's attention layers are {sorted(layers)}")
        given = {index: patterns[index] for index in layers if index in patterns}
    elif isinstance(patterns, (Mask, Pattern, bool)) or as_program(patterns) is not None:
        given = dict.fromkeys(layers, patterns)
    elif isinstance(patterns, Callable):  # type: ignore[arg-type]
        given = {index: patterns(index) for index in layers}
    else:
        given = {index: as_pattern(patterns, where="patterns") for index in layers}
    return {index: value for index, value in given.items() if value is not None}


def _bind(module: Any, index: int, given: Any, config: Any, told: bool, compiled: Compiled) -> Binding:
    program = as_program(given)
    if program is not None:
        own = native_pattern(module, index, config, told)
        check_program(program, index, own)
        facts = native_facts(module, index, config, told) if is_for_prefill(program) else None
        return Binding(index, own, facts is not None, True, facts, compiled, program)
    keeps_score = isinstance(given, (Mask, bool))
    pattern = as_pattern(given, where=f"the pattern of layer {index}")
    try:
        native = native_pattern(module, index, config, told)
    except UnsupportedError:
        if keeps_score:
            raise
        native = None
    if native is not None and keeps_score:
        pattern = Pattern(pattern.mask, native.score, native.sink, native.scale)
    elif native is not None:
        lost = ["soft cap"] if native.has_score and not pattern.has_score else []
        lost += ["sink logits"] if native.sink is not None and pattern.sink is None else []
        if lost:
            warnings.warn(
                f"layer {index}: the model's own {' and '.join(lost)} are not part of the pattern and are left out; "
                "give a mask instead of a pattern to keep them, or add them as in sd.models.native_patterns(model)",
                stacklevel=4,
            )
    free = sorted(set(pattern.tables) - set(pattern.bound) - PROVIDED)
    if free:
        raise TableError(
            f"layer {index}: nothing binds the table{'s' if len(free) > 1 else ''} {', '.join(free)} of the pattern; "
            f"bind before applying: pattern.bind({free[0]}=tensor)"
        )
    is_native = pattern == native
    facts = native_facts(module, index, config, told) if is_native else None
    return Binding(index, pattern, is_native, keeps_score or is_native, facts, compiled)


def _before_forward(name: str, bindings: tuple[Binding, ...], module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Runs before every forward of the model: nothing has switched the patterns off, and the cache keeps what they ask for."""
    implementation = text_config(module)._attn_implementation
    if implementation != name:
        raise UnsupportedError(
            f"the model has patterns, but its attn_implementation was since set to {implementation!r}, which would ignore them; "
            "call restore() on what models.apply returned"
        )
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Cache):
        _widen(cache, bindings)


def _widen(cache: Cache, bindings: tuple[Binding, ...]) -> None:
    """Let layers that are to keep a window keep everything where a pattern asks for more, as long as they are empty."""
    for binding in bindings:
        layer: Any = cache.layers[binding.index] if binding.index < len(cache.layers) else None
        if type(layer) is not DynamicSlidingWindowLayer or layer.cumulative_length or layer.record_past:
            continue
        if not binding.fits_window(layer.sliding_window):
            cache.layers[binding.index] = DynamicLayer()
