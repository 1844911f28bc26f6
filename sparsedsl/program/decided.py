"""What a mask leaves to its choices: the pairs that a choice decides, which make its candidates."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import sympy

from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.relations import one_form
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.node import Node

__all__ = ["assume", "pairs_decided_by", "possible", "simplified"]


def _dynamic_atoms(expr: sympy.Basic, nodes: frozenset[str]) -> list[sympy.Basic]:
    """The relations of a mask that read tables of these names; of one and its negation the first."""
    relations = expr.atoms(sympy.core.relational.Relational)
    found = sorted((r for r in relations if any(read.spec.name in nodes for read in table_reads(r))), key=sympy.default_sort_key)
    return [atom for place, atom in enumerate(found) if sympy.Not(atom) not in found[:place]]


def assume(expr: sympy.Basic, truth: dict[str, bool]) -> Any:
    """``expr`` where the boolean tables named are known to be true or false everywhere."""
    relations = expr.atoms(sympy.core.relational.Relational)
    known = {}
    for relation in relations:
        reads = table_reads(relation)
        named = [read for read in reads if read.spec.name in truth and relation in (sympy.Ne(read, 0), sympy.Eq(read, 0))]
        if named:
            value = truth[named[0].spec.name]
            known[relation] = sympy.true if value == isinstance(relation, sympy.Ne) else sympy.false
    return expr.xreplace(known)


# Of so many other dynamic conditions all cases are looked at; beyond it candidates are all pairs.
MOST_CASES = 6


def pairs_decided_by(mask: Mask, label: str) -> tuple[Mask, Mask]:
    """The pairs that attend only if the boolean table ``label`` holds, and those that attend only if it does not, whatever other choices
    say: two static masks."""
    nodes, bound = _split(mask)
    added, removed = _decided(mask.expr, nodes, label)
    return Mask(added, bound), Mask(removed, bound)


def possible(mask: Mask) -> Mask:
    """The pairs that attend for some result of the nodes that the mask reads: a static mask that allows every pair the mask ever does.

    >>> import sparsedsl as sd
    >>> selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4)
    >>> possible((sd.kv_idx <= sd.q_idx) & ~selected)
    Mask(kv_idx <= q_idx)
    """
    nodes, bound = _split(mask)
    return Mask(_possible(mask.expr, nodes), bound)


def _split(mask: Mask) -> tuple[frozenset[str], dict[str, Any]]:
    """Names of the tables that are results of nodes, and the tensors bound to others."""
    nodes = frozenset(name for name, value in mask.bound.items() if isinstance(value, Node))
    return nodes, {name: value for name, value in mask.bound.items() if name not in nodes}


def _cases(atoms: list[sympy.Basic]) -> list[dict[sympy.Basic, Any]]:
    """Every assignment of truth to these conditions and to their negations, which are conditions of their own: ``Ne(x, 0)`` is no
    ``Not`` of ``Eq(x, 0)``, and one becomes the other where sympy simplifies."""
    truths = itertools.product((sympy.true, sympy.false), repeat=len(atoms))
    pairs = [dict(zip(atoms, values, strict=True)) for values in truths]
    return [known | {sympy.Not(atom): sympy.Not(value) for atom, value in known.items()} for known in pairs]


@functools.lru_cache(maxsize=256)
def _possible(expr: sympy.Basic, nodes: frozenset[str]) -> Any:
    atoms = _dynamic_atoms(expr, nodes)
    if len(atoms) > MOST_CASES:
        return sympy.true
    return simplified(sympy.Or(*[expr.xreplace(known) for known in _cases(atoms)]))


@functools.lru_cache(maxsize=256)
def _decided(expr: sympy.Basic, nodes: frozenset[str], label: str) -> tuple[Any, Any]:
    atoms = [atom for atom in _dynamic_atoms(expr, nodes) if label not in {read.spec.name for read in table_reads(atom)}]
    on, off = (assume(expr, {label: value}) for value in (True, False))
    if len(atoms) > MOST_CASES:
        return sympy.true, sympy.true
    cases = _cases(atoms)
    added = [sympy.And(on.xreplace(known), sympy.Not(off.xreplace(known))) for known in cases]
    removed = [sympy.And(off.xreplace(known), sympy.Not(on.xreplace(known))) for known in cases]
    return simplified(sympy.Or(*added)), simplified(sympy.Or(*removed))


# Conditions up to which a mask is simplified: truth tables double with each.
MOST_CONDITIONS = 8


def simplified(expr: sympy.Basic) -> Any:
    """A mask by as few conditions as there can be, each as the operators write it; long ones are only written so.

    Conditions are taken for propositions, of which one may be the negation of another: what they say of integers is not looked at.
    """
    conditions = sorted(_conditions(expr) - {sympy.true, sympy.false}, key=sympy.default_sort_key)
    if not 1 < len(conditions) <= MOST_CONDITIONS:
        return one_form(expr)
    known: dict[Any, Any] = {}
    for number, condition in enumerate(conditions):
        if condition not in known:
            symbol = sympy.Symbol(f"condition {number}")
            known |= {condition: symbol, sympy.Not(condition): sympy.Not(symbol)}
    meant = {symbol: condition for condition, symbol in known.items() if symbol.is_Symbol}
    return one_form(sympy.simplify_logic(expr.xreplace(known)).xreplace(meant))


def _conditions(expr: sympy.Basic) -> set[Any]:
    """The relations and boolean symbols that a mask joins."""
    if isinstance(expr, (sympy.And, sympy.Or, sympy.Not, sympy.Xor)):
        return set().union(*map(_conditions, expr.args))
    return {expr}
