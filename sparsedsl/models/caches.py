"""Caches fitted to patterns: their layers hold what later queries may ask for, and no more.

Input: a cache that is still empty, and the patterns its layers serve. Output: the same cache, with :class:`~kept_keys.KeptKeys` wherever
a bound is proved (:func:`sparsedsl.cache_bound`), states in place of keys where a program goes on from one, and summaries beside the keys
where one chooses by them.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from sparsedsl.analysis.cached_keys import CacheBound
from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.lang.pattern import attend
from sparsedsl.models.binding import Binding
from sparsedsl.models.kept_keys import FixedKeys, KeptKeys
from sparsedsl.models.layer_caches import CacheReport, LayerCache
from sparsedsl.models.layers import layer_words
from sparsedsl.models.program_keys import FoldedKeys, StaticSummarisedKeys, SummarisedKeys, WithSummaries
from sparsedsl.program.graph import Program

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["arrange", "empty_cache", "release", "report"]


def empty_cache(model: PreTrainedModel, max_length: int | None = None) -> Cache:
    """A cache of the kind that a model makes for itself, with nothing in it. ``max_length``: with memory for so many tokens.

    Raises :class:`~sparsedsl.UnsupportedError` for ``max_length`` where the model's file has a cache of its own (MiniMax).
    """
    file = type(model).__module__
    own = [kind for kind in vars(sys.modules[file]).values() if isinstance(kind, type) and issubclass(kind, Cache)]
    own = [kind for kind in own if kind.__module__ == file]
    if max_length is None:
        made: Cache = own[0]() if own else DynamicCache(config=model.config)
        return made
    if own:
        raise UnsupportedError(
            f"cache(): {type(model).__name__} keeps a {own[0].__name__}, which takes memory as tokens come; leave max_length out"
        )
    return StaticCache(config=model.config, max_cache_len=check_size("max_length", max_length, 1))


def arrange(
    cache: Cache | None, owners: Mapping[int, int], bindings: Mapping[int, Binding], heads: int | None, *, late: bool = True,
    max_length: int | None = None,
) -> None:  # fmt: skip
    """Let empty layers hold what the patterns that read them may ask for, and tell each pattern of its layer; before a forward.

    ``owners``: index of each attention layer -> that of the layer whose keys it reads. ``heads``: of the queries. ``late``: others have
    seen the cache as it is. ``max_length``: of a static cache, where it is known; a layer with a window does not tell. Layers that all of
    their readers' native patterns are made for stay as they are.

    Raises :class:`~sparsedsl.UnsupportedError` where a native layer shares its keys with a pattern that needs others, or where the cache
    was filled for another pattern.
    """
    release(bindings)
    if cache is None:
        return
    if not cache.layers and type(cache) is DynamicCache and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(max(owners.values()) + 1))
    if max_length is None:
        whole = (
            layer for layer in cache.layers if isinstance(layer, (StaticLayer, FixedKeys, FoldedKeys)) and _window(layer) is None
        )
        max_length = max((layer.max_cache_len for layer in whole if layer.max_cache_len is not None), default=None)
    for owner in range(len(cache.layers)):
        readers = [index for index, owned in owners.items() if owned == owner]
        given = [bindings[index] for index in readers if index in bindings]
        if not given:
            continue
        layer = cache.layers[owner]
        before = layer
        if isinstance(before, (KeptKeys, FoldedKeys)) and before.seen == 0:
            layer = cache.layers[owner] = before.stands_for
        if _is_empty(layer):
            native = [index for index in readers if index not in bindings]
            made = cache.layers[owner] = _layer_for(layer, given, native, heads, max_length)
            if made is not layer and isinstance(made, (KeptKeys, FoldedKeys)):
                made.is_late = late and type(before) is DynamicLayer
                made.record_past = getattr(before, "record_past", False)
            layer = made
        elif isinstance(layer, (KeptKeys, FoldedKeys)):
            _check_made_for(layer, given, heads)
        if isinstance(layer, (KeptKeys, FoldedKeys, WithSummaries)):
            layer.claimed = True
            for binding in given:
                binding.held = layer


def release(bindings: Mapping[int, Binding]) -> None:
    """The forward is over, and with it what its layers hand out."""
    for binding in bindings.values():
        if binding.held is not None:
            binding.held.claimed = False
        binding.held = None


def report(cache: Cache, length: int, batch: int, heads: int | None) -> CacheReport:
    """What the layers of a cache that has seen a token hold while ``length`` tokens go by, in words and bytes. ``heads``: of queries."""
    groups: dict[tuple[str, int, int, int], list[int]] = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or (not keys.numel() and not isinstance(layer, FoldedKeys)):
            continue  # no keys of its own
        each = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (keys, values))
        window = _window(layer)
        words, most, more = "every key", length, 0
        if isinstance(layer, KeptKeys):
            bound = layer.bound
            words, most = str(bound), bound.held(length, layer.recent, layer.first)
        elif isinstance(layer, FoldedKeys):
            words, most, more = _folded(layer, length, heads)
            more -= each * most
        elif isinstance(layer, WithSummaries) and layer.kept:
            words = "every key, and summaries of blocks of them"
            more = sum(kept.most_bytes(length) for shares in layer.kept.values() for kept in shares.shares)
        elif window is not None:
            words, most = f"the last {window - 1} keys", min(length, window - 1)
        groups.setdefault((words, each, most, each * most + more), []).append(index)
    found = tuple(
        LayerCache(tuple(layers), words, most, each, batch * took) for (words, each, most, took), layers in groups.items()
    )
    took = sum(one.bytes * len(one.layers) for one in found)
    return CacheReport(length, batch, found, took, sum(batch * one.token_bytes * length * len(one.layers) for one in found))


def _folded(layer: FoldedKeys, length: int, heads: int | None) -> tuple[str, int, int]:
    """What the states of a layer are, in words; the rows of tokens in one, and the bytes of all."""
    bounds = [cache_bound(program) for program in layer.programs.values()]
    sizes = layer.keys.shape[1], layer.keys.shape[3], layer.keys.dtype
    took = sum(bound.bytes(length, *sizes, head_dim_v=layer.values.shape[3], heads=heads) for bound in bounds)
    return ", ".join(dict.fromkeys(map(str, bounds))), max(bound.most(length) for bound in bounds), took


def _is_empty(layer: Any) -> bool:
    if type(layer) is DynamicLayer:
        return not layer.is_initialized
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.cumulative_length == 0
    return type(layer) in (StaticLayer, StaticSlidingWindowLayer) and int(layer.cumulative_length) == 0


def _window(layer: Any) -> int | None:
    """The last keys, the query's own included, that a layer of transformers keeps; None: all."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window
    return layer.max_cache_len if type(layer) is StaticSlidingWindowLayer else None


