"""sympy expression -> torch source text, one short method a node. An unknown node raises.

The printer is the text form's (:mod:`sparsedsl.lang.printing`) with torch's spelling and torch's types minded: integers stay int64,
``//`` and ``%`` round towards minus infinity (as torch's do), and real arithmetic inside masks is done in float64, as analysis does
it, so that a tile called full has no pair that the generated mask would drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from sympy.core.relational import Relational

from sparsedsl.codegen.sharing import REAL_FUNCTIONS, SharingPrinter, is_constant, is_real_arithmetic
from sparsedsl.codegen.source import Source
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.printing import ATOM, COMPARE, POWER, UNARY
from sparsedsl.lang.tables import TableRead

__all__ = ["Names", "TorchPrinter", "write_expression"]

_TORCH = {
    "abs": "torch.abs", "cos": "torch.cos", "erf": "torch.erf", "exp": "torch.exp", "log": "torch.log", "relu": "torch.relu",
    "sigmoid": "torch.sigmoid", "sin": "torch.sin", "softplus": "torch.nn.functional.softplus", "sqrt": "torch.sqrt",
    "tanh": "torch.tanh", "where": "torch.where",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What the symbols and tables are called in the generated code.

    ``clamp``: whether every table index is clamped. If False, an index that is a plain symbol or a number is trusted to lie
    inside the table, and whoever calls the code sees to it (:func:`sparsedsl.codegen.to_flex.table_extents` says what it takes).
    """

    symbols: Mapping[str, str]
    tables: Mapping[str, str]
    clamp: bool = True


class TorchPrinter(SharingPrinter):
    """Prints for torch. ``real``: the dtype, as source text, of real arithmetic on integers and tables; "" leaves it to torch."""

    def __init__(self, names: Names, real: str = "") -> None:
        super().__init__()
        self.names, self.real = names, real

    def operand_type(self, expr: sympy.Basic) -> str:
        """Integers below real arithmetic become ``real``, if it is given."""
        return self.real if is_real_arithmetic(expr) else ""

    def call(self, name: str, *arguments: sympy.Basic) -> tuple[str, int]:
        """A call of the torch function for ``name``."""
        if name in REAL_FUNCTIONS:
            return f"{_TORCH[name]}({self._as_real(arguments[0])})", ATOM
        return f"{_TORCH[name]}({', '.join(self.text(a) for a in arguments)})", ATOM

    def _as_real(self, expr: sympy.Expr, level: int = 0) -> str:
        """A float tensor, also where torch would keep an integer one or refuse it."""
        return self.text(expr, level) if self.real or not expr.is_integer else f"{self.text(expr, ATOM)}.to(torch.float32)"

    def _print_Symbol(self, expr: sympy.Symbol) -> tuple[str, int]:
        return self.names.symbols[expr.name], ATOM

    def _print_Add(self, expr: sympy.Add) -> tuple[str, int]:
        grouped = fn.regrouped(expr)
        return super()._print_Add(grouped) if grouped.is_Add else self._print_Mul(grouped)

    def _print_Pow(self, expr: sympy.Pow) -> tuple[str, int]:
        base, power = expr.args
        if is_constant(base):
            # An integer base and an integer tensor would stay integers, and fail on negative powers.
            return f"torch.pow({float(base)!r}, {self.text(power)})", ATOM
        if power.is_Integer or power == sympy.Rational(1, 2):
            return super()._print_Pow(expr)
        return f"{self._as_real(base, ATOM)}**{self.text(power, ATOM)}", POWER

    def _print_floor(self, expr: sympy.floor) -> tuple[str, int]:
        if expr.args[0].is_rational:
            return super()._print_floor(expr)
        return f"torch.floor({self._as_real(expr.args[0])}).to(torch.int64)", ATOM

    def _extreme(self, expr: sympy.Basic, function: str, bound: str) -> tuple[str, int]:
        numbers = [a for a in expr.args if is_constant(a)]
        first, *rest = sorted((a for a in expr.args if not is_constant(a)), key=sympy.default_sort_key)
        body = self.text(first, ATOM if numbers and not rest else 0)
        for argument in rest:
            body = f"{function}({body}, {self.text(argument)})"
        return body + "".join(f".clamp({bound}={self.text(n)})" for n in numbers), ATOM

    def _print_Min(self, expr: sympy.Basic) -> tuple[str, int]:
        return self._extreme(expr, "torch.minimum", "max")

    def _print_Max(self, expr: sympy.Basic) -> tuple[str, int]:
        return self._extreme(expr, "torch.maximum", "min")

    def _print_TableRead(self, expr: TableRead) -> tuple[str, int]:
        # Two booleans would add and multiply as booleans, and a float32 value compares with numbers rounded to float32.
        kind = {"bool": "torch.int64", "float": self.real, "int": ""}[expr.spec.dtype]
        return self._read(expr) + (f".to({kind})" if kind else ""), ATOM

    def _read(self, expr: TableRead) -> str:
        table = self.names.tables[expr.spec.name]
        return f"{table}[{', '.join(self._index(table, i, index) for i, index in enumerate(expr.args))}]"

    def _index(self, table: str, dim: int, index: sympy.Expr) -> str:
        if index.is_Integer:
            index = max(index, sympy.Integer(0))
            return f"min({index}, {table}.shape[{dim}] - 1)" if self.names.clamp and index else str(index)
        if index.is_Symbol and not self.names.clamp:
            return self.text(index)
        return f"{self.text(index, ATOM)}.clamp(0, {table}.shape[{dim}] - 1)"

    def _print_StrictFunction(self, expr: strict.StrictFunction) -> tuple[str, int]:
        body = self._exact(expr)
        return (f"{body}.to(torch.int64)" if strict.is_condition(expr) else body), ATOM

    def _exact(self, expr: strict.StrictFunction) -> str:
        if expr.operation == "wrap":  # its operand stands there twice: printed twice, so that it gets a name
            operand, again = self.text(expr.args[0], ATOM), self.text(expr.args[0], COMPARE + 1)
            return f"({operand} + ({again} < 0) * {self.text(expr.args[1], UNARY)})"
        return strict.torch_source(
            type(expr), [self.text(a) for a in expr.args], [strict.number(a) is not None for a in expr.args]
        )

    def _print_Relational(self, expr: Relational) -> tuple[str, int]:
        if strict.is_condition(expr.lhs) and expr.rhs == 0 and isinstance(expr, (sympy.Eq, sympy.Ne)):
            body = self._exact(expr.lhs)
            return (body, ATOM) if isinstance(expr, sympy.Ne) else (f"~{body}", UNARY)
        if isinstance(expr.lhs, TableRead) and expr.lhs.spec.dtype == "bool" and expr.rhs == 0:
            body = self._read(expr.lhs)
            return (body, ATOM) if isinstance(expr, sympy.Ne) else (f"~{body}", UNARY)
        return super()._print_Relational(expr)


def write_expression(source: Source, expr: sympy.Basic, names: Names, *, real: str = "") -> str:
    """Write a line for every subexpression used more than once, and return the text of ``expr`` itself.

    >>> import sparsedsl as sd
    >>> chunk = (sd.q_idx - sd.kv_idx) // 4
    >>> source = Source()
    >>> print(write_expression(source, ((chunk >= 2) & (chunk < 9)).expr, Names({"q_idx": "q_pos", "kv_idx": "kv_idx"}, {})))
    (t >= 2) & (t <= 8)
    >>> print(source.text, end="")
    t = (q_pos - kv_idx) // 4
    """
    return TorchPrinter(names, real).write(source, [expr])[0]
