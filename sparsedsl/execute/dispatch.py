"""Who does the pieces of work of a program: each is asked of the registry, and run by the backend that takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sparsedsl.backends.protocol import Backend
from sparsedsl.backends.registry import AUTO, BACKENDS, choose, named
from sparsedsl.execute.static import static_attention
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import inner_call, wants_grad
from sparsedsl.runtime.heads import lse_merge
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.repeated import Again
from sparsedsl.runtime.request import CallFacts, Request
from sparsedsl.selection.choosing import Choose
from sparsedsl.selection.proxies import Pool, Prober
from sparsedsl.selection.selected_call import Results, SelectedAgain, SelectedCall
from sparsedsl.selection.weights import weights_of
from sparsedsl.torch_private import transforms_active

__all__ = ["Dispatch", "takes"]

Tensor = torch.Tensor


# Backends that were chosen for good, so many at most.
_TAKEN: dict[tuple[Request, str], Backend] = {}
MOST_TAKEN = 4096


def takes(request: Request, backend: str, patience: Patience) -> Backend:
    """The backend that does a piece of work of a call.

    Raises:
        UnsupportedError: the one that was asked for cannot.
    """
    found = _TAKEN.get((request, backend))
    if found is None:
        plan = choose(request, backend, patience=patience)
        found = named(plan.backend)
        if plan.lasting:
            if len(_TAKEN) >= MOST_TAKEN:
                _TAKEN.clear()
            _TAKEN[request, backend] = found
    return found


class Dispatch:
    """The pieces of work of one call of a program that was compiled for ``backend``, which may be ``"auto"``."""

    def __init__(self, backend: str):
        self.backend = backend
        self.patience = Patience()
        # Those that may have ways of their own.
        self._asked: Iterable[Backend] = BACKENDS.values() if backend == AUTO else (named(backend),)

    @property
    def whole_tables(self) -> bool:
        """Whether choices for single queries are handed over as tables."""
        return self.backend != AUTO and named(self.backend).reads_whole_tables

    def follows_places(self, x: Tensor) -> bool:
        """Whether rows in another order are better not gathered: some backend reads them where they lie."""
        return x.is_cpu and not transforms_active() and any(backend.follows_places for backend in self._asked)

    def chooser(self, device: torch.device, dtype: torch.dtype) -> Choose | None:
        """What makes scores of a dtype and chooses by them in one pass, if some backend can."""
        patience = self.patience if self.backend == AUTO else None
        return next((found for b in self._asked if (found := b.chooser(device, dtype, patience)) is not None), None)

    def attend(
        self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Tensor], *, q_offset: int, scale: Any, lse: bool,
        places: Places | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention over a mask that reads tables only: ``out``, and the LSE where it is wanted. ``places``: of rows, if not in order."""
        scale = scale or pattern.scale or q.shape[3] ** -0.5
        static = static_attention(pattern, new_tables=bool(tables))
        found = None if tables or places is not None else static.again(q, k, v, self.backend, q_offset, scale)
        if found is not None:
            return found
        call = inner_call(pattern, q, k, v, tables, q_offset=q_offset, scale=scale, places=places)
        return static.attend(call, self.backend, lse=lse, patience=self.patience)

    def attend_again(self, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int, scale: Any) -> Again | None:
        """What runs calls over a mask without tables that are of the kind of this one."""
        scale = scale or pattern.scale or q.shape[3] ** -0.5
        call = inner_call(pattern, q, k, v, {}, q_offset=q_offset, scale=scale)
        return static_attention(pattern, new_tables=False).again_of(call, self.backend, self.patience)

    def pooler(self, x: Tensor) -> Pool | None:
        """What makes one row of every block of rows of a tensor, if some backend has a way of its own."""
        if wants_grad(x) or transforms_active():
            return None
        patience = self.patience if self.backend == AUTO else None
        return next((found for b in self._asked if (found := b.pooler(x.device, x.dtype, patience)) is not None), None)

    def prober(self, x: Tensor, y: Tensor) -> Prober | None:
        """What says how much rows of x attend to rows of y, if some backend has a way of its own."""
        if transforms_active():
            return None
        patience = self.patience if self.backend == AUTO else None
        dtype = torch.promote_types(x.dtype, y.dtype)
        return next((found for b in self._asked if (found := b.prober(x.device, dtype, patience)) is not None), None)

    def weighed(self, scores: Tensor, rule: Any) -> tuple[Tensor, Tensor]:
        """Weights of blocks, and the logarithm of their total: see :func:`sparsedsl.selection.weights.weights_of`."""
        if not wants_grad(scores) and not transforms_active():
            for backend in self._asked:
                found = backend.weighed(scores, rule)
                if found is not None:
                    return found
        return weights_of(scores, rule)

    def selected(
        self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall, near: Results | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention along lists: see :func:`~sparsedsl.backends.tiled.selected.selected_attention`; with ``near``, results over other keys
        that nobody else reads, of one softmax over both."""
        facts = _facts(q, k, v, lse=selected.weights is None)
        backend = takes(request_of(selected, facts), self.backend, self.patience)
        if near is None:
            return backend.selected(q, k, v, selected)
        if not wants_grad(q, k, v, *near, *selected.tables.values()) and not transforms_active():
            found = backend.joined(q, k, v, selected, near)
            if found is not None:
                return found
        return lse_merge([near, backend.selected(q, k, v, selected)])  # type: ignore[list-item]

    def selected_again(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> SelectedAgain | None:
        """What runs calls along lists that are of the kind of this one."""
        request = request_of(selected, _facts(q, k, v, lse=selected.weights is None))
        return (
            takes(request, self.backend, self.patience).selected_again(q, k, v, selected)
            if (request, self.backend) in _TAKEN
            else None
        )

    def slots(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, **words: Any) -> Any:
        """A scan of gated slots: see :func:`~sparsedsl.backends.tiled.scan_slots.slot_scan`."""
        request = Request("slots", _facts(q, k, v), slots=gate.shape[3])
        return takes(request, self.backend, self.patience).slots(q, k, v, gate, **words)

    def linear(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, **words: Any) -> Any:
        """A scan of decayed linear attention: see :func:`~sparsedsl.backends.tiled.scan_linear.linear_scan`."""
        return takes(Request("linear", _facts(q, k, v)), self.backend, self.patience).linear(q, k, v, decay, **words)

    def gated(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, erase: Tensor | None, form: str,
        **words: Any,
    ) -> Any:  # fmt: skip
        """A scan whose decays come with the data: see :func:`~sparsedsl.backends.tiled.scan_gated.gated_scan`."""
        grad = wants_grad(q, k, v, log_decay, *(t for t in (beta, erase) if t is not None))
        request = Request("linear", CallFacts.of(q, k, v, grad=grad, lse=True), form=form)
        return takes(request, self.backend, self.patience).gated(q, k, v, log_decay, beta, erase, **words)


def request_of(selected: SelectedCall, facts: CallFacts) -> Request:
    """What attention along lists asks of a backend."""
    return Request(
        "selected", facts, mask=selected.mask, score=selected.score, block=selected.blocks.kv_block,
        per_block=selected.weights is not None,
    )  # fmt: skip


def _facts(q: Tensor, k: Tensor, v: Tensor, *, lse: bool = True) -> CallFacts:
    return CallFacts.of(q, k, v, grad=wants_grad(q, k, v), lse=lse)
