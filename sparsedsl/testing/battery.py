"""Every property on one pattern, with random shapes, tables and inputs: what ``python -m sparsedsl check`` runs."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from random import SystemRandom
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from sparsedsl.analysis.bounds import check_reads
from sparsedsl.analysis.domain import Domain
from sparsedsl.check_defaults import ASKED
from sparsedsl.errors import ArgumentError, CallWarning, SparseDSLError, TableError
from sparsedsl.execute.compiling import as_declared
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.lang.advice import meant, shown, surplus
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX, Q_LEN
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.graph import Program
from sparsedsl.testing.behaviour import assert_causal, assert_equivariant, assert_prefill_equals_decode
from sparsedsl.testing.call_shapes import AttentionCase, inputs, shapes
from sparsedsl.testing.counterexamples import Counterexample, NotApplicable, pattern_code, showing
from sparsedsl.testing.expression_checks import assert_text_round_trip
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_check import check_kernel
from sparsedsl.testing.kernels.kernel_report import KernelReport
from sparsedsl.testing.leaks import ask_about_pattern
from sparsedsl.testing.list_checks import assert_lists_sound
from sparsedsl.testing.matching import assert_matches_reference
from sparsedsl.testing.pattern_report import FAILS, HOLDS, SKIPPED, LayerReports, Property, Report
from sparsedsl.testing.program_battery import PROGRAM_PROOFS, PROGRAM_PROPERTIES, ProgramSubject
from sparsedsl.testing.progress import Progress
from sparsedsl.testing.reach_checks import constants_of, edges_of
from sparsedsl.testing.strategies import tables_for
from sparsedsl.testing.unseen_checks import assert_unseen_keys_have_no_effect
from sparsedsl.tracing.decorators import is_traceable

__all__ = ["check"]

# Whole sequences that are tried reach past the constants of the pattern (a window of 128), but no further than this; beyond, a few queries
# are tried next to each constant.
_LONGEST = 600
# What `check` takes for kernels alone.
_OF_KERNELS = frozenset(("budget", "locate", "only", "seconds", "stop_at_first"))
_BLOCKS = (1, 2, 3, 8, 16, 32, 64)


@dataclass(frozen=True)
class _Subject:
    """A pattern under test: what is fixed about it, and where its cases come from."""

    pattern: Pattern
    backend: str
    tables: dict[str, torch.Tensor]
    causal: bool | None

    @property
    def bound(self) -> Pattern:
        """The pattern with the given tables bound."""
        return self.pattern.bind(**self.tables)

    def attention(self) -> Any:
        """The compiled pattern."""
        return compile_pattern(self.bound, backend=self.backend)

    def _limits(self) -> tuple[dict[str, int], float]:
        """Largest sizes of whole problems, and how far positions may go with the tables that are bound."""
        bound, longest = self.bound.bound, math.inf
        reach = min(2 * max([0, *constants_of(self.pattern.exprs)]) + 16, _LONGEST)
        limits = {"max_len": max(70, reach), "max_batch": 2 if reach <= 70 else 1, "max_heads": 6 if reach <= 70 else 2}
        names = {BATCH: "max_batch", HEAD: "max_heads", Q_IDX: "max_len", KV_IDX: "max_len"}
        for read in {r for expr in self.pattern.exprs for r in table_reads(expr)}:
            for argument, size in zip(read.args, bound[read.spec.name].shape if read.spec.name in bound else (), strict=False):
                if argument in names:
                    limits[names[argument]] = min(limits[names[argument]], size)
                    longest = min(longest, size) if argument in (Q_IDX, KV_IDX) else longest
        return limits, longest

    def cases(self, **words: Any) -> st.SearchStrategy[AttentionCase]:
        """Shapes that reach past the pattern's constants and stay inside the tables that are bound to it."""
        limits, longest = self._limits()
        near = [n for n in edges_of(self.pattern.exprs, self.bound.bound) if n + 1 < longest]
        found = shapes(**(limits | {"near": near} | words))
        return found.filter(self._fits) if self.bound.bound else found

    @property
    def within(self) -> AttentionCase | None:
        """The largest problem that bound tables reach; None if they do not limit positions."""
        limits, longest = self._limits()
        if longest == math.inf:
            return None
        batch, heads = limits["max_batch"], limits["max_heads"]
        return AttentionCase(batch, heads, heads, int(longest), int(longest))

    def _fits(self, case: AttentionCase) -> bool:
        """Whether tables that were bound from outside are long enough; tables still to be drawn will be."""
        bound = self.bound.bound
        if set(self.pattern.tables) - set(bound):
            return True
        try:
            check_reads(self.pattern, Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, bound))
        except TableError:
            return False
        return True

    def draw(self, data: st.DataObject, **words: Any) -> tuple[AttentionCase, dict[str, torch.Tensor]]:
        """A case and the tables for it."""
        case = data.draw(self.cases(**words))
        return case, data.draw(tables_for(self.bound, case))


