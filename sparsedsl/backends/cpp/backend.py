"""The ``cpp`` backend: C++ generated for a pattern. It runs attention over masks that read tables only, on CPU."""

from __future__ import annotations

import functools

from sparsedsl.backends.cpp.attention import CppKernel
from sparsedsl.backends.cpp.build import compiler
from sparsedsl.backends.cpp.native import fixed_pass, native, parallel
from sparsedsl.backends.cpp.prepared import READY
from sparsedsl.backends.protocol import Backend, ListMaker
from sparsedsl.codegen.to_cpp import CppVariant, cpp_source
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.request import Request

__all__ = ["CPP"]

# Logits of a call from which on its time is worth that of a compiler, unless the pattern is compiled already.
WORTH_COMPILING = 1 << 18


class CppBackend(Backend):
    """Compiled by the C++ compiler of the machine, once for a pattern."""

    name = "cpp"
    summary = "C++ generated for the pattern, with gradients and the LSE"
    details = "code"
    reads_whole_tables = True

    def refusal(self, request: Request) -> str | None:
        """What the generated code lacks, or this machine."""
        facts = request.facts
        if request.work != "attention" or request.pattern is None:
            return f"generated C++ has attention over masks that read tables only, and no {request.work}"
        if facts.device != "cpu":
            return f"generated C++ runs on the CPU, and the tensors are on {facts.device}"
        worth = facts.logits >= WORTH_COMPILING
        return _refusal_of(request.pattern, facts.dtype == "float64", facts.grad, worth, compiler())

    def preference(self, request: Request) -> int:
        """First on CPU where it is worth the compiler's second. Choices of programs are tables that are new at every call."""
        facts = request.facts
        if facts.device != "cpu" or request.work != "attention" or request.new_tables or request.pattern is None:
            return 0
        ready = not facts.grad and (request.pattern, facts.dtype == "float64") in READY
        return 30 if ready or facts.logits >= WORTH_COMPILING else 0

    def reason(self, request: Request) -> str:
        """In words."""
        return "compiled for the pattern: nothing that it leaves empty is looked at"

    def pattern(self, pattern: Pattern, lists: ListMaker, *, minimal: bool) -> CppKernel:
        """Compiled at the first call."""
        return CppKernel(pattern, lists)

    def way(self, request: Request) -> str:
        """In words."""
        return "C++ generated for the pattern"


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


CPP = CppBackend()
