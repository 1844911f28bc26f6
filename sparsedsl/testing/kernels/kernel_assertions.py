"""The assertions of the kit for patterns, on a kernel: the same names, the same arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.testing.call_shapes import AttentionCase, tensor_code
from sparsedsl.testing.counterexamples import Counterexample
from sparsedsl.testing.kernels.calling import Broken, Refused, cotangents, moved, results, with_gradients
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.expected_results import Ambiguous, expectation
from sparsedsl.testing.kernels.findings import Skip
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.kernel_check import KERNEL_PROPERTIES, kernel_counterexample
from sparsedsl.testing.kernels.kernel_snippets import declaring
from sparsedsl.testing.kernels.limits import fits, near
from sparsedsl.testing.kernels.oracle import Problem
from sparsedsl.testing.kernels.property_search import run_case

__all__ = ["kernel_holds", "kernel_matches"]

Tensor = torch.Tensor


def kernel_holds(
    kernel: Kernel, name: str, case: AttentionCase, default: AttentionCase, seed: int, tables: Mapping[str, Any]
) -> tuple[str, ...]:
    """One property on one case of the kit for patterns; the kit's own case is moved into the limits of the kernel.

    Raises:
        Counterexample: it fails; of "CAUS" also where the pattern itself lets a row see later keys.
        ShapeError: a case outside the limits.
        UnsupportedError: the property says nothing about this kernel or this case, and why.
    """
    of = KERNEL_PROPERTIES[name]
    reason = of.unfit(kernel)
    if reason:
        raise UnsupportedError(f"{kernel.name}: {name} cannot be asked of it: {reason}")
    words = {field: getattr(case, field) for field in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "head_dim_v")}
    dtype = "float32" if "float32" in kernel.dtypes else kernel.dtypes[0]
    one: KernelCase | None = KernelCase(**words, q_offset=case.q_offset, seed=seed, dtype=dtype, device=kernel.devices[0])
    if case == default:
        one = near(kernel, {**words, "seed": seed, "dtype": dtype})
    if one is None or not fits(kernel, one):
        raise ShapeError(f"{case!r} lies outside the declared limits of {kernel!r}; give a case inside them")
    try:
        found = run_case(kernel, of, one, tables)
    except Skip as skip:
        if name == "CAUS":
            raise kernel_skipped(kernel, name, one, str(skip), tables) from None
        raise UnsupportedError(f"{kernel.name}: {name} says nothing about {one!r}: {skip}") from None
    if found is not None:
        raise kernel_counterexample(kernel, name, one, found, tables)
    return (name,)


def kernel_skipped(kernel: Kernel, name: str, case: KernelCase, why: str, tables: Mapping[str, Any]) -> Counterexample:
    """Where causality is asserted of a pattern that is not causal."""
    lines = [*declaring(kernel), f"sd.testing.assert_causal(kernel, sd.testing.{case.attention!r}, seed={case.seed})"]
    return Counterexample(f"{kernel.name}: {why}", *lines)


def kernel_matches(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int, scale: float | None, tables: Mapping[str, Any]
) -> tuple[str, ...]:
    """Results and gradients of one call are those of the oracle; the names of what was compared."""
    known = {name: torch.as_tensor(value) for name, value in {**kernel.implements.bound, **tables}.items()}
    lacking = [name for name in kernel.tables if name not in known]
    if lacking:
        raise ShapeError(f"{kernel.name} needs values for {', '.join(lacking)}: pass {lacking[0]}=tensor")
    if scale is not None and not kernel.scale:
        raise ShapeError(
            f"{kernel.name} takes no scale=; leave it out, or put it into the pattern: sd.attend(mask, scale={scale!r})"
        )
    problem = Problem(kernel.implements, q, k, v, known, q_offset, scale)

    def failed(what: str) -> Counterexample:
        words = "".join(
            f", {name}={tensor_code(value)}" for name, value in {"q_offset": q_offset, "scale": scale, **tables}.items()
        )
        return Counterexample(
            f"{kernel.name} differs from attention in float64: {what}", *declaring(kernel),
            *(f"{name} = {tensor_code(x)}" for name, x in (("q", q), ("k", k), ("v", v))),
            f"sd.testing.assert_matches_reference(kernel, q, k, v{words})",
        )  # fmt: skip

    try:
        got, asked = dict(results(kernel, problem)), None
        if kernel.grad != "none":
            found = with_gradients(kernel, problem, cotangents(kernel, problem, 0), moved(problem, kernel.grad))
            asked = found.asked
            got |= {name: x for name, x in found.gradients.items() if x is not None}
        wanted = expectation(kernel, problem, asked)
    except (Broken, Refused) as error:
        raise failed(str(error)) from None
    except Ambiguous as why:
        raise UnsupportedError(f"{kernel.name}: these inputs have no one answer: {why}. Give others") from None
    for name, value in got.items():
        fault = wanted.fault(name, value)
        if fault:
            raise failed(str(fault))
    return tuple(got)