# ---- the properties: each draws a case and runs an assertion -----------------------------------------------


def _text(subject: _Subject, data: st.DataObject) -> None:
    parts = [subject.pattern.mask, subject.pattern.score, subject.pattern.sink]
    for part in parts:
        if part is not None:
            assert_text_round_trip(part)


def _lists(subject: _Subject, data: st.DataObject) -> None:
    case, tables = subject.draw(data)
    block = data.draw(st.sampled_from(_BLOCKS)), data.draw(st.sampled_from(_BLOCKS))
    words: dict[str, Any] = {"batch": case.batch, "heads": case.heads, "q_offset": case.q_offset, **tables}
    sizes = case.q_len, case.kv_len, block
    with showing(f"pattern = {pattern_code(subject.bound)}", "assert_lists_sound", "pattern", *sizes, **words):
        assert_lists_sound(subject.bound, *sizes, **words)


def _numbers(subject: _Subject, data: st.DataObject) -> None:
    case, tables = subject.draw(data)
    q, k, v = data.draw(inputs(case, dtype=st.sampled_from([torch.float32, torch.bfloat16])))
    words: dict[str, Any] = {"q_offset": case.q_offset, **tables}
    with showing(f"attn = {_attention_code(subject)}", "assert_matches_reference", "attn", q, k, v, **words):
        assert_matches_reference(subject.attention(), q, k, v, **words)


def _causal(subject: _Subject, data: st.DataObject) -> None:
    _on_case(subject, data, assert_causal)


def _calls(subject: _Subject, data: st.DataObject) -> None:
    if any(Q_LEN in expr.free_symbols for expr in subject.pattern.exprs):
        raise NotApplicable("the pattern reads q_len, the end of each call")
    _on_case(subject, data, assert_prefill_equals_decode, max_len=40, max_heads=2, max_batch=1)


def _order(subject: _Subject, data: st.DataObject) -> None:
    if all(any(s in expr.free_symbols for expr in subject.pattern.exprs) for s in (BATCH, HEAD)):
        raise NotApplicable("the pattern reads both b and h")
    _on_case(subject, data, assert_equivariant)


def _unseen(subject: _Subject, data: st.DataObject) -> None:
    _on_case(subject, data, assert_unseen_keys_have_no_effect)


def _on_case(subject: _Subject, data: st.DataObject, assertion: Callable[..., Any], **words: Any) -> None:
    case, tables = subject.draw(data, **words)
    seed = data.draw(st.integers(0, 99))
    with showing(f"attn = {_attention_code(subject)}", assertion.__name__, "attn", case, seed=seed, **tables):
        assertion(subject.attention(), case, seed=seed, **tables)


def _attention_code(subject: _Subject) -> str:
    return f"sd.compile({pattern_code(subject.bound)}, backend={subject.backend!r})"


PROPERTIES: dict[str, tuple[str, Callable[[_Subject, st.DataObject], None]]] = {
    "text": ("printing and parsing give the same expressions back", _text),
    "tile lists": ("no allowed pair is left out, no full tile has a masked pair, no empty tile is listed", _lists),
    "numbers": ("outputs, LSE and gradients equal plain attention in float64", _numbers),
    "causality": ("results at a position do not move with anything after it", _causal),
    "calls": ("one call, chunks, and token by token give the same", _calls),
    "order": ("batch entries and heads can be reordered, as far as the pattern ignores b and h", _order),
    "unseen": ("keys that a query may not see have no effect on it, whatever they hold", _unseen),
}
# What is asked before cases are drawn; the answer is printed beside the verdict.
PROOFS: dict[str, Callable[[_Subject], str]] = {
    "causality": lambda subject: ask_about_pattern(subject.attention(), subject.causal, subject.within),
}


