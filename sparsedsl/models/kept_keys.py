"""Layers of transformers caches that hold the keys a bound says later queries may ask for: as they come, and in memory of a fixed size.

Such a layer hands out the keys it held and the new ones, with their slots, and is then told to let go of those that no later
query needs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from sparsedsl.analysis.cached_keys import CacheBound
from sparsedsl.errors import ShapeError, UnsupportedError

__all__ = ["FixedKeys", "KeptKeys", "check_claimed"]

Tensor = torch.Tensor


class KeptKeys(DynamicLayer):
    """The keys that a bound says later queries may ask for; ``slots`` are the cache slots they stand at, ``handed`` those of the keys that
    the last ``update`` gave.

    Between ``update`` and :meth:`settle`, which the attention function calls, it holds every key that it handed out. Batches are
    reordered, repeated and selected from as in any layer, since all rows hold the same slots.
    """

    keys: Any
    values: Any

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
        self._padding: Tensor | None = None
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
        self._padding = padding
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
        needed = every[self._needed(every, target, self._padding)]
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
        self.seen, self._lacks, self._padding, self._waiting = 0, False, None, None
        self.slots = self.handed = torch.empty(0, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"KeptKeys({self.bound.kind}, {self.slots.numel()} of {self.seen} keys)"


def check_claimed(layer: Any) -> None:
    """Refuse a call of a layer of a static cache that no forward with the pattern has claimed: such caches are no longer what transformers
    takes for static, so that it would let native layers see slots that are not written yet."""
    if not layer.claimed:
        raise UnsupportedError(
            "this static cache was made for a pattern, and the model that was called with it runs without the pattern, or in a graph "
            "(torch.compile). Give it a cache of its own, put the pattern back with models.apply, or call the model without a graph"
        )


class FixedKeys(KeptKeys):
    """The same in memory of a fixed size, taken once, for ``capacity`` keys: what the bound needs at most while ``max_cache_len`` tokens go
    by. None: transformers does not say how many."""

    def __init__(
        self, bound: CacheBound, *, recent: int, first: int, stands_for: Any, capacity: int, max_cache_len: int | None
    ) -> None:  # fmt: skip
        super().__init__(bound, recent=recent, first=first, stands_for=stands_for)
        self.capacity, self.max_cache_len = capacity, max_cache_len
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys held and the new ones."""
        check_claimed(self)
        return super().update(key_states, value_states)

    def _hold(self, places: Tensor) -> None:
        super()._hold(places)
        held = (self.keys, self.values)
        if self._room is None or self._room[0].shape[:2] != self.keys.shape[:2] or self._room[0].shape[2] < self.slots.numel():
            rows = max(self.capacity, self.slots.numel())  # rows whose padding differs may need more between them
            self._room = tuple(x.new_zeros((*x.shape[:2], rows, x.shape[3])) for x in held)
        self.keys, self.values = (room[:, :, : x.shape[2]].copy_(x) for room, x in zip(self._room, held, strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Those of a static layer that holds everything, as native ones do whose mask may be made by this."""
        return self.max_cache_len or self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that it was made for; -1: not known."""
        return self.max_cache_len or -1
