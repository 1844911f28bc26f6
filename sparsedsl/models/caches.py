"""Layers of transformers caches that hold what a pattern's later queries may ask for, and no more.

Input: a cache that is still empty, and the patterns that its layers serve. Output: the same cache, with :class:`KeptKeys` wherever a bound
is proved (:func:`sparsedsl.cache_bound`). A layer hands out the keys it held and the new ones, with their slots, and is then told to let go
of those that no later query needs. Layers of programs that choose among all keys keep the summaries they choose by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from sparsedsl.analysis.cached_keys import CacheBound
from sparsedsl.analysis.lists import size_text
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.lang.pattern import attend

if TYPE_CHECKING:
    from sparsedsl.execute.compiled import Attention
    from sparsedsl.models.attention_function import Binding

__all__ = ["FixedKeys", "KeptKeys", "SummarisedKeys", "arrange", "layer_words", "release", "report"]

Tensor = torch.Tensor


class KeptKeys(DynamicLayer):
    """The keys that a bound says later queries may ask for; ``slots`` are the cache slots they stand at, ``handed`` those of the keys that
    the last ``update`` gave.

    Between ``update`` and :meth:`settle`, which the attention function calls, it holds every key that it handed out. Batches are
    reordered, repeated and selected from as in any layer, since all rows hold the same slots.
    """

    def __init__(self, bound: CacheBound, *, recent: int, first: int, stands_for: Any) -> None:
        super().__init__()
        self.bound, self.recent, self.first = bound, recent, first
        # The empty layer of transformers that would hold the keys of the layer's own mask.
        self.stands_for = stands_for
        self.seen = 0
        self.slots = self.handed = torch.empty(0, dtype=torch.int64)
        # Whether a forward of the model with the patterns runs: another one would not know which keys are missing.
        self.claimed = False
        self.record_past = False
        # In place of a layer that anybody may take tokens back from: nothing goes before it is known that nobody does, which is when the
        # second forward begins. Who takes some back after the first one (prompt lookup, assistants) does so after each.
        self.is_late = False
        self._lacks = False
        self._waiting: tuple[Tensor | None] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys held and the new ones."""
        if self._lacks and not self.claimed:
            raise UnsupportedError(
                f"this cache was made for a pattern and holds {self.slots.numel()} of {self.seen} keys; the model that was called with it "
                "runs without the pattern. Give it a cache of its own, or put the pattern back with models.apply"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._waiting is not None:
            self.is_late = False
            self.settle(*self._waiting)
        new = key_states.shape[-2]
        self.slots = self.handed = torch.cat([self.slots, torch.arange(self.seen, self.seen + new)])
        self.seen += new
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def settle(self, padding: Tensor | None) -> None:
        """Let go of the keys that no later query needs. ``padding``: (B, slots), False = padding, or None where nothing is padded."""
        if self.record_past:
            return
        if self.is_late or self.keys.device != self.device:  # on its way to the host: when it is back
            self._waiting = (padding,)
            return
        self._waiting = None
        kept = self._needed(self.slots, self.seen, padding)
        if bool(kept.all()):
            return
        self._lacks = True
        self._hold(kept.nonzero().flatten())

    def _hold(self, places: Tensor) -> None:
        """Keep the keys at these places of those held."""
        self.slots = self.slots[places]
        places = places.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(2, places), self.values.index_select(2, places)

    def _needed(self, slots: Tensor, seen: int, padding: Tensor | None) -> Tensor:
        """Which slots a query behind the first ``seen`` ones may ask for, whether it counts slots or, in some row, the tokens that are no
        padding."""
        needed = self.bound.needs(slots, seen, self.recent, self.first)
        if padding is None:
            return needed
        real = padding.cpu()
        real = torch.nn.functional.pad(real, (0, max(0, seen - real.shape[1])))[:, :seen]
        tokens = real.cumsum(-1) - 1
        counted = self.bound.needs(tokens[:, slots], real.sum(-1, keepdim=True), self.recent, self.first)
        return needed | (counted & real[:, slots]).any(0)

    def get_seq_length(self) -> int:
        """Tokens seen, whether or not their keys are held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of a layer that holds everything: masks of other layers may be made by this one."""
        return self.seen + query_length, 0

    def activate_past_recording(self) -> None:
        """Let go of nothing until ``crop`` is called."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number.

        Raises :class:`~sparsedsl.UnsupportedError` where a key that is needed again is gone.
        """
        if tokens_to_remove > 0:
            raise ShapeError(f"crop() takes back tokens by a negative number, as transformers' layers do; got {tokens_to_remove}")
        if not self.is_initialized:
            return
        if self.is_late:
            self.is_late, self._waiting = False, None
            self.activate_past_recording()
        target = max(self.seen + tokens_to_remove, 0)
        every = torch.arange(target)
        needed = every[self._needed(every, target, None)]
        gone = needed[~torch.isin(needed, self.slots)]
        if gone.numel():
            raise UnsupportedError(
                f"crop({tokens_to_remove}) wants the cache as it was after {target} tokens, and {gone.numel()} keys that were needed then "
                f"are gone (slot {int(gone[0])} first). Call activate_past_recording() before the tokens that may be taken back"
            )
        self.seen = target
        self._lacks = self._lacks or needed.numel() < target
        self._hold(torch.isin(self.slots, needed).nonzero().flatten())

    def reset(self) -> None:
        """Empty, as when it was new."""
        super().reset()
        self.seen, self._lacks, self._waiting = 0, False, None
        self.slots = self.handed = torch.empty(0, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"KeptKeys({self.bound.kind}, {self.slots.numel()} of {self.seen} keys)"


class FixedKeys(KeptKeys):
    """The same in memory of a fixed size, taken once: what the bound needs at most while ``max_cache_len`` tokens go by."""

    def __init__(
        self, bound: CacheBound, *, recent: int, first: int, stands_for: Any, capacity: int, max_cache_len: int
    ) -> None:  # fmt: skip
        super().__init__(bound, recent=recent, first=first, stands_for=stands_for)
        self.capacity, self.max_cache_len = capacity, max_cache_len
        self._room: tuple[Tensor, Tensor] | None = None

    def _hold(self, places: Tensor) -> None:
        super()._hold(places)
        held = (self.keys, self.values)
        if self._room is None or self._room[0].shape[:2] != self.keys.shape[:2] or self._room[0].shape[2] < self.slots.numel():
            rows = max(self.capacity, self.slots.numel())  # rows whose padding differs may need more between them
            self._room = tuple(x.new_zeros((*x.shape[:2], rows, x.shape[3])) for x in held)  # type: ignore[assignment]
        self.keys, self.values = (
            room[:, :, : x.shape[2]].copy_(x)
            for room, x in zip(self._room, held, strict=True)  # type: ignore[arg-type]
        )

    def get_max_length(self) -> int:
        """Tokens that it was made for."""
        return self.max_cache_len


class SummarisedKeys(DynamicLayer):
    """A layer that grows, with the summaries that programs make of its keys: what a step of decoding reads in place of most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, KeptSummaries] = {}

    def summaries(self, attention: Attention) -> KeptSummaries:
        """Those of a compiled program."""
        key = attention.program.key
        if key not in self.kept:
            self.kept[key] = attention.keep_summaries()
        return self.kept[key]

    def reset(self) -> None:
        """Empty, as when it was new."""
        super().reset()
        self.kept.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number."""
        super().crop(tokens_to_remove)
        for kept in self.kept.values():
            kept.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As beams go on."""
        super().reorder_cache(beam_idx)
        self._follow(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._follow(torch.arange(0 if self.keys is None else self.keys.shape[0]).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        super().batch_select_indices(indices)
        self._follow(indices)

    def _follow(self, rows: Tensor) -> None:
        for kept in self.kept.values():
            kept.reorder(rows)


def arrange(
    cache: Cache | None, owners: Mapping[int, int], bindings: Mapping[int, Binding], heads: int | None, *, late: bool = True
) -> None:  # fmt: skip
    """Let empty layers hold what the patterns that read them may ask for, and tell each pattern of its layer; before a forward.

    ``owners``: index of each attention layer -> that of the layer whose keys it reads. ``heads``: of the queries. ``late``: others have
    seen the cache as it is. Layers that all of their readers' native patterns are made for stay as they are.

    Raises :class:`~sparsedsl.UnsupportedError` where a native layer shares its keys with a pattern that needs others, or where the cache
    was filled for another pattern.
    """
    release(bindings)
    if cache is None:
        return
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(max(owners.values()) + 1))
    longest = max((layer.max_cache_len for layer in cache.layers if isinstance(layer, (StaticLayer, FixedKeys))), default=None)
    for owner in range(len(cache.layers)):
        readers = [index for index, owned in owners.items() if owned == owner]
        given = [bindings[index] for index in readers if index in bindings]
        if not given:
            continue
        layer = cache.layers[owner]
        before = layer
        if isinstance(before, KeptKeys) and before.seen == 0:
            layer = cache.layers[owner] = before.stands_for
        if _is_empty(layer):
            native = [index for index in readers if index not in bindings]
            made = cache.layers[owner] = _layer_for(layer, given, native, heads, longest)
            if made is not layer and isinstance(made, KeptKeys):
                made.is_late = late and type(before) is DynamicLayer
                made.record_past = getattr(before, "record_past", False)
            layer = made
        elif isinstance(layer, KeptKeys):
            _check_made_for(layer, given, heads)
        if isinstance(layer, KeptKeys):
            layer.claimed = True
        if isinstance(layer, (KeptKeys, SummarisedKeys)):
            for binding in given:
                binding.held = layer


def release(bindings: Mapping[int, Binding]) -> None:
    """The forward is over, and with it what its layers hand out."""
    for binding in bindings.values():
        if isinstance(binding.held, KeptKeys):
            binding.held.claimed = False
        binding.held = None


def report(cache: Cache, length: int, batch: int) -> str:
    """What the layers of a cache that has seen a token hold while ``length`` tokens go by, in words and bytes."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or not keys.numel():
            continue  # no keys of its own
        each = sum(x.shape[1] * x.shape[3] * x.element_size() for x in (keys, values))
        window = _window(layer)
        words, most = "every key", length
        if isinstance(layer, KeptKeys):
            bound = layer.bound
            words, most = str(bound), bound.held(length, layer.recent, layer.first)
        elif window is not None:
            words, most = f"the last {window - 1} keys", min(length, window - 1)
        groups.setdefault((words, each, most), []).append(index)
    lines = [
        f"{layer_words(layers)}: {words}; {each:,} bytes a token, {size_text(batch * each * most)} for {length:,} tokens"
        for (words, each, most), layers in groups.items()
    ]
    took = sum(batch * each * most * len(layers) for (_, each, most), layers in groups.items())
    whole = sum(batch * each * length * len(layers) for (_, each, _), layers in groups.items())
    return "\n".join([*lines, f"all layers: {size_text(took)}, where {size_text(whole)} hold every key"])


def layer_words(indices: list[int]) -> str:
    """``layer 1``, ``layers 1, 2``."""
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


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


def _layer_for(layer: Any, given: list[Binding], native: list[int], heads: int | None, longest: int | None) -> Any:
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
    found = _sizes(given, heads)
    if found is None:
        if longest is None and any(binding.sums_up_keys for binding in given):
            return SummarisedKeys()
        return DynamicLayer() if wide and longest is None else layer
    bound, recent, first = found
    if not wide and window is not None and bound.kind == "ring" and recent >= window:
        return layer
    if longest is None:
        made = KeptKeys(bound, recent=recent, first=first, stands_for=layer)
    else:
        most = bound.held(longest, recent, first)
        made = FixedKeys(bound, recent=recent, first=first, stands_for=layer, capacity=most, max_cache_len=longest)
    return made


def _check_made_for(layer: KeptKeys, given: list[Binding], heads: int | None) -> None:
    """What a layer let go of was let go of by these patterns."""
    found = _sizes(given, heads)
    if found is not None and found[0] is layer.bound:
        return
    if found is None or (found[0].pattern, *found[1:]) != (layer.bound.pattern, layer.recent, layer.first):
        raise UnsupportedError(
            f"{layer_words([binding.index for binding in given])}: the cache was filled for another pattern ({layer.bound}). Give each "
            "pattern a cache of its own: handle.cache()"
        )


def _sizes(given: list[Binding], heads: int | None) -> tuple[CacheBound, int, int] | None:
    """The bound of all these patterns together, with its numbers; None: there is none."""
    known, key = given[0].bounds, (heads, *(binding.index for binding in given))
    if key not in known:
        known[key] = _found_sizes(given, heads)
    return known[key]


def _found_sizes(given: list[Binding], heads: int | None) -> tuple[CacheBound, int, int] | None:
    if any(binding.runs_program(whole=False) for binding in given):
        return None
    mask = given[0].pattern.mask
    for binding in given[1:]:
        mask = mask | binding.pattern.mask
    bound = cache_bound(attend(mask))
    try:
        return (bound, *bound.sizes(heads=heads)) if bound.is_bounded else None
    except (ShapeError, TableError):  # how many depends on what only a call knows
        return None
