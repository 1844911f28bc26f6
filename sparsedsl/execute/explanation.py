"""What a call would do and cost, before anything runs: who does each piece of work, asked of the registry as the call asks it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.cached_keys import STATE, CacheBound
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.mask_clauses import KeyBound, clauses
from sparsedsl.analysis.program_report import ProgramAnalysis, analyse_program
from sparsedsl.analysis.report import ITEM_BYTES, Analysis, analyse
from sparsedsl.backends.registry import AUTO, BACKENDS, check_runs, choose, named, refusals
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.execute.calls import Calls
from sparsedsl.execute.requests import requests_of
from sparsedsl.execute.static import StaticAttention
from sparsedsl.execute.ways import way_of
from sparsedsl.html_card import card, grid
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import expression_text, reading_text
from sparsedsl.lang.symbols import KV_IDX
from sparsedsl.lang.tables import declared
from sparsedsl.lang.thumbnail import thumbnail
from sparsedsl.plain_values import Reported
from sparsedsl.program.glance import picture_of
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.quantities import bytes_text, seconds_text
from sparsedsl.runtime.call import bind_tables, exactly
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.program_call import refused_positions
from sparsedsl.runtime.request import CallFacts, Plan, Request
from sparsedsl.tuning.rates import machine

__all__ = ["Explanation", "explain"]


# Beyond so many queries the backend that is taken alone is asked for its expected time: to cut strips takes a while.
LONGEST_COMPARED = 1 << 20


@dataclass(frozen=True, eq=False)
class CacheNeed(Reported):
    """What must be kept of the tokens so far to go on with later ones: ``bound``; ``bytes`` while ``length`` tokens go by, None where
    ``unknown`` says why they are not known; ``token_bytes``: of the keys and values of one token, all key heads and batch entries.
    ``recent``, ``first``: of a bound, its numbers for these heads and tables; None where there are none."""

    bound: CacheBound
    length: int
    token_bytes: int
    bytes: int | None
    unknown: str = ""
    recent: int | None = None
    first: int | None = None

    def __str__(self) -> str:
        if self.bytes is None:
            return f"{self.bound}; its bytes are not known: {self.unknown}"
        here = "".join(
            f"; {bound} is {value:,} here" if value is not None and not isinstance(bound, int) else ""
            for bound, value in ((self.bound.recent, self.recent), (self.bound.first, self.first))
        )
        took = f"{bytes_text(self.bytes)} for {self.length:,} tokens"
        if self.bound.kind == STATE and self.bound.recent == 0:
            return f"{self.bound}; {bytes_text(self.bytes)}, however many tokens went by"
        return f"{self.bound}{here}; {took}, {bytes_text(self.token_bytes)} a token that is held"


@dataclass(frozen=True, eq=False)
class Explanation(Reported):
    """What a call would do.

    Attributes:
        plan: who runs it and why; of several backends their names together. None: nobody can, and ``refusal`` says why and what to do.
        analysis: what it costs.
        details: how the backend would go about it: the schedule of `tiled`, the kernels of `triton`.
        unbuilt: what the first call has to wait for, as nobody has compiled it yet; or "". To explain compiles nothing.
        structure: of a static pattern, the solved clauses of its mask.
        steps: of a program, node -> how it runs, in words.
        others: name of each backend that cannot run the call -> why not.
        expected: of a static pattern, name of each backend that can -> seconds that the cost model expects of a forward pass, once all is
            compiled: an estimate, from ``expected_from``. Those of which it knows nothing are not in it.
        cache_need: what must be kept to go on with later tokens, and its bytes; proved when it is asked for.
    """

    _adds = ("expected", "expected_from", "cache_need")

    plan: Plan | None
    refusal: str | None
    analysis: Analysis | ProgramAnalysis
    details: tuple[str, ...] = ()
    unbuilt: str = ""
    structure: tuple[str, ...] = ()
    steps: Mapping[Node, str] | None = None
    others: Mapping[str, str] | None = None
    _expect: Callable[[], dict[str, float]] | None = None
    _device: str = "cpu"
    _cache: Callable[[], CacheNeed] | None = None

    @functools.cached_property
    def expected(self) -> Mapping[str, float]:
        """Name of each backend that can -> expected seconds of a forward pass, the quickest first; worked out when it is asked for."""
        return {} if self._expect is None else self._expect()

    @property
    def expected_from(self) -> str:
        """Where the rates are from that :attr:`expected` is made of."""
        if not self.expected:
            return ""
        return "the rates of this GPU" if self._device == "cuda" else f"the rates of this machine, {machine().source}"

    @functools.cached_property
    def cache_need(self) -> CacheNeed | None:
        """What must be kept of the tokens so far to go on with later ones, and its bytes (:func:`sparsedsl.cache_bound`)."""
        return None if self._cache is None else self._cache()

    @property
    def cache(self) -> str:
        """:attr:`cache_need` in words."""
        return "" if self.cache_need is None else str(self.cache_need)

    def _said(self) -> dict[str, Any]:
        found = super()._said()
        if self.steps is not None and isinstance(self.analysis, ProgramAnalysis):
            program = self.analysis.program
            found["steps"] = {program.labels[node]: program.worded(way) for node, way in self.steps.items()}
        return found

    def __str__(self) -> str:
        if self.plan is None:
            lines = [f"backend: none. {self.refusal}"]
        else:
            lines = [f"backend: {self.plan.backend} ({self.plan.reason})"]
            if self.unbuilt:
                lines.append(self.unbuilt)
            if self.details:
                lines += [f"{named(self.plan.backend).details}:", *(f"  {line}" for line in self.details)]
        lines += self._times()
        if self.others:
            width = max(map(len, self.others))
            lines += ["backends that do not run this call:", *(f"  {name:{width}}  {why}" for name, why in self.others.items())]
        if self.structure:
            many = "keys that a query sees, as intervals" + (" (any of):" if len(self.structure) > 1 else ":")
            lines += [many, *(f"  {line}" for line in self.structure)]
        if self.steps is not None and isinstance(self.analysis, ProgramAnalysis):
            lines += ["how each node runs:", *(f"  {names}: {way}" for names, way in self._ways())]
        return "\n".join([*lines, str(self.analysis), *([f"  cache            {self.cache}"] if self.cache else [])])

    __repr__ = __str__

    def _ways(self) -> list[tuple[str, str]]:
        """Nodes of a program, and how they run; those that run alike together."""
        found: dict[str, list[str]] = {}
        if self.steps is not None and isinstance(self.analysis, ProgramAnalysis):
            program = self.analysis.program
            for node, way in self.steps.items():
                found.setdefault(program.worded(way), []).append(program.labels[node])
        return [(", ".join(labels), way) for way, labels in found.items()]

    def _times(self) -> list[str]:
        """What a forward pass is expected to take, for the backend that was chosen and the others."""
        if not self.expected:
            return []
        chosen = None if self.plan is None else self.plan.backend
        lines = [f"expected time of a forward pass, once compiled (an estimate from {self.expected_from}):"]
        width = max(map(len, self.expected))
        for name, seconds in self.expected.items():
            lines.append(f"  {name:{width}}  {seconds_text(seconds)}{', chosen' if name == chosen else ''}")
        return lines

    def _repr_html_(self) -> str:
        found = self.analysis
        plan = "none" if self.plan is None else f"{self.plan.backend} ({self.plan.reason})"
        facts = [("backend", plan if self.refusal is None else f"{plan}. {self.refusal}")]
        facts += [(named(self.plan.backend).details, line.strip()) for line in self.details[:4] if self.plan is not None]
        facts += [("first call", self.unbuilt)] if self.unbuilt else []
        facts += [(f"expected of {name}", seconds_text(seconds)) for name, seconds in self.expected.items()]
        facts += [(f"not on {name}", why) for name, why in (self.others or {}).items()]
        facts += [*found.facts(), *([("cache", self.cache)] if self.cache else [])]
        code, lengths = str(found.program if isinstance(found, ProgramAnalysis) else found.pattern), _lengths(found)
        if isinstance(found, ProgramAnalysis):
            picture, more = picture_of(found.program, **lengths), grid(("node", "how it runs"), self._ways())
        else:
            picture, more = thumbnail(found.pattern.mask.expr, found.tables, **lengths), ""
        return card("Explanation", "\n".join(declared(code, found.tables)), facts, picture, found.warnings, more)


def _lengths(found: Analysis | ProgramAnalysis) -> dict[str, int]:
    return {"q_len": found.q_len, "kv_len": found.kv_len, "q_offset": found.q_offset}


def explain(
    calls: Calls, q_len: int, kv_len: int, *, batch: int, heads: int | None, kv_heads: int | None, head_dim: int, head_dim_v: int,
    dtype: Any, device: Any, q_offset: int, grad: bool, lse: bool, sizes: Mapping[str, int] | None, tables: Mapping[str, Any],
) -> Explanation:  # fmt: skip
    """See :meth:`sparsedsl.Attention.explain`."""
    program = calls.program
    name = check_word("dtype", str(dtype).removeprefix("torch."), ITEM_BYTES)
    heads = count_heads(program.patterns, {**program.bound, **tables}, heads)
    facts = CallFacts(
        torch.device(device).type, name, batch, heads, kv_heads or heads, q_len, kv_len, head_dim, head_dim_v, grad, lse
    )
    cache = functools.partial(_cache_need, program, facts, sizes, tables)
    if calls.static is not None:
        return replace(_of_pattern(calls.static, calls.backend, facts, q_offset, tables), _cache=cache)
    analysis = analyse_program(
        program, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        head_dim_v=head_dim_v, item=ITEM_BYTES[name], sizes=sizes, **tables,
    )  # fmt: skip
    why = refused_positions(program, q_offset, q_len, kv_len) or calls.refused_use(grad=grad, lse=lse)
    if why is not None:
        return Explanation(None, why, analysis, _cache=cache)
    return replace(_of_program(program, calls.backend, facts, sizes, analysis), _cache=cache)


def _cache_need(
    program: Program, facts: CallFacts, sizes: Mapping[str, int] | None, tables: Mapping[str, Any]
) -> CacheNeed:  # fmt: skip
    """What a cache must hold, and its bytes a token, and while ``facts.kv_len`` tokens go by."""
    bound = cache_bound(program)
    each = facts.batch * facts.kv_heads * (facts.head_dim + facts.head_dim_v) * ITEM_BYTES[facts.dtype]
    read = _of_sizes(bound, tables)
    try:
        took = bound.bytes(
            facts.kv_len, facts.kv_heads, facts.head_dim, facts.dtype, head_dim_v=facts.head_dim_v, batch=facts.batch,
            heads=facts.heads, sizes=sizes, **read,
        )  # fmt: skip
        recent, first = bound.sizes(batch=facts.batch, heads=facts.heads, **read) if bound.is_bounded else (None, None)
    except (ShapeError, TableError) as error:
        return CacheNeed(bound, facts.kv_len, each, None, str(error))
    return CacheNeed(bound, facts.kv_len, each, took, "", recent, first)


def _of_sizes(bound: CacheBound, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables that say how many keys stay."""
    read = {name for number in (bound.first, bound.recent) if not isinstance(number, int) for name in number.tables}
    return {name: table for name, table in tables.items() if name in read}


