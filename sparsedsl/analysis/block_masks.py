"""Blocks of tokens inside a mask."""

from __future__ import annotations

import functools
from typing import Any

import sympy

from sparsedsl.lang.symbols import KV_IDX, Q_IDX

__all__ = ["constant_in_blocks"]


@functools.lru_cache(maxsize=512)
def constant_in_blocks(mask: Any, q_block: int, kv_block: int) -> bool:
    """Whether a mask reads queries and keys only by the blocks they lie in.

    >>> import sparsedsl as sd
    >>> earlier = (sd.kv_idx // 256 < sd.q_idx // 256).expr
    >>> constant_in_blocks(earlier, 128, 128), constant_in_blocks(earlier, 512, 128)
    (True, False)
    """

    def only_by_blocks(symbol: sympy.Symbol, block: int) -> bool:
        if block == 1:
            return True
        known = {
            read: sympy.Dummy(integer=True)
            for read in mask.atoms(sympy.floor)
            if (share := sympy.Wild("share", exclude=[0])) and (match := read.args[0].match(symbol * share)) is not None
            and match[share].is_Rational and match[share].p == 1 and match[share].q % block == 0
        }  # fmt: skip
        return symbol not in mask.xreplace(known).free_symbols

    return only_by_blocks(Q_IDX, q_block) and only_by_blocks(KV_IDX, kv_block)
