"""``sd.analyse`` of a program: what each node costs at given lengths, whether the future leaks in, and what to beware of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.program_cost import ATTENDING, CHOOSING, CostStep, Lengths, steps_of
from sparsedsl.analysis.proofs import Verdict
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.errors import ShapeError, TableError
from sparsedsl.lang.advice import shown, surplus
from sparsedsl.lang.tables import declared
from sparsedsl.plain_values import Reported, plain
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.recurrences import Linear
from sparsedsl.quantities import bytes_text, factor_text, flops_text, share_text

__all__ = ["ProgramAnalysis", "analyse_program", "lengths_text"]


@dataclass(frozen=True, eq=False)
class ProgramAnalysis(Reported):
    """What :func:`sparsedsl.analyse` found about a program. Where a choice decides, numbers are upper bounds.

    ``density``: pairs attended to at most / all pairs, of the branch with the most. ``flops``: forward pass, all nodes; ``flops_dense``:
    dense attention over the same lengths. ``causal``: see :func:`~sparsedsl.analysis.token_reach.program_causality`.
    """

    program: Program
    q_len: int
    kv_len: int
    q_offset: int
    heads: int
    steps: tuple[CostStep, ...]
    density: float
    flops: int
    flops_dense: int
    bytes: int
    causal: Verdict
    effects: frozenset[str]
    warnings: tuple[str, ...]
    seconds: float = field(repr=False)
    tables: Mapping[str, torch.Tensor] = field(repr=False)

    def _said(self) -> dict[str, Any]:
        steps = [{**plain(step), "node": self.program.labels[step.node]} for step in self.steps]
        return {**super()._said(), "steps": steps}

    def share(self, kind: str) -> float:
        """Part of the FLOPs that goes into ``"choosing"``, ``"moving"`` or ``"attending"``."""
        return sum(step.flops for step in self.steps if step.kind == kind) / max(self.flops, 1)

    def facts(self) -> list[tuple[str, str]]:
        """What it says beside the program: names and words."""
        shares = ", ".join(f"{kind} {share_text(self.share(kind))}" for kind in (CHOOSING, ATTENDING) if self.share(kind))
        attends = any(step.pairs is not None for step in self.steps)
        saving = factor_text(self.flops_dense / max(self.flops, 1))
        return [
            ("queries x keys", lengths_text(self.q_len, self.kv_len, self.q_offset)),
            ("pairs", f"at most {share_text(self.density)} of all" if attends else "none: keys are seen through a state"),
            ("forward", f"at most {flops_text(self.flops)}, {saving} less than dense: {shares}"),
            ("traffic", f"about {bytes_text(self.bytes)}"),
            ("causal", str(self.causal)),
            ("effects", ", ".join(sorted(self.effects)) or "none"),
        ]

    def __str__(self) -> str:
        rows = self._costs()
        width = max((len(row[0]) for row in rows), default=0)
        steps = [f"    {label:{width}}  {kind:9}  {flops:>10}  {moved:>10}" for label, kind, flops, moved in rows]
        facts = [f"  {name:16} {words}" for name, words in self.facts()]
        return "\n".join(
            [
                *declared(str(self.program), self.tables),
                *facts[:4],
                *steps,
                *facts[4:],
                *(f"  ! {text}" for text in self.warnings),
            ]
        )

    def _costs(self) -> list[tuple[str, str, str, str]]:
        """Label, kind, FLOPs and bytes of every step."""
        labels = self.program.labels
        return [(labels[step.node], step.kind, flops_text(step.flops), bytes_text(step.bytes)) for step in self.steps]

    def _repr_html_(self) -> str:
        from sparsedsl.html_card import card, grid
        from sparsedsl.program.glance import picture_of

        lengths = {"q_len": self.q_len, "kv_len": self.kv_len, "q_offset": self.q_offset}
        code = "\n".join(declared(str(self.program), self.tables))
        steps = grid(("node", "for", "FLOP", "bytes moved"), self._costs())
        return card("Analysis", code, self.facts(), picture_of(self.program, **lengths), self.warnings, steps)


def lengths_text(q_len: int, kv_len: int, q_offset: int) -> str:
    """Queries x keys, and where the queries begin."""
    return f"{q_len:,} x {kv_len:,}" + (f", first query at {q_offset:,}" if q_offset else "")


def analyse_program(
    program: Program, q_len: int, kv_len: int | None = None, *, q_offset: int = 0, batch: int = 1,
    heads: int | None = None, kv_heads: int | None = None, head_dim: int = 64, head_dim_v: int | None = None, item: int = 2,
    sizes: Mapping[str, int] | None = None,
    **tables: Any,
) -> ProgramAnalysis:  # fmt: skip
    """Everything that can be said before a program runs; see :func:`sparsedsl.analyse`. ``sizes``: of axes with names of their own."""
    start = time.perf_counter()
    unknown = set(tables) - set(program.tables)
    if unknown:
        raise TableError(surplus(unknown, program.tables, f"the program reads {', '.join(program.tables) or 'no table'}"))
    given = program.bound | tables
    missing = [name for name in program.tables if name not in given]
    if missing:
        raise TableError(
            f"missing table{'s' * (len(missing) > 1)} {', '.join(missing)}: pass {', '.join(f'{n}=tensor' for n in missing)}"
        )
    if sizes is not None and not isinstance(sizes, Mapping):
        raise ShapeError(f"sizes must be a dict, axis -> size, as {{'retrieval_heads': 2}}; got {shown(sizes)}")
    widths = {"kv_heads": kv_heads, "head_dim": head_dim, "head_dim_v": head_dim_v, **(sizes or {})}
    for name, value in {"q_len": q_len, **{name: value for name, value in widths.items() if value is not None}}.items():
        check_size(name, value, 1)
    keys = check_size("q_offset", q_offset, 0) + q_len if kv_len is None else kv_len
    heads = count_heads(program.patterns, given, heads)
    domain = Domain(q_len, keys, q_offset, batch, heads, {name: given[name] for name in program.tables})
    domain = exact_domain(program.exprs, domain)
    known = {
        "batch": batch, "heads": heads, "kv_heads": kv_heads or heads, "value_heads": kv_heads or heads, "queries": q_len, "keys": keys,
        "head_dim": head_dim, "value_dim": head_dim_v or head_dim, "one": 1, **(sizes or {}),
    }  # fmt: skip
    steps = steps_of(program, Lengths(known, domain, item))
    dense = 2 * batch * heads * q_len * keys * (known["head_dim"] + known["value_dim"])
    pairs = max((step.pairs for step in steps if step.pairs is not None), default=0)
    causal, effects = program_causality(program), reasons(program)
    warnings = [f"a later token reaches a query: {causal.reason or causal.witness}"] if causal.status == "REFUTED" else []
    warnings += [f"{LATER_QUERIES}: not for training or teacher-forced likelihood"] if LATER_QUERIES in effects else []
    warnings += [text for pattern in program.patterns for text in pattern.warnings]
    warnings += [f"{program.labels[node]}: {text}" for node in program.nodes(Linear) for text in node.warnings]
    warnings += [f"{program.labels[step.node]} allows no pair at these lengths" for step in steps if step.pairs == 0]
    return ProgramAnalysis(
        program, q_len, keys, q_offset, heads, steps, pairs / (batch * heads * q_len * keys), sum(s.flops for s in steps), dense,
        sum(s.bytes for s in steps), causal, frozenset(effects), tuple(warnings), time.perf_counter() - start,
        {name: given[name] for name in program.tables},
    )  # fmt: skip
