"""The symbols a pattern is written in. All are non-negative integers, except ``SCORE``, the scaled logit."""

from __future__ import annotations

import sympy

__all__ = [
    "BATCH",
    "CALL_WORDS",
    "HEAD",
    "INDEX_SYMBOLS",
    "KV_IDX",
    "KV_LEN",
    "Q_IDX",
    "Q_LEN",
    "RESERVED_NAMES",
    "SCORE",
    "SYMBOL_NAMES",
]

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

# A table that is called so is kept as `h_table`: a formula is worked out with indices and tables by their names.
SYMBOL_NAMES = frozenset({*INDEX_SYMBOLS, "score"})

# What a call of a compiled pattern takes by keyword: a table with such a name is bound, or passed as `tables={"scale": tensor}`.
CALL_WORDS = frozenset(
    ("q", "k", "v", "q_offset", "return_lse", "scale", "state", "return_state", "summaries", "tables")
    + ("q_positions", "kv_positions", "head_offset", "heads", "whole", "cp")
)

# Names that inputs of programs do not have, and that tables found by tracing are not given: they stand for themselves in text forms,
# or are words of the public functions.
RESERVED_NAMES = frozenset(
    {*SYMBOL_NAMES, "q", "k", "v", "q_offset", "return_lse", "scale", "batch", "heads", "kv_heads"}
    | {"block_size", "device", "dtype", "head_dim", "head_dim_v", "pattern", "mask", "backend", "self"}
)
