"""Tables: runtime tensors read inside a pattern, with the declared facts that analysis may rely on.

In the IR every table is its own :class:`sympy.Function`; a read ``doc[q_idx]`` is the application ``doc(q_idx)``. A boolean table
stands in a mask as ``Ne(chosen(q, kv), 0)``.
"""

from __future__ import annotations

import copyreg
import functools
import keyword
import operator
import unicodedata
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import sympy

from sparsedsl.errors import PatternError, TableError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.symbols import CALL_WORDS, SYMBOL_NAMES

__all__ = [
    "TableRead",
    "TableSpec",
    "by_kept_name",
    "declared",
    "kept_name",
    "table_reads",
    "table_specs",
    "to_pass",
    "values_text",
]

T = TypeVar("T")
_DTYPES = {
    **dict.fromkeys((int, "int", "int8", "int16", "int32", "int64", "long", "uint8"), "int"),
    **dict.fromkeys((bool, "bool"), "bool"),
    **dict.fromkeys((float, "float", "float16", "bfloat16", "float32", "float64", "half", "double"), "float"),
}


def kept_name(name: str) -> str:
    """What a table called ``name`` is called in formulas: ``h_table`` for ``h``, which is the head there.

    >>> kept_name("h"), kept_name("doc")
    ('h_table', 'doc')
    """
    return f"{name}_table" if name in SYMBOL_NAMES else name


def by_kept_name(given: Mapping[str, T], known: Container[str]) -> Mapping[str, T]:
    """Values that were given by names of tables, by the names that tables are kept by. ``known``: those of the pattern.

    >>> by_kept_name({"h": 1, "doc": 2}, ["h_table", "doc"])
    {'h_table': 1, 'doc': 2}
    """
    if SYMBOL_NAMES.isdisjoint(given):
        return given
    found: dict[str, T] = {}
    for name, value in given.items():
        kept = name if name in known or kept_name(name) not in known else kept_name(name)
        if kept in found:
            raise TableError(f"table {name!r} is given twice: it is kept as {kept!r}")
        found[kept] = value
    return found


def to_pass(*names: str) -> str:
    """How a call is given tables, in words.

    >>> print(to_pass("doc"), "|", to_pass("doc", "scale"))
    pass doc=tensor with the call | pass doc=tensor, tables={'scale': tensor} with the call
    """
    words = [f"{name}=tensor" for name in names if name not in CALL_WORDS]
    taken = [f"{name!r}: tensor" for name in names if name in CALL_WORDS]
    words += [f"tables={{{', '.join(taken)}}}"] if taken else []
    return f"pass {', '.join(words)} with the call"


@dataclass(frozen=True)
class TableSpec:
    """What is declared about a table; part of every expression that reads it.

    ``dtype`` is the kind, ``"int"``, ``"bool"`` or ``"float"``: the tensor's width is its own business.
    ``monotone``: non-decreasing along its last index. ``bijective``: a permutation along its last index.
    ``values_in``: inclusive bounds of an integer table. ``learned``: a float table that receives gradients.
    """

    name: str
    dtype: str = "int"
    monotone: bool = False
    bijective: bool = False
    learned: bool = False
    values_in: tuple[int, int] | None = None

    @classmethod
    def declare(
        cls,
        name: str,
        *,
        dtype: Any = None,
        monotone: bool = False,
        bijective: bool = False,
        learned: bool = False,
        values_in: tuple[int, int] | None = None,
    ) -> TableSpec:
        """Check the user's words and build the spec.

        Names are kept as Python keeps identifiers, in the normal form NFKC, and those of indices by :func:`kept_name`.
        """
        given = name
        name = unicodedata.normalize("NFKC", name) if isinstance(name, str) else ""
        if not name.isidentifier() or keyword.iskeyword(name):
            raise TableError(
                f"table name must be a Python identifier, since it is passed as attn(..., name=tensor); got {given!r}"
            )
        name = kept_name(name)
        for word, value in (("monotone", monotone), ("bijective", bijective), ("learned", learned)):
            if not isinstance(value, bool):
                raise TableError(f"table {name!r}: {word} must be True or False; got {shown(value)}")
        wanted = ("float" if learned else "int") if dtype is None else dtype
        key = wanted if isinstance(wanted, type) else str(wanted).removeprefix("torch.")
        if key not in _DTYPES:
            raise TableError(f"table {name!r}: dtype must be int, bool, float or a torch dtype of these kinds; got {dtype!r}")
        kind = _DTYPES[key]
        if learned and kind != "float":
            raise TableError(f"table {name!r}: only float tables can be learned; got dtype {kind}. Write dtype=float")
        if (monotone or bijective or values_in is not None) and kind != "int":
            raise TableError(f"table {name!r}: monotone, bijective and values_in are facts about int tables; got dtype {kind}")
        if values_in is not None:
            try:
                low, high = (operator.index(bound) for bound in values_in)
            except (TypeError, ValueError):
                raise TableError(f"table {name!r}: values_in wants (low, high), two integers; got {values_in!r}") from None
            if low > high:
                raise TableError(f"table {name!r}: values_in wants low <= high; got {values_in!r}")
            if low >= 2**63 or high < -(2**63):
                raise TableError(f"table {name!r}: no tensor holds integers of values_in={values_in!r}: they lie outside int64")
            values_in = (low, high)
        return cls(name, kind, bool(monotone), bool(bijective), bool(learned), values_in)

    def declaration(self) -> str:
        """The Python call that declares this table, as it stands in text forms."""
        words = [repr(self.name)]
        if self.dtype != ("float" if self.learned else "int"):
            words.append(f"dtype={self.dtype}")
        words += [f"{fact}=True" for fact in ("monotone", "bijective", "learned") if getattr(self, fact)]
        if self.values_in is not None:
            words.append(f"values_in={self.values_in}")
        return f"table({', '.join(words)})"


