"""The ``flex`` backend: torch's FlexAttention on compact tile lists. It knows no lists of selected blocks: choices are tables to it."""

from __future__ import annotations

import importlib.util

import torch

from sparsedsl.backends.flex.attention import FlexKernel
from sparsedsl.backends.flex.selected import selected_attention
from sparsedsl.backends.protocol import Backend, ListMaker
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.request import Request
from sparsedsl.selection.selected_call import SelectedCall
from sparsedsl.torch_private import has_avx2

__all__ = ["FLEX"]


class FlexBackend(Backend):
    """FlexAttention, compiled by torch for each kind of call."""

    name = "flex"
    summary = "torch FlexAttention"
    reads_whole_tables = True

    def refusal(self, request: Request) -> str | None:
        """What FlexAttention lacks."""
        facts = request.facts
        if request.work in ("slots", "linear"):
            return f"FlexAttention has no state that runs along the keys, as {request.work}() needs"
        if request.work == "selected" and not request.per_block:
            return "FlexAttention follows no lists of blocks: choices are tables to it"
        if request.pattern is not None and not request.pattern.has_lse:
            return f"FlexAttention has a softmax, and no normaliser {request.pattern.normaliser!r}"
        if facts.dtype == "float64":
            return "FlexAttention has no float64"
        if facts.device == "cpu":
            if facts.grad:
                return "FlexAttention has no backward pass on CPU"
            if facts.lse:
                return "FlexAttention does not return the LSE on CPU"
        return self.lacking(facts.device)

    def lacking(self, device: str) -> str | None:
        """What torch compiles it with."""
        if device == "cuda" and importlib.util.find_spec("triton") is None:
            return "FlexAttention on a GPU is compiled by Triton, which is not installed"
        if device == "cpu" and not has_avx2():
            return "FlexAttention on CPU needs AVX2, which this machine lacks"
        return None

    def preference(self, request: Request) -> int:
        """On CPU nobody waits for a compiler unasked; where tables are new, its tile lists would be made anew at every call."""
        return 5 if request.facts.device != "cpu" and request.work == "attention" and not request.new_tables else 0

    def reason(self, request: Request) -> str:
        """In words."""
        return "tiles that the pattern leaves empty are never visited"

    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> FlexKernel:
        """Compiled at the first call of each kind."""
        return FlexKernel(pattern, lists)

    def selected(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: SelectedCall) -> tuple[torch.Tensor, None]:
        """Two passes, where every block has a softmax of its own."""
        return selected_attention(q, k, v, selected)

    def way(self, request: Request) -> str:
        """In words."""
        if request.per_block:
            return "two passes: the LSE of every block, then FlexAttention with a bias of queries x blocks (short sequences)"
        return "FlexAttention on tile lists" + (", choices as tables" if request.new_tables else "")


FLEX = FlexBackend()
