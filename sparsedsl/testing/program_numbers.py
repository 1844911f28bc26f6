"""What a program must give, and how far off it may be: its dense meaning in float64, with the same choices.

A choice is no continuous function of its scores, so a tolerance says nothing about it. In float64, where no two scores of random inputs are
equal, choices must be the same; in lower precision the dense meaning is worked out for what was chosen there.

A result may be off by twice as much as the dense meaning in the same precision, and twice as much as it moves when every number it is given
is moved at random by as many roundings as a sum over all keys makes on its way (the square root of their number), or by one rounding
of the type it was given in. Gradients may be off by that many roundings of what cancels in them, too: ``dO . v`` and ``dO . out`` are equal
where a query sees one key, and what is left of them is no matter of the inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.program.branches import Compact
from sparsedsl.program.graph import Program
from sparsedsl.run.picked.picks import Picks
from sparsedsl.run.programs.call import check_program_call
from sparsedsl.run.programs.compiled import CompiledProgram
from sparsedsl.run.programs.reference import Reference
from sparsedsl.testing.numerics import Expected, Results, gradients

__all__ = ["ProgramRun", "choice_tables", "expect_program", "run_program"]

Tensor = torch.Tensor
Cotangents = tuple[Tensor, Tensor | None]
_MOVES = 2


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
    """Picks as booleans ``(batch, heads, units of queries, units of keys)``; orders and kept tokens as they are."""
    found = {}
    for label, value in choices.items():
        table = value.table() if isinstance(value, Picks) else value
        found[label] = table.expand(batch, *table.shape[1:]) if isinstance(table, Tensor) else table
    return found


def moving(program: Program, named: Mapping[str, Tensor]) -> list[str]:
    """The inputs and tables that gradients may reach."""
    learned = {name for name, spec in program.tables.items() if spec.learned}
    return [name for name, value in named.items() if value.is_floating_point() and (name in program.inputs or name in learned)]


def run_program(
    attn: CompiledProgram, tensors: Mapping[str, Tensor], run: ProgramRun, cotangents: Cotangents | None = None
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
) -> Expected:
    """Expected results of a call. ``choices``: label -> what was chosen, see :func:`choice_tables`; None: what the dense meaning chooses.

    Raises:
        PatternError: in lower precision, what :func:`~sparsedsl.compact` runs makes choices of its own, which nobody reports.
    """
    dtype = tensors["q"].dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    if dtype != torch.float64 and any(_chooses_inside(node) for node in program.everything):
        raise PatternError(
            f"{program!r}: what compact() runs makes choices of its own, which calls do not report; in {dtype} they may differ by "
            "rounding. Give float64 inputs"
        )
    exact = _dense(program, tensors, run, torch.float64, choices, cotangents)
    plain = _dense(program, tensors, run, accumulated, choices, cotangents, rounded=dtype)
    fine = torch.finfo(accumulated).eps * max(tensors["k"].shape[2], 1) ** 0.5
    moved = {step: _moved(program, tensors, run, step, choices, cotangents) for step in {fine, max(fine, torch.finfo(dtype).eps)}}
    tolerance = {}
    for name, value in exact.items():
        step = fine if name == "lse" else max(moved)
        off = [_apart(value, other[name]) for other in moved[step]]
        cancelled = (
            fine * _cancelling(name, tensors, cotangents) if cotangents is not None and name not in ("out", "lse") else 0.0
        )
        tolerance[name] = 2 * (_apart(value, plain[name]) + max(off) + cancelled) + torch.finfo(dtype).smallest_normal
    return Expected(exact, tolerance)


def _cancelling(name: str, tensors: Mapping[str, Tensor], cotangents: Cotangents) -> float:
    """The size of the two terms that a gradient is the difference of: ``dO . v`` and its mean, times what the logits are made of."""
    d_out, d_lse = cotangents
    size = _largest(d_out) * _largest(tensors["v"]) * tensors["v"].shape[3] ** 0.5 + (0.0 if d_lse is None else _largest(d_lse))
    others = [_largest(x) for other, x in tensors.items() if other not in (name[1:], "v") and x.is_floating_point()]
    queries = 1 if name == "dq" else tensors["q"].shape[1] * tensors["q"].shape[2]
    return 2 * size * max(others) * queries**0.5


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _chooses_inside(node: Any) -> bool:
    return isinstance(node, Compact) and any(
        inner.gives in ("picks", "order", "tokens") for inner in Program(node.inside).everything
    )


def _moved(
    program: Program, tensors: Mapping[str, Tensor], run: ProgramRun, step: float, choices: Any, cotangents: Cotangents | None
) -> list[Results]:
    """The results for inputs that are off by so much, relatively, at random."""
    found = []
    for number in range(_MOVES):
        generator = torch.Generator().manual_seed(number)

        def off(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            x = x.detach().cpu()
            if not x.is_floating_point():
                return x
            return x.double() * (1 + step * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))

        again = None if cotangents is None else (off(cotangents[0]), None if cotangents[1] is None else off(cotangents[1]))
        given = {name: off(x) for name, x in tensors.items()}
        found.append(_dense(program, given, run, torch.float64, choices, again))
    return found


def _apart(wanted: Tensor, got: Tensor) -> float:
    got = got.double()
    both = torch.isfinite(wanted) & torch.isfinite(got)
    return float((wanted - got)[both].abs().max()) if both.any() else 0.0


def _dense(
    program: Program,
    tensors: Mapping[str, Tensor],
    run: ProgramRun,
    dtype: torch.dtype,
    choices: Mapping[str, Any] | None,
    cotangents: Cotangents | None,
    rounded: torch.dtype | None = None,
) -> Results:
    """The dense meaning in ``dtype`` on the CPU, the output rounded to ``rounded``."""
    given = {name: x.detach().cpu().to(dtype) if x.is_floating_point() else x.detach().cpu() for name, x in tensors.items()}
    named = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
    leaves = {}
    if cotangents is not None:
        leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v", *moving(program, named))}
    call = check_program_call(program, given["q"], given["k"], given["v"], named, **run.words)
    runner = Reference(call)
    if choices is not None:
        chosen = choice_tables(choices, call.q.shape[0])
        on_cpu = {label: _on_cpu(value) for label, value in chosen.items()}
        runner.values |= {node: on_cpu[node.label] for node in program.order if node.label in on_cpu}
    with torch.set_grad_enabled(cotangents is not None):
        out, lse = runner.value(program.root)
        out = out if rounded is None else out.to(rounded).to(dtype)
    results = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    return results if cotangents is None else results | gradients(out, lse, leaves, cotangents)


def _on_cpu(value: Any) -> Any:
    return [part.cpu() for part in value] if isinstance(value, list) else value.cpu()
