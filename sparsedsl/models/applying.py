"""Putting patterns and programs into a model and taking them out again."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, find_first_full_attention_index

from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import PatternError, TableError, UnsupportedError
from sparsedsl.lang.advice import shown, way_in
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.attention_function import BINDING, Binding, Compiled, attend
from sparsedsl.models.caches import arrange, layer_words, release, report
from sparsedsl.models.carried import Stack, calling, put_stacks, stacks_of
from sparsedsl.models.derived import PROVIDED
from sparsedsl.models.layers import attention_layers, closed_layers, is_told_causal, key_owners, text_config
from sparsedsl.models.mask_arguments import MaskFunction
from sparsedsl.models.native import masks_of, native_facts, native_pattern
from sparsedsl.models.programs import check_program, is_for_prefill
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.node import Node

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["AppliedPatterns", "apply"]

_NAME = "sparsedsl"  # what bound modules call; for all else the model keeps the name it had
_NATIVE = ("sdpa", "eager", "flex_attention")


# What a layer may be given; None: it stays native.
Given = Mask | Pattern | Program | Node | bool | None


def apply(
    model: PreTrainedModel,
    patterns: Given | Mapping[int, Given] | Callable[[int], Given],
    *,
    backend: str = "auto",
    allow: Sequence[str] = (),
    indices: Literal["tokens", "slots"] = "tokens",
) -> AppliedPatterns:
    """Run patterns, or programs, in the attention layers of a transformers model.

    The model stays the module it was: forward, ``generate()`` with its cache, padding masks, packed positions and training
    work as before, with the patterns in place of the layers' own causal, sliding or chunked masks.

    - A *mask* says which pairs attend; soft cap, sink logits and scale stay the layer's own. A *pattern* says everything (its
      scale, if it has none, is the layer's).
    - Layers that are given nothing stay native, bit for bit: they see transformers' own masks, and the implementation keeps its name.
      Layers that are given something run it, or the call raises. Where a layer chooses keys by an indexer, a pattern takes that place.
    - Padding means nothing: ``q_idx`` and ``kv_idx`` count the real tokens of a row, ``q_len`` and ``kv_len`` are how many there are, and
      tables are read by them. So a row alone, padded left, right or in between, and packed gives the same. Padded keys never attend.
    - In packed batches (``position_ids`` that start again; no attention mask, no cache) a query sees its own sequence only, and indices
      and lengths are those of the sequence; in models that make their masks by ``position_ids`` (GPT-OSS does not, and sees one sequence).
    - With ``indices="slots"`` they are slots of the KV cache, as in transformers' mask functions: with left padding, slot 0 is padding;
      in packed batches the positions that were given. The layer's own native pattern stands for the mask of transformers and counts as that
      does, whatever ``indices`` says: a window over padding in the middle of a row counts the padding too.
    - Two tables are bound at every call: ``sd.models.sinks[h]``, the layer's sink logits, and ``sd.models.left_padding[b]``, the number of
      slots before the first one that the indices count: padding slots before a row in slots, 0 in tokens. Others must be bound before:
      ``pattern.bind(name=tensor)``.
    - Caches that are still empty are fitted: a layer with a pattern holds the keys that :func:`sparsedsl.cache_bound` says later queries
      may ask for, and no more; all of them where no bound is proved. Layers that share their keys (Gemma 3n, Gemma 4) get one together,
      or the call raises.

    A *program*, such as ``sd.patterns.pbs()`` or ``sd.patterns.moba()``, over q, k and v:

    - takes the layer's scale for every dot product of queries without one of its own, those it chooses by included; the layer's soft
      cap for attentions that leave logits as they are; the layer's sink logits if it has none;
    - with the effect ``"selection reads later queries"`` (``pbs``, ``token_sparse``) runs where the queries are those of a whole prompt.
      Decoding, and a chunk that continues a prompt, run the layer's native pattern over the whole cache. Other programs run there too;
    - runs on the real tokens of each row, or of each packed sequence, alone; rows that have as many run as one batch. What a padding query
      gives is zero.

    Args:
        model: a transformers model with one stack of layers, running ``sdpa``, ``eager`` or ``flex_attention``.
        patterns: one mask, pattern or program for all layers; or a mapping from layer index; or a function of the layer index, where a
            missing index and None mean native.
        backend, allow: as in :func:`sparsedsl.compile`.
        indices: what indices and lengths count: ``"tokens"`` or ``"slots"``.

    Returns:
        :class:`AppliedPatterns`, whose ``restore()`` (or leaving its ``with`` block) gives the model back as it was.

    Raises:
        PatternError: no layer has such an index, what was given is no pattern, or ``indices`` is another word.
        TableError: a pattern reads a table that nothing binds.
        UnsupportedError: the model's attention cannot be reached or would lose something, or a program reads inputs beside q, k and v.
            Calls that ask for what patterns cannot give raise it too: 4-D masks, attention dropout, attention weights, position biases,
            paged caches; padding in a layer with a program by ``indices="slots"``; gradients of a program that reads later queries.

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
    if indices not in ("tokens", "slots"):
        raise PatternError(f'indices must be "tokens" or "slots", what q_idx and kv_idx count; got {shown(indices)}')
    config = text_config(model)
    layers = attention_layers(model)
    closed = closed_layers(model)
    chosen = _choose(patterns, sorted({*layers, *closed}))
    if missed := sorted(set(chosen) & set(closed)):
        raise UnsupportedError(
            f"{layer_words(missed)} ({', '.join(sorted({closed[index] for index in missed}))}): the module's own forward does not call "
            "transformers' attention interface (AttentionInterface), so patterns cannot reach it. Give a mapping without it, or call "
            "sd.compile(pattern) in that forward"
        )
    native = str(config._attn_implementation or "sdpa")
    if native not in _NATIVE:
        raise UnsupportedError(
            f"the model runs attn_implementation={native!r}; patterns are put over {', '.join(_NATIVE)}: "
            "call model.set_attn_implementation('sdpa') first"
        )
    if any(hasattr(module, BINDING) for module in layers.values()):
        raise PatternError("this model has patterns already; call restore() on what the first models.apply returned")
    told, compiled = is_told_causal(model, config), Compiled(backend, tuple(allow))
    stack = Stack(key_owners(layers), masks_of({i: m for i, m in layers.items() if i not in chosen}, config, told))
    bindings = {index: _bind(layers[index], index, given, config, told, compiled, stack) for index, given in chosen.items()}
    for binding in bindings.values():
        binding.count_slots = indices == "slots"
    return AppliedPatterns(model, config, native, layers, stack, bindings)


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

    def __init__(
        self,
        model: PreTrainedModel,
        config: PreTrainedConfig,
        native: str,
        layers: dict[int, Any],
        stack: Stack,
        bindings: dict[int, Binding],
    ) -> None:
        self.model, self.layers = model, tuple(layers)
        self.patterns = {index: binding.program or binding.pattern for index, binding in bindings.items()}
        self._config, self._stack = config, stack
        self._modules = [layers[index] for index in bindings]
        self._bindings = bindings
        self._active = True
        AttentionInterface.register(_NAME, attend)
        if not isinstance(ALL_MASK_ATTENTION_FUNCTIONS[native], MaskFunction):
            AttentionMaskInterface.register(native, MaskFunction(ALL_MASK_ATTENTION_FUNCTIONS[native]))
        view = calling(config, _NAME)
        for index, binding in bindings.items():
            setattr(layers[index], BINDING, binding)
            layers[index].config = view
        put_stacks(config, native, (*stacks_of(config), stack))
        before = functools.partial(_before_forward, stack, bindings)
        after = functools.partial(_after_forward, stack, bindings)
        self._hooks = (
            model.base_model.register_forward_pre_hook(before, with_kwargs=True),
            model.base_model.register_forward_hook(after, always_call=True),
        )

    def restore(self) -> None:
        """Give the model back its own attention. Doing so twice is no error."""
        if not self._active:
            return
        self._active = False
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            delattr(module, BINDING)
            module.config = self._config
        left = tuple(stack for stack in stacks_of(self._config) if stack is not self._stack)
        if left != stacks_of(self._config):  # another model may share the configuration, or the name was set anew
            put_stacks(self._config, self._config._attn_implementation, left)

    def cache(self, max_length: int | None = None) -> Cache:
        """An empty KV cache that holds the keys these patterns may ask for, and no more; pass it as ``past_key_values``.

        ``max_length``: take memory for so many tokens at once, as transformers' static cache does; None: as tokens come.
        """
        if max_length is None:
            cache: Cache = DynamicCache(config=self.model.config)
        else:
            cache = StaticCache(config=self.model.config, max_cache_len=check_size("max_length", max_length, 1))
        arrange(cache, self._stack.owners, self._bindings, getattr(self._config, "num_attention_heads", None), late=False)
        release(self._bindings)
        return cache

    def cache_report(self, length: int, *, batch: int = 1) -> str:
        """What the layers' caches hold while ``length`` tokens go by, in words and bytes: what is bounded, and what grows.

        The model runs on one token, to see what its layers' keys and values are.

        >>> import sparsedsl as sd
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> with sd.models.apply(LlamaForCausalLM(LlamaConfig(**tiny)).eval(), {1: sd.patterns.sliding_window(512)}) as applied:
        ...     print(applied.cache_report(32768))
        layer 0: every key; 128 bytes a token, 4 MiB for 32,768 tokens
        layer 1: ring: a ring of 512 keys; PROVED (for all indices, lengths and tables); 128 bytes a token, 0.0624 MiB for 32,768 tokens
        all layers: 4.06 MiB, where 8 MiB hold every key
        """
        check_size("length", length, 1)
        check_size("batch", batch, 1)
        cache = self.cache()
        with torch.no_grad():
            self.model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), past_key_values=cache)
        return report(cache, length, batch)

    def __enter__(self) -> AppliedPatterns:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        groups: dict[str, list[int]] = {}
        for index, pattern in self.patterns.items():
            groups.setdefault(_words(pattern), []).append(index)
        words = [f"{layer_words(indices)} {text}" for text, indices in groups.items()]
        left = [index for index in self.layers if index not in self.patterns]
        words += [f"native: {layer_words(left)}"] if left else []
        state = "" if self._active else ", restored"
        return f"<AppliedPatterns on {type(self.model).__name__}{state}: {'; '.join(words)}>"