# ---- programs --------------------------------------------------------------------------------------------------------------------


def _of_program(
    program: Program, backend: str, facts: CallFacts, sizes: Mapping[str, int] | None, analysis: ProgramAnalysis
) -> Explanation:
    whole = backend != AUTO and named(backend).reads_whole_tables
    asked = requests_of(program, facts, whole_tables=whole, sizes=sizes)
    everything = [request for requests in asked.values() for request in requests]
    patience = Patience(asks=True)
    try:
        if backend != AUTO:
            check_runs(everything, backend, patience)
        plans = {node: [choose(request, backend, patience=patience) for request in requests] for node, requests in asked.items()}
    except UnsupportedError as error:
        return Explanation(None, str(error), analysis, others=refusals(everything, patience))
    every = [plan for found in plans.values() for plan in found]
    names = dict.fromkeys(plan.backend for plan in every)
    plan = Plan(", ".join(names), "; ".join(dict.fromkeys(why for plan in every for why in plan.reason.split("; "))))
    ways = {}
    for node in program.everything:
        done = [found.backend for found in plans.get(node, [])]
        way = way_of(node, list(zip(asked.get(node, []), done, strict=True)), backend, facts)
        if way is not None:
            ways[node] = named(backend).way(Request("attention", facts)) if backend == "reference" else way
    unbuilt = _unbuilt(
        ((request, plan) for node, found in plans.items() for request, plan in zip(asked[node], found, strict=True)), backend
    )
    return Explanation(plan, None, analysis, unbuilt=unbuilt, steps=ways, others=refusals(everything, patience))


