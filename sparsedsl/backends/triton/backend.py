"""The ``triton`` backend: kernels generated for a pattern, and those along selected blocks and along scans."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparsedsl.analysis.key_intervals import intervals
from sparsedsl.backends.protocol import Backend, ListMaker
from sparsedsl.backends.triton.attention import TritonKernel, missing, refusal_of
from sparsedsl.backends.triton.scan_pass import MOST
from sparsedsl.codegen.to_triton import DTYPES, WIDEST
from sparsedsl.lang.normalisers import POINTWISE
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.select import Select
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.request import CallFacts, Request
from sparsedsl.selection.choosing import Choose
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["TRITON"]


class TritonBackend(Backend):
    """Kernels on a GPU; on CPU only in Triton's interpreter."""

    name = "triton"
    summary = "kernels generated for the pattern"
    details = "kernels"

    def refusal(self, request: Request) -> str | None:
        """What the kernels lack."""
        facts = request.facts
        if facts.dtype not in DTYPES:
            return f"the generated kernels have no {facts.dtype}"
        if facts.dtype == "float16" and request.pattern is not None and request.pattern.normaliser == POINTWISE:
            return (
                "its kernels round weights to the type of v, and those of normaliser='pointwise' may leave the range of float16"
            )
        widest = max(facts.head_dim, facts.head_dim_v)
        if widest > WIDEST:
            return f"the generated kernels have heads up to {WIDEST} wide; this one is {widest}"
        if request.slots > MOST["the number of slots"]:
            return f"the kernels hold at most {MOST['the number of slots']} slots; these are {request.slots}"
        lacking = self.lacking(facts.device)
        if lacking is not None:
            return lacking
        if request.work == "selected":
            from sparsedsl.backends.triton.selected import refusal_of_selected

            return refusal_of_selected(request)
        return None if request.pattern is None else refusal_of(request.pattern)

    def lacking(self, device: str) -> str | None:
        """Triton, or a GPU."""
        return missing(device)

    def reads_places(self, call: Call) -> bool:
        """Those of keys that are the same for all entries and heads, as those of pages are; forward."""
        places = call.places
        return places is not None and places.queries is None and places.batch == places.heads == 1 and not call.needs_grad

    def preference(self, request: Request) -> int:
        """First on a GPU; an interpreter is only for tests."""
        return 10 if request.facts.device != "cpu" else 0

    def reason(self, request: Request) -> str:
        """In words."""
        return "kernels that know the pattern: nothing that it leaves empty is looked at"

    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> TritonKernel:
        """Generated at the first call."""
        return TritonKernel(pattern, lists)

    def source(self, request: Request) -> str:
        """The modules of the kernels along lists, with mask and score in them."""
        if request.work != "selected":
            return ""
        from sparsedsl.backends.triton.selected import source_of_selected

        return source_of_selected(request.mask, request.score)

    def selected(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selected: SelectedCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adjacent queries share the union of their blocks."""
        return self._modules["selected"](q, k, v, selected)

    def chooser(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Choose | None:
        """One kernel, on a GPU; where kernels are interpreted, for those who ask by name."""
        if missing(device.type) is not None or (device.type == "cpu" and patience is not None):
            return None
        from sparsedsl.backends.triton.choosing import choose_blocks

        return choose_blocks

    def choice(self, node: Select, facts: CallFacts, *, by_name: bool) -> str | None:
        """One kernel; or torch, and why."""
        if missing(facts.device) is not None or (facts.device == "cpu" and not by_name):
            return None
        from sparsedsl.backends.triton.choice_forms import why_torch

        why = why_torch(node, facts)
        return "one kernel from landmarks to lists" if why is None else f"torch, since {why}"

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """Chunks in parallel."""
        return self._modules["slots"](*tensors, **words)

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """Chunks in parallel."""
        return self._modules["linear"](*tensors, **words)

    def gated(self, *tensors: Any, **words: Any) -> Any:
        """Chunks in parallel, states from chunk to chunk; a few tokens one by one."""
        return self._modules["gated"](*tensors, **words)

    def way(self, request: Request) -> str:
        """In words."""
        return {
            "attention": "kernels generated for the pattern",
            "selected": f"kernels along lists: adjacent queries share the union of their blocks{_printed(request)}",
            "slots": "kernels: chunks in parallel, states from chunk to chunk",
            "linear": "kernels: chunks in parallel, states from chunk to chunk",
        }[request.work]

    @functools.cached_property
    def _modules(self) -> dict[str, Any]:
        # Their modules load Triton, which takes a second and may not be installed.
        from sparsedsl.backends.triton.scan_gated import gated_scan_triton
        from sparsedsl.backends.triton.scan_linear import linear_scan_triton
        from sparsedsl.backends.triton.scan_slots import slot_scan_triton
        from sparsedsl.backends.triton.selected import selected_attention

        return {
            "selected": selected_attention, "slots": slot_scan_triton, "linear": linear_scan_triton, "gated": gated_scan_triton,
        }  # fmt: skip


def _printed(request: Request) -> str:
    """Whether mask and score are printed into the kernels: one interval of keys a query is not."""
    if request.work != "selected" or (request.score == SCORE and intervals(request.mask) is not None):
        return ""
    return ", mask and score printed into them"


TRITON = TritonBackend()
