"""What printers of generated code share: constants are worked out, operands cast, and what is used twice gets a line and a name.

A printer subclasses :class:`SharingPrinter`; its ``write`` prints twice, once to count and once to write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import sympy
from sympy.core.relational import Relational

from sparsedsl.codegen.source import Source
from sparsedsl.lang import functions as fn
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.printing import ATOM, Printer
from sparsedsl.lang.tables import TableRead

__all__ = ["REAL_FUNCTIONS", "SharingPrinter", "is_constant", "is_real_arithmetic"]

REAL_FUNCTIONS = frozenset(fn.REAL_FUNCTIONS)


def is_constant(expr: sympy.Basic) -> bool:
    """Whether ``expr`` is a number: no symbol, no table."""
    return isinstance(expr, sympy.Expr) and not facts(expr).symbols and not facts(expr).reads


def is_real_arithmetic(expr: sympy.Basic) -> bool:
    """Whether the node works on real numbers, so that integers below it become real first."""
    if isinstance(expr, Relational):
        return not (expr.lhs.is_integer and expr.rhs.is_integer)
    if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Pow, sympy.Min, sympy.Max, fn.Where)):
        return not expr.is_integer
    if isinstance(expr, sympy.floor):
        return not expr.args[0].is_rational
    return type(expr).__name__.lower() in REAL_FUNCTIONS


class SharingPrinter(Printer):
    """A printer whose nodes may be counted or named on the way. Subclasses say what operands are cast to and spell the nodes."""

    def __init__(self) -> None:
        self._operands_as = ""
        self._counted: Counter[sympy.Basic] | None = None
        self._repeats: Counter[sympy.Basic] = Counter()
        self._known: dict[sympy.Basic, str] = {}
        self._emit: Callable[[str, str], str] | None = None

    def operand_type(self, expr: sympy.Basic) -> str:
        """The type, as source text, that integers right below ``expr`` are cast to; "" for none."""
        return ""

    def has_type(self, expr: sympy.Basic, kind: str) -> bool:
        """Whether the text of the integer ``expr`` has the type already."""
        return False

    def cast(self, text: str, kind: str) -> str:
        """The text of an atom, cast."""
        return f"{text}.to({kind})"

    def assignment(self, name: str, text: str) -> str:
        """The line that gives a value its name."""
        return f"{name} = {text}"

    def text(self, expr: sympy.Basic, level: int = 0) -> str:
        """The text of ``expr``, bracketed if it binds looser than ``level``."""
        wanted = self._operands_as
        if is_constant(expr):
            return self.constant(expr, level)
        self._operands_as = self.operand_type(expr)
        try:
            if wanted and getattr(expr, "is_integer", False) and not self.has_type(expr, wanted):
                return self.cast(self.node(expr, ATOM), wanted)
            return self.node(expr, level)
        finally:
            self._operands_as = wanted

    def constant(self, expr: sympy.Expr, level: int) -> str:
        """A number: functions of tensors refuse numbers, so a function of numbers is worked out here."""
        if isinstance(expr, (sympy.Integer, sympy.Float, sympy.core.numbers.Infinity, sympy.core.numbers.NegativeInfinity)):
            return super().text(expr, level)
        from sparsedsl.lang.evaluation import evaluate

        value = evaluate(expr, {})
        if expr.is_integer:
            return super().text(sympy.Integer(int(value)), level)
        body, precedence = self.number(float(value))
        return f"({body})" if precedence < level else body

    def node(self, expr: sympy.Basic, level: int) -> str:
        """The text of a node that is neither a constant nor cast; its name, if it has one."""
        if self._counted is not None:
            if not expr.is_Symbol:
                self._counted[expr] += 1
                if self._counted[expr] > 1:  # only the first printing of it will be kept
                    return "_"
        elif expr in self._known:
            return self._known[expr]
        elif self._emit is not None and self._repeats[expr] > 1:
            self._known[expr] = self._emit(_stem(expr), super().text(expr, 0))
            return self._known[expr]
        return super().text(expr, level)

    def count(self, exprs: Sequence[sympy.Basic]) -> Counter[sympy.Basic]:
        """How often each subexpression is asked for, if the first printing of it is kept."""
        self._counted = Counter()
        for expr in exprs:
            self.text(expr)
        counted, self._counted = self._counted, None
        return counted

    def write(self, source: Source, exprs: Sequence[sympy.Basic]) -> list[str]:
        """Write a line for every subexpression used more than once, and return the texts of ``exprs`` themselves."""

        def emit(stem: str, text: str) -> str:
            name = source.fresh(stem)
            source.line(self.assignment(name, text))
            return name

        self._repeats, self._known, self._emit = self.count(exprs), {}, emit
        return [self.text(expr) for expr in exprs]


def _stem(expr: sympy.Basic) -> str:
    if isinstance(expr, TableRead):
        return f"{expr.spec.name}_here"
    return "t" if isinstance(expr, sympy.Expr) else "both"
