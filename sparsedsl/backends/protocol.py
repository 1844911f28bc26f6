"""What a backend is: one object that says what it refuses, how much it is preferred, and runs what it took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.totals import Totals
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.select import Select
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.repeated import Again
from sparsedsl.runtime.request import CallFacts, Request
from sparsedsl.selection.choosing import Choose
from sparsedsl.selection.proxies import Pool, Prober
from sparsedsl.selection.selected_call import Results, SelectedAgain, SelectedCall

__all__ = ["Backend", "ListMaker", "PatternRunner"]

Tensor = torch.Tensor
ListMaker = Callable[[Domain, tuple[int, int]], BlockLists]
"""Makes the tile lists of a mask for a domain and a tile size (queries, keys), and remembers them."""


class PatternRunner(ABC):
    """One pattern on one backend; made once, called many times."""

    @abstractmethod
    def attend(self, call: Call, *, lse: bool) -> tuple[Tensor, Tensor | None]:
        """``out (B, Hq, Sq, Dv)`` in the dtype of q, and ``lse (B, Hq, Sq)``; the LSE may be None where ``lse`` is False."""

    def again(self, call: Call) -> Again | None:
        """What runs calls without gradients or tables that differ from this one in the number of keys, the offset and values alone, at a
        lower price; None: nothing does, or ``auto`` may want another backend for one of them."""
        return None

    @property
    @abstractmethod
    def source(self) -> str:
        """The generated code, readable; where a backend interprets the pattern, the pattern."""

    def described(self, domain: Domain, facts: CallFacts) -> tuple[str, ...]:
        """How a call would run, line by line, for ``explain``; empty where there is nothing to tell."""
        return ()

    def expected_seconds(self, domain: Domain, facts: CallFacts, totals: Totals) -> float | None:
        """What the cost model expects a forward pass to take, once all is compiled; None where it does not know. ``totals``: of the mask,
        in tiles of 128 x 128 tokens."""
        return None


class Backend(ABC):
    """One way to compute. ``choose``, ``explain`` and the call ask :meth:`refusal`, so they cannot differ."""

    name: ClassVar[str]
    # In a few words, for messages that name it as a way out.
    summary: ClassVar[str]
    # What the lines of `described` are called in an explanation.
    details: ClassVar[str] = "how"
    # Whether there is anything that it refuses.
    may_refuse: ClassVar[bool] = True
    # Whether it follows numbers of rows (`Call.places`) in attention over a mask; for others rows are gathered.
    follows_places: ClassVar[bool] = False
    # Whether choices for single queries are handed over as whole tables instead of lists.
    reads_whole_tables: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, request: Request) -> str | None:
        """Why it cannot do a piece of work, or None."""

    def reads_places(self, call: Call) -> bool:
        """Whether it follows the numbers of rows of a call that has some; else rows are gathered."""
        return self.follows_places

    def lacking(self, device: str) -> str | None:
        """What this machine lacks for it to run anything on a kind of device, ``"cpu"`` or ``"cuda"``; or None. Asks for no build."""
        return None

    def refusal_by_now(self, request: Request, patience: Patience) -> str | None:
        """The same for ``auto``, which waits no longer than ``patience``: :class:`~sparsedsl.runtime.request.NotYet` where it would. A
        patience that only asks begins no build."""
        return self.refusal(request)

    def unbuilt(self, request: Request, *, by_name: bool) -> str:
        """What a call has to wait for that nobody has begun to build, in words; or "". ``by_name``: the call asks for this backend."""
        return ""

    def preference(self, request: Request) -> int:
        """How much ``auto`` likes it for a piece of work that it can do; 0: it is taken only where it is asked for by name."""
        return 0

    def reason(self, request: Request) -> str:
        """Why ``auto`` takes it, in words."""
        return "needs no compiler"

    @abstractmethod
    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> PatternRunner:
        """A pattern made ready. ``minimal``: its tile lists are worth the time that makes them short, as its tables stay the same."""

    def source(self, request: Request) -> str:
        """The code that is written for a piece of work of a program, readable; empty where none is."""
        return ""

    def selected(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor | None]:
        """Attention along selected blocks: see :func:`~sparsedsl.backends.tiled.selected.selected_attention`."""
        self._cannot("selected blocks")

    def joined(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall, near: Results) -> Results | None:
        """The same without gradients, in one softmax with results over other keys, which nobody else reads; None: it has no such way."""
        return None

    def selected_again(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> SelectedAgain | None:
        """What runs calls along lists without gradients that differ from this one in the number of keys, the offset, lists of blocks that
        are there, weights and values alone, at a lower price; None: nothing does."""
        return None

    def chooser(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Choose | None:
        """Its own way to choose blocks by scores of a dtype on a device, in one pass from what scores are made of to lists; None: it has
        none, or none before ``patience`` ends."""
        return None

    def choice(self, node: Select, facts: CallFacts, *, by_name: bool) -> str | None:
        """In words, how it makes the choice of a node in a program; None: it leaves it to others. ``by_name``: it was asked for."""
        return None

    def pooler(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Pool | None:
        """Its own way to make one row of every block of rows of a tensor of which nobody wants gradients; None: it has none, or none before
        ``patience`` ends."""
        return None

    def prober(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Prober | None:
        """Its own way to say how much the last queries attend to each key; None: it has none, or none before ``patience`` ends."""
        return None

    def weighed(self, scores: Tensor, rule: str) -> tuple[Tensor, Tensor] | None:
        """Its own way to make weights of the scores of blocks that it chose, of which nobody wants gradients: see
        :func:`~sparsedsl.selection.weights.weights_of`. None: it has none."""
        return None

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """A scan of gated slots: see :func:`~sparsedsl.backends.tiled.scan_slots.slot_scan`."""
        self._cannot("slots()")

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """A scan of decayed linear attention: see :func:`~sparsedsl.backends.tiled.scan_linear.linear_scan`."""
        self._cannot("linear()")

    def gated(self, *tensors: Any, **words: Any) -> Any:
        """A scan of linear attention whose decays come with the data: see :func:`~sparsedsl.backends.tiled.scan_gated.gated_scan`."""
        self._cannot("linear() with decays that come with the data")

    @abstractmethod
    def way(self, request: Request) -> str:
        """How it does a piece of work, in words, for ``explain``."""

    def _cannot(self, what: str) -> NoReturn:
        raise UnsupportedError(f"backend {self.name!r} cannot run {what}. Use backend='auto'")
