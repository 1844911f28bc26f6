"""From a pattern or a program to a callable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.execute.compiled import Attention
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import as_pattern
from sparsedsl.program.graph import Program, as_program

__all__ = ["compile"]


def compile(pattern: Any, *, backend: str = "auto", allow: Sequence[str] = ()) -> Attention:
    """Make a callable out of a pattern or a program.

    Args:
        pattern: a :class:`~sparsedsl.Mask`, a :class:`~sparsedsl.Pattern` from :func:`sparsedsl.attend`, or a node of a program.
        backend: ``"reference"`` (dense torch; defines the meaning), ``"tiled"`` (torch's dense products on the rectangles of the
            pattern; compiles nothing; any dtype; gradients), ``"cpp"`` (C++ generated for the pattern and compiled once, on CPU),
            ``"flex"`` (torch FlexAttention on compact tile lists),
            ``"triton"`` (kernels generated for the pattern, on GPU) or ``"auto"``, which chooses per call and says why in
            :meth:`Attention.explain`.

        allow: effects of a program that are meant: ``"selection reads later queries"`` allows gradients of such a program.

    Returns:
        An :class:`Attention`: ``attn(q, k, v, q_offset=0, return_lse=False, scale=None, **inputs_and_tables)``.

    Raises:
        PatternError: not a pattern, or an unknown backend.

    >>> import torch, sparsedsl as sd
    >>> attn = sd.compile((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4))
    >>> q = k = v = torch.randn(1, 2, 8, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 8, 16])
    """
    program = as_program(pattern)
    if program is None:
        if not isinstance(allow, (tuple, list)) or allow:
            raise PatternError(f"allow={shown(allow)}: a static pattern has no effects; leave it out")
        program = Program(as_pattern(pattern))
    return Attention(program, backend, allow)
