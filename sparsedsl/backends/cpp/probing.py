"""How much the last queries attend to each key, in C++: two passes over the keys, without queries x keys in memory."""

from __future__ import annotations

import struct

import torch

from sparsedsl.backends.cpp.attention import rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import KINDS, place_of
from sparsedsl.backends.cpp.libraries import fixed_library, parallel
from sparsedsl.runtime.dtypes import accumulated

__all__ = ["probed_keys"]

Tensor = torch.Tensor
# As in codegen/cpp/probing.cpp.
_CALL = struct.Struct("=20q2d4q")


@torch.no_grad()
def probed_keys(
    q: Tensor,
    k: Tensor,
    *,
    rows: int,
    causal: bool,
    scale: float,
    keys_normalised: int,
    keys_kept: int,
    q_offset: int,
    length: int,
) -> Tensor | None:
    """See :class:`sparsedsl.selection.proxies.Prober`; of tensors on the CPU."""
    heads = max(q.shape[1], k.shape[1])
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and heads % q.shape[1] == heads % k.shape[1] == 0
    if not fits or q.dtype not in KINDS or k.dtype not in KINDS or not (q.numel() and keys_kept):
        return None
    real = torch.promote_types(accumulated(q.dtype), accumulated(k.dtype))
    start = q.shape[2] - rows
    q, k = _as_read(q[:, :, start:], real), _as_read(k, real)
    to = torch.zeros((q.shape[0], heads, length), dtype=real)
    call = _CALL.pack(
        *place_of(q), KINDS[q.dtype], q.shape[1], *place_of(k), KINDS[k.dtype], k.shape[1], q.shape[0], heads, rows, q.shape[3],
        keys_normalised, keys_kept, int(causal), q_offset + start, scale, 1 / rows, to.data_ptr(), length, torch.get_num_threads(),
        parallel(),
    )  # fmt: skip
    if fixed_library("choosing", real == torch.float64).probe_keys(call) < 0:
        raise MemoryError("probing keys found no memory for the totals of its rows")
    return to


def _as_read(x: Tensor, real: torch.dtype) -> Tensor:
    """As the compiled code reads it: 16 bits wide, or as wide as the sums; rows without gaps."""
    if x.dtype is not real and not (KINDS[x.dtype] and real is torch.float32):
        x = x.to(real)
    return rows_without_gaps(x)
