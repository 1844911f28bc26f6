"""Every interpretation of programs is a table with a rule for every kind of node: what is new is refused by name, by each of them."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from source_tree import ROOT, modules
from sparsedsl.analysis.proofs import PROVED
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.backends.reference.nodes import REFERENCE_RULES, Reference
from sparsedsl.execute.empty import run_empty
from sparsedsl.execute.node_rules import LOWERED_RULES
from sparsedsl.execute.requests import REQUEST_RULES, facts_of, requests_of
from sparsedsl.execute.state import horizon
from sparsedsl.execute.ways import way_of
from sparsedsl.program.branches import Attend, Branch, as_branch
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import fitted
from sparsedsl.program.node import Node, one_of
from sparsedsl.program.program_text import TEXT_RULES
from sparsedsl.program.relocation import Relocation, relocated
from sparsedsl.program.rules import Rules, check_rules, kinds_of_nodes
from sparsedsl.program_picture import COLOURS, words
from sparsedsl.runtime.program_call import ProgramCall, check_program_call
from sparsedsl.testing.program_inputs import draw_inputs

CAUSAL = sd.kv_idx <= sd.q_idx


@dataclass(frozen=True, eq=False, repr=False)
class Doubled(Branch):
    """A kind of node that nobody has told the library of."""

    inner: Branch
    function = "doubled"


NEW = Program(one_of(Doubled(as_branch("the test", sd.patterns.sliding_window(4)))))


def call(keys: int) -> ProgramCall:
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, keys, 4)
    return check_program_call(NEW, q, k, k, {})


# Interpretation -> what asks it about the new node.
QUESTIONS: dict[str, Callable[[], Any]] = {
    "the effects": lambda: reasons(NEW),
    "the text form": lambda: check_rules(NEW, TEXT_RULES),
    "the cost": lambda: sd.analyse(NEW, 8),
    "the proof of causality": lambda: program_causality(NEW),
    "the reference": lambda: Reference(call(3)).value(NEW.root),
    "the lowering": lambda: check_rules(NEW, LOWERED_RULES),
    "the explanation": lambda: way_of(NEW.root, [], "auto", facts_of(call(3), False)),
    "the requests to backends": lambda: requests_of(NEW, facts_of(call(3), False)),
    "the state": lambda: horizon(NEW),
    "a call without keys": lambda: run_empty(call(0)),
    "what a layer adds to a program": lambda: fitted(NEW, 0, sd.attend(CAUSAL), 0.25, 4),
    "where a call stands": lambda: relocated(NEW, Relocation(heads=(1, 2))),
    "the exchange between ranks": lambda: sd.parallel.plan(NEW, 256, 2),
    "the sink logits of a layer": lambda: fitted(NEW, 0, sd.attend(CAUSAL, sink=0.0), None, 4),
}


def tables() -> dict[str, Rules[Any]]:
    """Every table of rules that stands in the library, by its interpretation."""
    for name in modules(ROOT):
        if name != "sparsedsl.__main__":
            importlib.import_module(name)
    found = [thing for name in modules(ROOT) if name in sys.modules for thing in vars(sys.modules[name]).values()]
    return {thing.interpretation: thing for thing in found if isinstance(thing, Rules)}


@pytest.mark.parametrize("interpretation", QUESTIONS)
def test_a_kind_of_node_without_a_rule_is_refused_by_the_name_of_the_interpretation(interpretation: str) -> None:
    with pytest.raises(sd.UnsupportedError, match=f"{interpretation} has no rule for nodes of the kind Doubled"):
        QUESTIONS[interpretation]()


def test_no_interpretation_is_left_out() -> None:
    assert set(tables()) == set(QUESTIONS)


def test_every_table_has_a_rule_for_every_kind_and_cannot_be_made_without() -> None:
    for interpretation, rules in tables().items():
        kinds = set(rules)
        assert kinds in (kinds_of_nodes(), kinds_of_nodes(Branch)), interpretation
        base = Node if kinds == kinds_of_nodes() else Branch
        with pytest.raises(TypeError, match=f"{interpretation} has no rule for Mix: write one"):
            Rules(interpretation, {kind: rule for kind, rule in rules.items() if kind.__name__ != "Mix"}, base)


def test_rules_for_a_kind_of_ones_own_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(run: Any, node: Doubled) -> Any:
        out, lse = run.value(node.inner)
        return 2 * out, lse

    for rules, rule in ((REFERENCE_RULES, doubled), (LOWERED_RULES, doubled), (TEXT_RULES, Doubled)):
        monkeypatch.setitem(rules, Doubled, rule)
    monkeypatch.setitem(tables()["the effects"], Doubled, lambda node: iter(()))
    monkeypatch.setitem(REQUEST_RULES, Doubled, lambda node, asked: [])
    q, k, v = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    for backend in ("reference", "tiled"):
        once = sd.compile(sd.patterns.sliding_window(4), backend=backend)(q, k, v)
        assert torch.allclose(sd.compile(NEW, backend=backend)(q, k, v), 2 * once)


def test_a_picture_has_words_and_a_colour_for_every_kind() -> None:
    assert {kind.gives for kind in kinds_of_nodes()} == set(COLOURS)
    assert words(NEW, NEW.root, {})[0] == NEW.labels[NEW.root]


# ---- no chains ---------------------------------------------------------------------------------------------------------------------


def asked(function: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What ``isinstance`` and ``match`` look at in a function, as source text, and the classes they look for."""
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[subject, against]):
                yield ast.unparse(subject), against
            case ast.Match(subject=subject, cases=cases):
                patterns = [part for case in cases for part in ast.walk(case.pattern)]
                yield from ((ast.unparse(subject), part.cls) for part in patterns if isinstance(part, ast.MatchClass))