def check(
    pattern: Any,
    *,
    examples: int | None = None,
    progress: bool = False,
    backend: str = "reference",
    causal: bool | None = None,
    seed: int | None = None,
    **tables: Any,
) -> Report | KernelReport | LayerReports:
    """Run every property of the kit on one pattern, program or kernel, with random shapes, tables and inputs.

    Args:
        pattern: a Mask, a Pattern, a node of a program, or a FlexAttention function; a :class:`Kernel`, or with ``implements=`` a function
            on q, k and v, which is made one; or what ``sd.models.apply`` returned: then the pattern of each layer, of decoders as a
            causal one.
        examples: random cases for each property; None: 50, of a kernel 100.
        progress: show how far it is on stderr: a bar in a terminal, else a line every few seconds.
        backend: the lowering that is run; see :func:`sparsedsl.compile`.
        causal: True if the pattern must not see later positions, False if it may. None: as ``sd.attend(causal=True)`` declares; where it
            does not, leaks are tested for only if the mask itself looks causal. The prover is asked first: what it refutes fails at its
            witness, however far away, and what it proves is said.
        seed: None draws new cases each time, by a seed that the report names; a number draws the same ones.
        tables: values for tables; the others are drawn, as their declarations allow. All of a program's are drawn, and its inputs.
            Of a kernel these words are ``budget="quick" | "default" | "deep"``, ``seconds``, ``only`` (names of properties),
            ``stop_at_first`` and ``locate``, of a function also what :class:`Kernel` takes; see docs/testing.md.

    Returns:
        A :class:`Report`, of a kernel a :class:`KernelReport`, of the layers of a model :class:`LayerReports`: ``print`` it, ask ``.ok``,
        run ``.snippet``.

    >>> import sparsedsl as sd
    >>> report = check((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 5), examples=3)
    >>> report.ok
    True
    >>> leaky = sd.attend(sd.kv_idx <= sd.q_idx + 1, causal=True)
    >>> [p.name for p in check(leaky, examples=1, seed=0).properties if p.status == "FAILS"]
    ['causality']
    """
    if callable(pattern) and "implements" in tables:
        claims = {f.name for f in fields(Kernel) if f.init}
        pattern = Kernel(pattern, **{name: value for name, value in tables.items() if name in claims})
        tables = {name: value for name, value in tables.items() if name not in claims}
    if isinstance(pattern, Kernel):
        _refuse_for_kernels(
            backend != "reference" and "backend", causal is not None and "causal", *sorted(set(tables) - _OF_KERNELS)
        )
        return check_kernel(pattern, examples=examples, seed=seed, progress=progress, **tables)
    examples, seed = ASKED.now.examples or examples, seed if ASKED.now.seed is None else ASKED.now.seed
    examples = 50 if examples is None else examples
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise SparseDSLError(f"seed must be a whole number or None; got {shown(seed)}")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise SparseDSLError(f"examples must be a whole number of at least 1; got {examples!r}")
    seed = SystemRandom().randrange(10**6) if seed is None else seed
    words: dict[str, Any] = {"examples": examples, "progress": progress, "backend": backend, "seed": seed}
    layers = getattr(pattern, "by_layers", None)
    if layers is not None:
        reports: dict[Any, Any] = {
            key: check(one, causal=True if causal is None and decodes else causal, **words, **tables)
            for key, one, decodes in layers()
        }
        return LayerReports(reports)
    _refuse_bare_kernels(pattern)
    declared = as_declared(getattr(pattern, "program", pattern), "check()")
    if isinstance(declared, Program) and declared.static is not None:
        declared = declared.static
    _refuse_unknown(declared, tables)
    if isinstance(declared, Program):
        claimed = causal is None and any(part.causal for part in declared.patterns)
        programs = ProgramSubject(declared, backend, True if claimed else causal)
        programs.attention()
        return Report(declared, tuple(_run(PROGRAM_PROPERTIES, PROGRAM_PROOFS, programs, examples, progress, seed)), seed)
    subject = _Subject(declared, backend, dict(tables), True if causal is None and declared.causal else causal)
    subject.attention()  # refuses unknown backends before anything is drawn
    return Report(declared, tuple(_run(PROPERTIES, PROOFS, subject, examples, progress, seed)), seed)


