"""From a pattern or a program to a callable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.execute.compiled import Attention
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.program.graph import Program, as_program
from sparsedsl.tracing.decorators import is_traceable, traced

__all__ = ["as_declared", "compile"]


def compile(pattern: Any, *, backend: str = "auto", allow: Sequence[str] = (), layout: str = "bhsd") -> Attention:
    """Make a callable out of a pattern or a program.

    Args:
        pattern: a :class:`~sparsedsl.Mask`, a :class:`~sparsedsl.Pattern` from :func:`sparsedsl.attend`, or a node of a program; or a
            FlexAttention ``mask_mod(b, h, q_idx, kv_idx)`` or ``score_mod(score, b, h, q_idx, kv_idx)``, which is traced.
        backend: ``"reference"`` (dense torch; defines the meaning), ``"tiled"`` (torch's dense products on the rectangles of the
            pattern; compiles nothing; any dtype; gradients), ``"cpp"`` (C++ generated for the pattern and compiled once, on CPU),
            ``"flex"`` (torch FlexAttention on compact tile lists),
            ``"triton"`` (kernels generated for the pattern, on GPU) or ``"auto"``, which chooses per call and says why in
            :meth:`Attention.explain`.

        allow: effects of a program that are meant: ``"selection reads later queries"`` allows gradients of such a program.
        layout: of q, k, v and out: ``"bhsd"``, or ``"bshd"`` for heads behind the rows, ``(B, S, H, D)``. The LSE is ``(B, H, S)`` in both.
            It is read by strides; nothing is copied for it.

    Returns:
        An :class:`Attention`: ``attn(q, k, v, q_offset=0, return_lse=False, scale=None, **inputs_and_tables)``.

    Raises:
        PatternError: not a pattern, or an unknown backend or layout. TraceError: a function that cannot be traced, or whose arguments do
            not tell a mask from a score.

    >>> import torch, sparsedsl as sd
    >>> attn = sd.compile((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4))
    >>> q = k = v = torch.randn(1, 2, 8, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 8, 16])
    """
    declared = as_declared(pattern, "compile()")
    if isinstance(declared, Pattern):
        if not isinstance(allow, (tuple, list)) or allow:
            raise PatternError(f"allow={shown(allow)}: a static pattern has no effects; leave it out")
        declared = Program(declared)
    return Attention(declared, backend, allow, layout)


def as_declared(value: Any, where: str) -> Pattern | Program:
    """The pattern or program of what a user gives for one: functions are traced. ``where``: what it was given to, for messages."""
    if is_traceable(value):
        value = traced(value, where)
    program = as_program(value)
    return as_pattern(value) if program is None else program
