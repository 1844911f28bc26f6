"""Units of tokens inside a mask."""

from __future__ import annotations

import functools
from typing import Any

import sympy

from sparsedsl.lang.symbols import KV_IDX, Q_IDX

__all__ = ["constant_in_units"]


@functools.lru_cache(maxsize=512)
def constant_in_units(mask: Any, q_unit: int, kv_unit: int) -> bool:
    """Whether a mask reads queries and keys only by the units they lie in.

    >>> import sparsedsl as sd
    >>> earlier = (sd.kv_idx // 256 < sd.q_idx // 256).expr
    >>> constant_in_units(earlier, 128, 128), constant_in_units(earlier, 512, 128)
    (True, False)
    """

    def only_by_units(symbol: sympy.Symbol, unit: int) -> bool:
        if unit == 1:
            return True
        known = {
            read: sympy.Dummy(integer=True)
            for read in mask.atoms(sympy.floor)
            if (share := sympy.Wild("share", exclude=[0])) and (match := read.args[0].match(symbol * share)) is not None
            and match[share].is_Rational and match[share].p == 1 and match[share].q % unit == 0
        }  # fmt: skip
        return symbol not in mask.xreplace(known).free_symbols

    return only_by_units(Q_IDX, q_unit) and only_by_units(KV_IDX, kv_unit)
