"""``&``, ``|`` and ``^`` of many operands: the very objects that sympy would build, with the work for each operand done once.

sympy orders and rewrites all operands again for each one that is added, so that a loop over ``|`` takes cubic time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from sparsedsl.lang.known_facts import sort_key

__all__ = ["Xor", "join", "join_xor"]


class Xor(sympy.Xor):
    """sympy's, which puts its operands in order each time somebody asks for them, and compares every two of them when it is built."""

    in_language = True
    args = sympy.Basic.args

    def __new__(cls, *parts: Boolean, **_: Any) -> Boolean:
        return join_xor(parts)


def join(kind: type[sympy.And] | type[sympy.Or], parts: Iterable[Boolean]) -> Boolean:
    """``And`` or ``Or`` of ``parts``: nested ones are opened, equal ones dropped, and ``x <= 3 | x > 3`` is decided.

    >>> import sparsedsl as sd
    >>> parts = [(sd.kv_idx <= 3).expr, (sd.q_idx <= 3).expr, (sd.kv_idx > 3).expr]
    >>> join(sympy.Or, parts[:2]) == sympy.Or(*parts[:2]), join(sympy.Or, parts)
    (True, True)
    """
    found: dict[Boolean, None] = {}
    for part in parts:
        if part == kind.zero:
            return kind.zero
        if part != kind.identity:
            found.update(dict.fromkeys(part.args if isinstance(part, kind) else (part,)))
    kept: dict[Boolean, Boolean] = {}
    for part in sorted(found, key=sort_key):
        form, opposite = _forms(part)
        if opposite in kept:
            return kind.zero
        kept.setdefault(form, part)
    if len(kept) < 2:
        return next(iter(kept.values()), kind.identity)
    return _build(kind, kept.values())


def join_xor(parts: Iterable[Boolean]) -> Boolean:
    """``Xor`` of ``parts``: of what stands there twice nothing is left, and of ``x`` and its opposite ``True``."""
    kept: dict[Boolean, Boolean] = {}
    odd = False
    todo = list(parts)
    for part in todo:
        if isinstance(part, sympy.Xor):
            todo += part.args
            continue
        if part in (sympy.true, sympy.false):
            odd ^= part == sympy.true
            continue
        if isinstance(part, sympy.Not):
            odd = not odd
            todo.append(part.args[0])
            continue
        form, opposite = _forms(part)
        if opposite in kept:
            del kept[opposite]
            odd = not odd
        elif form in kept:
            del kept[form]
        else:
            kept[form] = part
    ordered = sorted(kept.values(), key=sort_key)
    if not ordered:
        return sympy.true if odd else sympy.false
    whole = ordered[0] if len(ordered) == 1 else _build(Xor, ordered)
    return sympy.Not(whole) if odd else whole


def _build(kind: Any, ordered: Iterable[Boolean]) -> Boolean:
    made = sympy.Basic.__new__(kind, *ordered)
    made._argset = frozenset(made._args)
    return made


@functools.lru_cache(maxsize=1 << 14)
def _forms(part: Boolean) -> tuple[Boolean, Boolean | None]:
    """The one form of ``part`` and of its opposite."""
    if not part.is_Relational:
        return part, None
    form = part.canonical
    opposite = form.negated
    # the opposite of n <= 3 is written n >= 4 in masks
    if isinstance(opposite, sympy.Gt) and all(side.is_integer for side in opposite.args):
        opposite = sympy.Ge(opposite.lhs, opposite.rhs + 1, evaluate=False)
    elif isinstance(opposite, sympy.Lt) and all(side.is_integer for side in opposite.args):
        opposite = sympy.Le(opposite.lhs, opposite.rhs - 1, evaluate=False)
    return form, opposite.canonical
