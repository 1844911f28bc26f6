"""The ``tiled`` backend: torch's dense products on the tiles of a pattern. It runs everything, everywhere, and compiles nothing."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.backends.protocol import Backend, ListMaker, PatternRunner
from sparsedsl.backends.tiled.attention import TiledKernel
from sparsedsl.backends.tiled.scan_gated import gated_scan
from sparsedsl.backends.tiled.scan_linear import linear_scan
from sparsedsl.backends.tiled.scan_slots import slot_scan
from sparsedsl.backends.tiled.selected import selected_attention
from sparsedsl.backends.tiled.stick_breaking import StickBreakingKernel
from sparsedsl.lang.normalisers import STICK_BREAKING
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.request import Request
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["TILED"]


class TiledBackend(Backend):
    """Plain torch, on any device."""

    name = "tiled"
    summary = "torch's dense products on the tiles of the pattern, with gradients and the LSE"
    details = "schedule"
    may_refuse = False

    def refusal(self, request: Request) -> str | None:
        """Nothing."""
        return None

    def preference(self, request: Request) -> int:
        """On CPU it waits for no compiler; on a GPU kernels are quicker."""
        return 10 if request.facts.device == "cpu" else 1

    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> PatternRunner:
        """Its schedules are cut from the mask: lists of tiles are for others, and where keys are visited in order."""
        if pattern.normaliser == STICK_BREAKING:
            return StickBreakingKernel(pattern, lists)
        return TiledKernel(pattern, minimal=minimal)

    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: SelectedCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For every block of keys the queries that selected it."""
        return selected_attention(q, k, v, selected)

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """Chunks in parallel."""
        return slot_scan(*tensors, **words)

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """Chunks in parallel."""
        return linear_scan(*tensors, **words)

    def gated(self, *tensors: Any, **words: Any) -> Any:
        """Chunks in parallel."""
        return gated_scan(*tensors, **words)

    def way(self, request: Request) -> str:
        """In words."""
        return {
            "attention": "dense products on the tiles of the mask",
            "selected": "torch along lists: for every block of keys the queries that selected it",
            "slots": "torch: chunks in parallel, states from chunk to chunk",
            "linear": "torch: chunks in parallel, states from chunk to chunk",
        }[request.work]


TILED = TiledBackend()
