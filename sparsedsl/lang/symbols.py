"""The symbols a pattern is written in. All are non-negative integers, except ``SCORE``, the scaled logit."""

from __future__ import annotations

import sympy

__all__ = ["BATCH", "HEAD", "INDEX_SYMBOLS", "KV_IDX", "KV_LEN", "Q_IDX", "Q_LEN", "RESERVED_NAMES", "SCORE"]

BATCH = sympy.Symbol("b", integer=True, nonnegative=True)
HEAD = sympy.Symbol("h", integer=True, nonnegative=True)
# Positions, not rows: with ``q_offset=n`` the first query of a call has ``q_idx == n``.
Q_IDX = sympy.Symbol("q_idx", integer=True, nonnegative=True)
KV_IDX = sympy.Symbol("kv_idx", integer=True, nonnegative=True)
# ``q_len`` is the position after the last query of the call (``q_offset`` + rows), so ``q_idx < q_len`` always holds.
Q_LEN = sympy.Symbol("q_len", integer=True, positive=True)
KV_LEN = sympy.Symbol("kv_len", integer=True, positive=True)
SCORE = sympy.Symbol("score", real=True)

INDEX_SYMBOLS = {s.name: s for s in (BATCH, HEAD, Q_IDX, KV_IDX, Q_LEN, KV_LEN)}

# Call-time keywords of the public functions; a table with such a name could not be passed.
RESERVED_NAMES = frozenset(
    {*INDEX_SYMBOLS, "score", "q", "k", "v", "q_offset", "return_lse", "scale", "batch", "heads", "kv_heads"}
    | {"block_size", "device", "dtype", "head_dim", "head_dim_v", "pattern", "mask", "backend", "self"}
)
