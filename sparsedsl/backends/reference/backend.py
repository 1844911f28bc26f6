"""The ``reference`` backend: dense, in plain torch. It defines what everything means."""

from __future__ import annotations

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.totals import Totals
from sparsedsl.backends.protocol import Backend, ListMaker, PatternRunner
from sparsedsl.backends.reference.attention import attend_reference
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.request import CallFacts, Request
from sparsedsl.tiling.cost import dense_seconds
from sparsedsl.tuning.rates import machine

__all__ = ["REFERENCE", "SMALL_LOGITS"]

# Up to this many logits the dense reference is quicker than cutting a mask into strips.
SMALL_LOGITS = 1 << 15


class ReferencePattern(PatternRunner):
    """A pattern, dense."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def attend(self, call: Call, *, lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Differentiable by torch itself, as often as wanted."""
        return attend_reference(self.pattern, call)

    def expected_seconds(self, domain: Domain, facts: CallFacts, totals: Totals) -> float | None:
        """Of all logits, on a CPU."""
        return dense_seconds(machine(), facts.logits, facts.head_dim, facts.head_dim_v) if facts.device == "cpu" else None

    @property
    def source(self) -> str:
        """The pattern, which is interpreted."""
        return self.pattern.text


class ReferenceBackend(Backend):
    """Whole programs, by rules of its own (:mod:`backends.reference.nodes`); attention over a single mask also for ``auto``."""

    name = "reference"
    summary = "dense"

    may_refuse = False

    def refusal(self, request: Request) -> str | None:
        """Nothing: what it cannot hold in memory is torch's to say."""
        return None

    def preference(self, request: Request) -> int:
        """Few logits are quicker dense."""
        return 20 if request.work == "attention" and request.facts.logits <= SMALL_LOGITS else 0

    def reason(self, request: Request) -> str:
        """In words."""
        return f"{request.facts.logits:,} logits are few: dense is quicker than cutting the mask into strips"

    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> ReferencePattern:
        """Nothing is prepared."""
        return ReferencePattern(pattern)

    def way(self, request: Request) -> str:
        """In words."""
        return "dense, in plain torch: defines the meaning"


REFERENCE = ReferenceBackend()