class _TableFunction(type(sympy.Function)):  # type: ignore[misc]
    """Metaclass of table functions: pickles a class made at run time as the declaration it was made from."""


class TableRead(sympy.Function, metaclass=_TableFunction):
    """Base of all table reads; ``spec`` says which table, the arguments are its indices."""

    spec: ClassVar[TableSpec]
    reads_table = in_language = True
    is_number = False  # `doc[0]` has no symbols, but no value either until the table is bound

    @classmethod
    def eval(cls, *indices: sympy.Expr) -> None:
        """A read never simplifies by itself."""
        return None

    def _sympystr(self, printer: Any) -> str:
        return f"{self.spec.name}[{', '.join(printer._print(index) for index in self.args)}]"

    def _latex(self, printer: Any) -> str:
        indices = ", ".join(printer._print(index) for index in self.args)
        name = self.spec.name.replace("_", r"\_")
        return rf"\operatorname{{{name}}}\left[{indices}\right]"


@functools.cache
def read_class(spec: TableSpec) -> type[TableRead]:
    """The one function class for ``spec``: sympy compares function classes by identity.

    sympy, like our printers, looks rules up by the names of classes, and a table may be called ``floor`` or ``Max``. So the name of
    this class is no identifier, and no rule can have it; the blank at its end leaves the order of terms as the tables' names have it.
    """
    facts: dict[str, Any] = {"spec": spec}
    if spec.dtype == "float":
        facts["is_extended_real"] = True
    else:
        facts["is_integer"] = True
        low = 0 if spec.dtype == "bool" else (spec.values_in or (None,))[0]
        if low is not None and low >= 0:
            facts["is_positive" if low > 0 else "is_nonnegative"] = True
    return _TableFunction(f"{spec.name} ", (TableRead,), facts)


def _reduce_class(cls: type) -> Any:
    spec = cls.__dict__.get("spec")
    return cls.__qualname__ if spec is None else (read_class, (spec,))


copyreg.pickle(_TableFunction, _reduce_class)


def table_reads(expr: sympy.Basic) -> set[TableRead]:
    """Every table read in ``expr``, nested ones included."""
    return set(facts(expr).reads)


def table_specs(*exprs: sympy.Basic) -> dict[str, TableSpec]:
    """Name -> spec of every table read in ``exprs``, by name; refuses two tables of one name and a varying number of indices."""
    found: dict[str, tuple[TableSpec, int]] = {}
    for expr in exprs:
        for read in table_reads(expr):
            spec, known = read.spec, found.get(read.spec.name)
            if known is None:
                found[spec.name] = (spec, len(read.args))
            elif known[0] != spec:
                raise PatternError(
                    f"two different tables are called {spec.name!r}: {known[0].declaration()} and {spec.declaration()}; "
                    "declare it once and reuse it, or rename one"
                )
            elif known[1] != len(read.args):
                raise PatternError(f"table {spec.name!r} is read with {known[1]} and with {len(read.args)} indices; use one form")
    return {name: found[name][0] for name in sorted(found)}


def values_text(table: Any) -> str:
    """The values of a tensor where they are few, else what it is.

    >>> import torch
    >>> values_text(torch.tensor([1, 5])), values_text(torch.zeros(4, 8))
    ('[1, 5]', '<torch.float32 of shape (4, 8)>')
    """
    return str(table.tolist()) if table.numel() <= 16 else f"<{table.dtype} of shape {tuple(table.shape)}>"


def declared(text: str, tables: Mapping[str, Any]) -> list[str]:
    """The lines of a text form, with the values of tables that are known behind their declarations.

    >>> import torch
    >>> declared("w = table('w')\\nq_idx - kv_idx < w[h]", {"w": torch.tensor([8, 64])})
    ["w = table('w')  # [8, 64]", 'q_idx - kv_idx < w[h]']
    """
    lines = []
    for line in text.splitlines():
        name, sign, rest = line.partition(" = ")
        known = bool(sign) and rest.startswith("table(") and name in tables
        lines.append(f"{line}  # {values_text(tables[name])}" if known else line)
    return lines