def _refuse_unknown(declared: Pattern | Program, tables: Mapping[str, Any]) -> None:
    """What is no table may be one of our own words, misspelt."""
    own = [*declared.tables, *(declared.inputs if isinstance(declared, Program) else ())]
    unknown = [name for name in tables if name not in own]
    if unknown:
        known = [*own, *inspect.signature(check).parameters]
        raise TableError("check(): " + surplus(unknown, known, f"the pattern reads {', '.join(own) or 'no table'}"))
    if tables and isinstance(declared, Program):
        raise SparseDSLError(f"tables and inputs of a program are drawn; bind what is fixed to it: got {', '.join(tables)}")


def _refuse_bare_kernels(value: Any) -> None:
    """A function on q, k and v says what it should compute; no mask or score takes these."""
    if not is_traceable(value):
        return
    try:
        first = list(inspect.signature(value).parameters)[:3]
    except (TypeError, ValueError):  # none that could be seen
        return
    if first in (["q", "k", "v"], ["query", "key", "value"]):
        name = getattr(value, "__name__", "fn")
        raise ArgumentError(
            f"check(): {name} takes q, k and v, as a kernel does, and does not say what it should compute: write "
            f"sd.testing.check({name}, implements=pattern), or make it a sd.testing.Kernel({name}, implements=pattern) first"
        )


def _refuse_for_kernels(*names: str | bool) -> None:
    for name in names:
        if name in ("backend", "causal"):
            raise ArgumentError(
                f"check: {name}= is for patterns and programs; a kernel says what it implements, and runs as it is"
            )
        if name:
            known = ", ".join(sorted(_OF_KERNELS))
            near = meant(name, _OF_KERNELS)
            raise ArgumentError(f"check: of a kernel there are examples, seed, progress, {known}; got {name}{near}")


def _run(
    properties: Mapping[str, tuple[str, Callable[[Any, st.DataObject], None]]],
    proofs: Mapping[str, Callable[[Any], str]],
    subject: Any,
    examples: int,
    progress: bool,
    seed: int,
) -> Iterator[Property]:
    for name, (meaning, body) in properties.items():
        wanted = 1 if name == "text" else examples
        with Progress(wanted, name, shown=progress) as shown_so_far:
            yield _verdict(name, meaning, body, proofs.get(name), subject, wanted, shown_so_far, seed)


def _verdict(
    name: str,
    meaning: str,
    body: Callable[[Any, st.DataObject], None],
    proof: Callable[[Any], str] | None,
    subject: Any,
    examples: int,
    progress: Progress,
    seed: int,
) -> Property:
    count = 0

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, report_multiple_bugs=False, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )  # fmt: skip
    @hypothesis.given(st.data())
    def cases(data: st.DataObject) -> None:
        nonlocal count
        try:
            body(subject, data)
        except Counterexample:
            progress.say("failed; looking for a smaller case")
            raise
        count += 1
        progress.update()

    try:
        with warnings.catch_warnings():
            # what is rarely meant, as an offset beyond the keys, is drawn on purpose
            warnings.simplefilter("ignore", CallWarning)
            detail = "" if proof is None else proof(subject)
            hypothesis.seed(seed)(cases)()
    except NotApplicable as reason:
        return Property(name, meaning, SKIPPED, 0, str(reason))
    except Unsatisfiable:
        return Property(name, meaning, SKIPPED, 0, "the bound tables fit no small shape that was tried")
    except Counterexample as failure:
        return Property(name, meaning, FAILS, count, failure.what, failure.snippet)
    return Property(name, meaning, HOLDS, count, detail)
