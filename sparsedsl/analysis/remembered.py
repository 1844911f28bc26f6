"""What was derived from lengths and tables, kept as long as the tables live unchanged."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Remembered", "as_seen"]

T = TypeVar("T")


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


class Remembered(Generic[T]):
    """The last ``size`` results. A table that was written to, or replaced by another, makes a result anew.

    >>> known = Remembered(size=2)
    >>> table = torch.zeros(2)
    >>> known.get("sum", [table], lambda: float(table.sum())), known.get("sum", [table], lambda: None)
    (0.0, 0.0)
    >>> _ = table.add_(1)
    >>> known.get("sum", [table], lambda: float(table.sum()))
    2.0
    """

    def __init__(self, size: int = 32) -> None:
        self.size = size
        self._known: OrderedDict[Any, tuple[list[Callable[[torch.Tensor], bool]], T]] = OrderedDict()
        # Taken again by the same thread where a table dies, and with it a result, while a result is put in.
        self._lock = threading.RLock()

    def get(self, key: Any, tables: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """The result for ``key`` and these very tables, made if it is not known. A ``make`` that raises leaves nothing behind."""
        full = (key, *(id(t) for t in tables))
        with self._lock:
            known = self._known.get(full)
            if known is not None:
                self._known.move_to_end(full)
        if known is not None and all(unchanged(t) for unchanged, t in zip(known[0], tables, strict=True)):
            return known[1]
        result = make()
        seen = [as_seen(t, lambda _: self._forget(full)) for t in tables]
        with self._lock:
            self._known[full] = (seen, result)
            while len(self._known) > self.size:
                self._known.popitem(last=False)
        return result

    def _forget(self, full: Any) -> None:
        with self._lock:
            self._known.pop(full, None)
