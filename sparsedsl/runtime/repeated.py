"""Calls of a kind that was checked before: all but the number of keys, the offset and the values is as it was, so that nothing is asked
again that depends on the rest. What is not plainly of a known kind is left to the ordinary call, which checks everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from sparsedsl.runtime.call import Call
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.runtime.torch_modes import in_context_parallel
from sparsedsl.torch_private import autocast_anywhere, modes_active, transforms_active

__all__ = ["Again", "Repeated"]

Tensor = torch.Tensor
What = TypeVar("What")
Again = Callable[[Tensor, Tensor, Tensor, int], "tuple[Tensor, Tensor] | None"]
"""``(out, lse)`` of q, k, v and an offset; None: the ordinary call is to look at them."""
# Kinds that are remembered.
MOST = 64


class Repeated(Generic[What]):
    """What is known of kinds of calls of one pattern or program without tables, by all of q, k and v that does not change from call to
    call. Whoever asks looks at further inputs."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[What, int]] = {}

    def remember(self, call: Call | ProgramCall, scales: Sequence[float | None], what: What) -> None:
        """``what``: of calls without gradients like one that was checked, with one of these scales (None: they give none)."""
        if len(self._known) >= MOST:
            self._known.clear()
        q, k, v, domain = call.q, call.k, call.v, call.domain
        # Integers were checked for all lengths up to the next power of two (analysis.exactness).
        longest = 1 << (max(domain.q_offset + domain.rows, domain.kv_len) - 1).bit_length()
        for scale in scales:
            self._known[(*q.shape, k.shape[1], v.shape[3], q.dtype, scale)] = what, longest

    def find(self, q: Any, k: Any, v: Any, q_offset: Any, scale: Any) -> tuple[What, int] | None:
        """What is known of a call, and the position of its first query; None: the ordinary call is to look at it. ``q_offset`` and
        ``scale`` as they are given to a call."""
        if not type(q) is type(k) is type(v) is Tensor or modes_active() or transforms_active() or autocast_anywhere():
            return None
        shapes = q.shape, k.shape, v.shape
        if [*map(len, shapes)] != _FOUR:
            return None
        (batch, heads, rows, width), (k_batch, kv_heads, keys, k_width), (v_batch, v_heads, v_keys, v_width) = shapes
        try:
            known = self._known.get((batch, heads, rows, width, kv_heads, v_width, q.dtype, scale))
        except TypeError:  # a scale that is no number
            return None
        if known is None or not (
            k_batch == v_batch == batch and v_heads == kv_heads and v_keys == keys and k_width == width
            and k.dtype is v.dtype is q.dtype and q.is_cpu and k.is_cpu and v.is_cpu
        ):  # fmt: skip
            return None
        if type(q_offset) is not int:
            # Without an offset before more keys the ordinary call warns.
            last = (q_offset is None and rows == keys) or (isinstance(q_offset, str) and q_offset == "end")
            q_offset = keys - rows if last else -1
        what, longest = known
        if not 0 <= q_offset <= keys - rows or keys > longest or (rows > 1 and heads > keys):
            return None
        if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
            return None
        return None if in_context_parallel() else (what, q_offset)


_FOUR = [4, 4, 4]