def _unbuilt(work: Iterable[tuple[Request, Plan]], backend: str) -> str:
    """What calls have to wait for, each thing once."""
    words = (named(plan.backend).unbuilt(request, by_name=backend != AUTO) for request, plan in work)
    return "; ".join(dict.fromkeys(filter(None, words)))


# What `explain` takes by keyword beside tables.
_WORDS = (
    "kv_len", "batch", "heads", "kv_heads", "head_dim", "head_dim_v", "dtype", "device", "q_offset", "grad", "return_lse", "sizes",
)  # fmt: skip

# ---- static patterns -------------------------------------------------------------------------------------------------------------


def _of_pattern(static: StaticAttention, backend: str, facts: CallFacts, q_offset: int, tables: Mapping[str, Any]) -> Explanation:
    """The plan of a call with these facts, the analysis behind it, and how the mask was solved and cut."""
    pattern = static.pattern
    bound = bind_tables(pattern, tables, words=_WORDS)
    domain = exactly(pattern.exprs, Domain(facts.q_len, facts.kv_len, q_offset, facts.batch, facts.heads, bound))
    plan, refusal = None, None
    details: tuple[str, ...] = ()
    request, patience = static.request(facts), Patience(asks=True)
    try:
        plan = choose(request, backend, patience=patience)
        details = static.runner(plan.backend).described(domain, facts)
    except UnsupportedError as error:
        plan, refusal = None, str(error)
    analysis = analyse(
        pattern, facts.q_len, facts.kv_len, q_offset=q_offset, batch=facts.batch,
        heads=facts.heads, head_dim=facts.head_dim, head_dim_v=facts.head_dim_v, dtype=facts.dtype, **tables,
    )  # fmt: skip
    others = refusals([request], patience)
    able = [name for name in BACKENDS if name not in others]
    if facts.q_len > LONGEST_COMPARED:
        able = [name for name in able if plan is not None and name == plan.backend]
    unbuilt = "" if plan is None else _unbuilt([(request, plan)], backend)
    return Explanation(
        plan, refusal, analysis, details, unbuilt, tuple(_clause_lines(pattern)), others=others, _device=facts.device,
        _expect=functools.partial(_expected_seconds, static, domain, facts, analysis, able),
    )  # fmt: skip


