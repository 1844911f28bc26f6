"""Putting patterns and programs into a model and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import find_first_full_attention_index

from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.models.binding import Binding
from sparsedsl.models.caches import arrange, empty_cache, release, report
from sparsedsl.models.carried import Stack, between_graphs
from sparsedsl.models.continuous import check_served, paged_step
from sparsedsl.models.given import bind, choose
from sparsedsl.models.installed import Installed, home_of, installed_at, installed_in
from sparsedsl.models.layer_caches import CacheReport
from sparsedsl.models.layers import (
    attention_layers,
    check_module,
    closed_layers,
    is_told_causal,
    layer_words,
    native_implementation,
    text_config,
)
from sparsedsl.models.saving import save
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import is_for_prefill
from sparsedsl.program.node import Node

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AppliedPatterns", "applied", "apply"]


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
    - Calls add up, as context managers do that are stacked: patterns of different layers all stand, a layer runs what it was given last,
      and ``restore()``, in any order, takes away what its own call gave.
    - A copy of the model, and one that was pickled, run the patterns and have handles of their own: :func:`applied`. ``save_pretrained``
      writes patterns as text, and :func:`from_pretrained` reads them.
    - ``torch.compile`` and ``torch.export`` make one graph where they make one of the model itself, with an operator for each layer.
    - Continuous batching (``model.generate_batch``) gives each request the tokens that it gets alone: see the manual on serving.
    - Caches that are still empty are fitted: a layer with a pattern or a program holds what :func:`sparsedsl.cache_bound` says later
      queries may ask for, and no more: some keys, or the state of a program; all keys where no bound is proved. Layers that share their
      keys (Gemma 3n, Gemma 4) get one together, or the call raises.

    A *program*, such as ``sd.patterns.pbs()`` or ``sd.patterns.moba()``, over q, k and v:

    - takes the layer's scale for every dot product of queries without one of its own, those it chooses by included; the layer's soft
      cap for attentions that leave logits as they are; the layer's sink logits if it has none;
    - with the effect ``"selection reads later queries"`` (``pbs``, ``token_sparse``) runs where the queries are those of a whole prompt.
      Decoding, and a chunk that continues a prompt, run the layer's native pattern over the whole cache. Other programs run there too;
    - runs on the real tokens of each row, or of each packed sequence, alone; rows that have as many run as one batch. What a padding query
      gives is zero.

    Args:
        model: a transformers model with one stack of layers, running ``sdpa``, ``eager`` or ``flex_attention``. Of an encoder-decoder
            model give one stack, ``model.get_encoder()`` or ``model.get_decoder()``, whose cross-attention stays native; of a model with a
            tower for images that tower, ``model.vision_model``, or the whole for its text.
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
            Calls that ask for what patterns cannot give raise it too: 4-D masks, attention dropout, attention weights, position biases;
            continuous batching of what depends on later keys, ``b`` or lengths; padding in a layer with a program by
            ``indices="slots"``; gradients of a program that reads later queries.

    >>> import sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
    >>> local = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4)
    >>> with sd.models.apply(model, {1: local}, backend="reference") as applied:
    ...     print(applied)
    <AppliedPatterns on LlamaForCausalLM: layer 1 attend((kv_idx <= q_idx) & (q_idx - kv_idx < 4)); native: layer 0>
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
    chosen = choose(patterns, sorted({*layers, *closed}))
    if missed := sorted(set(chosen) & set(closed)):
        raise UnsupportedError(
            f"{layer_words(missed)} ({', '.join(sorted({closed[index] for index in missed}))}): the module's own forward does not call "
            "transformers' attention interface (AttentionInterface), so patterns cannot reach it. Give a mapping without it, or call "
            "sd.compile(pattern) in that forward"
        )
    home = home_of(model, layers)
    installed = installed_at(home)
    if installed is None:
        native = native_implementation(config, "patterns are put")
        installed = Installed(home, config, native, layers, is_told_causal(model, config))
    else:
        installed.check_is_asked()
    compiled, told, stack = Compiled(backend, tuple(allow)), installed.told, installed.stack
    in_slots = indices == "slots"
    bindings = {i: bind(layers[i], i, given, config, told, compiled, stack, in_slots) for i, given in chosen.items()}
    return AppliedPatterns(model, installed, chosen, bindings, compiled, indices)


def applied(model: PreTrainedModel) -> tuple[AppliedPatterns, ...]:
    """What is applied to a model, or to parts of it: the handles that :func:`apply` returned and that were not restored, oldest first.

    A copy of a model with patterns, and one that was pickled, have handles of their own:

    >>> import copy, sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**tiny))
    >>> handle = sd.models.apply(model, {1: sd.kv_idx <= sd.q_idx})
    >>> twin = copy.deepcopy(model)
    >>> sd.models.applied(model) == (handle,)
    True
    >>> for its_own in sd.models.applied(twin):
    ...     its_own.restore()
    >>> len(sd.models.applied(twin)), len(sd.models.applied(model))
    (0, 1)
    """
    check_module(model)
    return tuple(handle for installed in installed_in(model) for handle in installed.applied)


class AppliedPatterns:
    """Patterns at work in a model; made by :func:`apply`, ended by :meth:`restore` or by leaving its ``with`` block.

    ``patterns``: layer index -> the pattern or :class:`~sparsedsl.Program` the layer runs. ``given``: layer index -> what it was given.
    ``layers``: the indices of all attention layers.

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
        installed: Installed,
        given: dict[int, Any],
        bindings: dict[int, Binding],
        compiled: Compiled,
        indices: str,
    ) -> None:
        self.model, self.layers, self.given = model, tuple(installed.layers), given
        self.patterns = {index: binding.program or binding.pattern for index, binding in bindings.items()}
        self.backend, self.allow, self.indices = compiled.backend, compiled.allow, indices
        self._installed, self._bindings = installed, bindings
        installed.add(self, bindings)
        installed.hook(model, _before_forward, _after_forward)
        installed.put_method("save_pretrained", model, save)
        installed.put_method("init_continuous_batching", model, _serve)

    def restore(self) -> None:
        """Take these patterns out again. Layers then run what they ran without them: what an earlier :func:`apply` gave them that still
        stands, else the model's own attention. Handles are restored in any order; doing so twice is no error."""
        self._installed.remove(self)

    def by_layers(self) -> list[tuple[tuple[int, ...], Pattern | Program, bool]]:
        """What :func:`sparsedsl.testing.check` looks at: indices of layers that run the same, what they run, and whether they decode.

        Where a layer is causal by its own word a pattern must be: one that sees later tokens trains a model on what it is to say. A
        program that runs on prompts alone may.

        >>> import sparsedsl as sd
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> with sd.models.apply(LlamaForCausalLM(LlamaConfig(**tiny)), sd.kv_idx <= sd.q_idx + 1) as applied:
        ...     applied.by_layers()
        [((0, 1), <Pattern attend(kv_idx <= q_idx + 1)>, True)]
        """
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, pattern in self.patterns.items():
            decodes = bool(getattr(self._installed.layers[index], "is_causal", False))
            meant = decodes and not (isinstance(pattern, Program) and is_for_prefill(pattern))
            groups.setdefault((pattern.key, meant), []).append(index)
        return [(tuple(indices), self.patterns[indices[0]], decodes) for (_, decodes), indices in groups.items()]

    def cache(self, max_length: int | None = None) -> Cache:
        """An empty KV cache that holds the keys these patterns may ask for, and no more; pass it as ``past_key_values``.

        ``max_length``: take memory for so many tokens at once, as transformers' static cache does; None: as tokens come.
        """
        cache = empty_cache(self.model, max_length)
        installed = self._installed
        arrange(cache, installed.stack.owners, installed.bindings, installed.heads, late=False, max_length=max_length)
        release(installed.bindings)
        return cache

    def cache_report(self, length: int, *, batch: int = 1) -> CacheReport:
        """What the layers' caches hold while ``length`` tokens go by, in words and bytes: what is bounded, and what grows; ``print`` it.

        The model runs on one token, to see what its layers' keys and values are.

        >>> import sparsedsl as sd
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> with sd.models.apply(LlamaForCausalLM(LlamaConfig(**tiny)).eval(), {1: sd.patterns.sliding_window(512)}) as applied:
        ...     print(applied.cache_report(32768))
        layer 0: every key; 128 B a token, 4 MiB for 32,768 tokens
        layer 1: ring: a ring of 512 keys; PROVED (for all indices, lengths and tables); 128 B a token, 63.9 KiB for 32,768 tokens
        all layers: 4.06 MiB, where 8 MiB hold every key
        """
        check_size("length", length, 1)
        check_size("batch", batch, 1)
        cache = self.cache()
        with torch.no_grad():
            self.model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), past_key_values=cache)
        return report(cache, length, batch, self._installed.heads)

    def __enter__(self) -> AppliedPatterns:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        groups: dict[str, list[int]] = {}
        for index, pattern in self.patterns.items():
            groups.setdefault(_words(pattern), []).append(index)
        words = [f"{layer_words(indices)} {text}" for text, indices in groups.items()]
        standing = self._installed.bindings
        hidden = [
            index for index in self.patterns if self in self._installed.applied and standing[index] is not self._bindings[index]
        ]
        words += [f"given another by a later apply: {layer_words(hidden)}"] if hidden else []
        left = [index for index in self.layers if index not in self.patterns]
        others = [index for index in left if index in standing]
        words += [f"given one by another apply: {layer_words(others)}"] if others else []
        native = [index for index in left if index not in standing]
        words += [f"native: {layer_words(native)}"] if native else []
        state = "" if self in self._installed.applied else ", restored"
        return f"<AppliedPatterns on {type(self.model).__name__}{state}: {'; '.join(words)}>"


