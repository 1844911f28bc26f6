"""A kernel's results held against the oracle's: what is wrong first as a class of numbers (NaN, infinity), then element by element."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.errors import SparseDSLError
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.testing.kernels.calling import Cotangents, moved
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.oracle import Bent, Exact, Problem
from sparsedsl.testing.kernels.tolerance import Allowance
from sparsedsl.testing.program_numbers import ProgramRun, choice_tables, expect_program

__all__ = ["Ambiguous", "Expectation", "Fault", "expectation"]

Tensor = torch.Tensor
_RUNS = (6, 40)


class Ambiguous(Exception):
    """A program chooses otherwise in the kernel's precision than in float64: there is no one answer to hold the kernel to."""


@dataclass(frozen=True)
class Fault:
    """How a result is wrong. ``kind``: "shape", "NaN", "infinite", "number"; ``ratio``: error over tolerance."""

    kind: str
    name: str
    place: tuple[int, ...] = ()
    got: float = 0.0
    wanted: float = 0.0
    ratio: float = 0.0
    count: int = 0
    total: int = 0
    what: str = ""

    def __str__(self) -> str:
        if self.what:
            return self.what
        text = f"{self.name}{list(self.place)} is {self.got:.9g}, wanted {self.wanted:.9g}"
        if self.kind == "number":
            text += f"; error/tolerance {self.ratio:.3g}"
        return f"{text}; {self.count} of {self.total} are off"


@dataclass
class Expectation:
    """What one call must give. ``values`` in float64; ``_allowed(name, run)``: how far off, more surely for later runs."""

    values: Mapping[str, Tensor]
    allowed_by: Callable[[str, int], Tensor]
    runs: int = 1
    exact: Exact | None = None
    _known: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def allowed(self, name: str, run: int = 0) -> Tensor:
        """How far off each element of a result may be."""
        if (name, run) not in self._known:
            self._known[name, run] = self.allowed_by(name, run)
        return self._known[name, run]

    def fault(
        self, name: str, got: Tensor, *, part: Any = ..., wanted: Tensor | None = None, where: Tensor | None = None
    ) -> Fault | None:
        """What is wrong with a result, or None.

        ``part``: which elements of the whole it is, as an index. ``wanted``: another result to compare with, which may be as far off.
        ``where``: the elements that count.
        """
        exact = self.values[name][part] if wanted is None else wanted.detach().double().cpu()
        if got.shape != exact.shape:
            return Fault("shape", name, what=f"{name} has shape {tuple(got.shape)}, wanted {tuple(exact.shape)}")
        got = got.detach().double().cpu()
        counts = torch.ones_like(exact, dtype=torch.bool) if where is None else where.expand(exact.shape)
        if not bool(counts.any()):
            return None
        for kind, strange in (
            ("NaN", torch.isnan(got) != torch.isnan(exact)),
            ("infinite", (torch.isinf(got) | torch.isinf(exact)) & (got != exact)),
        ):
            strange = strange & counts
            if bool(strange.any()):
                return _at(kind, name, strange.nonzero()[0], got, exact, strange, None)
        finite = torch.isfinite(exact) & counts
        off = torch.where(finite, (got - exact).abs(), 0.0)
        excess = off
        for run in range(self.runs):
            excess = off / ((1 if wanted is None else 2) * self.allowed(name, run)[part])
            if float(excess.max()) <= 1:
                return None
        return _at("number", name, (excess == excess.max()).nonzero()[0], got, exact, excess > 1, excess)

    def worst(self, name: str, got: Tensor) -> float:
        """The largest error over tolerance."""
        exact = self.values[name]
        off = torch.where(torch.isfinite(exact), (got.detach().double().cpu() - exact).abs(), 0.0)
        return float((off / self.allowed(name, self.runs - 1)).max()) if off.numel() else 0.0


def _at(kind: str, name: str, place: Tensor, got: Tensor, exact: Tensor, wrong: Tensor, excess: Tensor | None) -> Fault:
    where = tuple(place.tolist())
    ratio = 0.0 if excess is None else float(excess[where])
    return Fault(kind, name, where, float(got[where]), float(exact[where]), ratio, int(wrong.sum()), wrong.numel())


def expectation(kernel: Kernel, problem: Problem, asked: Cotangents | None = None, bent: Bent | None = None) -> Expectation:
    """What ``problem`` must give, with gradients where cotangents are given.

    Raises:
        Ambiguous: of programs, see there.
    """
    if kernel.is_program:
        return _of_program(kernel, problem, asked)
    exact = Exact(problem, bent or Bent())
    allowance = Allowance(exact, problem.q.dtype, kernel.rounds)
    values = {"out": exact.out, "lse": exact.lse}
    if kernel.empty == "nan":
        values["out"] = exact.out.masked_fill(exact.empty[..., None], float("nan"))
    rules: dict[str, Any] = {"out": allowance.out, "lse": allowance.lse}
    if asked is not None:
        found = exact.gradients(*asked)
        kept = {f"d{name}": _dtype_of(problem, name) for name in moved(problem, "all")}
        values |= found.values
        grads = allowance.gradients(found, kept)
        rules |= {name: functools.partial(grads.__getitem__, name) for name in grads}
    return Expectation(values, lambda name, run: rules[name](), exact=exact)


def _dtype_of(problem: Problem, name: str) -> torch.dtype:
    return (getattr(problem, name) if name in ("q", "k", "v") else problem.tables[name]).dtype


def _of_program(kernel: Kernel, problem: Problem, asked: Cotangents | None) -> Expectation:
    """The dense meaning for the choices of float64, if float32 chooses the same."""
    tensors = {name: x.detach().cpu() for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v))}
    tensors |= {name: x.detach().cpu() for name, x in problem.tables.items() if isinstance(x, Tensor)}
    chosen = []
    dense = compile_pattern(kernel.implements, backend="reference", allow=[LATER_QUERIES])
    for dtype in (torch.float64, torch.float32):
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
        named = {name: x for name, x in given.items() if name not in (*"qkv", *kernel.implements.bound)}
        try:
            found = dense.choices(given["q"], given["k"], given["v"], q_offset=problem.q_offset, **named)
        except SparseDSLError as error:
            raise Ambiguous(str(error)) from error
        chosen.append(choice_tables(found, problem.q.shape[0]))
    for label, value in chosen[0].items():
        if not _same(value, chosen[1][label]):
            raise Ambiguous(f"{label}: scores are too close to be told apart")
    run = ProgramRun(problem.q_offset, problem.scale)
    slopes: Any = None if asked is None else tuple(None if x is None else x.cpu() for x in asked)
    wanted = expect_program(kernel.implements, tensors, run, choices=chosen[0], cotangents=slopes)
    return Expectation(wanted.values, lambda name, run: wanted.tolerance(name, _RUNS[run]), runs=len(_RUNS))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other)
