"""Checks of the library's arguments. Every message names function and argument, what was got and what was wanted."""

from __future__ import annotations

import numbers
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.expressions import Index, Score, as_score
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.table_reads import Table

__all__ = [
    "check_choice",
    "check_count",
    "check_counts",
    "check_flag",
    "check_head_logit",
    "check_logit",
    "check_positive",
    "check_whole",
]


def check_whole(function: str, name: str, value: object, least: int, why: str = "") -> int:
    """A Python whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise PatternError(f"{function}(): {name} must be a whole number; got {value!r} ({type(value).__name__})")
    if value < least:
        reason = f" ({why})" if why else ""
        raise PatternError(f"{function}(): {name} must be at least {least}{reason}; got {value}")
    return int(value)


def check_count(function: str, name: str, value: object, least: int, why: str = "") -> Any:
    """A whole number of at least ``least``, or an index expression such as ``table[h]``: values known at the call."""
    if isinstance(value, Table):
        table = value.spec.name
        raise PatternError(
            f"{function}(): {name} is the table {table!r} itself; read it, for one value per head {table}[sd.h], "
            f"for one per batch entry {table}[sd.b]"
        )
    if isinstance(value, Index):
        if value.expr.is_Integer:
            return check_whole(function, name, int(value.expr), least, why)
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise PatternError(
            f"{function}(): {name} must be a whole number or an index expression such as table[sd.h]; "
            f"got {value!r} ({type(value).__name__})"
        )
    return check_whole(function, name, value, least, why)


def check_counts(function: str, name: str, value: object, axes: int, least: int, why: str = "") -> tuple[int, ...]:
    """One whole number for all axes, or a tuple with one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise PatternError(f"{function}(): {name} must be a whole number or {axes} of them, one for each axis; got {value!r}")
    return tuple(check_whole(function, name, part, least, why) for part in values)


def check_flag(function: str, name: str, value: object) -> bool:
    """``True`` or ``False``."""
    if not isinstance(value, bool):
        raise PatternError(f"{function}(): {name} must be True or False; got {value!r} ({type(value).__name__})")
    return value


def check_choice(function: str, name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of a few words."""
    return check_word(f"{function}(): {name}", value, choices)


def check_positive(function: str, name: str, value: object) -> int | float:
    """A positive, finite Python number; whole ones become ``int``, which stays exact: ``score / 50``, not ``0.02 * score``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < float("inf"):
        raise PatternError(f"{function}(): {name} must be a positive number; got {value!r} ({type(value).__name__})")
    number = float(value)
    return int(number) if number.is_integer() else number


def check_head_logit(function: str, name: str, value: object) -> Score:
    """A logit that is the same for all pairs of a head: a number, or an expression over ``b`` and ``h``."""
    found = as_score(value, where=f"{function}(): {name}")
    if found.expr.free_symbols - {BATCH, HEAD}:
        raise PatternError(f"{function}(): {name} must be a number or an expression over h (and b); got {found}")
    return found


def check_logit(function: str, value: object) -> Score:
    """What a score function is applied to: an expression in ``sd.score``."""
    return as_score(value, where=f"{function}(): logit")
