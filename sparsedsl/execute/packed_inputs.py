"""What packed calls are given and give back: rows of all requests, and tables and inputs as each request gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.program.axes import base_of, block_of, windows_of
from sparsedsl.program.graph import Program
from sparsedsl.program.tensors import Input
from sparsedsl.runtime.call import FLOATS, wants_grad
from sparsedsl.runtime.packed_rows import Requests

if TYPE_CHECKING:
    from sparsedsl.execute.calls import Calls

__all__ = ["PagedRows", "given_back", "inputs_by_request", "refuse_gradients", "rows_first", "wants_lse"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class PagedRows:
    """How inputs with rows for keys lie where the keys lie in pages: in pools of ``pages`` pages for ``page`` keys each, found by ``table``
    ``(R, width)``. ``layout``: of a page, as that of the pools of keys."""

    table: Tensor
    pages: int
    page: int
    layout: str


def inputs_by_request(
    program: Program, named: Mapping[str, Any], requests: Requests, kv_ends: Tensor | PagedRows
) -> Callable[[int], Mapping[str, Any]]:  # fmt: skip
    """Request -> its tables, which are those of the call, and its part of the inputs. ``kv_ends``: where keys end in their row, or how
    they lie in pages.

    Raises:
        ShapeError: an input is of another number of rows, pages or requests. UnsupportedError: of rows that cannot be cut.
    """
    named = by_kept_name(named, program.tables)
    rows = {"queries": requests.ends.tolist(), "keys": kv_ends if isinstance(kv_ends, PagedRows) else kv_ends.tolist()}
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
    pools = rows["keys"]
    if len(counted) == 1 and base_of(axis) == "keys" and isinstance(pools, PagedRows):
        return _out_of_pages(node, value, dim, axis, pools, requests)
    if len(counted) > 1 or axis not in ("queries", "keys"):
        raise UnsupportedError(
            f"input {node.name!r} has an axis {axis!r}, whose blocks begin anew in each request: a packed call cannot cut it. Call the "
            "program for each request"
        )
    ends = rows[axis]
    if value.shape[0] != 1 or value.shape[dim] < ends[-1]:
        raise ShapeError(
            f"input {node.name!r} must have a batch of 1 and its {axis} behind each other, {ends[-1]} of them; got {tuple(value.shape)}"
        )
    return lambda number: value.narrow(dim, ends[number], ends[number + 1] - ends[number])


def rows_first(name: str, x: Any, layout: str) -> Tensor:
    """``(T, H, D)`` -> ``(1, H, T, D)``, a view."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        wanted = "(tokens, heads, head_dim)" if layout == "thd" else "(heads, tokens, head_dim)"
        raise ShapeError(f"{name} must be a tensor {wanted}, requests behind each other; got {shown(x)}")
    if x.dtype not in FLOATS:
        raise ShapeError(f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}")
    return (x.transpose(0, 1) if layout == "thd" else x)[None]


def given_back(out: Tensor, lse: Tensor | None, requests: Requests, wanted: bool, layout: str) -> Any:
    """Results as the call gives them; rows of no request see nothing, not even a sink."""
    out = out[0].transpose(0, 1) if layout == "thd" else out[0]
    if not wanted or lse is None:
        return out
    owner, _ = requests.owners()
    return out, torch.where((owner < requests.count).to(lse.device), lse[0], float("-inf"))


def wants_lse(calls: Calls, wanted: bool) -> bool:
    """``wanted``, where there is one."""
    if wanted and not calls.has_lse:
        raise UnsupportedError(str(calls.refused_use(grad=False, lse=True)))
    return bool(wanted)


def refuse_gradients(*given: Any) -> None:
    """Calls over pages are forward only."""
    if wants_grad(*(x for x in given if isinstance(x, Tensor))):
        raise UnsupportedError(
            "paged() is forward only, and q, a pool or a table wants gradients: call it under torch.no_grad(), or train on rows behind "
            "each other, with ragged()"
        )


def _out_of_pages(
    node: Input, value: Tensor, dim: int, axis: str, pools: PagedRows, requests: Requests
) -> Callable[[int], Tensor]:  # fmt: skip
    """The rows of a request of an input that lies in a pool of its own, ``(pages, ..)``, with as many rows a page as it has blocks of keys:
    of blocks that are over. Where a block takes several pages, its row is with the last one."""
    block = 0 if windows_of(axis) is not None else block_of(axis)
    if not block or (pools.page % block and block % pools.page) or node.axes[:1] != ("batch",):
        raise UnsupportedError(
            f"input {node.name!r} has an axis {axis!r}, and keys lie in pages of {pools.page}: its rows have a place there if one is a "
            "multiple of the other. Use ragged(), or call the program for each request"
        )
    rows, each = max(pools.page // block, 1), max(block // pools.page, 1)
    at = 1 if len(node.axes) == 4 and dim == 2 and pools.layout == "nhd" else dim
    if value.shape[0] != pools.pages or value.shape[at] != rows:
        order = list(node.axes[1:dim]) + list(node.axes[dim + 1 :])
        order.insert(at - 1, str(rows))
        raise ShapeError(
            f"input {node.name!r} has rows for keys, which lie in pages: it must be a pool of its own, "
            f"({pools.pages}, {', '.join(order)}), {rows} for each page of {pools.page} keys; got {tuple(value.shape)}"
        )
    lens = requests.kv_lens.tolist()

    def of(number: int) -> Tensor:
        over = lens[number] // block
        ends = pools.table[number, each - 1 :: each][: -(-over // rows)].clamp(0, max(pools.pages - 1, 0))
        return value[ends.to(value.device)].movedim(at, 1).flatten(0, 1)[:over].movedim(0, dim - 1)[None]

    return of
