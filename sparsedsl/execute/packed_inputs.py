"""Tables and inputs of a packed call, as each of its requests gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.program.axes import base_of
from sparsedsl.program.graph import Program
from sparsedsl.program.tensors import Input
from sparsedsl.runtime.packed_rows import Requests

__all__ = ["inputs_by_request"]

Tensor = torch.Tensor


def inputs_by_request(
    program: Program, named: Mapping[str, Any], requests: Requests, kv_ends: Tensor | None
) -> Callable[[int], Mapping[str, Any]]:  # fmt: skip
    """Request -> its tables, which are those of the call, and its part of the inputs. ``kv_ends``: where keys end in their row; None: keys
    lie in pages.

    Raises:
        ShapeError: an input is of another number of rows or requests. UnsupportedError: of blocks of rows, or of keys in pages.
    """
    named = by_kept_name(named, program.tables)
    rows = {"queries": requests.ends.tolist(), "keys": None if kv_ends is None else kv_ends.tolist()}
    parts = {}
    for name, node in program.inputs.items():
        value = named.get(name)
        if isinstance(value, torch.Tensor) and value.ndim == len(node.axes):
            parts[name] = _cut(node, value, rows, requests)

    def of(number: int) -> dict[str, Any]:
        return {**named, **{name: part(number) for name, part in parts.items()}}

    return of


def _cut(node: Input, value: Tensor, rows: Mapping[str, Any], requests: Requests) -> Callable[[int], Tensor]:
    """How a request's part is taken out of an input."""
    counted = [(dim, axis) for dim, axis in enumerate(node.axes) if base_of(axis) in ("queries", "keys")]
    if not counted:
        if node.axes[:1] != ("batch",):
            return lambda number: value
        if value.shape[0] not in (1, requests.count):
            raise ShapeError(
                f"input {node.name!r} must have a batch of {requests.count} requests, or 1; got {tuple(value.shape)}"
            )
        return lambda number: value if value.shape[0] == 1 else value[number : number + 1]
    dim, axis = counted[0]
    if len(counted) > 1 or axis not in ("queries", "keys"):
        raise UnsupportedError(
            f"input {node.name!r} has an axis {axis!r}, whose blocks begin anew in each request: a packed call cannot cut it. Call the "
            "program for each request"
        )
    ends = rows[axis]
    if ends is None:
        raise UnsupportedError(
            f"input {node.name!r} has a row for each key, and keys lie in pages here: a row of it has no place. Use ragged(), or call the "
            "program for each request"
        )
    if value.shape[0] != 1 or value.shape[dim] < ends[-1]:
        raise ShapeError(
            f"input {node.name!r} must have a batch of 1 and its {axis} behind each other, {ends[-1]} of them; got {tuple(value.shape)}"
        )
    return lambda number: value.narrow(dim, ends[number], ends[number + 1] - ends[number])
