"""What a call would do and cost, before anything runs: who does each piece of work, asked of the registry as the call asks it."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.cached_keys import CacheBound
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.lists import size_text
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.program_report import ProgramAnalysis, analyse_program
from sparsedsl.analysis.report import ITEM_BYTES, Analysis, analyse
from sparsedsl.backends.registry import AUTO, check_runs, choose, named, refusals
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.execute.requests import requests_of
from sparsedsl.execute.static import StaticAttention
from sparsedsl.execute.ways import way_of
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.runtime.call import bind_tables, exactly
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.program_call import refused_positions
from sparsedsl.runtime.request import CallFacts, Plan, Request

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a call would do.

    Attributes:
        plan: who runs it and why; of several backends their names together. None: nobody can, and ``refusal`` says why and what to do.
        analysis: what it costs.
        details: how the backend would go about it: the schedule of `tiled`, the kernels of `triton`.
        structure: of a static pattern, the solved clauses of its mask.
        steps: of a program, node -> how it runs, in words.
        others: name of each backend that cannot run the call -> why not.
    """

    plan: Plan | None
    refusal: str | None
    analysis: Analysis | ProgramAnalysis
    details: tuple[str, ...] = ()
    structure: tuple[str, ...] = ()
    steps: Mapping[Node, str] | None = None
    others: Mapping[str, str] | None = None
    _cache: Callable[[], str] | None = None

    @functools.cached_property
    def cache(self) -> str:
        """What must be kept of the tokens so far to go on with later ones, in words and bytes (:func:`sparsedsl.cache_bound`); proved when
        it is asked for."""
        return "" if self._cache is None else self._cache()

    def __str__(self) -> str:
        if self.plan is None:
            lines = [f"backend: none. {self.refusal}"]
        else:
            lines = [f"backend: {self.plan.backend} ({self.plan.reason})"]
            if self.details:
                lines += [f"{named(self.plan.backend).details}:", *(f"  {line}" for line in self.details)]
            elif isinstance(self.analysis, Analysis):
                lines.append(f"tiles: {self.analysis.block[0]} x {self.analysis.block[1]} tokens (q, kv)")
        if self.structure:
            lines += ["structure (a union of):", *(f"  {line}" for line in self.structure)]
        if self.steps is not None and isinstance(self.analysis, ProgramAnalysis):
            program = self.analysis.program
            width = max((len(program.labels[node]) for node in self.steps), default=0)
            lines += [f"  {program.labels[node]:{width}}  {program.worded(way)}" for node, way in self.steps.items()]
        return "\n".join([*lines, str(self.analysis), *([f"  cache            {self.cache}"] if self.cache else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def explain(
    attention: Any, q_len: int, kv_len: int, *, batch: int, heads: int | None, kv_heads: int | None, head_dim: int, head_dim_v: int,
    dtype: Any, device: Any, q_offset: int, grad: bool, lse: bool, sizes: Mapping[str, int] | None, tables: Mapping[str, Any],
) -> Explanation:  # fmt: skip
    """See :meth:`sparsedsl.Attention.explain`."""
    program: Program = attention.program
    name = check_word("dtype", str(dtype).removeprefix("torch."), ITEM_BYTES)
    heads = count_heads(program.patterns, {**program.bound, **tables}, heads)
    facts = CallFacts(
        torch.device(device).type, name, batch, heads, kv_heads or heads, q_len, kv_len, head_dim, head_dim_v, grad, lse
    )
    cache = functools.partial(cache_words, program, facts, sizes, tables)
    if program.static is not None:
        return replace(_of_pattern(attention.static, attention.backend, facts, q_offset, tables), _cache=cache)
    analysis = analyse_program(
        program, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        head_dim_v=head_dim_v, item=ITEM_BYTES[name], sizes=sizes, **tables,
    )  # fmt: skip
    why = refused_positions(program, q_offset, q_len, kv_len) or attention.refused_use(grad=grad, lse=lse)
    if why is not None:
        return Explanation(None, why, analysis, _cache=cache)
    return replace(_of_program(program, attention.backend, facts, sizes, analysis), _cache=cache)


def cache_words(program: Program, facts: CallFacts, sizes: Mapping[str, int] | None, tables: Mapping[str, Any]) -> str:
    """What a cache must hold, in words; and its bytes a token, and while ``facts.kv_len`` tokens go by."""
    bound = cache_bound(program)
    try:
        took = bound.bytes(
            facts.kv_len, facts.kv_heads, facts.head_dim, facts.dtype, head_dim_v=facts.head_dim_v, batch=facts.batch,
            heads=facts.heads, sizes=sizes, **_of_sizes(bound, tables),
        )  # fmt: skip
    except (ShapeError, TableError) as error:
        return f"{bound}; its bytes are not known: {error}"
    each = facts.batch * facts.kv_heads * (facts.head_dim + facts.head_dim_v) * ITEM_BYTES[facts.dtype]
    return f"{bound}; {size_text(took)} for {facts.kv_len:,} tokens, {each:,} bytes a token that is held"


def _of_sizes(bound: CacheBound, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables that say how many keys stay."""
    read = {name for number in (bound.first, bound.recent) if not isinstance(number, int) for name in number.tables}
    return {name: table for name, table in tables.items() if name in read}


# ---- programs --------------------------------------------------------------------------------------------------------------------


def _of_program(
    program: Program, backend: str, facts: CallFacts, sizes: Mapping[str, int] | None, analysis: ProgramAnalysis
) -> Explanation:
    whole = backend != AUTO and named(backend).reads_whole_tables
    asked = requests_of(program, facts, whole_tables=whole, sizes=sizes)
    everything = [request for requests in asked.values() for request in requests]
    patience = Patience()
    try:
        if backend != AUTO:
            check_runs(everything, backend)
        plans = {node: [choose(request, backend, patience=patience) for request in requests] for node, requests in asked.items()}
    except UnsupportedError as error:
        return Explanation(None, str(error), analysis, others=refusals(everything, patience))
    every = [plan for found in plans.values() for plan in found]
    names = dict.fromkeys(plan.backend for plan in every)
    plan = Plan(", ".join(names), "; ".join(dict.fromkeys(plan.reason for plan in every)))
    ways = {}
    for node in program.everything:
        done = [found.backend for found in plans.get(node, [])]
        way = way_of(node, list(zip(asked.get(node, []), done, strict=True)))
        if way is not None:
            ways[node] = named(backend).way(Request("attention", facts)) if backend == "reference" else way
    return Explanation(plan, None, analysis, steps=ways, others=refusals(everything, patience))


# What `explain` takes by keyword beside tables.
_WORDS = (
    "kv_len", "batch", "heads", "kv_heads", "head_dim", "head_dim_v", "dtype", "device", "q_offset", "grad", "return_lse", "sizes",
)  # fmt: skip

# ---- static patterns -------------------------------------------------------------------------------------------------------------


def _of_pattern(static: StaticAttention, backend: str, facts: CallFacts, q_offset: int, tables: Mapping[str, Any]) -> Explanation:
    """The plan of a call with these facts, the analysis behind it, and how the mask was solved and cut."""
    pattern = static.pattern
    bound = bind_tables(pattern, tables, words=_WORDS)
    domain = exactly(pattern.exprs, Domain(facts.q_len, facts.kv_len, q_offset, facts.batch, facts.heads, bound))
    plan, refusal = None, None
    details: tuple[str, ...] = ()
    request, patience = static.request(facts), Patience()
    try:
        plan = choose(request, backend, patience=patience)
        details = static.runner(plan.backend).described(domain, facts)
    except UnsupportedError as error:
        plan, refusal = None, str(error)
    analysis = analyse(
        pattern, facts.q_len, facts.kv_len, q_offset=q_offset, batch=facts.batch,
        heads=facts.heads, head_dim=facts.head_dim, head_dim_v=facts.head_dim_v, dtype=facts.dtype, **tables,
    )  # fmt: skip
    return Explanation(plan, refusal, analysis, details, tuple(_clause_lines(pattern)), others=refusals([request], patience))


def _clause_lines(pattern: Pattern) -> list[str]:
    lines = []
    for clause in clauses(pattern.mask.expr):
        parts = []
        for bound in clause.bounds:
            form = expression_text(sympy.Add(bound.q_part, bound.kv_part))
            low = "" if bound.low is None else f"{expression_text(bound.low)} <= "
            high = "" if bound.high is None else f" <= {expression_text(bound.high)}"
            parts.append(f"{low}{form}{high}")
        solved = " and ".join(parts) or "every pair"
        rest = " and ".join(expression_text(r) for r in clause.rest)
        lines.append(solved + (f"; decided by boxes and points: {rest}" if rest else ""))
    return lines or ["nothing"]
