"""What a program must give, and how far off it may be: its dense meaning in float64, with the same choices.

A choice is no continuous function of its scores, so a tolerance says nothing about it. In float64, where no two scores of random inputs are
equal, choices must be the same; in lower precision the dense meaning is worked out for what was chosen there.

How far off a result may be is the rule of :mod:`sparsedsl.testing.roundings`, applied to the operations of the dense meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.backends.reference.nodes import REFERENCE_RULES, Reference
from sparsedsl.backends.reference.scan_linear import run_recurrence
from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.program.branches import Attend
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.runtime.interpreter import Rule
from sparsedsl.runtime.program_call import ProgramCall, check_program_call
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.testing.gated_numbers import pair_rows
from sparsedsl.testing.numerics import Cotangents, ExpectedResult, Results, expected, gradients, plain_attention, results_of
from sparsedsl.testing.roundings import stored

__all__ = ["ProgramRun", "choice_tables", "expect_program", "run_program"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class ProgramRun:
    """What a call is given beside tensors."""

    q_offset: int = 0
    scale: float | None = None

    @property
    def words(self) -> dict[str, Any]:
        """As a call takes them."""
        return {"q_offset": self.q_offset, "scale": self.scale}


def choice_tables(choices: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """SelectedBlocks as booleans ``(batch, heads, blocks of queries, blocks of keys)``; orders and kept tokens as they are."""
    found = {}
    for label, value in choices.items():
        table = value.table() if isinstance(value, SelectedBlocks) else value
        found[label] = table.expand(batch, *table.shape[1:]) if isinstance(table, Tensor) else table
    return found


def moving(program: Program, named: Mapping[str, Tensor]) -> list[str]:
    """The inputs and tables that gradients may reach."""
    learned = {name for name, spec in program.tables.items() if spec.learned}
    return [name for name, value in named.items() if value.is_floating_point() and (name in program.inputs or name in learned)]


def run_program(
    attn: Attention, tensors: Mapping[str, Tensor], run: ProgramRun, cotangents: Cotangents | None = None
) -> tuple[Results, Cotangents | None]:
    """Everything a compiled program gives for a call, and the cotangents that gradients were taken with (None: it refuses gradients)."""
    given: dict[str, Any] = {**tensors, **run.words}
    named = {name: value for name, value in tensors.items() if name not in ("q", "k", "v")}
    with torch.no_grad():
        results: Results = {"out": attn(**given)}
        with contextlib.suppress(UnsupportedError):
            results["lse"] = attn(**given, return_lse=True)[1]
    q, v = tensors["q"], tensors["v"]
    shape = (*q.shape[:3], v.shape[3])
    if results["out"].shape != shape:
        return results, None
    if cotangents is None:
        d_out, d_lse = (torch.randn(shape[:n], generator=torch.Generator().manual_seed(n)).to(q.device) for n in (4, 3))
        cotangents = d_out, d_lse if "lse" in results else None
    leaves = {name: tensors[name].detach().requires_grad_() for name in ("q", "k", "v", *moving(attn.program, named))}
    try:
        with torch.enable_grad():
            made = attn(**(given | leaves), return_lse="lse" in results)
    except UnsupportedError:
        return results, None
    out, lse = made if "lse" in results else (made, None)
    return results | gradients(out, lse, leaves, cotangents), cotangents


def expect_program(
    program: Program,
    tensors: Mapping[str, Tensor],
    run: ProgramRun,
    *,
    choices: Mapping[str, Any] | None = None,
    cotangents: Cotangents | None = None,
) -> ExpectedResult:
    """Expected results of a call. ``choices``: label -> what was chosen, see :func:`choice_tables`; None: what the dense meaning chooses.

    Raises:
        PatternError: in lower precision, what :func:`~sparsedsl.compact` runs makes choices of its own, which nobody reports.
    """
    dtype = tensors["q"].dtype
    if dtype != torch.float64 and any(_chooses_inside(node) for node in program.everything):
        raise PatternError(
            f"{program!r}: what compact() runs makes choices of its own, which calls do not report; in {dtype} they may differ by "
            "rounding. Give float64 inputs"
        )

    def dense(given: dict[str, Tensor], leaves: Mapping[str, Tensor], asked: Cotangents | None) -> Results:
        named = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
        call = check_program_call(program, given["q"], given["k"], given["v"], named, **run.words)
        runner = _Dense(call)
        if choices is not None:
            chosen = choice_tables(choices, call.q.shape[0])
            labels = program.labels
            runner.values |= {node: _on_cpu(chosen[labels[node]]) for node in program.order if labels[node] in chosen}
        out, lse = runner.value(program.root)
        return results_of(out, lse, leaves, asked)

    named = {name: x for name, x in tensors.items() if name not in ("q", "k", "v")}
    return expected(tensors, [*"qkv", *moving(program, named)] if cotangents is not None else [], cotangents, dense)


class _Dense(Reference):
    """The dense meaning; attention as :func:`~sparsedsl.testing.numerics.plain_attention`, whose backward pass is that of
    kernels, and linear attention with decays from the data as :func:`~sparsedsl.testing.gated_numbers.pair_rows`."""

    def __init__(self, call: ProgramCall, rules: Mapping[type[Node], Rule] | None = None):
        super().__init__(call, {**REFERENCE_RULES, Attend: _attend, Linear: _linear} if rules is None else rules)

    def value(self, node: Node) -> Any:
        """What a branch gives is stored before others use it."""
        fresh = node not in self.values
        found = super().value(node)
        if fresh and node.gives == "branch":
            found = self.values[node] = (stored(found[0]), found[1])
        return found


def _attend(run: Reference, node: Attend) -> tuple[Tensor, Tensor | None]:
    if node.normaliser is not None:
        return REFERENCE_RULES[Attend](run, node)
    q, k, v = (run.value(x) for x in (node.x, node.y, node.z))
    pattern, tables = run.concrete_pattern(node.pattern)
    return plain_attention(pattern, q, k, v, tables, q_offset=run.call.q_offset, scale=run.call.scale)


def _linear(run: Reference, node: Linear) -> tuple[Tensor, Tensor | None]:
    return run_recurrence(run, node, None if node.gate is None else pair_rows)


def _chooses_inside(node: Node) -> bool:
    inner = (part for root in node.subprograms for part in Program(root).everything)
    return any(part.chooses for part in inner)


def _on_cpu(value: Any) -> Any:
    return [part.cpu() for part in value] if isinstance(value, list) else value.cpu()
