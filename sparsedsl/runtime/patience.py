"""How long a call waits for what is being built in the background, before it is answered by something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from sparsedsl.torch_private import saved_tensor_hooks

__all__ = ["Patience", "until_built"]

_ENDLESS: ContextVar[bool] = ContextVar("until built", default=False)


@contextmanager
def until_built() -> Iterator[None]:
    """Calls within it wait for as long as it takes: what they do depends on no clock. Graphs run so."""
    token = _ENDLESS.set(True)
    try:
        yield
    finally:
        _ENDLESS.reset(token)


class Patience:
    """That of one call: ``waited`` seconds so far, all its pieces of work together. ``asks``: of one that is only talked about: nothing is
    begun for it."""

    __slots__ = ("asks", "waited")

    def __init__(self, *, asks: bool = False) -> None:
        self.waited, self.asks = 0.0, asks

    def ends_before(self, wait: Callable[[float | None], bool], most: float) -> bool:
        """Whether ``wait(seconds)`` comes to its end before the call has waited for ``most`` seconds. One that its backward pass makes
        again waits to the end: both must be computed in the same way."""
        if _ENDLESS.get() or (torch.is_grad_enabled() and saved_tensor_hooks()):
            return wait(None)
        left = max(0.0, most - self.waited)
        begin = time.monotonic()
        try:
            return wait(left if left < threading.TIMEOUT_MAX else None)
        finally:
            self.waited += time.monotonic() - begin
