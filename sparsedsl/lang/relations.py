"""Comparisons and powers in one form: what sympy is given for ``<``, ``==``, ``**`` of indices and scores."""

from __future__ import annotations

import math
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from sparsedsl.lang import functions as fn
from sparsedsl.lang.known_facts import HIGHEST, facts
from sparsedsl.lang.symbols import KV_IDX, Q_IDX

__all__ = ["one_form", "raised", "relation_of", "unstrict"]


def relation_of(relation: Any, left: sympy.Expr, right: sympy.Expr) -> Boolean:
    """``left (relation) right`` in one form for integers: linear terms left, the constant right, ``<=``, ``>=``, ``==``, ``!=``."""
    if not (left.is_integer and right.is_integer):
        return relation(left, right)
    difference = left - right
    constant, terms = (sympy.expand(difference) if _terms(difference) <= 1000 else difference).as_coeff_Add()
    limit = -constant
    if relation is sympy.Lt:
        relation, limit = sympy.Le, limit - 1
    elif relation is sympy.Gt:
        relation, limit = sympy.Ge, limit + 1
    content, primitive = terms.as_content_primitive()
    if not (content.is_Integer and content > 0 and primitive.is_integer):
        content, primitive = sympy.Integer(1), terms
    if _leads_negative(primitive):
        content, primitive = -content, -primitive
    if content < 0:
        flipped = {sympy.Le: sympy.Ge, sympy.Ge: sympy.Le}
        content, limit, relation = -content, -limit, flipped.get(relation, relation)
    if relation is sympy.Le:
        limit = sympy.floor(limit / content)
    elif relation is sympy.Ge:
        limit = sympy.ceiling(limit / content)
    elif limit % content:
        return sympy.false if relation is sympy.Eq else sympy.true
    else:
        limit = limit / content
    low, high = fn.signs(primitive)
    outside = {sympy.Le: low > limit, sympy.Ge: high < limit}.get(relation, bool(low > limit or high < limit))
    always = {sympy.Le: high <= limit, sympy.Ge: low >= limit}.get(relation, bool(low == high == limit))
    if outside or always:
        return sympy.true if bool(always) == (relation is not sympy.Ne) else sympy.false
    return relation(primitive, limit, evaluate=False)


def _terms(expr: sympy.Expr) -> int:
    """How many terms ``expr`` has when it is multiplied out, at most."""
    if isinstance(expr, sympy.Add):
        return sum(map(_terms, expr.args))
    if isinstance(expr, sympy.Mul):
        return math.prod(map(_terms, expr.args))
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        return math.comb(_terms(expr.base) + int(expr.exp) - 1, int(expr.exp))
    return 1


def raised(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """``base**exponent`` of scores; of numbers too long for digits as a float."""
    if base.is_Rational and exponent.is_Rational and abs(exponent) > HIGHEST:
        base, exponent = sympy.Float(base), sympy.Float(exponent)
    factor, _ = base.as_coeff_Mul()
    plain = exponent.is_Number and exponent.is_finite and factor.is_finite and factor != 0 and not base.is_Number
    if plain and abs(exponent) * abs(math.log(abs(factor))) > 40:  # sympy would take factor**exponent out, which may be no float
        return sympy.Pow(base, exponent, evaluate=False)
    return base**exponent


def unstrict(condition: Boolean) -> Boolean:
    """``condition`` with ``<=`` or ``>=`` for the ``<`` or ``>`` between integers that sympy makes when it negates a comparison."""
    if isinstance(condition, (sympy.StrictLessThan, sympy.StrictGreaterThan)):
        return relation_of(type(condition), condition.lhs, condition.rhs)
    return condition


def one_form(condition: Boolean) -> Boolean:
    """``condition`` with every comparison of integers in the form that the operators give it; sympy's simplifier has its own."""
    made = condition.atoms(sympy.core.relational.Relational)
    return condition.xreplace({r: relation_of(type(r), r.lhs, r.rhs) for r in made if r.lhs.is_integer and r.rhs.is_integer})


def _leads_negative(terms: sympy.Expr) -> bool:
    """Whether the query index (else the key index) enters with a minus sign: the sign that ``relation_of`` normalises away."""
    for symbol in (Q_IDX, KV_IDX):
        coefficient = terms.coeff(symbol, 1)
        if coefficient.is_number and coefficient != 0:
            return bool(coefficient < 0)
        reading = [term.as_coeff_Mul() for term in sympy.Add.make_args(terms) if symbol in facts(term).symbols]
        if reading:
            coefficient, _ = min(reading, key=lambda pair: sympy.default_sort_key(pair[1]))
            return bool(coefficient < 0)
    return bool(terms.could_extract_minus_sign())
