"""The arguments of a call made ready: what cannot be told apart from a mistake is refused or warned of, what has one meaning is filled in.

Runs before a call is checked or becomes part of a graph, so nothing here looks at values.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from sparsedsl.errors import CallWarning, ShapeError, TableError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import relates_positions
from sparsedsl.runtime.torch_modes import autocast_inputs, in_context_parallel

__all__ = ["arranged", "joined_tables", "warn_of_slips"]

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


def joined_tables(named: dict[str, Any], tables: Any) -> dict[str, Any]:
    """Tables that a call was given by keyword, and those of its ``tables=``, whose names may be words of the call too."""
    if tables is None:
        return named
    if isinstance(tables, Tensor):  # of a table that is called so
        return {**named, "tables": tables}
    if not isinstance(tables, Mapping):
        raise TableError(
            f"tables must be a mapping, name -> tensor, of tables whose names are words of the call; got {shown(tables)}"
        )
    twice = [name for name in tables if name in named]
    if twice:
        raise TableError(f"table {twice[0]!r} is given twice, by keyword and in tables=")
    return {**named, **tables}


def _refuse_distributed(*tensors: Any) -> None:
    """Indices of a shard count from 0, so that a pattern would mean something else on it."""
    distributed: Any = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and any([isinstance(t, distributed.DTensor) for t in tensors]):
        raise UnsupportedError(
            "q, k and v must be plain tensors; got a DTensor, of which choices() cannot be asked: ask of q.to_local(), k.to_local() and "
            "v.to_local(), or of q.full_tensor() and so on"
        )
    if in_context_parallel():
        raise UnsupportedError(
            "this call is made inside of torch's context_parallel(), where every rank holds a shard of the tokens in another order: "
            "positions would be wrong. Call it outside of context_parallel(): with rows placed by sd.parallel.plan(...) and "
            "cp=plan.on(mesh), or on all tokens, with shards of the batch or the heads"
        )


_TOLD: set[Any] = set()


def _warn_once(key: Any, text: str) -> None:
    if key not in _TOLD:
        _TOLD.add(key)
        warnings.warn(text, CallWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """How far up the first frame outside of this package is: a warning names the line of whoever called."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "sparsedsl":
        frame, level = frame.f_back, level + 1
    return level


def warn_of_slips(parts: tuple[Any, ...], q: Any, k: Any, q_offset: Any, layout: str = "bhsd") -> None:
    """Warn, once a program, of calls that have a meaning, but rarely the one that is wanted. ``q_offset`` is as it was given.

    ``parts``: the patterns and masks of what is called. ``layout``: of the call; ``q`` and ``k`` are given heads first.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and q.ndim == k.ndim == 4):
        return
    (_, heads, rows, _), (_, kv_heads, keys, _) = q.shape, k.shape
    if heads == kv_heads and rows > 1 and keys > 1 and heads > max(rows, keys):
        _warn_once(("layout", layout), _slip_of_layout(q, k, layout))
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


def _slip_of_layout(q: Tensor, k: Tensor, layout: str) -> str:
    heads, rows = q.shape[1:3]
    if layout == "bshd":
        shapes = (tuple(x.transpose(1, 2).shape) for x in (q, k))
        read, instead = (
            "(batch, tokens, heads, head_dim), as layout='bshd' has it",
            "heads stand before the tokens, leave layout= out",
        )
    else:
        shapes, read = (tuple(x.shape) for x in (q, k)), "(batch, heads, tokens, head_dim)"
        instead = (
            "the layout is (batch, tokens, heads, head_dim), say so: sd.compile(..., layout='bshd'), or pass q.transpose(1, 2), "
            "k.transpose(1, 2), v.transpose(1, 2)"
        )
    return f"q {next(shapes)} and k {next(shapes)} are read as {read}: {heads} heads of {rows} tokens. If {instead}"


def _relates(parts: tuple[Any, ...]) -> bool:
    return any(relates_positions(expr) for part in parts for expr in part.exprs)
