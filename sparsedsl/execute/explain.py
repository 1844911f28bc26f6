"""What a call would do and cost, before anything runs."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from sparsedsl.analysis.clauses import clauses
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.report import Analysis, analyse
from sparsedsl.backends.tiled.attention import HeadSizes
from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text
from sparsedsl.plan import CallFacts, Plan, choose
from sparsedsl.runtime.call import bind_tables, exactly
from sparsedsl.tiling.schedule import Schedule

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, eq=False)
class Explanation:
    """``plan`` (None if no lowering can run the call, then ``refusal`` says why), ``analysis``, ``structure``: the solved clauses.

    ``schedule``: how `tiled` cuts the mask, None for other lowerings. ``kernels``: how `triton` finds its tiles and launches its kernels.
    """

    plan: Plan | None
    refusal: str | None
    analysis: Analysis
    structure: tuple[str, ...]
    schedule: Schedule | None = None
    kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.plan is None:
            head = [f"backend: none. {self.refusal}"]
        else:
            head = [
                f"backend: {self.plan.backend} ({self.plan.reason})",
                f"tiles: {self.plan.block[0]} x {self.plan.block[1]} tokens (q, kv)",
            ]
            if self.kernels:
                head[1:] = ["kernels:", *(f"  {line}" for line in self.kernels)]
            if self.schedule is not None:
                head[1:] = ["schedule:", *(f"  {line}" for line in str(self.schedule).splitlines())]
        body = ["structure (a union of):", *(f"  {line}" for line in self.structure)]
        return "\n".join([*head, *body, str(self.analysis)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def explain(attention: Any, facts: CallFacts, q_offset: int, tables: Mapping[str, Any]) -> Explanation:
    """The plan of a call with these facts, the analysis behind it, and how the mask was solved and cut."""
    pattern: Pattern = attention.pattern
    bound = bind_tables(pattern, tables)
    domain = exactly(pattern.exprs, Domain(facts.q_len, facts.kv_len, q_offset, facts.batch, facts.heads, bound))
    sizes = HeadSizes(facts.kv_heads, facts.head_dim, facts.head_dim_v)
    plan, refusal, schedule = None, None, None
    try:
        plan = choose(pattern, facts, attention.backend, costs=lambda: attention.costs(domain, sizes), missing=attention.missing)
        if plan.backend == "tiled":
            schedule = attention.schedule(domain, sizes)
    except UnsupportedError as error:
        plan, refusal = None, str(error)
    kernels: tuple[str, ...] = ()
    if plan is not None and plan.backend == "triton":
        shape = Shape(facts.dtype, facts.head_dim, facts.head_dim_v, facts.heads // facts.kv_heads)
        kernels = attention.kernels(domain, facts.device, shape, grad=facts.grad)
    analysis = analyse(
        pattern, facts.q_len, facts.kv_len, (128, 128) if plan is None else plan.block, q_offset=q_offset, batch=facts.batch,
        heads=facts.heads, head_dim=facts.head_dim, head_dim_v=facts.head_dim_v, dtype=facts.dtype, **tables,
    )  # fmt: skip
    return Explanation(plan, refusal, analysis, tuple(_clause_lines(pattern)), schedule, kernels)


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
