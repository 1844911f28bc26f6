"""Results kept between calls: tile lists, schedules, tiles of masks, checks of tables. One bound in bytes for the whole process.

A :class:`Cache` belongs to whoever asks again (a compiled pattern, a schedule, a module) and dies with it. All caches together hold at
most ``SPARSEDSL_MEMORY_BYTES`` (:func:`sparsedsl.settings.memory_bytes`), on all devices together; what was not asked for longest goes
first. Entries are of two kinds, each sure of half of the bound, and free to use what the other leaves: *results* take long to make;
*tiles* are pieces of masks and biases, many and quickly made again, which must not push the results out.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import sympy
import torch

from sparsedsl.lang.pattern import Pattern
from sparsedsl.settings import memory_bytes

__all__ = ["Cache", "as_seen", "cache_bytes", "clear_caches", "held_bytes"]

T = TypeVar("T")
# What an entry takes beside what it holds: its key, its place in the order, weak references. Measured: 700 to 1,100 bytes.
ENTRY_BYTES = 1024
# What a pattern with its expressions takes, about. Its tables belong to whoever bound them.
PATTERN_BYTES = 1 << 14
# Begins the keys of what was made of tables, so that no key without tables is the same.
_OF = object()


def as_seen(table: torch.Tensor, gone: Callable[[Any], Any] | None = None) -> Callable[[torch.Tensor], bool]:
    """A question to ask later: is the tensor given then this very ``table``, unchanged? ``gone`` is called when the table dies.

    A tensor counts the writes to it (its version), so that asking costs nothing. A tensor made under ``torch.inference_mode()`` does
    not: a copy of it is kept and compared, which on a GPU waits for the device. A write through ``t.data`` or through an array that
    shares the memory (``t.numpy()``) is counted nowhere: :func:`sparsedsl.table` says what to do then.

    >>> table = torch.zeros(2)
    >>> unchanged = as_seen(table)
    >>> unchanged(table), unchanged(table.clone()), unchanged(table.add_(1))
    (True, False, False)
    """
    ref = weakref.ref(table, gone)
    if table.is_inference():
        copy = table.clone()
        return lambda now: ref() is now and torch.equal(copy, now)
    version = table._version
    return lambda now: ref() is now and version == now._version


class _Place:
    """The place of an entry in the order of all. It does not hold the entry, which may refer back to the owner of its cache."""

    __slots__ = ("cache", "key", "order", "size")

    def __init__(self, order: _Ages, cache: weakref.ref[Cache[Any]], key: Any, size: int) -> None:
        self.order, self.cache, self.key, self.size = order, cache, key, size

    def enter(self) -> None:
        self.order.places[self] = None
        self.order.bytes += self.size

    def leave(self) -> None:
        if self.order.places.pop(self, self) is None:
            self.order.bytes -= self.size


class _Ages:
    """The places of one kind in all caches, the one not asked for longest first, and their bytes together."""

    def __init__(self) -> None:
        self.places: OrderedDict[_Place, None] = OrderedDict()
        self.bytes = 0


_RESULTS, _TILES = _Ages(), _Ages()
# Taken again by the same thread where a table or a cache dies while an entry is put in.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# The thread that held the lock does not exist in a forked child.
os.register_at_fork(after_in_child=_renew_lock)


class Cache(Generic[T]):
    """Results by key and tables. A table that was written to, or replaced by another, makes a result anew; one that dies takes it along.

    ``tiles``: its entries are of the kind that is quickly made again. ``most``: bytes that this cache may hold, beside the bound for all.
    An entry larger than the bound is not kept, nor a tile larger than a quarter of it. Safe to use from several threads: two that ask
    at once may both make the result. What is asked for while a CUDA graph is recorded lives as long as the cache, whatever the bound,
    since the graph reads it at every replay.

    >>> known = Cache()
    >>> table = torch.zeros(2)
    >>> known.get("sum", [table], lambda: float(table.sum())), known.get("sum", [table], lambda: None)
    (0.0, 0.0)
    >>> _ = table.add_(1)
    >>> known.get("sum", [table], lambda: float(table.sum()))
    2.0
    """

    def __init__(self, *, tiles: bool = False, most: int | None = None) -> None:
        self._order = _TILES if tiles else _RESULTS
        self._most = most
        self._bytes = 0
        # In the order in which they were asked for, where `most` says how many they may be.
        self._entries: dict[Any, tuple[_Place, Sequence[Callable[[torch.Tensor], bool]], T]] = {}
        self._recorded: list[T] = []

    def get(self, key: Any, tables: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """The result for ``key`` and these very tables, made if it is not known. A ``make`` that raises leaves nothing behind."""
        full = (_OF, key, *map(id, tables)) if tables else key
        known = self._entries.get(full)
        if known is not None and (not tables or all(map(_asked, known[1], tables))):
            place, _, result = known
            try:
                self._order.places.move_to_end(place)
                if self._most is not None:
                    with _lock:
                        self._entries[full] = self._entries.pop(full)
            except KeyError:
                pass  # another thread has let go of it just now
        else:
            result = make()
            self._put(full, tables, result)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._recorded.append(result)
        return result

    def _put(self, full: Any, tables: Sequence[torch.Tensor], result: T) -> None:
        bound = memory_bytes()
        size = ENTRY_BYTES + held_bytes(full) + held_bytes(result) + sum(t.nbytes for t in tables if t.is_inference())
        largest = bound if self._order is _RESULTS else bound // 4
        place = _Place(self._order, weakref.ref(self), full, size)
        # Tables may outlive this module when Python ends: its names are gone then, what is bound here is not.
        closing = sys.is_finalizing
        seen = [as_seen(table, lambda _: None if closing() else _let_go(place)) for table in tables]
        dropped: list[Any] = []  # they die after the lock is released
        with _lock:
            known = self._entries.get(full)
            if known is not None:
                dropped.append(_let_go(known[0]))
            if size <= largest and (self._most is None or size <= self._most):
                self._entries[full] = (place, seen, result)
                self._bytes += size
                place.enter()
                while self._most is not None and self._bytes > self._most:
                    dropped.append(_let_go(next(iter(self._entries.values()))[0]))
            while _RESULTS.bytes + _TILES.bytes > bound:
                order = _TILES if _TILES.bytes * 2 > bound or not _RESULTS.places else _RESULTS
                dropped.append(_let_go(next(iter(order.places))))

    def __len__(self) -> int:
        return len(self._entries)

    def __del__(self) -> None:
        if _lock is None:  # the interpreter is going down, and has taken this module's names along
            return
        with _lock:
            for place, _, _ in self._entries.values():
                place.leave()


def _asked(unchanged: Callable[[torch.Tensor], bool], table: torch.Tensor) -> bool:
    return unchanged(table)


def _let_go(place: _Place) -> Any:
    """Remove an entry from its cache and from the order; what was removed."""
    if sys.is_finalizing():  # keys can no longer be hashed
        return None
    with _lock:
        place.leave()
        cache = place.cache()
        known = None if cache is None else cache._entries.get(place.key)
        if cache is None or known is None or known[0] is not place:
            return None
        cache._bytes -= place.size
        return cache._entries.pop(place.key)


def clear_caches() -> None:
    """Let go of all results that calls have kept: tile lists, schedules, tiles of masks, checks of tables. The next calls make them anew.

    Compiled kernels stay, and so does what was measured on this machine. What a recorded CUDA graph reads stays as long as the compiled
    pattern does. To keep less at any time set ``SPARSEDSL_MEMORY_BYTES``.

    >>> import torch, sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.sliding_window(100), backend="tiled")
    >>> q = k = v = torch.randn(1, 2, 1000, 16)
    >>> out = attn(q, k, v)
    >>> sd.cache_bytes() > 0
    True
    >>> sd.clear_caches()
    >>> sd.cache_bytes()
    0
    """
    dropped = []
    with _lock:
        for order in (_RESULTS, _TILES):
            while order.places:
                dropped.append(_let_go(next(iter(order.places))))


def cache_bytes() -> int:
    """Bytes of all results that calls have kept, on all devices together; at most ``SPARSEDSL_MEMORY_BYTES``.

    >>> import sparsedsl as sd
    >>> sd.cache_bytes() <= 2**28
    True
    """
    return _RESULTS.bytes + _TILES.bytes


def held_bytes(value: object) -> int:
    """Bytes that ``value`` keeps in memory: the storage of tensors, containers, dataclasses; each object once.

    A view counts its whole storage. Functions, objects that are no dataclasses, and other caches count next to nothing: what they refer
    to belongs to somebody else.

    >>> table = torch.zeros(1000)
    >>> held_bytes(table), held_bytes(table[:2]), 8000 <= held_bytes({"a": [table, table.clone(), table.view(10, 100)]}) < 8500
    (4000, 4000, True)
    """
    total, waiting, seen = 0, [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            place, size = _storage(one)
            if place not in seen:
                seen.add(place)
                total += size
            continue
        if isinstance(one, (int, float, type(None), type)) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Pattern):
            total += PATTERN_BYTES
            continue
        total += sys.getsizeof(one)
        if isinstance(one, (str, bytes, sympy.Basic)):
            continue
        if isinstance(one, Mapping) and not isinstance(one, weakref.WeakValueDictionary):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        elif dataclasses.is_dataclass(one):
            waiting += vars(one).values() if hasattr(one, "__dict__") else [getattr(one, f.name) for f in dataclasses.fields(one)]
    return total


def _storage(tensor: torch.Tensor) -> tuple[Any, int]:
    """Something that names the memory of a tensor, and its bytes."""
    try:
        storage = tensor.untyped_storage()
        return ("storage", tensor.device, storage.data_ptr()), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own, as within torch.func.vmap
        return id(tensor), tensor.numel() * tensor.element_size()
