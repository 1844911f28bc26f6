"""Proofs over all indices, lengths and tables, by the SMT solver z3: implication, equality, causality.

A mask is translated to integer arithmetic; tables become functions known only by their declared facts. ``PROVED`` holds for every
length and every table that keeps its declaration. ``REFUTED`` comes with a witness that has been checked by evaluating the masks on
it. Everything else is ``UNKNOWN``. Integers are unbounded here, and exact wherever a pattern runs (:mod:`exactness`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.effort import EFFORT
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.errors import PatternError
from sparsedsl.lang import functions as fn
from sparsedsl.lang.exact import evaluate_exactly
from sparsedsl.lang.expressions import as_mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.tables import TableRead, TableSpec, table_reads, values_text
from sparsedsl.plain_values import Reported

try:
    import z3
except ImportError:  # patterns run without it; what would be proved is then unknown
    z3 = None


__all__ = ["PROVED", "REFUTED", "UNKNOWN", "Verdict", "Witness", "causality", "equivalent", "implies", "satisfiable"]

# A witness is first sought among small indices, where a reader can check it by hand.
SMALL = 32
INT64 = 2**63 - 1


@dataclass(frozen=True)
class Witness(Reported):
    """One point at which a claim fails: indices, lengths, and the table values it needs."""

    b: int
    h: int
    q_idx: int
    kv_idx: int
    q_len: int | None = None
    kv_len: int | None = None
    tables: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def indices(self) -> tuple[int, int, int, int]:
        """``(b, h, q_idx, kv_idx)``."""
        return self.b, self.h, self.q_idx, self.kv_idx

    def __str__(self) -> str:
        tables = "".join(f", {name}={values_text(table)}" for name, table in self.tables.items())
        return f"b={self.b}, h={self.h}, q_idx={self.q_idx}, kv_idx={self.kv_idx}{tables}"


@dataclass(frozen=True)
class Verdict(Reported):
    """``status`` is "PROVED", "REFUTED" or "UNKNOWN"; compare with ``sd.PROVED`` and so on. ``witness`` refutes.

    >>> import sparsedsl as sd
    >>> verdict = sd.implies(sd.kv_idx <= sd.q_idx, sd.kv_idx < sd.q_idx)
    >>> verdict == sd.REFUTED, verdict.witness.q_idx == verdict.witness.kv_idx
    (True, True)
    """

    status: str
    witness: Witness | None = field(default=None, compare=False)
    reason: str = field(default="", compare=False)

    def __bool__(self) -> NoReturn:
        raise PatternError(
            f"a verdict has three values; got {self}. Write `verdict == sd.PROVED`, `== sd.REFUTED` or `== sd.UNKNOWN`"
        )

    def __str__(self) -> str:
        if self.witness is not None:
            return f"{self.status} at {self.witness}"
        return f"{self.status} ({self.reason})" if self.reason else self.status

    __repr__ = __str__


PROVED, REFUTED, UNKNOWN = Verdict("PROVED"), Verdict("REFUTED"), Verdict("UNKNOWN")


def implies(a: Any, b: Any) -> Verdict:
    """Whether every pair that mask ``a`` allows is allowed by ``b``, for all lengths and tables.

    >>> import sparsedsl as sd
    >>> causal = sd.kv_idx <= sd.q_idx
    >>> sd.implies(causal & (sd.q_idx - sd.kv_idx < 8), causal)
    PROVED (for all indices, lengths and tables)
    >>> sd.implies(causal, sd.q_idx - sd.kv_idx < 8) == sd.REFUTED
    True
    """
    first, second = _masks(a, b)
    return _refute(sympy.And(first, sympy.Not(second)))


def equivalent(a: Any, b: Any) -> Verdict:
    """Whether two masks allow the same pairs, for all lengths and tables.

    >>> import sparsedsl as sd
    >>> sd.equivalent(sd.q_idx // 64 == sd.kv_idx // 64, abs(sd.q_idx // 64 - sd.kv_idx // 64) < 1)
    PROVED (for all indices, lengths and tables)
    """
    first, second = _masks(a, b)
    return PROVED_FOR_ALL if first == second else _refute(sympy.Xor(first, second))


def causality(mask: Any) -> Verdict:
    """Whether no query sees a later position: ``mask`` implies ``kv_idx <= q_idx``, for all lengths and tables."""
    (expr,) = _masks(mask)
    return _refute(sympy.And(expr, sympy.Ge(KV_IDX - Q_IDX, 1)))


def _masks(*values: object) -> list[Boolean]:
    return [as_mask(v.mask if isinstance(v, Pattern) else v, where="argument").expr for v in values]


PROVED_FOR_ALL = Verdict("PROVED", reason="for all indices, lengths and tables")


def _refute(counter: Boolean) -> Verdict:
    """The verdict on a claim whose counter-examples satisfy ``counter``."""
    if not clauses(counter):
        return PROVED_FOR_ALL
    found = satisfiable(counter)
    if found.status == "PROVED":
        return Verdict("REFUTED", found.witness)
    return PROVED_FOR_ALL if found.status == "REFUTED" else found


@functools.lru_cache(maxsize=512)
def satisfiable(mask: Boolean) -> Verdict:
    """PROVED with a witness if some pair satisfies ``mask``, REFUTED if none can, else UNKNOWN."""
    if z3 is None:
        witness = _search(mask)
        return Verdict("UNKNOWN", reason="z3-solver is not installed") if witness is None else Verdict("PROVED", witness)
    translation = _Translation(mask)
    answer = None
    for bound in (SMALL, None):
        solver = z3.Solver(ctx=translation.ctx)
        solver.set("timeout", EFFORT.now.proof_ms)
        solver.set("random_seed", 1)
        solver.add(translation.formula, *translation.facts)
        if bound is not None:
            solver.add(*(variable < bound for variable in translation.symbols.values()))
        answer = solver.check()
        if answer == z3.sat:
            witness = translation.witness(solver.model())
            if witness is not None:
                return Verdict("PROVED", witness)
    if answer == z3.unsat:
        return Verdict("REFUTED")
    witness = _search(mask)
    if witness is not None:
        return Verdict("PROVED", witness)
    if answer == z3.sat:
        return Verdict(
            "UNKNOWN", reason="a candidate point failed when evaluated: the mask uses float functions or bit operations"
        )
    return Verdict("UNKNOWN", reason=f"the solver gave up after {EFFORT.now.proof_ms / 1000:g} s: {solver.reason_unknown()}")


class _Translation:
    """A mask as a z3 formula, with the facts about the symbols and tables in it."""

    def __init__(self, mask: Boolean):
        self.mask = mask
        self.ctx = z3.Context()
        self.symbols = {s.name: z3.Int(s.name, self.ctx) for s in (BATCH, HEAD, Q_IDX, KV_IDX, Q_LEN, KV_LEN)}
        self._known: dict[sympy.Basic, Any] = {}
        self.facts: list[Any] = [v >= 0 for v in self.symbols.values()]
        self.facts += [self.symbols["q_idx"] < self.symbols["q_len"], self.symbols["kv_idx"] < self.symbols["kv_len"]]
        self.reads: dict[TableSpec, list[tuple[list[Any], Any]]] = {}
        self.formula = self.term(mask)
        for spec, reads in self.reads.items():
            self.facts += _table_facts(spec, reads)

    def term(self, expr: sympy.Basic) -> Any:
        """The z3 term of an expression."""
        if expr not in self._known:
            self._known[expr] = self._translate(expr)
        return self._known[expr]

    def _translate(self, expr: sympy.Basic) -> Any:
        args = expr.args
        match expr:
            case sympy.Symbol():
                return self.symbols[expr.name]
            case sympy.Integer():
                return z3.IntVal(int(expr), self.ctx)
            case sympy.Rational() | sympy.Float():
                return z3.RealVal(str(sympy.Rational(float(expr))), self.ctx)
            case sympy.Add():
                return functools.reduce(lambda x, y: x + y, (self.term(a) for a in args))
            case sympy.Mul():
                return functools.reduce(lambda x, y: x * y, (self.term(a) for a in args))
            case sympy.Pow() if args[1].is_Integer and 0 <= int(args[1]) <= 8:
                return functools.reduce(lambda x, y: x * y, [self.term(args[0])] * int(args[1]), z3.IntVal(1, self.ctx))
            case sympy.floor() if args[0].is_rational:
                numerator, denominator = args[0].as_numer_denom()
                n, d = self.term(numerator), self.term(denominator)
                return n / d if denominator.is_positive else z3.If(d > 0, n / d, (-n) / (-d))
            case sympy.Mod():
                n, d = self.term(args[0]), self.term(args[1])
                return n % d if args[1].is_positive else z3.If(d > 0, n % d, -((-n) % (-d)))
            case sympy.Min() | sympy.Max():
                least = isinstance(expr, sympy.Min)
                return functools.reduce(lambda x, y: z3.If((x < y) if least else (x > y), x, y), (self.term(a) for a in args))
            case fn.Abs():
                value = self.term(args[0])
                return z3.If(value >= 0, value, -value)
            case fn.Where():
                return z3.If(*(self.term(a) for a in args))
            case TableRead():
                return self._read(expr)
            case sympy.logic.boolalg.BooleanTrue() | sympy.logic.boolalg.BooleanFalse():
                return z3.BoolVal(bool(expr), self.ctx)
            case sympy.And() | sympy.Or():
                join = z3.And if isinstance(expr, sympy.And) else z3.Or
                return join(*(self.term(a) for a in args))
            case sympy.Xor():
                return functools.reduce(z3.Xor, (self.term(a) for a in args))
            case sympy.Not():
                return z3.Not(self.term(args[0]))
            case sympy.core.relational.Relational():
                left, right = self.term(args[0]), self.term(args[1])
                return {
                    "<=": left <= right,
                    "<": left < right,
                    ">=": left >= right,
                    ">": left > right,
                    "==": left == right,
                    "!=": left != right,
                }[expr.rel_op]
        return self._unknown(expr)

    def _unknown(self, expr: sympy.Basic) -> Any:
        """A function z3 has no theory of: any value at all, but equal arguments give equal values."""
        arguments = [self.term(a) for a in expr.args]
        sort = z3.IntSort(self.ctx) if expr.is_integer else z3.RealSort(self.ctx)
        function = z3.Function(f"{type(expr).__name__}()", *(a.sort() for a in arguments), sort)
        value = function(*arguments)
        if isinstance(expr, fn.BitAnd):
            a, c = arguments
            self.facts.append(z3.Implies(z3.And(a >= 0, c >= 0), z3.And(value >= 0, value <= a, value <= c)))
        return value

    def _read(self, expr: TableRead) -> Any:
        indices = [self.term(a) for a in expr.args]
        sort = z3.RealSort(self.ctx) if expr.spec.dtype == "float" else z3.IntSort(self.ctx)
        function = z3.Function(expr.spec.name, *[z3.IntSort(self.ctx)] * len(indices), sort)
        value = function(*indices)
        self.reads.setdefault(expr.spec, []).append((indices, value))
        return value

    def witness(self, model: Any) -> Witness | None:
        """The model as concrete indices and tables, if the mask really holds there."""
        number = lambda term: model.eval(term, model_completion=True)  # noqa: E731
        values = {name: number(variable).as_long() for name, variable in self.symbols.items()}
        if max(values.values()) > 1 << 40:
            return None
        tables = {}
        for spec, reads in self.reads.items():
            cells: dict[tuple[int, ...], float] = {}
            for indices, value in reads:
                place = tuple(number(i).as_long() for i in indices)
                if spec.dtype == "float":
                    cells[place] = float(number(value).as_fraction()) if z3.is_rational_value(number(value)) else 0.0
                else:
                    cells[place] = number(value).as_long()
            table = _build_table(spec, cells)
            if table is None:
                return None
            tables[spec.name] = table
        if not bool(evaluate_exactly(self.mask, {**values, **tables})):
            return None
        has_length = {s.name for s in self.mask.free_symbols} & {"q_len", "kv_len"}
        lengths = {name: values[name] for name in has_length}
        return Witness(values["b"], values["h"], values["q_idx"], values["kv_idx"], tables=tables, **lengths)


def _search(mask: Boolean) -> Witness | None:
    """Look for a pair among small indices and random tables, where the solver's theory ends (bits, float functions, products)."""
    specs = {read.spec: len(read.args) for read in table_reads(mask)}
    generator = torch.Generator().manual_seed(0)
    env: dict[str, Any] = {
        "b": torch.arange(2)[:, None, None, None], "h": torch.arange(2)[:, None, None],
        "q_idx": torch.arange(SMALL)[:, None], "kv_idx": torch.arange(SMALL), "q_len": SMALL, "kv_len": SMALL,
    }  # fmt: skip
    for _ in range(8 if specs else 1):
        tables = {spec.name: _random_table(spec, rank, generator) for spec, rank in specs.items()}
        holds = evaluate_exactly(mask, {**env, **tables}).expand(2, 2, SMALL, SMALL)
        if bool(holds.any()):
            b, h, q, kv = (int(i) for i in holds.nonzero()[0])
            lengths = {s.name: SMALL for s in mask.free_symbols & {Q_LEN, KV_LEN}}
            return Witness(b, h, q, kv, tables=tables, **lengths)
    return None


def _random_table(spec: TableSpec, rank: int, generator: torch.Generator) -> torch.Tensor:
    shape = (SMALL,) * rank
    if spec.bijective:
        return torch.rand(shape, generator=generator).argsort(dim=-1)
    if spec.dtype == "float":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    low, high = _values(spec) if spec.values_in or spec.dtype == "bool" else (0, SMALL // 4)
    table = low + torch.randint(0, min(high - low, SMALL) + 1, shape, generator=generator)
    table = table.sort(dim=-1).values if spec.monotone else table
    return table.to(torch.bool) if spec.dtype == "bool" else table


def _table_facts(spec: TableSpec, reads: list[tuple[list[Any], Any]]) -> Iterator[Any]:
    """What the declaration says about the reads that occur."""
    if spec.dtype != "float":
        low, high = _values(spec)
        for _, value in reads:
            yield z3.And(value >= low, value <= high)
    if not (spec.monotone or spec.bijective):
        return
    for (first, x), (second, y) in itertools.permutations(reads, 2):
        same = [a == b for a, b in zip(first[:-1], second[:-1], strict=True)]
        if spec.monotone:
            yield z3.Implies(z3.And(first[-1] <= second[-1], *same), x <= y)
        if spec.bijective:
            yield z3.Implies(z3.And(first[-1] != second[-1], *same), x != y)


def _values(spec: TableSpec) -> tuple[int, int]:
    """The least and the greatest value that a tensor for a table of whole numbers may hold."""
    low, high = (0, 1) if spec.dtype == "bool" else spec.values_in or (0 if spec.bijective else -INT64 - 1, INT64)
    return max(low, -INT64 - 1), min(high, INT64)


def _fill(spec: TableSpec) -> int:
    return _values(spec)[0] if spec.values_in else 0


def _build_table(spec: TableSpec, cells: dict[tuple[int, ...], float]) -> torch.Tensor | None:
    """A tensor that holds ``cells`` and keeps the declaration; None if it would be too large. Cells off the table do not matter."""
    inside = {place: value for place, value in cells.items() if min(place) >= 0}
    if not inside:
        inside = {(0,) * len(next(iter(cells))): _fill(spec)}
    shape = [max(place[axis] for place in inside) + 1 for axis in range(len(next(iter(inside))))]
    if spec.bijective:
        shape[-1] = max(shape[-1], *(int(v) + 1 for v in inside.values()))
    if torch.Size(shape).numel() > 1 << 20:
        return None
    dtype = {"int": torch.int64, "bool": torch.bool, "float": torch.float64}[spec.dtype]
    table = torch.full(shape, _fill(spec), dtype=dtype)
    rows: dict[tuple[int, ...], dict[int, float]] = {}
    for place, value in inside.items():
        rows.setdefault(place[:-1], {})[place[-1]] = value
        table[place] = value
    for lead in itertools.product(*(range(n) for n in shape[:-1])):
        known = rows.get(lead, {})
        if spec.bijective:
            rest = iter(sorted(set(range(shape[-1])) - {int(v) for v in known.values()}))
            table[lead] = torch.tensor([int(known[i]) if i in known else next(rest) for i in range(shape[-1])])
        elif spec.monotone and known:
            ordered = sorted(known.items())
            table[lead] = int(ordered[0][1])
            for place_, value in ordered:
                table[lead][place_:] = int(value)
    return table