def chains(source: str) -> list[str]:
    """Functions that do one thing for one kind of node and another for another, with the kinds."""
    kinds, found = {kind.__name__ for kind in kinds_of_nodes()}, []
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            told_apart: dict[str, set[str]] = {}
            for subject, against in asked(function):
                parts = [*ast.walk(against)]
                names = [p.id for p in parts if isinstance(p, ast.Name)] + [p.attr for p in parts if isinstance(p, ast.Attribute)]
                told_apart.setdefault(subject, set()).update(kinds & {*names})
            found += [f"{function.name}: {', '.join(sorted(names))}" for names in told_apart.values() if len(names) > 1]
    return found


def test_chains_are_found() -> None:
    text = "def way(node):\n    if isinstance(node, (Dot, scores.Bound)):\n        return 1\n"
    assert chains(text) == ["way: Bound, Dot"]
    assert chains(
        "def way(node):\n    match node:\n        case Dot():\n            return 1\n        case Mix():\n            return 2\n"
    )
    assert not chains("def way(node):\n    return isinstance(node, (Dot, Node, tuple))\n")


def test_nothing_chooses_between_kinds_of_nodes_but_tables() -> None:
    # The checked call asks for inputs, which it is given, and for recurrences, which it checks: neither is an interpretation.
    others = {name: path for name, path in modules(ROOT).items() if name != "sparsedsl.runtime.program_call"}
    found = {name: chains(path.read_text(encoding="utf-8")) for name, path in others.items()}
    assert {name: functions for name, functions in found.items() if functions} == {}


# ---- what chains had let through ---------------------------------------------------------------------------------------------------


def test_linear_attention_over_reordered_keys_is_not_proved_causal() -> None:
    order = sd.segment_sort(sd.probe(sd.q, sd.k, rows=4), 4)
    sorted_keys = sd.linear([0.5] * 4, k=sd.take(sd.k, order), v=sd.take(sd.v, order))
    verdict = program_causality(Program(sorted_keys))
    assert verdict.status == "REFUTED" and "probe" in verdict.reason
    with pytest.raises(sd.testing.Counterexample):
        sd.testing.assert_causal(sd.compile(sorted_keys, backend="reference", allow=[LATER_QUERIES]))
    assert program_causality(Program(sd.linear([0.5] * 4))) == PROVED


@pytest.mark.parametrize(
    "mask",
    [
        lambda selected, others: CAUSAL & ~selected,
        lambda selected, others: CAUSAL & (selected ^ others),
        lambda selected, others: CAUSAL & ~(selected & others),
        lambda selected, others: ~(CAUSAL & selected),
        lambda selected, others: CAUSAL & (selected | (sd.q_idx - sd.kv_idx < 3)),
    ],
)
def test_pairs_of_the_report_are_no_fewer_than_a_call_attends_to(mask: Callable[[Any, Any], Any]) -> None:
    means = sd.summary(sd.k, 4)
    selected, others = sd.top_k(sd.dot(sd.q, means), 2), sd.threshold(sd.dot(sd.q, sd.summary(sd.k, 4, "max")), 0.1)
    program = Program(sd.attend(mask(selected, others)))
    q, k = (torch.randn(1, 2, 32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    run = Reference(check_program_call(program, q, k, k, {}))
    attended = int(run.pairs(program.patterns[0].mask).expand(1, 2, 32, 32).sum())
    report = sd.analyse(program, 32, heads=2)
    most = max(step.pairs or 0 for step in report.steps)
    assert 0 < attended <= most <= 2 * 32 * 32
    assert report.density == most / (2 * 32 * 32)


@settings(max_examples=15)
@given(sd.testing.programs(), st.integers(0, 99))
def test_pairs_of_the_report_bound_those_of_random_programs(program: Program, seed: int) -> None:
    case = sd.testing.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=24, kv_len=24)
    named = draw_inputs(program, case, seed, {})
    q, k, v = (named.pop(name) for name in ("q", "k", "v"))
    run = Reference(check_program_call(program, q, k, v, named))
    tables = {name: x for name, x in named.items() if name in program.tables}
    report = sd.analyse(program, case.q_len, heads=case.heads, kv_heads=case.kv_heads, **tables)
    steps = {step.node: step for step in report.steps}
    for node in program.order:
        if isinstance(node, Attend) and node.y.axes[2] == "keys":
            attended = int(run.pairs(node.pattern.mask).expand(1, 4, 24, 24).sum())
            assert attended <= steps[node].pairs, program.text


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_sinks_are_all_there_is_where_there_are_no_keys(backend: str) -> None:
    sinks = sd.table("sinks", dtype=float, learned=True)
    picking = sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2), sink=sinks[sd.h])
    logits = torch.tensor([1.0, 2.0], requires_grad=True)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    joined = sd.joint(picking, sd.attend(CAUSAL, sink=1.5), CAUSAL)
    for program, wanted in ((picking, logits), (joined, torch.logaddexp(logits, torch.tensor(1.5)))):
        out, lse = sd.compile(program, backend=backend)(q, k, k, return_lse=True, sinks=logits)
        assert not out.any() and torch.allclose(lse, wanted[None, :, None].expand(1, 2, 3))
        (slope,) = torch.autograd.grad(lse.sum(), logits)
        (expected,) = torch.autograd.grad(3 * wanted.sum(), logits)
        assert torch.allclose(slope, expected)
