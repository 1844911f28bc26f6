"""sparsedsl: write the attention pattern once, as maths.

Names load on first use, so that ``import sparsedsl`` loads neither torch nor Triton.
"""

from __future__ import annotations

import difflib
import importlib
import types
from typing import Any

from sparsedsl import _layout
from sparsedsl.errors import (
    ArgumentError,
    CallWarning,
    MissingPackageError,
    PatternError,
    SettingsError,
    ShapeError,
    SparseDSLError,
    TableError,
    TraceError,
    UnsupportedError,
)

__version__ = "0.1.0.dev0"

# public name -> module that defines it ("" = the name is itself a module)
_PUBLIC = {
    **dict.fromkeys(("b", "h", "q_idx", "kv_idx", "q_len", "kv_len", "score"), "sparsedsl.lang.expressions"),
    **dict.fromkeys(("Index", "Mask", "Score", "table"), "sparsedsl.lang.expressions"),
    **dict.fromkeys(
        (
            "clamp",
            "cos",
            "erf",
            "exp",
            "log",
            "maximum",
            "minimum",
            "relu",
            "sigmoid",
            "sin",
            "softplus",
            "sqrt",
            "tanh",
            "where",
        ),
        "sparsedsl.lang.numeric",
    ),
    "parse": "sparsedsl.lang.text",
    "Pattern": "sparsedsl.lang.pattern",
    **dict.fromkeys(
        (
            "Program",
            "antidiagonal",
            "attend",
            "bound",
            "compact",
            "decay_table",
            "dot",
            "input",
            "joint",
            "k",
            "keep_tokens",
            "linear",
            "mix",
            "per_chunk",
            "probe",
            "q",
            "recall",
            "schedule",
            "segment_sort",
            "slots",
            "smooth",
            "summary",
            "take",
            "threshold",
            "top_k",
            "top_p",
            "v",
        ),
        "sparsedsl.program",
    ),
    **dict.fromkeys(("trace_mask", "trace_score"), "sparsedsl.tracing"),
    **dict.fromkeys(("PROVED", "REFUTED", "UNKNOWN", "Verdict", "equivalent", "implies"), "sparsedsl.analysis.proofs"),
    **dict.fromkeys(("Analysis", "analyse"), "sparsedsl.analysis.report"),
    **dict.fromkeys(("Build", "build"), "sparsedsl.gpu.build"),
    "Attention": "sparsedsl.execute.compiled",
    "compile": "sparsedsl.execute.compile",
    "plot": "sparsedsl.plotting",
    **dict.fromkeys(("models", "patterns", "testing"), ""),
}

__all__ = [
    "ArgumentError", "CallWarning", "MissingPackageError", "PatternError", "SettingsError", "ShapeError", "SparseDSLError",
    "TableError", "TraceError", "UnsupportedError", *_PUBLIC,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        near = difflib.get_close_matches(name, __all__, n=1)
        raise AttributeError(
            f"module 'sparsedsl' has no attribute {name!r}; public names are {', '.join(sorted(__all__))}"
            + (f". Did you mean {near[0]!r}?" if near else "")
        )
    value = getattr(importlib.import_module(module), name) if module else importlib.import_module(f"sparsedsl.{name}")
    if isinstance(value, types.FunctionType):
        from sparsedsl.lang.advice import answering

        value = answering(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
