"""sympy expression -> Triton source text, one short method a node. An unknown node raises.

The sibling of :mod:`sparsedsl.codegen.expression`, with Triton's types minded:

- Integers are int32 where the largest positions prove that nothing overflows, and become int64 where they do not.
- ``//`` and ``%`` mean rounding down; Triton's own round towards zero, compiled and interpreted, so they stand alone only where
  numerator and divisor cannot be negative.
- Real arithmetic is float32 in scores. In masks it is float64 and in the order in which ``evaluate`` does it, since analysis decides
  tiles that way: a tile called full then has no pair that the generated mask would drop.
- Every table index is clamped into the table: pairs beyond the lengths and masked pairs read too.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import sympy
from sympy.core.relational import Relational

from sparsedsl.codegen.rolling import UNIT, apart, sums_in
from sparsedsl.codegen.sharing import SharingPrinter, is_constant, is_real_arithmetic
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_exact import exact_text, needs_exact
from sparsedsl.codegen.triton_integers import LONGEST, IntegerSizes, fits_int32
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.printing import ADD, ATOM, COMPARE, MULTIPLY, UNARY
from sparsedsl.lang.tables import TableRead

__all__ = [
    "LONGEST",
    "TableNames",
    "TritonNames",
    "TritonPrinter",
    "each_unit",
    "needs_exact",
    "write_expression",
    "write_expressions",
]

_FUNCTIONS = {
    "abs": "tl.abs", "cos": "tl.cos", "erf": "tl.erf", "exp": "tl.exp", "log": "tl.log", "sigmoid": "tl.sigmoid", "sin": "tl.sin",
    "softplus": "_softplus", "sqrt": "tl.sqrt", "tanh": "_tanh",
}  # fmt: skip
_ALL_NAN = "propagate_nan=tl.PropagateNan.ALL"


@dataclass(frozen=True)
class TableNames:
    """What a table is called in a kernel: the pointer to its first entry, and its sizes. It is contiguous.

    Integer tables hold int32 or int64; booleans torch's bool or int8; float tables any float type.
    """

    pointer: str
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class TritonNames:
    """What symbols, tables and values that the kernel has already are called.

    ``symbols``: text at the place of use, such as ``q_idx[:, None]``; something that ``.to(...)`` can follow. Integers are int32 or
    int64, ``score`` has the type of real arithmetic. ``wide_tables``: tables of 2**31 entries and more, whose flat index is int64.
    ``replaced``: subexpressions -> text.
    ``table_ranges``: what integer tables are known to hold, both ends inclusive; what is not known is computed with in int64.
    """

    symbols: Mapping[str, str]
    tables: Mapping[str, TableNames] = field(default_factory=dict)
    wide_tables: frozenset[str] = frozenset()
    replaced: Mapping[sympy.Basic, str] = field(default_factory=dict)
    table_ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class TritonPrinter(SharingPrinter):
    """Prints for Triton. ``real``: the type of real arithmetic, ``"tl.float32"`` (scores) or ``"tl.float64"`` (masks)."""

    def __init__(self, names: TritonNames, real: str) -> None:
        super().__init__()
        self.names, self.real = names, real
        self.sizes = IntegerSizes(names.table_ranges)

    def operand_type(self, expr: sympy.Basic) -> str:
        """Real arithmetic wants real operands; integer arithmetic that may leave int32 wants int64."""
        if is_real_arithmetic(expr):
            return self.real
        return "tl.int64" if self.sizes.overflow(expr) else ""

    def has_type(self, expr: sympy.Basic, kind: str) -> bool:
        """int64 comes of int64: of operands cast to it, or of a float or an exact operation."""
        return kind == "tl.int64" and (
            self.sizes.overflow(expr) or (isinstance(expr, sympy.floor) and not expr.args[0].is_rational)
        )

    def node(self, expr: sympy.Basic, level: int) -> str:
        """What the kernel has already is not computed again."""
        return self.names.replaced[expr] if expr in self.names.replaced else super().node(expr, level)

    # ---- numbers ------------------------------------------------------------------------------------------

    def number(self, value: float) -> tuple[str, int]:
        """A float constant as an operand of a tensor, whose type it takes."""
        if value in (float("inf"), float("-inf")):
            return f'float("{value}")', ATOM
        return super().number(value)

    def _print_Integer(self, expr: sympy.Integer) -> tuple[str, int]:
        value = int(expr)
        if not fits_int32(value):
            return (repr(float(value)), ATOM) if self._operands_as == self.real else (f"tl.full([], {value}, tl.int64)", ATOM)
        return super()._print_Integer(expr)

    def argument(self, expr: sympy.Basic, *, typed: bool = False) -> str:
        """What a function or a comparison takes: a bare number is float32 there. ``typed``: it also makes the type of the result."""
        if self._operands_as != self.real or not is_constant(expr):
            return self.text(expr)
        from sparsedsl.lang.evaluation import evaluate

        value = float(evaluate(expr, {}))
        text, _ = self.number(value)
        normal = value in (0, float("inf"), float("-inf")) or 2**-126 <= abs(value) < 2**127
        single = self.real == "tl.float32" or (not typed and normal and struct.unpack("f", struct.pack("f", value))[0] == value)
        return text if normal and single else f"tl.full([], {text}, {self.real})"

    def call(self, name: str, *arguments: sympy.Basic) -> tuple[str, int]:
        """A call of the function for ``name``."""
        if name == "relu":
            return f"tl.maximum({self.argument(arguments[0])}, {self.argument(sympy.Integer(0))}, {_ALL_NAN})", ATOM
        function = "_tanh_double" if name == "tanh" and self.real == "tl.float64" else _FUNCTIONS[name]
        return f"{function}({', '.join(self.argument(a) for a in arguments)})", ATOM

    # ---- arithmetic ---------------------------------------------------------------------------------------

    def _print_Symbol(self, expr: sympy.Symbol) -> tuple[str, int]:
        return self.names.symbols[expr.name], ATOM

    def _print_Add(self, expr: sympy.Add) -> tuple[str, int]:
        if expr.is_integer:
            return super()._print_Add(expr)
        grouped = fn.regrouped(expr)
        if not grouped.is_Add:
            return self._print_Mul(grouped)
        terms = list(grouped.args)
        if self.real == "tl.float32":  # any order will do: one that reads well
            terms.sort(key=lambda t: (bool(t.could_extract_minus_sign()), t.is_number))
        parts = [self.text(terms[0], ADD)]
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            parts.append(f" - {self.text(-term, MULTIPLY)}" if minus else f" + {self.text(term, MULTIPLY)}")
        return "".join(parts), ADD

    def _print_Mul(self, expr: sympy.Mul) -> tuple[str, int]:
        if expr.is_integer:
            return super()._print_Mul(expr)
        factors = list(expr.args)
        minus = "-" if factors[0] == -1 else ""
        over = factors[1:] if minus else factors
        under: list[sympy.Expr] = []
        if self.real == "tl.float32":  # one rounding for a quotient; evaluate() has two, which masks must follow
            under = [f for f in over if isinstance(f, sympy.Pow) and f.exp.is_Integer and f.exp < 0]
            over = [f for f in over if f not in under]
        body = "*".join(self.text(f, UNARY) for f in over) or "1.0"
        body += "".join(f" / {self.text(f.base ** (-f.exp), UNARY)}" for f in under)
        return f"{minus}{body}", UNARY if minus else MULTIPLY

    def _print_Pow(self, expr: sympy.Pow) -> tuple[str, int]:
        base, power = expr.args
        if power.is_Integer and power < 0:
            return f"1.0 / {self.text(base**-power, UNARY)}", MULTIPLY
        if power.is_Integer:
            half = base ** (power // 2)
            factors = [base] * int(power) if power <= 3 else [half, half] + [base] * int(power % 2)
            return "*".join(self.text(f, UNARY) for f in factors), MULTIPLY
        if abs(power) == sympy.Rational(1, 2):
            root = f"tl.sqrt({self.argument(base)})"
            return (root, ATOM) if power > 0 else (f"1.0 / {root}", MULTIPLY)
        if is_constant(base) and base.is_positive:
            factor = math.log2(base)
            return f"tl.exp2({self.argument(power) if factor == 1 else f'{factor!r}*{self.text(power, UNARY)}'})", ATOM
        return f"_power({self.argument(base)}, {self.argument(power)})", ATOM

    def _print_floor(self, expr: sympy.floor) -> tuple[str, int]:
        if not expr.args[0].is_rational:
            return f"tl.floor({self.argument(expr.args[0])}).to(tl.int64)", ATOM
        return self._quotient("//", *expr.args[0].as_numer_denom())

    def _print_Mod(self, expr: sympy.Mod) -> tuple[str, int]:
        return self._quotient("%", *expr.args)

    def _quotient(self, sign: str, numerator: sympy.Expr, divisor: sympy.Expr) -> tuple[str, int]:
        if self.sizes.nonnegative(numerator) and self.sizes.nonnegative(divisor):
            return f"{self.text(numerator, MULTIPLY)} {sign} {self.text(divisor, UNARY)}", MULTIPLY
        power = int(divisor) if divisor.is_Integer and divisor > 0 and divisor & (divisor - 1) == 0 else 0
        if power and sign == "//":  # shifts and masks round down for either sign
            return f"({self.text(numerator, MULTIPLY)} >> {power.bit_length() - 1})", ATOM
        if power:
            return f"({self.text(numerator, MULTIPLY)} & {power - 1})", ATOM
        name = "_floor_div" if sign == "//" else "_floor_mod"
        return f"{name}({self.text(numerator)}, {self.text(divisor)})", ATOM

    def _extreme(self, expr: sympy.Basic, function: str) -> tuple[str, int]:
        ordered = sorted(expr.args, key=lambda a: (is_constant(a), sympy.default_sort_key(a)))
        body = self.argument(ordered[0])
        for argument in ordered[1:]:
            nan = "" if expr.is_integer else f", {_ALL_NAN}"
            body = f"{function}({body}, {self.argument(argument)}{nan})"
        return body, ATOM

    def _print_Min(self, expr: sympy.Basic) -> tuple[str, int]:
        return self._extreme(expr, "tl.minimum")

    def _print_Max(self, expr: sympy.Basic) -> tuple[str, int]:
        return self._extreme(expr, "tl.maximum")

    def _print_Where(self, expr: sympy.Basic) -> tuple[str, int]:
        condition, a, c = expr.args
        typed = is_constant(a) and is_constant(c)
        return f"tl.where({self.text(condition)}, {self.argument(a, typed=typed)}, {self.argument(c, typed=typed)})", ATOM

    # ---- tables and exact operations ----------------------------------------------------------------------

    def _print_TableRead(self, expr: TableRead) -> tuple[str, int]:
        kind = {"bool": "tl.int32", "float": self.real, "int": ""}[expr.spec.dtype]
        return self.read(expr) + (f".to({kind})" if kind else ""), ATOM

    def read(self, expr: TableRead) -> str:
        """The entry as it is stored."""
        offset = self.flat_index(expr)
        table = self.names.tables[expr.spec.name]
        return f"tl.load({table.pointer}{f' + {offset}' if offset else ''})"

    def flat_index(self, expr: TableRead) -> str:
        """How far the entry lies from the table's first; "" for the first itself."""
        names = self.names.tables[expr.spec.name]
        flat = ""
        for dim, (index, size) in enumerate(zip(expr.args, names.sizes, strict=True)):
            place = self._index(index, size)
            if expr.spec.name in self.names.wide_tables and dim == 0 and place:
                place += ".to(tl.int64)"
            flat = f"({flat})*{size}" if "+" in flat else f"{flat}*{size}" if flat else ""
            flat = " + ".join(part for part in (flat, place) if part)
        return flat

    def _index(self, index: sympy.Expr, size: str) -> str:
        if index.is_Integer:
            return f"tl.minimum({index}, {size} - 1)" if index > 0 else ""
        text = self.text(index)
        return f"tl.minimum({text if self.sizes.nonnegative(index) else f'tl.maximum({text}, 0)'}, {size} - 1)"

    def _print_StrictFunction(self, expr: strict.StrictFunction) -> tuple[str, int]:
        if expr.operation == "wrap":
            # its operand stands there twice: printed twice, so that it gets a name
            operand, again = self.text(expr.args[0], ADD), self.text(expr.args[0], COMPARE + 1)
            return f"{operand} + tl.where({again} < 0, {self.argument(expr.args[1])}, 0)", ADD
        body, precedence = exact_text(self, expr)
        return (f"({body}).to(tl.int32)", ATOM) if strict.is_condition(expr) else (body, precedence)

    def _print_Relational(self, expr: Relational) -> tuple[str, int]:
        if expr.rhs == 0 and isinstance(expr, (sympy.Eq, sympy.Ne)):
            if strict.is_condition(expr.lhs):
                body, precedence = exact_text(self, expr.lhs)
                return (body, precedence) if isinstance(expr, sympy.Ne) else (f"~({body})", UNARY)
            if isinstance(expr.lhs, TableRead) and expr.lhs.spec.dtype == "bool":
                return f"({self.read(expr.lhs)} {'!=' if isinstance(expr, sympy.Ne) else '=='} 0)", ATOM
        if is_real_arithmetic(expr):
            left, right = (self.argument(a) if is_constant(a) else self.text(a, ADD) for a in expr.args)
            return f"{left} {expr.rel_op} {right}", COMPARE
        return super()._print_Relational(expr)


