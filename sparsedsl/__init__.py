"""sparsedsl: write the attention pattern once, as maths.

Names load on first use, so that ``import sparsedsl`` loads neither torch nor Triton.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # the names of _PUBLIC for type checkers; at run time they load on first use
    # isort: off
    # fmt: off
    from sparsedsl import export as export, models as models, nn as nn, parallel as parallel, patterns as patterns
    from sparsedsl import serve as serve, testing as testing
    from sparsedsl.analysis.cached_keys import CacheBound as CacheBound
    from sparsedsl.analysis.caches import cache_bytes as cache_bytes, clear_caches as clear_caches
    from sparsedsl.analysis.proofs import PROVED as PROVED, REFUTED as REFUTED, UNKNOWN as UNKNOWN, Verdict as Verdict
    from sparsedsl.analysis.proofs import equivalent as equivalent, implies as implies
    from sparsedsl.analysis.report import Analysis as Analysis, analyse as analyse, analyze as analyze
    from sparsedsl.execute.cache_bounds import cache_bound as cache_bound
    from sparsedsl.execute.compiling import compile as compile
    from sparsedsl.execute.compiled import Attention as Attention
    from sparsedsl.execute.functional import attention as attention
    from sparsedsl.execute.paged_plan import PagedPlan as PagedPlan
    from sparsedsl.execute.page_summaries import PageSummaries as PageSummaries
    from sparsedsl.gpu.builds import Build as Build, build as build
    from sparsedsl.lang.expressions import Index as Index, Mask as Mask, Score as Score, b as b
    from sparsedsl.lang.expressions import h as h, kv_idx as kv_idx, kv_len as kv_len, q_idx as q_idx
    from sparsedsl.lang.expressions import q_len as q_len, score as score
    from sparsedsl.lang.table_reads import table as table
    from sparsedsl.lang.numeric import clamp as clamp, cos as cos, erf as erf, exp as exp
    from sparsedsl.lang.numeric import log as log, maximum as maximum, minimum as minimum, relu as relu
    from sparsedsl.lang.numeric import sigmoid as sigmoid, sin as sin, softplus as softplus, sqrt as sqrt
    from sparsedsl.lang.numeric import tanh as tanh, where as where
    from sparsedsl.lang.pattern import Pattern as Pattern
    from sparsedsl.lang.text import parse as parse
    from sparsedsl.plotting import plot as plot
    from sparsedsl.program import Program as Program, antidiagonal as antidiagonal, attend as attend, bound as bound
    from sparsedsl.program import compact as compact, decay_table as decay_table, dot as dot, input as input
    from sparsedsl.program import diagonals as diagonals
    from sparsedsl.program import divergence as divergence
    from sparsedsl.program import given as given, given_key_scores as given_key_scores, given_scores as given_scores
    from sparsedsl.program import joint as joint, k as k, keep_tokens as keep_tokens, linear as linear
    from sparsedsl.program import mix as mix, per_chunk as per_chunk, probe as probe, q as q
    from sparsedsl.program import recall as recall, schedule as schedule, segment_sort as segment_sort, slots as slots
    from sparsedsl.program import smooth as smooth, summary as summary, take as take, threshold as threshold
    from sparsedsl.program import top_k as top_k, top_p as top_p, v as v
    from sparsedsl.runtime.merging import merge as merge
    from sparsedsl.runtime.seen_pages import VisiblePages as VisiblePages
    from sparsedsl.versions import show_versions as show_versions
    from sparsedsl.tracing import mask as mask, trace_mask as trace_mask, trace_score as trace_score
    # fmt: on
    # isort: on

__version__ = "0.2.0"

# Module -> the public names that it defines; "" stands for the names that are modules themselves.
_PUBLIC = {
    name: module
    for module, names in {
        "sparsedsl.lang.expressions": "b h q_idx kv_idx q_len kv_len score Index Mask Score",
        "sparsedsl.lang.table_reads": "table",
        "sparsedsl.lang.numeric": "clamp cos erf exp log maximum minimum relu sigmoid sin softplus sqrt tanh where",
        "sparsedsl.lang.text": "parse",
        "sparsedsl.lang.pattern": "Pattern",
        "sparsedsl.program": (
            "Program antidiagonal attend bound compact decay_table diagonals divergence dot given given_key_scores given_scores input "
            "joint k keep_tokens linear mix "
            "per_chunk probe q recall schedule segment_sort slots smooth summary take threshold top_k top_p v"
        ),
        "sparsedsl.tracing": "mask trace_mask trace_score",
        "sparsedsl.analysis.proofs": "PROVED REFUTED UNKNOWN Verdict equivalent implies",
        "sparsedsl.analysis.report": "Analysis analyse analyze",
        "sparsedsl.analysis.caches": "cache_bytes clear_caches",
        "sparsedsl.gpu.builds": "Build build",
        "sparsedsl.analysis.cached_keys": "CacheBound",
        "sparsedsl.execute.cache_bounds": "cache_bound",
        "sparsedsl.execute.compiled": "Attention",
        "sparsedsl.execute.compiling": "compile",
        "sparsedsl.execute.functional": "attention",
        "sparsedsl.execute.paged_plan": "PagedPlan",
        "sparsedsl.execute.page_summaries": "PageSummaries",
        "sparsedsl.plotting": "plot",
        "sparsedsl.runtime.merging": "merge",
        "sparsedsl.runtime.seen_pages": "VisiblePages",
        "sparsedsl.versions": "show_versions",
        "": "export models nn parallel patterns serve testing",
    }.items()
    for name in names.split()
}

_ERRORS = (
    "ArgumentError", "CallWarning", "MissingPackageError", "PatternError", "SettingsError", "ShapeError", "SparseDSLError",
    "TableError", "TraceError", "UnsupportedError",
)  # fmt: skip
# Public names that `from sparsedsl import *` leaves alone: they would hide functions of Python, and the variables everyone has.
_NOT_BY_STAR = frozenset(("b", "h", "k", "q", "v", "compile", "input"))

__all__ = [*_ERRORS, *(name for name in _PUBLIC if name not in _NOT_BY_STAR)]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        from sparsedsl.lang.advice import no_attribute

        # Tools look for names such as `__path__`; the library is not loaded for these.
        if not name.startswith("_") and name in importlib.import_module("sparsedsl.patterns").__all__:
            raise AttributeError(f"module 'sparsedsl' has no attribute {name!r}; it is one of the library: sd.patterns.{name}")
        raise AttributeError(no_attribute("sparsedsl", name, __dir__()))
    value = getattr(importlib.import_module(module), name) if module else importlib.import_module(f"sparsedsl.{name}")
    if isinstance(value, types.FunctionType):
        from sparsedsl.lang.advice import answering

        value = answering(value)
    if name == "score":
        from sparsedsl.lang.expressions import decorate_by

        decorate_by(_score_decorator)
    globals()[name] = value
    if "hypothesis" in sys.modules:
        from sparsedsl.type_strategies import register

        register()
    return value


def _score_decorator(*function: Any, **words: Any) -> Any:
    """``@sd.score``. The language cannot reach up to tracing, nor need everyone who reads the score load torch."""
    from sparsedsl.tracing.decorators import score_by

    return score_by(*function, **words)


def __dir__() -> list[str]:
    return sorted((*_ERRORS, *_PUBLIC))
