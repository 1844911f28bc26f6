"""``sd.analyse`` of a program: what each node costs at given lengths, whether the future leaks in, and what to beware of."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.program_causality import program_causality
from sparsedsl.analysis.proofs import Verdict
from sparsedsl.analysis.rows import count_rows
from sparsedsl.analysis.tiles import classify
from sparsedsl.errors import ShapeError, TableError
from sparsedsl.lang.advice import shown, surplus
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.axes import unit_of
from sparsedsl.program.branches import Attend, Branch, Compact, Linear, Recall
from sparsedsl.program.decided import assume
from sparsedsl.program.effects import LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Take
from sparsedsl.program.scores import Antidiagonal, Bound, Dot, Probe
from sparsedsl.program.select import Select, TopK
from sparsedsl.program.tensors import Summary

__all__ = ["ProgramAnalysis", "Step", "analyse_program"]

BLOCK = (128, 128)
CHOOSING, MOVING, ATTENDING = "choosing", "moving", "attending"


@dataclass(frozen=True)
class Step:
    """What one node costs: FLOPs (a multiply-add counts as two) and bytes it reads and writes. ``pairs``: of a branch, pairs of query and
    key that it attends to at most, all heads. ``kind``: choosing, moving or attending."""

    node: Node
    kind: str
    flops: int
    bytes: int
    pairs: int = 0


@dataclass(frozen=True, eq=False)
class ProgramAnalysis:
    """What :func:`sparsedsl.analyse` found about a program. Where a choice decides, numbers are upper bounds.

    ``density``: pairs attended to at most / all pairs, of the branch with the most. ``flops``: forward pass, all nodes; ``flops_dense``:
    dense attention over the same lengths. ``causal``: see :func:`~sparsedsl.analysis.program_causality.program_causality`.
    """

    program: Program
    q_len: int
    kv_len: int
    q_offset: int
    heads: int
    steps: tuple[Step, ...]
    density: float
    flops: int
    flops_dense: int
    bytes: int
    causal: Verdict
    effects: frozenset[str]
    warnings: tuple[str, ...]
    seconds: float = field(repr=False)

    def share(self, kind: str) -> float:
        """Part of the FLOPs that goes into ``"choosing"``, ``"moving"`` or ``"attending"``."""
        return sum(step.flops for step in self.steps if step.kind == kind) / max(self.flops, 1)

    def __str__(self) -> str:
        width = max((len(step.node.label) for step in self.steps), default=0)
        lines = [
            *self.program.text.splitlines(),
            f"  queries x keys   {self.q_len:,} x {self.kv_len:,}"
            + (f", first query at {self.q_offset:,}" if self.q_offset else ""),
            f"  pairs            at most {self.density:.4%} of all",
            f"  forward          at most {self.flops / 1e9:,.3f} GFLOP, {self.flops_dense / max(self.flops, 1):.1f} x less than dense: "
            + ", ".join(f"{kind} {self.share(kind):.1%}" for kind in (CHOOSING, ATTENDING)),
            f"  traffic          about {self.bytes / 2**20:,.1f} MiB",
            *(
                f"    {step.node.label:{width}}  {step.kind:9}  {step.flops / 1e9:10,.3f} GFLOP  {step.bytes / 2**20:9,.1f} MiB"
                for step in self.steps
            ),
            f"  causal           {self.causal}",
            f"  effects          {', '.join(sorted(self.effects)) or 'none'}",
        ]
        return "\n".join(lines + [f"  ! {warning}" for warning in self.warnings])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


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
    heads = count_heads((node.pattern for node in program.everything if isinstance(node, Attend)), given, heads)
    domain = Domain(q_len, keys, q_offset, batch, heads, {name: given[name] for name in program.tables})
    domain = exact_domain(program.exprs, domain)
    known = {
        "batch": batch, "heads": heads, "kv_heads": kv_heads or heads, "queries": q_len, "keys": keys, "head_dim": head_dim,
        "value_dim": head_dim_v or head_dim, "one": 1, **(sizes or {}),
    }  # fmt: skip
    steps = tuple(step for node in program.everything for step in [_step(node, _Sizes(known), domain, item)] if step is not None)
    dense = 2 * batch * heads * q_len * keys * (known["head_dim"] + known["value_dim"])
    pairs = max((step.pairs for step in steps), default=0)
    causal, effects = program_causality(program), reasons(program)
    warnings = [f"a later token reaches a query: {causal.reason or causal.witness}"] if causal.status == "REFUTED" else []
    warnings += [f"{LATER_QUERIES}: not for training or teacher-forced likelihood"] if LATER_QUERIES in effects else []
    warnings += [text for node in program.everything if isinstance(node, Attend) for text in node.pattern.warnings]
    warnings += [
        f"{step.node.label} allows no pair at these lengths" for step in steps if isinstance(step.node, Attend) and not step.pairs
    ]
    return ProgramAnalysis(
        program, q_len, keys, q_offset, heads, steps, pairs / (batch * heads * q_len * keys), sum(s.flops for s in steps), dense,
        sum(s.bytes for s in steps), causal, frozenset(effects), tuple(warnings), time.perf_counter() - start,
    )  # fmt: skip


class _Sizes:
    """Sizes of axes; an unknown one is taken as one head, or as the head dimension."""

    def __init__(self, known: Mapping[str, int]):
        self.known = known

    def of(self, axis: str) -> int:
        """Rows of one axis."""
        if axis.isdecimal():
            return int(axis)
        base, _, unit = axis.partition("/")
        size = self.known.get(base, self.known["head_dim"] if base.endswith("dim") else self.known["kv_heads"])
        return -(-size // int(unit or 1))

    def count(self, *axes: str) -> int:
        """Elements of a tensor with these axes."""
        product = 1
        for axis in axes:
            product *= self.of(axis)
        return product


def _step(node: Node, sizes: _Sizes, domain: Domain, item: int) -> Step | None:
    if isinstance(node, (Dot, Bound, Antidiagonal)):
        dim = node.x.axes[3]
        pairs, read = sizes.count(*node.axes), sizes.count(*node.x.axes) + sizes.count(*node.y.axes)
        factor = {Bound: 2, Antidiagonal: node.block * node.block // node.stride if isinstance(node, Antidiagonal) else 1}.get(
            type(node), 1
        )
        # Candidates are half of all pairs where rows are causal, which is what is usual; the bound stays all of them.
        return Step(node, CHOOSING, 2 * pairs * sizes.of(dim) * factor, read * item)
    if isinstance(node, Probe):
        rows = min(node.rows, sizes.of("queries"))
        pairs = sizes.of("batch") * sizes.of(node.axes[1]) * rows * sizes.of("keys")
        return Step(node, CHOOSING, 4 * pairs * sizes.of(node.x.axes[3]), 2 * sizes.count(*node.y.axes) * item)
    if isinstance(node, Select):
        units = sizes.count(*node.axes)
        return Step(node, CHOOSING, units, 4 * sizes.count(*node.axes[:3]) * (node.count if isinstance(node, TopK) else 1))
    if isinstance(node, Summary):
        read = sizes.count(*node.x.axes)
        return Step(node, CHOOSING, read, read * item)
    if isinstance(node, Take):
        return Step(node, MOVING, 0, 2 * sizes.count(*node.axes) * item)
    if isinstance(node, Compact):
        moved = 2 * sizes.count("batch", "heads", "keys") * (2 * sizes.of("head_dim") + 2 * sizes.of("value_dim"))
        return Step(node, MOVING, 0, moved * item)
    if isinstance(node, Attend):
        pairs = _pairs(node, sizes, domain)
        width = sizes.of(node.y.axes[3]) + sizes.of(node.z.axes[3])
        return Step(
            node, ATTENDING, 2 * pairs * width, sizes.count(*node.y.axes) * 2 * item + sizes.count(*node.x.axes) * 2 * item, pairs
        )
    if isinstance(node, Linear):
        state = sizes.of("head_dim") * sizes.of("value_dim")
        return Step(
            node,
            ATTENDING,
            4 * sizes.count("batch", "heads", "queries") * state,
            3 * sizes.count("batch", "heads", "keys", "head_dim") * item,
        )
    if isinstance(node, Recall):
        rows = sizes.of(node.memory.gate.axes[3]) * (sizes.of("head_dim") + sizes.of("value_dim"))
        flops = 2 * rows * (sizes.count("batch", "heads", "queries") + sizes.count("batch", "kv_heads", "keys"))
        return Step(
            node,
            ATTENDING,
            flops,
            sizes.count(*node.memory.gate.axes) * item + 2 * sizes.count("batch", "kv_heads", "keys", "head_dim") * item,
        )
    if isinstance(node, Branch):
        return Step(node, ATTENDING, 2 * sizes.count(*node.axes), 2 * sizes.count(*node.axes) * item)
    return None


def _pairs(node: Attend, sizes: _Sizes, domain: Domain) -> int:
    """Pairs that attend at most: those in any case, and for each choice what its candidates allow or its number does."""
    if unit_of(node.y.axes[2]) > 1:
        domain = Domain(domain.rows, sizes.of(node.y.axes[2]), domain.q_offset, domain.batch, domain.heads, domain.tables)
    mask = node.pattern.mask
    choices = {name: value for name, value in mask.bound.items() if isinstance(value, Select)}
    orders = {name for name, value in mask.bound.items() if isinstance(value, Node)} - set(choices)
    expr = _without(mask.expr, orders)
    always = _count(assume(expr, dict.fromkeys(choices, False)), domain)
    most = _count(assume(expr, dict.fromkeys(choices, True)), domain)
    rows = domain.batch * domain.heads * domain.rows
    picked = [
        choice.count * choice.units[1] * rows if isinstance(choice, TopK) and not choice.extra else most
        for choice in choices.values()
    ]
    return min(most, always + sum(picked)) if choices else most


def _without(expr: Any, names: set[str]) -> Any:
    """``expr`` where relations that read these tables hold."""
    relations = [
        r for r in expr.atoms(sympy.core.relational.Relational) if any(read.spec.name in names for read in table_reads(r))
    ]
    return expr.xreplace(dict.fromkeys(relations, sympy.true))


def _count(expr: Any, domain: Domain) -> int:
    if expr == sympy.false:
        return 0
    mask = Mask(expr).expr
    with torch.no_grad():
        lists = classify(mask, domain, BLOCK)
        rows = count_rows(mask, domain, lists)
    groups = (domain.batch if BATCH in mask.free_symbols else 1) * (domain.heads if HEAD in mask.free_symbols else 1)
    return int(rows.allowed * domain.batch * domain.heads // groups)
