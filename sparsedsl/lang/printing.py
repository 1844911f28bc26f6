"""Expressions as text: Python in the language itself. What ``str`` shows, :func:`sparsedsl.parse` reads.

Two forms: the canonical one, which keys and files are made of, and one for reading. One short method a node with explicit precedence; an
unknown node raises. Printers of generated code subclass :class:`Printer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead, table_specs

__all__ = ["Printer", "expression_text", "reading_text", "to_text"]

# Python's precedences, loosest first.
OR, XOR, AND, COMPARE, ADD, MULTIPLY, UNARY, POWER, ATOM = 1, 2, 3, 4, 6, 7, 8, 9, 10


class Printer:
    """sympy expression -> Python text. ``text(expr, level)`` adds brackets when ``expr`` binds looser than ``level``."""

    def text(self, expr: sympy.Basic, level: int = 0) -> str:
        """The text of ``expr``, bracketed if it binds looser than ``level``."""
        for kind in type(expr).__mro__:
            method: Callable[[Any], tuple[str, int]] | None = getattr(self, f"_print_{kind.__name__}", None)
            if method is not None:
                body, precedence = method(expr)
                return f"({body})" if precedence < level else body
        raise UnsupportedError(
            f"{type(self).__name__} has no rule for {type(expr).__name__} in {expr}; add a method _print_" + type(expr).__name__
        )

    def call(self, name: str, *arguments: sympy.Basic) -> tuple[str, int]:
        """A function call with printed arguments."""
        return f"{name}({', '.join(self.text(a) for a in arguments)})", ATOM

    def number(self, value: float) -> tuple[str, int]:
        """A float constant that reads back to the same value."""
        if value in (float("inf"), float("-inf")):
            return ("inf", ATOM) if value > 0 else ("-inf", UNARY)
        return repr(value), ATOM if value >= 0 else UNARY

    def _print_Symbol(self, expr: sympy.Symbol) -> tuple[str, int]:
        return expr.name, ATOM

    def _print_Integer(self, expr: sympy.Integer) -> tuple[str, int]:
        return str(int(expr)), ATOM if int(expr) >= 0 else UNARY

    def _print_Rational(self, expr: sympy.Rational) -> tuple[str, int]:
        return f"{expr.p} / {expr.q}", MULTIPLY

    def _print_Float(self, expr: sympy.Float) -> tuple[str, int]:
        return self.number(float(expr))

    def _print_Infinity(self, expr: sympy.Basic) -> tuple[str, int]:
        return self.number(float("inf"))

    def _print_NegativeInfinity(self, expr: sympy.Basic) -> tuple[str, int]:
        return self.number(float("-inf"))

    def _print_NumberSymbol(self, expr: sympy.NumberSymbol) -> tuple[str, int]:
        return self.number(float(expr))

    def _print_Add(self, expr: sympy.Add) -> tuple[str, int]:
        terms = sorted(expr.args, key=lambda t: (t.is_number, bool(t.could_extract_minus_sign())))
        parts = [self.text(terms[0], ADD)]
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            parts.append(f" - {self.text(-term, MULTIPLY)}" if minus else f" + {self.text(term, ADD)}")
        return "".join(parts), ADD

    def _print_Mul(self, expr: sympy.Mul) -> tuple[str, int]:
        numbers: list[sympy.Expr] = []
        plain: list[sympy.Expr] = []
        sums: list[sympy.Expr] = []
        under: list[sympy.Expr] = []
        coefficient, rest = expr.as_coeff_Mul()
        size = abs(coefficient)
        if isinstance(size, sympy.Rational):
            numbers += [sympy.Integer(size.p)] if size.p != 1 else []
            under += [sympy.Integer(size.q)] if size.q != 1 else []
        else:
            numbers.append(size)
        for factor in sympy.Mul.make_args(rest):
            if isinstance(factor, sympy.Pow) and factor.exp.is_Integer and factor.exp < 0:
                under.insert(0, factor.base ** (-factor.exp))
            else:
                (sums if isinstance(factor, sympy.Add) else plain).append(factor)
        # sympy distributes a number over a sum as soon as the two are a product of their own, which reading back must not make:
        # sums come last, integer divisors too, and a number before sums alone stands before a bracket.
        front = [self.text(number, UNARY) for number in numbers]
        over = [self.text(factor, UNARY) for factor in plain + sums]
        body = "".join(["*".join(over) or (front.pop() if front else "1"), *(f" / {self.text(f, UNARY)}" for f in under)])
        if not plain and len(sums) + len(under) > 1 and (front or coefficient.is_negative):
            body = f"({body})"
        text = "*".join([*front, body])
        return (f"-{text}", UNARY) if coefficient.is_negative else (text, MULTIPLY)

    def _print_Pow(self, expr: sympy.Pow) -> tuple[str, int]:
        if expr.exp.is_Integer and expr.exp < 0:
            return f"1 / {self.text(expr.base ** (-expr.exp), UNARY)}", MULTIPLY
        if expr.exp == sympy.Rational(1, 2):
            return self.call("sqrt", expr.base)
        return f"{self.text(expr.base, ATOM)}**{self.text(expr.exp, ATOM)}", POWER

    def _print_floor(self, expr: sympy.floor) -> tuple[str, int]:
        numerator, denominator = expr.args[0].as_numer_denom()
        return f"{self.text(numerator, MULTIPLY)} // {self.text(denominator, UNARY)}", MULTIPLY

    def _print_ceiling(self, expr: sympy.ceiling) -> tuple[str, int]:
        return f"-{self.text(sympy.floor(-expr.args[0]), UNARY)}", UNARY

    def _print_Mod(self, expr: sympy.Mod) -> tuple[str, int]:
        return f"{self.text(expr.args[0], MULTIPLY)} % {self.text(expr.args[1], UNARY)}", MULTIPLY

    def _print_BitAnd(self, expr: sympy.Basic) -> tuple[str, int]:
        return f"{self.text(expr.args[0], AND)} & {self.text(expr.args[1], COMPARE)}", AND

    def _print_Abs(self, expr: sympy.Basic) -> tuple[str, int]:
        return self.call("abs", *expr.args)

    def _print_Min(self, expr: sympy.Basic) -> tuple[str, int]:
        return self.call("minimum", *_ordered(expr.args))

    def _print_Max(self, expr: sympy.Basic) -> tuple[str, int]:
        return self.call("maximum", *_ordered(expr.args))

    def _print_Where(self, expr: sympy.Basic) -> tuple[str, int]:
        return self.call("where", *expr.args)

    def _print_Function(self, expr: sympy.Function) -> tuple[str, int]:
        name = type(expr).__name__.lower()
        if name not in fn.REAL_FUNCTIONS:
            raise UnsupportedError(f"{type(self).__name__} has no rule for the function {type(expr).__name__}")
        return self.call(name, *expr.args)

    def _print_StrictFunction(self, expr: strict.StrictFunction) -> tuple[str, int]:
        return self.call(type(expr).__name__, *expr.args)

    def _print_TableRead(self, expr: TableRead) -> tuple[str, int]:
        return f"{expr.spec.name}[{', '.join(self.text(a) for a in expr.args)}]", ATOM

    def _print_Relational(self, expr: Relational) -> tuple[str, int]:
        left, right = expr.lhs, expr.rhs
        if isinstance(left, TableRead) and left.spec.dtype == "bool" and right == 0:
            body, precedence = self._print_TableRead(left)
            return (body, precedence) if isinstance(expr, sympy.Ne) else (f"~{body}", UNARY)
        left, sign, right = self.sides(expr)
        return f"{self.text(left, ADD)} {sign} {self.text(right, ADD)}", COMPARE

    def sides(self, expr: Relational) -> tuple[sympy.Basic, str, sympy.Basic]:
        """What a comparison is written as: left, sign, right."""
        left, sign, right = expr.lhs, expr.rel_op, expr.rhs
        # x - y <= -1 is x < y between integers
        strict = {("<=", -1): "<", (">=", 1): ">"}.get((sign, right)) if left.is_integer else None
        if (right == 0 or strict) and isinstance(left, sympy.Add) and left.is_integer:
            # q_idx - kv_idx >= 0 reads better as q_idx >= kv_idx; between integers, parse() builds the same form from both
            negative = [t for t in left.args if t.could_extract_minus_sign()]
            if len(negative) > 1:  # q_idx - kv_idx stays together: q_idx - kv_idx < window[h]
                negative = [t for t in negative if t != -KV_IDX]
            if negative and len(negative) < len(left.args):
                left, right = sympy.Add(*(t for t in left.args if t not in negative)), sympy.Add(*(-t for t in negative))
                sign = strict or sign
        return left, sign, right

    def _print_Equality(self, expr: Relational) -> tuple[str, int]:
        body, precedence = self._print_Relational(expr)
        # `Eq` on a boolean table was printed as `~t[...]`, on numbers as `lhs == rhs`
        return body, precedence

    def _print_And(self, expr: sympy.And) -> tuple[str, int]:
        return " & ".join(self.text(a, COMPARE + 1) for a in _ordered(expr.args)), AND

    def _print_Or(self, expr: sympy.Or) -> tuple[str, int]:
        return " | ".join(self.text(a, COMPARE + 1) for a in _ordered(expr.args)), OR

    def _print_Xor(self, expr: sympy.Xor) -> tuple[str, int]:
        return " ^ ".join(self.text(a, COMPARE + 1) for a in _ordered(expr.args)), XOR

    def _print_Not(self, expr: sympy.Not) -> tuple[str, int]:
        return f"~{self.text(expr.args[0], UNARY)}", UNARY

    def _print_BooleanTrue(self, expr: BooleanTrue) -> tuple[str, int]:
        return "True", ATOM

    def _print_BooleanFalse(self, expr: BooleanFalse) -> tuple[str, int]:
        return "False", ATOM


class ReadingPrinter(Printer):
    """The same expressions as one writes them: keys left of what bounds them, windows by their size."""

    def sides(self, expr: Relational) -> tuple[sympy.Basic, str, sympy.Basic]:
        """``kv_idx <= q_idx`` for ``q_idx >= kv_idx``, ``q_idx - kv_idx < 512`` for ``<= 511``."""
        left, sign, right = super().sides(expr)
        if sign not in _TURNED:
            return left, sign, right
        if KV_IDX in right.free_symbols and KV_IDX not in left.free_symbols and not right.has(TableRead):
            left, sign, right = right, _TURNED[sign], left
        elif sign == ">=" and right.is_Integer and isinstance(left, sympy.Add) and -KV_IDX in left.args and right < 0:
            left, sign, right = KV_IDX, "<=", left + KV_IDX - right
        whole = sign == "<=" and right.is_Integer and left.is_integer
        if whole and ((right > 0 and right % 2) or (right == 0 and left in (Q_IDX, KV_IDX))):
            sign, right = "<", right + 1  # a size: most are even, or 1
        return left, sign, right


_TURNED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<"}


def _ordered(arguments: tuple[sympy.Basic, ...]) -> list[sympy.Basic]:
    return sorted(arguments, key=sympy.default_sort_key)


def expression_text(expr: sympy.Basic) -> str:
    """The bare expression, without its tables' declarations."""
    return Printer().text(expr)


def reading_text(expr: sympy.Basic) -> str:
    """The bare expression as one writes it, for people: reports and ``repr``. It says the same as :func:`expression_text`, which is what
    keys and files are made of and stays as it is.

    >>> import sparsedsl as sd
    >>> mask = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512) | (sd.kv_idx < 4)
    >>> reading_text(mask.expr)
    '((kv_idx <= q_idx) & (q_idx - kv_idx < 512)) | (kv_idx < 4)'
    >>> sd.parse(reading_text(mask.expr)).same_as(mask)
    True
    """
    return ReadingPrinter().text(expr)


def to_text(*exprs: sympy.Basic, write: Callable[[sympy.Basic], str] = expression_text) -> str:
    """Table declarations, one a line, then the expressions, each as ``write`` writes it."""
    lines = [f"{name} = {spec.declaration()}" for name, spec in table_specs(*exprs).items()]
    return "\n".join(lines + [write(e) for e in exprs])
