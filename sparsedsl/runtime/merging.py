"""Attention over parts of the keys -> attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.lang.advice import shown
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.heads import NEVER, lse_merge

__all__ = ["merge"]

Tensor = torch.Tensor


def merge(*parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over keys that were attended to in parts: ``merge((out, lse), (out, lse), ..) -> (out, lse)``.

    Each part is what ``attn(q, k, v, return_lse=True)`` gives for the same queries over keys of its own; keys that are in two parts
    count twice. It is exact: the parts of the keys may be chunks, the devices that hold them, or what a cache has and what is new.

    Args:
        parts: one or more pairs of out ``(.., S, Dv)`` and lse ``(.., S)``, the natural logarithm of the sum; all of the same shapes.

    Returns:
        out ``(.., S, Dv)`` in the dtype of the outputs, lse ``(.., S)`` in float32, or float64 where a part is float64; what is computed
        is computed in that. Gradients flow to all outputs and LSEs. A row whose LSE is -inf is empty, and nothing of its out is read;
        where a row is empty in all parts, out is 0 and lse -inf.

    Raises:
        ShapeError: no part, or parts that are no pairs of tensors of matching shapes.

    The weights are ``exp(lse_part - lse)``. Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax" (arXiv
    1805.02867).

    >>> import torch, sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.sliding_window(8))
    >>> q, k, v = (torch.randn(1, 2, 16, 4) for _ in range(3))
    >>> whole, lse = attn(q, k, v, return_lse=True)
    >>> near, far = ((sd.q_idx - sd.kv_idx < 4), (sd.q_idx - sd.kv_idx >= 4))
    >>> halves = [sd.attention(q, k, v, sd.patterns.sliding_window(8) & half, return_lse=True) for half in (near, far)]
    >>> torch.testing.assert_close(sd.merge(*halves), (whole, lse))
    """
    if not parts:
        raise ShapeError("merge() wants at least one (out, lse)")
    for number, part in enumerate(parts):
        _check(number, part, parts[0])
    outs, lses = zip(*parts, strict=True)
    dtype = outs[0].dtype
    for out in outs:
        dtype = torch.promote_types(dtype, out.dtype)
    wide = max((accumulated(t.dtype) for t in (*outs, *lses)), key=lambda kind: kind.itemsize)
    # What engines leave in rows without keys may be anything, NaN too.
    kept = [
        (torch.where((lse == NEVER)[..., None], 0.0, out.to(wide)), lse.to(wide)) for out, lse in zip(outs, lses, strict=True)
    ]
    merged, total = lse_merge(kept)
    return merged.to(dtype), total


def _check(number: int, part: Any, first: Any) -> None:
    if isinstance(part, (tuple, list)) and part and all(isinstance(inner, (tuple, list)) for inner in part):
        raise ShapeError("merge() takes the parts one by one, not in a list; write merge(*parts)")
    if not isinstance(part, (tuple, list)) or len(part) != 2 or not all(isinstance(t, Tensor) for t in part):
        raise ShapeError(
            f"merge(): part {number} must be a pair of tensors (out, lse), as return_lse=True gives it; got {shown(part)}"
        )
    out, lse = part
    if not (out.is_floating_point() and lse.is_floating_point()):
        raise ShapeError(f"merge(): out and lse must be floating-point; part {number} has {out.dtype} and {lse.dtype}")
    if out.shape[:-1] != lse.shape or out.ndim < 2:
        raise ShapeError(
            f"merge(): part {number} has out {tuple(out.shape)} and lse {tuple(lse.shape)}; wanted out (.., S, Dv) and lse (.., S). With "
            "layout='bshd' pass out.transpose(1, 2)"
        )
    if out.shape != first[0].shape or lse.device != out.device or out.device != first[0].device:
        raise ShapeError(
            f"merge(): parts must have one shape and device; part 0 has {tuple(first[0].shape)} on {first[0].device}, part {number} "
            f"{tuple(out.shape)} on {out.device} with its lse on {lse.device}"
        )
