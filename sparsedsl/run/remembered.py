"""What was derived from lengths and tables, kept as long as the tables live unchanged."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

__all__ = ["Remembered"]

T = TypeVar("T")


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
        self._known: OrderedDict[Any, tuple[list[tuple[weakref.ref[torch.Tensor], int]], T]] = OrderedDict()

    def get(self, key: Any, tables: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """The result for ``key`` and these very tables, made if it is not known."""
        full = (key, *(id(t) for t in tables))
        known = self._known.get(full)
        if known is not None and all(
            ref() is t and version == t._version for (ref, version), t in zip(known[0], tables, strict=True)
        ):
            self._known.move_to_end(full)
            return known[1]
        result = make()
        self._known[full] = ([(weakref.ref(t), t._version) for t in tables], result)
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return result
