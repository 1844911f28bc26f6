"""A gated scan token by token: a step of decoding, and calls whose numbers are not all finite, where a product of many rows would let
what a query does not see spread."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.runtime.heads import repeat_kv

__all__ = ["token_by_token"]

Tensor = torch.Tensor


def token_by_token(queries: Any, keys: Any, states: Any, *, scale: float) -> Any:
    """A step of :func:`sparsedsl.backends.tiled.scan_chunked.scan`; see :mod:`sparsedsl.backends.tiled.scan_gated` for what it takes."""
    (q,), (k, v, log_decay, beta, erase, begins), (state,) = queries, keys, states
    heads = state.shape[1]
    rows, groups = q.shape[2], max(1, q.shape[1] // heads)
    q = (repeat_kv(q, max(heads, q.shape[1])).to(state.dtype) * scale).unflatten(1, (heads, groups))  # (B, H, G, Sq, D)
    k, v, erase = (repeat_kv(t, heads).to(state.dtype) for t in (k, v, k if erase is None else erase))
    kept = repeat_kv(log_decay, heads).to(state.dtype).exp()
    kept = (kept[..., None] if kept.ndim == 3 else kept)[..., None]  # (B, H, Skv, D or 1, 1)
    share = None if beta is None else repeat_kv(beta, heads).to(state.dtype)[..., None]
    found = []
    for token in range(k.shape[2]):
        key, value, decay = k[:, :, token], v[:, :, token], kept[:, :, token]
        if begins is not None:
            state = torch.where(begins[:, :, token, None, None], 0.0, state)
        state = torch.where(decay == 0, 0.0, decay * state)
        if share is not None:
            value = share[:, :, token] * (value - (erase[:, :, token, None] @ state)[:, :, 0])
        state = torch.addcmul(state, key[..., None], value[:, :, None])
        if rows:
            found.append(q[:, :, :, token] @ state)
    return ((torch.stack(found, 3).flatten(1, 2),) if rows else ()), (state,)