def _words(pattern: Pattern | Program) -> str:
    if isinstance(pattern, Program):
        return f"{pattern.labels[pattern.root]}{', prompts only' if is_for_prefill(pattern) else ''}"
    return pattern.text.splitlines()[-1]


def _choose(patterns: Any, layers: list[int]) -> dict[int, Any]:
    """Layer index -> what the user gave for it."""
    if isinstance(patterns, Mapping):
        unknown = sorted(set(patterns) - set(layers), key=str)
        if unknown:
            raise PatternError(f"no attention layer has the index {unknown}; the model's attention layers are {layers}")
        given = {index: patterns[index] for index in layers if index in patterns}
    elif isinstance(patterns, (Mask, Pattern, bool)) or as_program(patterns) is not None:
        given = dict.fromkeys(layers, patterns)
    elif callable(patterns) and not isinstance(patterns, type):
        try:
            inspect.signature(patterns).bind(0)
        except TypeError:
            raise PatternError(
                f"patterns must be a pattern, a dict of them by layer, or a function of the layer's number; got {shown(patterns)}"
                f"{way_in(patterns)}"
            ) from None
        given = {index: patterns(index) for index in layers}
    else:
        given = {index: as_pattern(patterns, where="patterns") for index in layers}
    return {index: value for index, value in given.items() if value is not None}


