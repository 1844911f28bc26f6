"""What a scan is given, checked, and where documents begin. Every refusal names the argument, what it got and what it wanted."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.runtime.call import FLOATS, check_shapes

__all__ = ["check_number", "check_position", "check_qkv", "check_rows", "check_tensor", "count_documents"]


def check_qkv(q: Any, k: Any, v: Any) -> None:
    """q, k and v fit each other."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, (None, None, None, None), "(batch, heads, length, head_dim)")
        if 0 in (tensor.shape[1], tensor.shape[3]):
            raise ShapeError(f"{name} has no heads or no head_dim: shape {tuple(tensor.shape)}; both must be at least 1")
    check_shapes(q, k, v)


def check_tensor(
    name: str, tensor: Any, shape: tuple[int | None, ...], words: str, *, like: torch.Tensor | None = None, dtypes: Any = FLOATS
) -> None:
    """A tensor of that shape (None: any size) and one of the dtypes, on the device of ``like``."""
    kinds = (
        "bool" if dtypes == (torch.bool,) else "float16, bfloat16, float32 or float64" if dtypes is FLOATS else "an integer type"
    )
    if not isinstance(tensor, torch.Tensor):
        raise ShapeError(f"{name} must be a torch tensor {words}; got {type(tensor).__name__}")
    fits = tensor.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in shape)
        raise ShapeError(f"{name} must have the shape {words}, here ({sizes}); got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ShapeError(f"{name} must be {kinds}; got {tensor.dtype}. Cast it: {name}.to(...)")
    if like is not None and tensor.device != like.device:
        raise ShapeError(
            f"{name} must be on {like.device}, as q is; got {tensor.device}. Move it: {name}.to({str(like.device)!r})"
        )


def check_number(name: str, value: object) -> float:
    """A positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < float("inf"):
        raise ShapeError(f"{name} must be a positive number; got {value!r}")
    return float(value)


def check_position(name: str, value: object) -> int:
    """A whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ShapeError(f"{name} must be a whole number of at least 0; got {value!r}")
    return int(value)


def check_rows(q: torch.Tensor, k: torch.Tensor, first: int) -> None:
    """The last query sees no further than the last key. ``first``: the last key that query row 0 sees."""
    last = first + q.shape[2] - 1
    if q.shape[2] and last >= k.shape[2]:
        raise ShapeError(
            f"the last of {q.shape[2]} queries sees keys up to position {last} (q_offset, less the delay, plus its row), but k and v hold "
            f"{k.shape[2]}: wanted keys for every position up to it. Pass all keys since the state was taken, or a smaller q_offset"
        )


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def count_documents(documents: Any, q: torch.Tensor, k: torch.Tensor, q_offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where documents begin ``(B or 1, Skv)`` and the number of each key's document; a document ends where the id changes.

    The first key begins none: it belongs to the document the state comes from.
    """
    check_tensor("documents", documents, (None, k.shape[2]), "(1 or B, Skv)", like=q, dtypes=_INTEGERS)
    if documents.shape[0] not in (1, q.shape[0]):
        raise ShapeError(f"documents must have 1 row or one a batch entry, {q.shape[0]}; got shape {tuple(documents.shape)}")
    if q.shape[2] and q_offset + q.shape[2] > k.shape[2]:
        raise UnsupportedError(
            f"documents name the document of every position, {k.shape[2]} of them, but queries stand at positions up to "
            f"{q_offset + q.shape[2] - 1}: pass keys and documents for all positions, or drop documents where there is one only"
        )
    begins = torch.zeros_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins, begins.cumsum(1)