def _expected_seconds(
    static: StaticAttention, domain: Domain, facts: CallFacts, analysis: Analysis, names: Iterable[str]
) -> dict[str, float]:  # fmt: skip
    """Backend -> seconds that a forward pass is expected to take, the quickest first."""
    found = {}
    for name in names:
        try:
            seconds = static.runner(name).expected_seconds(domain, facts, analysis.totals)
        except UnsupportedError:  # more queries than it cuts: the call says so
            continue
        if seconds:
            found[name] = seconds
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def _clause_lines(pattern: Pattern) -> list[str]:
    lines = []
    for clause in clauses(pattern.mask.expr):
        solved = " and ".join(_bound_text(bound) for bound in clause.bounds)
        rest = " and ".join(reading_text(r) for r in clause.rest)
        where = f"{solved}; where also {rest}" if solved and rest else solved or rest or "every pair"
        lines.append(f"{where}, looked at tile by tile" if rest else where)
    return lines or ["nothing"]


def _bound_text(bound: KeyBound) -> str:
    """Of one bound, the keys between its ends: solved for ``kv_idx`` where that is a term of its own."""
    low, form, high = bound.low, sympy.Add(bound.q_part, bound.kv_part), bound.high
    if low is not None and low == high:
        return f"{expression_text(bound.q_part)} == {expression_text(low - bound.kv_part)}" if bound.q_part != 0 else (
            f"{expression_text(form)} == {expression_text(low)}"
        )  # fmt: skip
    sign = {KV_IDX: 1, -KV_IDX: -1}.get(bound.kv_part)
    if sign is not None:
        low, high = (None if end is None else sign * (end - bound.q_part) for end in (low, high)[::sign])
        form = KV_IDX
    before = "" if low is None else f"{expression_text(low)} <= "
    return f"{before}{expression_text(form)}" + ("" if high is None else f" <= {expression_text(high)}")