def _bind(
    module: Any, index: int, given: object, config: PreTrainedConfig, told: bool, compiled: Compiled, stack: Stack
) -> Binding:
    program = as_program(given)
    if program is not None:
        own = native_pattern(module, index, config, told)
        check_program(program, index, own)
        facts = native_facts(module, index, config, told) if is_for_prefill(program) else None
        return Binding(index, own, facts is not None, True, facts, compiled, stack, program)
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
    return Binding(index, pattern, is_native, keeps_score or is_native, facts, compiled, stack)


def _before_forward(stack: Stack, bindings: dict[int, Binding], module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Runs before every forward of the model: nothing has switched the patterns off, and the cache keeps what they ask for."""
    config = text_config(module)
    if stack not in stacks_of(config):
        raise UnsupportedError(
            f"the model has patterns, but its attn_implementation was since set to {config._attn_implementation!r}, which would ignore "
            "them; call restore() on what models.apply returned"
        )
    given = kwargs.get("past_key_values")
    cache = given if isinstance(given, Cache) else None
    arrange(cache, stack.owners, bindings, getattr(config, "num_attention_heads", None))
    stack.inside, stack.seen = True, None if cache is None else _seen(cache, stack)


def _after_forward(stack: Stack, bindings: dict[int, Binding], module: Any, args: Any, output: Any) -> None:
    """Runs after every forward of the model, failed ones included: each layer with a pattern has called for it."""
    stack.inside = False
    release(bindings)
    config = text_config(module)
    if output is None or all(binding.reached for binding in bindings.values()):
        return
    if module.training and getattr(config, "layerdrop", 0):
        return
    missed = [i for i, binding in bindings.items() if not binding.reached and i < getattr(config, "num_hidden_layers", i + 1)]
    if missed:
        raise UnsupportedError(
            f"{layer_words(missed)}: the forward ended, and the layer did not call transformers' attention interface, so its pattern "
            "did not run. Leave it native (patterns={...} without it), or call sd.compile(pattern) in its own forward"
        )


def _seen(cache: Cache, stack: Stack) -> int | None:
    """Tokens in the cache, where transformers would ask a layer that keeps no keys, as MiniMax's first one."""
    asked, own = find_first_full_attention_index(cache), min(stack.owners)
    if asked in stack.owners:
        return None
    return int(cache.layers[own].get_seq_length()) if own < len(cache.layers) else 0
