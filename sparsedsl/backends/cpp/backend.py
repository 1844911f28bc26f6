"""The ``cpp`` backend: C++ generated for a pattern. On CPU: attention over static masks and along selected blocks, scans."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparsedsl.backends.cpp.attention import CppKernel
from sparsedsl.backends.cpp.background import Build
from sparsedsl.backends.cpp.build import compiler, is_built, no_compiler
from sparsedsl.backends.cpp.choosing import can_choose, choose_blocks
from sparsedsl.backends.cpp.libraries import begun, fixed_library, fixed_pass, native, parallel, texts_of
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.backends.cpp.pooling import pooled_rows
from sparsedsl.backends.cpp.prepared import READY
from sparsedsl.backends.cpp.probing import probed_keys
from sparsedsl.backends.cpp.scan_gated import MOST_SHARING, WIDEST, gated_scan
from sparsedsl.backends.cpp.scan_linear import linear_scan
from sparsedsl.backends.cpp.scan_slots import slot_scan
from sparsedsl.backends.cpp.selected import along_lists, joined_attention, preparer_of, selected_again, selected_attention
from sparsedsl.backends.cpp.weighing import weighed_blocks
from sparsedsl.backends.protocol import Backend, ListMaker
from sparsedsl.codegen.to_cpp import CppVariant, cpp_source
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.request import NotYet, Request
from sparsedsl.selection.choosing import Choose
from sparsedsl.selection.proxies import Pool, Prober
from sparsedsl.selection.selected_call import Results, SelectedAgain, SelectedCall

__all__ = ["CPP"]

Tensor = torch.Tensor
# What is the same for all patterns, by work: for results, and for gradients.
FIXED_PARTS = {
    "attention": ("forward", "backward"), "selected": ("selected", "selected_backward"), "linear": ("scan_linear",),
    "gated": ("scan_gated",), "slots": ("scan_slots",), "choosing": ("choosing",),
}  # fmt: skip

# Whether in float64: what chooses blocks is built and loaded.
_CHOOSES: set[bool] = set()


class CppBackend(Backend):
    """Compiled by the C++ compiler of the machine, once for a pattern."""

    name = "cpp"
    summary = "C++ generated for the pattern, with gradients and the LSE"
    details = "code"
    follows_places = True

    def refusal(self, request: Request) -> str | None:
        """What the generated code lacks, or this machine."""
        facts = request.facts
        if facts.device != "cpu":
            return self.lacking(facts.device)
        double, worth = facts.dtype == "float64", facts.logits >= LIMITS.now.worth_compiling
        if request.pattern is not None:
            return _refusal_of(request.pattern, double, facts.grad, worth, compiler())
        if request.form:
            return _refusal_of_gated(request) or _refusal_of_scan("gated", double, compiler())
        if request.work == "selected":
            return _refusal_of_selected(request.mask, request.score, double, facts.grad, worth, compiler())
        return _refusal_of_scan(request.work, double, compiler())

    def lacking(self, device: str) -> str | None:
        """A compiler, which libraries that are built already do without."""
        if device != "cpu":
            return f"generated C++ runs on the CPU, and the tensors are on {device}"
        return None if compiler() else no_compiler()

    def refusal_by_now(self, request: Request, patience: Patience) -> str | None:
        """What is not built yet is built in the background; a call waits for it, but not for long."""
        if patience.asks:
            built = _built(request)
            if built is False:
                return NotYet(
                    f"cpp is being compiled: a call waits {LIMITS.now.wait_s:g} s for it at most, and runs on it once it is ready"
                )
            return self.refusal(request) if built else None
        if _is_built_here(request) and not _done(_begun(*_code_of(request), compiler()), patience):
            return NotYet(
                f"cpp is being compiled: more than the {LIMITS.now.wait_s:g} s that a call waits for; calls run on it once it is "
                "ready, this call does not"
            )
        return self.refusal(request)

    def unbuilt(self, request: Request, *, by_name: bool) -> str:
        """A library that is not in the cache folder."""
        if _built(request) is not None:
            return ""
        ends = (
            "waits until it is there"
            if by_name
            else f"waits {LIMITS.now.wait_s:g} s at most and is else answered by another backend"
        )
        return f"its C++ is not compiled yet: the first call begins to, and {ends}"

    def preference(self, request: Request) -> int:
        """First on CPU where it is worth the compiler's second."""
        facts = request.facts
        if facts.device != "cpu":
            return 0
        if request.work in ("linear", "slots"):
            return 30
        code = request.pattern if request.work == "attention" else along_lists(request.mask, request.score)
        ready = not facts.grad and (code, facts.dtype == "float64") in READY
        return 30 if ready or facts.logits >= LIMITS.now.worth_compiling else 0

    def reason(self, request: Request) -> str:
        """In words."""
        return "compiled for the pattern: nothing that it leaves empty is looked at"

    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> CppKernel:
        """Compiled at the first call."""
        return CppKernel(pattern, lists)

    def selected(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
        """Along lists of selected blocks."""
        return selected_attention(q, k, v, selected)

    def joined(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall, near: Results) -> Results | None:
        """As the rows along the lists are done."""
        return joined_attention(q, k, v, selected, near)

    def selected_again(self, q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> SelectedAgain | None:
        """Where nothing is made for lengths or of tables."""
        return selected_again(q, k, v, selected)

    def linear(self, *tensors: Any, **words: Any) -> Any:
        """A scan of decayed linear attention."""
        return linear_scan(*tensors, **words)

    def gated(self, *tensors: Any, **words: Any) -> Any:
        """A scan of linear attention whose decays come with the data."""
        return gated_scan(*tensors, **words)

    def slots(self, *tensors: Any, **words: Any) -> Any:
        """A scan of gated slots."""
        return slot_scan(*tensors, **words)

    def chooser(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Choose | None:
        """Where there is a compiler."""
        double = dtype == torch.float64
        if device.type != "cpu":
            return None
        if double in _CHOOSES:
            return choose_blocks
        path = compiler()
        if patience is not None and not _done(_begun("choosing", None, double, False, False, path), patience):
            return None
        if not can_choose(path):
            return None
        if patience is None or all(build.done for build in _begun("choosing", None, double, False, False, path)):
            _CHOOSES.add(double)
        return choose_blocks

    def pooler(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Pool | None:
        """Where blocks are chosen: it lies in the same library."""
        return None if self.chooser(device, dtype, patience) is None else pooled_rows

    def prober(self, device: torch.device, dtype: torch.dtype, patience: Patience | None) -> Prober | None:
        """Where blocks are chosen: it lies in the same library."""
        return None if self.chooser(device, dtype, patience) is None else probed_keys

    def weighed(self, scores: Tensor, rule: str) -> tuple[Tensor, Tensor] | None:
        """Where blocks are chosen: it lies in the same library."""
        return weighed_blocks(scores, rule) if scores.is_cpu and (scores.dtype == torch.float64) in _CHOOSES else None

    def source(self, request: Request) -> str:
        """The masks and scores of attention along lists."""
        return preparer_of(request.mask, request.score).source().text if request.work == "selected" else ""

    def way(self, request: Request) -> str:
        """In words."""
        return {
            "attention": "C++ generated for the pattern",
            "selected": "C++ along the lists, neighbouring queries together",
            "linear": "C++, chunk by chunk",
            "slots": "C++, key by key",
        }[request.work]


def _done(builds: tuple[Build, ...], patience: Patience) -> bool:
    """Whether all are done before the patience of a call ends."""
    return all(build.done or patience.ends_before(build.wait, LIMITS.now.wait_s) for build in builds)


def _is_built_here(request: Request) -> bool:
    """Whether it is work that this backend builds something for."""
    return request.facts.device == "cpu" and not (request.form and _refusal_of_gated(request))


def _code_of(request: Request) -> tuple[str, Any, bool, bool, bool]:
    """What decides which libraries a piece of work needs: kind of work, mask and score, float64, gradients, worth compiling."""
    facts = request.facts
    code = request.pattern if request.work == "attention" else (request.mask, request.score)
    work = "gated" if request.form else request.work
    return work, code, facts.dtype == "float64", facts.grad, facts.logits >= LIMITS.now.worth_compiling


def _libraries(work: str, code: Any, double: bool, grad: bool, worth: bool) -> list[tuple[str, ...]]:
    """What the refusals below wait for."""
    source, fixed = None, FIXED_PARTS[work][: 1 + grad]
    if worth and work == "attention":
        source = cpp_source(code, CppVariant(double))
    elif worth and work == "selected":
        source = preparer_of(*code).source(double=double)
    return texts_of(source, fixed, double=double)


@functools.lru_cache(maxsize=4096)
def _begun(work: str, code: Any, double: bool, grad: bool, worth: bool, path: str | None) -> tuple[Build, ...]:
    """Their builds, all of them begun; empty where one of the refusals says at once why there are none."""
    try:
        return begun(_libraries(work, code, double, grad, worth))
    except UnsupportedError:
        return ()


def _built(request: Request) -> bool | None:
    """Whether all that a piece of work needs is built, or is known not to be; False while it is being built, None: nobody has begun."""
    if not _is_built_here(request) or compiler() is None:
        return True
    try:
        found = [is_built(*texts) for texts in _libraries(*_code_of(request))]
    except UnsupportedError:
        return True
    return False if False in found else None if None in found else True


@functools.lru_cache(maxsize=1024)
def _refusal_of(pattern: Pattern, double: bool, grad: bool, worth: bool, path: str | None) -> str | None:
    """Why a pattern cannot be compiled here, or None.

    ``worth``: it will be, so that it is tried; else nobody waits for more than what is the same for all patterns. ``path``: of the
    compiler, so that another one is asked again.
    """
    try:
        source = cpp_source(pattern, CppVariant(double))
        if worth:
            native(source, double=double)
        fixed_pass("forward", double)
        if grad:
            fixed_pass("backward", double)
        parallel()
    except UnsupportedError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1024)
def _refusal_of_selected(mask: Any, score: Any, double: bool, grad: bool, worth: bool, path: str | None) -> str | None:
    """The same of attention along lists."""
    try:
        source = preparer_of(mask, score).source(double=double)
        if worth:
            native(source, double=double, fixed="selected")
        fixed_pass("selected", double)
        if grad:
            fixed_pass("selected_backward", double)
    except UnsupportedError as error:
        return str(error)
    return None


def _refusal_of_gated(request: Request) -> str | None:
    """What the code for decays that come with the data lacks."""
    facts = request.facts
    widest = max(facts.head_dim, facts.head_dim_v)
    if widest > WIDEST:
        return f"its code for linear() with decays from the data has heads up to {WIDEST} wide; this one is {widest}"
    if facts.heads > MOST_SHARING * facts.kv_heads:
        return f"its code for linear() with decays from the data has up to {MOST_SHARING} query heads a key head"
    return None


@functools.lru_cache(maxsize=8)
def _refusal_of_scan(work: str, double: bool, path: str | None) -> str | None:
    """The same of a scan."""
    try:
        fixed_library(f"scan_{work}", double)
    except UnsupportedError as error:
        return str(error)
    return None


CPP = CppBackend()
