"""sympy expression -> C++ source text, one short method a node. An unknown node raises.

The sibling of :mod:`sparsedsl.codegen.expression`, with C++'s types minded:

- Integers are ``i64``, 64 bits wide; ``//`` and ``%`` mean rounding down and are functions, since C++'s own round towards zero.
- Real arithmetic is ``real`` in scores (float, or double for float64 inputs). In masks it is double and in the order in which
  ``evaluate`` does it, since analysis decides tiles that way. The compiler joins no product with a sum (``-ffp-contract=off``).
- Every table index is clamped into the table: lanes and keys that are masked read too.

The functions that are called are in ``codegen/cpp/functions.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy
from sympy.core.relational import Relational

from sparsedsl.codegen.cpp_exact import exact_text
from sparsedsl.codegen.sharing import SharingPrinter, is_constant, is_real_arithmetic
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.printing import ADD, ATOM, COMPARE, MULTIPLY, UNARY
from sparsedsl.lang.tables import TableRead

__all__ = ["CppNames", "CppPrinter", "TableNames"]


@dataclass(frozen=True)
class TableNames:
    """What a table is called: the pointer to its first entry, and its sizes. It is contiguous; integers are i64, booleans bytes."""

    pointer: str
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class CppNames:
    """What symbols, tables and values that the code has already are called. ``replaced``: subexpressions -> text."""

    symbols: Mapping[str, str]
    tables: Mapping[str, TableNames] = field(default_factory=dict)
    replaced: Mapping[sympy.Basic, str] = field(default_factory=dict)


class CppPrinter(SharingPrinter):
    """Prints for C++. ``real``: the type of real arithmetic, ``"real"`` (scores) or ``"double"`` (masks).

    >>> import sparsedsl as sd
    >>> from sparsedsl.codegen.source import Source
    >>> chunk = (sd.q_idx - sd.kv_idx) // 4
    >>> source = Source()
    >>> names = CppNames({"q_idx": "q_idx", "kv_idx": "kv_idx"})
    >>> print(CppPrinter(names, "double").write(source, [((chunk >= 2) & (chunk < 9)).expr])[0])
    (t >= 2) & (t <= 8)
    >>> print(source.text, end="")
    const auto t = floor_div(q_idx - kv_idx, 4);
    """

    def __init__(self, names: CppNames, real: str) -> None:
        super().__init__()
        self.names, self.real = names, real

    def operand_type(self, expr: sympy.Basic) -> str:
        """Real arithmetic wants real operands."""
        return self.real if is_real_arithmetic(expr) else ""

    def cast(self, text: str, kind: str) -> str:
        return f"({kind}){text}"

    def assignment(self, name: str, text: str) -> str:
        return f"const auto {name} = {text};"

    def node(self, expr: sympy.Basic, level: int) -> str:
        """What the code has already is not computed again."""
        return self.names.replaced[expr] if expr in self.names.replaced else super().node(expr, level)

    # ---- numbers ------------------------------------------------------------------------------------------

    def number(self, value: float) -> tuple[str, int]:
        """A float constant, in the type of real arithmetic."""
        if value in (float("inf"), float("-inf")):
            return f"{'-' if value < 0 else ''}infinite<{self.real}>()", UNARY
        return f"({self.real}){value!r}", UNARY

    def _print_Integer(self, expr: sympy.Integer) -> tuple[str, int]:
        value = int(expr)
        if self._operands_as == self.real:
            return self.number(float(value))
        if value < -(2**63) + 1 or value > 2**63 - 1:
            return f"(i64){float(value)!r}", UNARY
        return f"{value}{'' if abs(value) < 2**31 else 'LL'}", ATOM if value >= 0 else UNARY

    def call(self, name: str, *arguments: sympy.Basic) -> tuple[str, int]:
        """A call of the function for ``name``."""
        return f"{name}_of({', '.join(self.text(a) for a in arguments)})", ATOM

    # ---- arithmetic ---------------------------------------------------------------------------------------

    def _print_Symbol(self, expr: sympy.Symbol) -> tuple[str, int]:
        return self.names.symbols[expr.name], ATOM

    def _print_Add(self, expr: sympy.Add) -> tuple[str, int]:
        if expr.is_integer:
            return super()._print_Add(expr)
        grouped = fn.regrouped(expr)
        if not grouped.is_Add:
            return self._print_Mul(grouped)
        first, *rest = grouped.args
        parts = [self.text(first, ADD)]
        for term in rest:
            minus = term.could_extract_minus_sign()
            parts.append(f" - {self.text(-term, MULTIPLY)}" if minus else f" + {self.text(term, MULTIPLY)}")
        return "".join(parts), ADD

    def _print_Mul(self, expr: sympy.Mul) -> tuple[str, int]:
        if expr.is_integer:
            return super()._print_Mul(expr)
        factors = list(expr.args)
        minus = "-" if factors[0] == -1 else ""
        body = "*".join(self.text(f, UNARY) for f in (factors[1:] if minus else factors))
        return (f"-({body})", UNARY) if minus else (body, MULTIPLY)

    def _print_Pow(self, expr: sympy.Pow) -> tuple[str, int]:
        base, power = expr.args
        if power.is_Integer and power < 0:
            return f"({self.real})1 / {self.text(base**-power, UNARY)}", MULTIPLY
        if power.is_Integer:
            half = base ** (power // 2)
            factors = [base] * int(power) if power <= 3 else [half, half] + [base] * int(power % 2)
            return "*".join(self.text(f, UNARY) for f in factors), MULTIPLY
        if power == sympy.Rational(1, 2):
            return self.call("sqrt", base)
        return self.call("power", base, power)

    def _print_floor(self, expr: sympy.floor) -> tuple[str, int]:
        if not expr.args[0].is_rational:
            return f"floor_of({self.text(expr.args[0])})", ATOM
        numerator, divisor = expr.args[0].as_numer_denom()
        return self._quotient("floor_div", numerator, divisor)

    def _print_Mod(self, expr: sympy.Mod) -> tuple[str, int]:
        return self._quotient("floor_mod", *expr.args)

    def _quotient(self, name: str, numerator: sympy.Expr, divisor: sympy.Expr) -> tuple[str, int]:
        return f"{name}({self.text(numerator)}, {self.text(divisor)})", ATOM

    def _extreme(self, expr: sympy.Basic, function: str) -> tuple[str, int]:
        first, *rest = sorted(expr.args, key=lambda a: (is_constant(a), sympy.default_sort_key(a)))
        body = self.text(first)
        for argument in rest:
            body = f"{function}({body}, {self.text(argument)})"
        return body, ATOM

    def _print_Min(self, expr: sympy.Basic) -> tuple[str, int]:
        return self._extreme(expr, "smaller")

    def _print_Max(self, expr: sympy.Basic) -> tuple[str, int]:
        return self._extreme(expr, "larger")

    def _print_BitAnd(self, expr: sympy.Basic) -> tuple[str, int]:
        return f"({self.text(expr.args[0], ATOM)} & {self.text(expr.args[1], ATOM)})", ATOM

    def _print_Where(self, expr: sympy.Basic) -> tuple[str, int]:
        condition, a, c = expr.args
        return f"({self.text(condition, ADD)} ? {self.text(a, ADD)} : {self.text(c, ADD)})", ATOM

    # ---- tables, exact operations, conditions -------------------------------------------------------------

    def _print_TableRead(self, expr: TableRead) -> tuple[str, int]:
        kind = {"bool": "i64", "float": self.real, "int": ""}[expr.spec.dtype]
        return (f"({kind}){self.read(expr)}", UNARY) if kind else (self.read(expr), ATOM)

    def read(self, expr: TableRead) -> str:
        """The entry as it is stored."""
        return f"{self.names.tables[expr.spec.name].pointer}[{self.flat_index(expr)}]"

    def flat_index(self, expr: TableRead) -> str:
        """How far the entry lies from the table's first."""
        flat = ""
        for index, size in zip(expr.args, self.names.tables[expr.spec.name].sizes, strict=True):
            place = f"inside({self.text(index)}, {size})"
            flat = f"({flat})*{size} + {place}" if "+" in flat else f"{flat}*{size} + {place}" if flat else place
        return flat

    def _print_StrictFunction(self, expr: strict.StrictFunction) -> tuple[str, int]:
        if expr.operation == "wrap":
            # its operand stands there twice: printed twice, so that it gets a name
            operand, again = self.text(expr.args[0], ADD), self.text(expr.args[0], COMPARE + 1)
            return f"{operand} + ({again} < 0 ? {self.text(expr.args[1])} : 0)", ADD
        body = exact_text(self, expr)
        return (f"(i64){body}", UNARY) if strict.is_condition(expr) else (body, ATOM)

    def _print_Relational(self, expr: Relational) -> tuple[str, int]:
        if expr.rhs == 0 and isinstance(expr, (sympy.Eq, sympy.Ne)):
            sign = "!=" if isinstance(expr, sympy.Ne) else "=="
            if strict.is_condition(expr.lhs):
                body = exact_text(self, expr.lhs)
                return (body, ATOM) if sign == "!=" else (f"!{body}", UNARY)
            if isinstance(expr.lhs, TableRead) and expr.lhs.spec.dtype == "bool":
                return f"{self.read(expr.lhs)} {sign} 0", COMPARE
        if is_real_arithmetic(expr):
            return f"{self.text(expr.lhs, ADD)} {expr.rel_op} {self.text(expr.rhs, ADD)}", COMPARE
        return super()._print_Relational(expr)

    def _print_Not(self, expr: sympy.Not) -> tuple[str, int]:
        return f"!{self.text(expr.args[0], UNARY)}", UNARY

    def _print_BooleanTrue(self, expr: sympy.Basic) -> tuple[str, int]:
        return "true", ATOM

    def _print_BooleanFalse(self, expr: sympy.Basic) -> tuple[str, int]:
        return "false", ATOM
