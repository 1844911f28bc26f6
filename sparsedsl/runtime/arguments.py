"""The arguments of a call made ready: what cannot be told apart from a mistake is refused or warned of, what has one meaning is filled in.

Runs before a call is checked or becomes part of a graph, so nothing here looks at values.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from sparsedsl.errors import CallWarning, ShapeError, UnsupportedError
from sparsedsl.lang.pattern import relates_positions
from sparsedsl.runtime.torch_modes import autocast_inputs, in_context_parallel

__all__ = ["arranged", "warn_of_slips"]

Tensor = torch.Tensor


def arranged(q: Any, k: Any, v: Any, q_offset: Any, *, compiling: bool = False) -> tuple[Any, Any, Any, Any]:
    """``q, k, v`` in the dtype they are computed in and with one batch size, and the position of the first query.

    ``k`` and ``v`` of batch 1 serve every batch entry of ``q``, without a copy. ``q_offset`` None is 0; ``"end"`` puts the last query at
    the last key. What is no tensor or has no batch is left for the check of the call.
    ``compiling``: within ``torch.compile``, which follows no look at values.
    """
    if not compiling:
        _refuse_distributed(q, k, v)
    q, k, v = autocast_inputs(q, k, v)
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.ndim == k.ndim == v.ndim == 4:
        if k.shape[0] == v.shape[0] == 1 != q.shape[0]:
            k, v = (t.expand(q.shape[0], -1, -1, -1) for t in (k, v))
        if isinstance(q_offset, str) and q_offset == "end":
            q_offset = k.shape[2] - q.shape[2]
            if not compiling and q_offset < 0:
                raise ShapeError(
                    f"q_offset='end' puts the last query at the last key: there must be no more queries than keys; got {q.shape[2]} "
                    f"queries and {k.shape[2]} keys"
                )
    return q, k, v, 0 if q_offset is None else q_offset


def _refuse_distributed(*tensors: Any) -> None:
    """Indices of a shard count from 0, so that a pattern would mean something else on it."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and any([isinstance(t, distributed.DTensor) for t in tensors]):
        raise UnsupportedError(
            "q, k and v must be plain tensors; got a DTensor, whose shards do not know which heads and positions they hold. Shards of the "
            "batch: call it within torch.distributed.tensor.experimental.local_map, or on q.to_local(), k.to_local(), v.to_local(). "
            "Shards of anything else: q.full_tensor() and so on first"
        )
    if in_context_parallel():
        raise UnsupportedError(
            "this call is made inside of torch's context_parallel(), where every rank holds a shard of the tokens in another order: "
            "positions would be wrong. Call it outside of context_parallel(), on all tokens; shard the batch or the heads instead"
        )


_TOLD: set[Any] = set()


def _warn_once(key: Any, text: str) -> None:
    if key not in _TOLD:
        _TOLD.add(key)
        warnings.warn(text, CallWarning, stacklevel=4)


def warn_of_slips(parts: tuple[Any, ...], q: Any, k: Any, q_offset: Any) -> None:
    """Warn, once a program, of calls that have a meaning, but rarely the one that is wanted. ``q_offset`` is as it was given.

    ``parts``: the patterns and masks of what is called.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and q.ndim == k.ndim == 4):
        return
    (_, heads, rows, _), (_, kv_heads, keys, _) = q.shape, k.shape
    if heads == kv_heads and rows > 1 and keys > 1 and heads > max(rows, keys):
        _warn_once(
            "layout",
            f"q {tuple(q.shape)} and k {tuple(k.shape)} are read as (batch, heads, tokens, head_dim): {heads} heads of {rows} tokens. If "
            "the layout is (batch, tokens, heads, head_dim), pass q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)",
        )
    if q_offset is None and rows < keys:
        if _relates(parts):
            _warn_once(
                ("offset", parts),
                f"q has {rows} tokens and k has {keys}, the pattern compares their positions, and no q_offset was given: the first query "
                f"is taken to stand at position 0. If these are the last tokens, as in decoding, pass q_offset='end' (or "
                f"{keys - rows}, the position of the first query); if they are the first, pass q_offset=0",
            )
    elif (
        isinstance(q_offset, int)
        and not isinstance(q_offset, bool)
        and q_offset > 0
        and q_offset + rows > keys
        and _relates(parts)
    ):
        _warn_once(
            ("beyond", parts),
            f"q_offset={q_offset} puts the last of {rows} queries at position {q_offset + rows - 1}, beyond the last of {keys} keys, at "
            f"{keys - 1}. With k and v up to and including the new tokens, pass q_offset='end' (or {max(keys - rows, 0)})",
        )


def _relates(parts: tuple[Any, ...]) -> bool:
    return any(relates_positions(expr) for part in parts for expr in part.exprs)
