"""Any lowering against plain attention: outputs, LSE and gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.testing.counterexamples import Counterexample, arguments_code, pattern_code
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_assertions import kernel_matches
from sparsedsl.testing.numerics import Results, expect, gradients
from sparsedsl.testing.program_matching import assert_program_matches, compiled_program, is_program

__all__ = ["assert_matches_reference", "attention_code"]


def as_attention(pattern: Any, backend: str = "reference") -> Attention:
    """A compiled pattern, on tensors with heads first; anything else compiled."""
    return pattern.heads_first if isinstance(pattern, Attention) else compile_pattern(pattern, backend=backend)


def attention_code(attn: Attention) -> str:
    """Code that compiles the pattern of ``attn`` again."""
    return f"sd.compile({pattern_code(attn.pattern)}, backend={attn.backend!r})"


def assert_matches_reference(
    attn: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int = 0,
    scale: float | None = None,
    **tables: Any,
) -> tuple[str, ...]:
    """A compiled pattern gives what plain attention gives, a compiled program what its nodes mean, as closely as its precision allows.

    Args:
        attn: from :func:`sparsedsl.compile`; a bare pattern or node is compiled with ``backend="reference"``; or a :class:`Kernel`.
        q: ``(B, Hq, Sq, D)``; any float dtype, strides and device the lowering takes.
        k: ``(B, Hkv, Skv, D)``.
        v: ``(B, Hkv, Skv, Dv)``.
        q_offset: position of the first query.
        scale: factor on the dot product.
        tables: as in the call; of a program its inputs too.

    Returns:
        The names of what was compared: ``"out"``, and as far as the lowering has them ``"lse"``, ``"dq"``, ``"dk"``, ``"dv"``
        and ``"d<table>"`` for learned tables and inputs; of a program that chooses ``"choices"`` before them.

    How far off each element may be follows from the roundings that the dense computation may make on the way to it; the rule is stated in
    :mod:`sparsedsl.testing.roundings`. What should be finite must be. Empty rows must give 0 and an LSE of ``-inf``, and zero gradients. In
    float64 the choices of a program must be the same; in lower precision it is compared with what its nodes mean for the choices it made.

    >>> import torch, sparsedsl as sd
    >>> q = k = v = torch.randn(1, 2, 9, 16)
    >>> assert_matches_reference(sd.compile(sd.kv_idx <= sd.q_idx, backend="reference"), q, k, v)
    ('out', 'lse', 'dq', 'dk', 'dv')
    """
    if isinstance(attn, Kernel):
        return kernel_matches(attn, q, k, v, q_offset=q_offset, scale=scale, tables=tables)
    if is_program(attn):
        tensors = {"q": q, "k": k, "v": v, **tables}
        return assert_program_matches(compiled_program(attn), tensors, q_offset=q_offset, scale=scale)
    attn = as_attention(attn)
    got, cotangents = run_all(attn, q, k, v, q_offset=q_offset, scale=scale, tables=tables)
    known = attn.pattern.bound | tables
    wanted = expect(attn.pattern, q, k, v, known, q_offset=q_offset, scale=scale, cotangents=cotangents)
    for name, value in got.items():
        fault = wanted.fault(name, value)
        if fault:
            raise Counterexample(
                f"backend {attn.backend!r} differs from plain attention: {fault}",
                f"attn = {attention_code(attn)}",
                f"q = {arguments_code(q)}",
                f"k = {arguments_code(k)}",
                f"v = {arguments_code(v)}",
                "sd.testing.assert_matches_reference("
                + arguments_code("attn", "q", "k", "v", q_offset=q_offset, scale=scale, **tables)
                + ")",
            )
    return tuple(got)


def run_all(
    attn: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    tables: dict[str, Any],
    q_offset: int = 0,
    scale: float | None = None,
) -> tuple[Results, tuple[torch.Tensor, torch.Tensor | None] | None]:
    """Everything the lowering can give for a call, and the cotangents that its gradients were taken with (None: it has none)."""
    words: dict[str, Any] = {"q_offset": q_offset, "scale": scale}
    with torch.no_grad():
        results: Results = {"out": attn(q, k, v, **words, **tables)}
        with contextlib.suppress(UnsupportedError):
            results["lse"] = attn(q, k, v, return_lse=True, **words, **tables)[1]
    shape = (*q.shape[:3], v.shape[3])
    if results["out"].shape != shape:
        return results, None
    learned = {name: t for name, t in (attn.pattern.bound | tables).items() if attn.pattern.tables[name].learned}
    leaves = {name: x.detach().requires_grad_() for name, x in {"q": q, "k": k, "v": v, **learned}.items()}
    inputs = {name: leaves.pop(name) for name in "qkv"}
    drawn = [torch.randn(shape[:n], generator=torch.Generator().manual_seed(n)).to(q.device) for n in (4, 3)]
    d_out, d_lse = drawn[0], drawn[1] if "lse" in results else None
    try:
        out, lse = _call(attn, inputs, {**tables, **leaves}, words, "lse" in results)
    except UnsupportedError:
        return results, None
    results |= gradients(out, lse, inputs | leaves, (d_out, d_lse))
    return results, (d_out, d_lse)


def _call(
    attn: Attention, inputs: dict[str, Any], tables: dict[str, Any], words: dict[str, Any], with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    words = words | inputs | tables
    with torch.enable_grad():
        return attn(**words, return_lse=True) if with_lse else (attn(**words), None)
