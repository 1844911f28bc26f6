"""Tiles of masks and biases that were made and may be wanted again: a bounded store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Tiles"]


class Tiles:
    """Tiles by key, at most ``limit`` bytes of them (or one); those not asked for longest go first.

    >>> kept = Tiles(limit=100)
    >>> first = kept.get("a", lambda: torch.zeros(20))
    >>> first is kept.get("a", lambda: torch.zeros(20)), first is kept.get("b", lambda: torch.zeros(20))
    (True, False)
    >>> len(kept)
    1
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._bytes = limit, 0
        self._tiles: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tile for ``key``, made if it is not there."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
                return tile
        tile = make()  # two threads may make the same one: that costs less than waiting
        with self._lock:
            if key not in self._tiles and (tile.nbytes * 4 <= self.limit or not self._tiles):
                self._tiles[key] = tile
                self._bytes += tile.nbytes
                while self._bytes > self.limit and len(self._tiles) > 1:
                    self._bytes -= self._tiles.popitem(last=False)[1].nbytes
        return tile

    def __len__(self) -> int:
        return len(self._tiles)