def _layer_for(layer: Any, given: list[Binding], native: list[int], heads: int | None, max_length: int | None) -> Any:
    """What is to stand in the place of an empty layer of transformers; itself, where it is good as it is."""
    window = _window(layer)
    wide = [] if window is None else [binding.index for binding in given if not binding.fits_window(window)]
    if wide and native:
        raise UnsupportedError(
            f"{layer_words(wide)}: the pattern may ask for more than the last {window} keys, and shares its keys with "
            f"native {layer_words(native)}, which cannot do with more. Give all of {sorted([*native, *(b.index for b in given)])} patterns "
            "(for what stays as it is: sd.models.native_patterns(model)), or one that looks back no further than the window"
        )
    if native or (not wide and all(binding.native for binding in given)):
        return layer
    found, is_static = _sizes(given, heads), isinstance(layer, StaticLayer)
    if found is None:
        if all(binding.keeps_state for binding in given):
            return FoldedKeys(_programs(given), stands_for=layer, max_cache_len=max_length)
        sums_up = any(binding.sums_up_keys for binding in given)
        if not wide and not sums_up:
            return layer
        if max_length is not None:
            return StaticSummarisedKeys(max_length)
        return SummarisedKeys() if sums_up else DynamicLayer()
    bound, recent, first = found
    if not wide and window is not None and bound.kind == "ring" and recent >= window:
        return layer
    if not is_static:
        return KeptKeys(bound, recent=recent, first=first, stands_for=layer)
    most = bound.held(max_length or layer.max_cache_len, recent, first)
    return FixedKeys(bound, recent=recent, first=first, stands_for=layer, capacity=most, max_cache_len=max_length)


def _programs(given: list[Binding]) -> dict[int, Program]:
    return {binding.index: binding.program for binding in given if binding.program is not None}


def _check_made_for(layer: KeptKeys | FoldedKeys, given: list[Binding], heads: int | None) -> None:
    """What a layer let go of was let go of by these patterns."""
    where = layer_words([binding.index for binding in given])
    way_out = "Give each pattern a cache of its own: handle.cache()"
    if isinstance(layer, FoldedKeys):
        if not layer.holds_all and layer.programs != _programs(given):
            raise UnsupportedError(f"{where}: the cache was filled for another program. {way_out}")
        return
    found = _sizes(given, heads)
    if found is not None and found[0] is layer.bound:
        return
    if found is None or (found[0].pattern, *found[1:]) != (layer.bound.pattern, layer.recent, layer.first):
        raise UnsupportedError(f"{where}: the cache was filled for another pattern ({layer.bound}). {way_out}")


def _sizes(given: list[Binding], heads: int | None) -> tuple[CacheBound, int, int] | None:
    """The bound of all these patterns together, with its numbers; None: there is none."""
    known, key = given[0].bounds, (heads, *(binding.index for binding in given))
    if key not in known:
        known[key] = _found_sizes(given, heads)
    return known[key]


def _found_sizes(given: list[Binding], heads: int | None) -> tuple[CacheBound, int, int] | None:
    asked = [binding.asks_for for binding in given]
    masks = [pattern.mask for pattern in asked if pattern is not None]
    if len(masks) < len(asked):
        return None
    bound = cache_bound(attend(functools.reduce(operator.or_, masks)))
    try:
        return (bound, *bound.sizes(heads=heads)) if bound.is_bounded else None
    except (ShapeError, TableError):  # how many depends on what only a call knows
        return None