def write_expression(source: Source, expr: sympy.Basic, names: TritonNames, *, real: str) -> str:
    """Write a line for every subexpression used more than once, and return the text of ``expr`` itself.

    Args:
        real: ``"tl.float32"`` in scores, ``"tl.float64"`` in masks.

    Functions that the text calls and Triton lacks are in :data:`sparsedsl.codegen.triton_functions.FUNCTIONS`.

    >>> import sparsedsl as sd
    >>> chunk = (sd.q_idx - sd.kv_idx) // 4
    >>> names = TritonNames({"q_idx": "q_idx[:, None]", "kv_idx": "kv_idx[None, :]"})
    >>> source = Source()
    >>> print(write_expression(source, ((chunk >= 2) & (chunk < 9)).expr, names, real="tl.float64"))
    (t >= 2) & (t <= 8)
    >>> print(source.text, end="")
    t = ((q_idx[:, None] - kv_idx[None, :]) >> 2)
    """
    return write_expressions(source, [expr], names, real=real)[0]


def write_expressions(source: Source, exprs: Sequence[sympy.Basic], names: TritonNames, *, real: str) -> list[str]:
    """The same for several expressions that share subexpressions, such as a score and its derivatives.

    >>> import sparsedsl as sd
    >>> from sparsedsl.codegen.derivatives import derivative
    >>> capped = (sd.tanh(sd.score / 30) * 30).expr
    >>> source = Source()
    >>> write_expressions(source, [capped, derivative(capped)], TritonNames({"score": "score"}), real="tl.float32")
    ['30*t', '1 - t*t']
    >>> print(source.text, end="")
    t = _tanh(0.03333333333333333*score)
    """
    sums = sums_in(*exprs)
    totals: dict[sympy.Basic, str] = {}
    for one in sums:
        totals[one] = source.fresh("summed")
        source.line(f"{totals[one]} = tl.zeros_like(s)")  # the products of the tile, which are there wherever a score is
    for units in dict.fromkeys(one.units for one in sums):
        here = [one for one in sums if one.units == units]
        with each_unit(source, units, [one.term for one in here], names, real=real) as (_, texts):
            for one, text in zip(here, texts, strict=True):
                source.line(f"{totals[one]} += {text}")
    return TritonPrinter(replace(names, replaced={**names.replaced, **totals}), real).write(source, exprs)


@contextmanager
def each_unit(
    source: Source, units: tuple[int, int], terms: Sequence[sympy.Basic], names: TritonNames, *, real: str
) -> Iterator[tuple[str, list[str]]]:
    """A loop over the units of sums: its index, and the texts of these terms in it. What is the same for all units is worked out before."""
    running, same = apart(terms)
    unit, (first, count) = source.fresh("unit"), units
    symbols = {**names.symbols, UNIT.name: unit}
    for symbol, text in zip(same, write_expressions(source, list(same.values()), names, real=real), strict=True):
        symbols[symbol.name] = text if text.isidentifier() else source.fresh("t")
        if not text.isidentifier():
            source.line(f"{symbols[symbol.name]} = {text}")
    with source.block(f"for {unit} in range({first}, {first + count}):"):
        yield unit, TritonPrinter(replace(names, symbols=symbols), real).write(source, running)
