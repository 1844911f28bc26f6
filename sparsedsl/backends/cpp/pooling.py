"""One row for every block of tokens, in C++: the keys are read once, for the least and the greatest together too."""

from __future__ import annotations

import struct

import torch

from sparsedsl.backends.cpp.attention import rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import KINDS, place_fields, place_of
from sparsedsl.backends.cpp.libraries import fixed_library, parallel
from sparsedsl.runtime.dtypes import accumulated

__all__ = ["pooled_rows"]

Tensor = torch.Tensor
_CALL = struct.Struct("=21q")
# As in codegen/cpp/pooling.cpp.
_HOWS = {"mean": 0, "sum": 1, "max": 2, "min": 3, "bounds": 4}


def pooled_rows(x: Tensor, block: int, how: str, pad: str, places: Tensor | None = None) -> Tensor | None:
    """See :class:`sparsedsl.selection.proxies.Pool`; of a tensor on the CPU of which nobody wants gradients."""
    number = _HOWS.get(how)
    if number is None or x.dtype not in KINDS or not x.numel():
        return None
    x = rows_without_gaps(x)
    (batch, own_heads, length, width), heads = x.shape, x.shape[1]
    places = None if places is None else places.to(torch.int32).contiguous()
    where = place_fields(places, length)
    if places is not None:
        heads, length = max(own_heads, places.shape[1]), places.shape[2]
    real = accumulated(x.dtype)
    shape = (batch, heads, -(-length // block), width)
    bounds = how == "bounds"
    to = torch.empty((2, *shape) if bounds else shape, dtype=real)
    first = to.data_ptr()
    call = _CALL.pack(
        *place_of(x), KINDS[x.dtype], own_heads, batch, heads, length, width, block, number, int(pad == "zero"), first,
        first + to.nbytes // 2 if bounds else 0, *where, torch.get_num_threads(), parallel(),
    )  # fmt: skip
    if fixed_library("choosing", real == torch.float64).pool_blocks(call) < 0:
        raise MemoryError("pooling blocks found no memory for a block of rows")
    return to