def _words(pattern: Pattern | Program) -> str:
    last = str(pattern).splitlines()[-1]
    if isinstance(pattern, Program):  # its last node, by its own name
        return f"{last.partition(' = ')[2]}{', prompts only' if is_for_prefill(pattern) else ''}"
    return last


def _serve(model: Any, *args: Any, **words: Any) -> Any:
    """In place of the model's own method: what cannot run there is refused before a thread begins that would note it and go on."""
    for installed in installed_in(model):
        check_served(installed.bindings, installed.config)
    return type(model).init_continuous_batching(model, *args, **words)


def _before_forward(installed: Installed, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Runs before every forward of the model: nothing has switched the patterns off, and the cache keeps what they ask for."""
    stack = installed.stack
    stack.inside += 1
    installed.check_is_asked()
    cache = kwargs.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)  # of a decoder, beside what it has of the encoder's output
    if torch.compiler.is_compiling() and not stack.between_graphs:
        _before_tracing(installed, args, kwargs, cache)
    else:
        _before_layers(installed, kwargs, cache)


@between_graphs
def _before_layers(installed: Installed, kwargs: dict[str, Any], cache: Any) -> None:
    stack = installed.stack
    stack.step = paged_step(kwargs) or (stack.step if stack.inside > 1 else None)
    arrange(cache if isinstance(cache, Cache) else None, stack.owners, installed.bindings, installed.heads)
    stack.seen = _seen(cache, stack) if isinstance(cache, Cache) else None


def _before_tracing(installed: Installed, args: Any, kwargs: dict[str, Any], cache: Any) -> None:
    """The same while a graph is made, which cannot exchange layers of a cache: where one has dropped what a pattern asks for, the graph
    raises when it runs."""
    installed.stack.positions = kwargs.get("position_ids")
    if len(args) > 2 or (isinstance(cache, Cache) and find_first_full_attention_index(cache) not in installed.stack.owners):
        raise UnsupportedError(
            "a graph does not show what this call means: pass all but input_ids and attention_mask by name; a cache whose first layer "
            "keeps no keys is for calls without torch.compile or torch.export"
        )


def _after_forward(installed: Installed, module: Any, args: Any, output: Any) -> None:
    """Runs after every forward of the model, failed ones included: each layer with a pattern has called for it."""
    stack, bindings, config = installed.stack, installed.bindings, installed.config
    stack.inside = max(0, stack.inside - 1)  # another hook may have failed before ours
    release(bindings)
    if stack.inside == 0:
        stack.traced, stack.positions, stack.step = (), None, None
    if stack.inside or output is None or all(binding.reached for binding in bindings.values()):
        return
    if module.training and any(getattr(config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")):
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
