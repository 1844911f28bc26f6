"""Two tables of rules, one for the dense meaning and one for the lowering: both whole, neither built on the other, each seen by the kit."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch

import sparsedsl as sd
from source_tree import ROOT, modules
from sparsedsl import testing as kit
from sparsedsl.backends.reference.nodes import REFERENCE_RULES, Reference
from sparsedsl.execute.lowering import Lowering
from sparsedsl.execute.node_rules import LOWERED_RULES
from sparsedsl.program import branches, given_blocks, key_choices, orders, recurrences, scores, select, sources, tensors
from sparsedsl.program.branches import Branch
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.node import one_of
from sparsedsl.program.rules import Rules, kinds_of_nodes
from sparsedsl.selection.composed_scores import SumScores
from sparsedsl.selection.scores import ScoreSource, TensorScores
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.testing import battery
from sparsedsl.testing.program_inputs import named_inputs

CASE = kit.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=18, kv_len=18)
CAUSAL = sd.kv_idx <= sd.q_idx
ENDED = (sd.kv_idx // 4 + 1) * 4 <= sd.q_idx
MEANS = sd.summary(sd.k, 4)
BY = sd.dot(sd.q, MEANS)
SEEN = sd.probe(sd.q, sd.k, rows=4, causal=True, keep="before")
GATE = sd.input("gate", "batch heads queries 2")
VOTES = sd.given_key_scores(sd.input("votes", "batch heads keys"))

PROGRAMS: dict[type, Any] = {
    tensors.Input: sd.attend(CAUSAL, k=sd.input("keys", "batch kv_heads keys head_dim")),
    tensors.Summary: sd.attend(CAUSAL & sd.top_k(BY, 2)),
    orders.Take: sd.patterns.pbs(4, 8),
    scores.Dot: sd.attend(CAUSAL & sd.top_k(BY, 2)),
    scores.Bound: sd.attend(CAUSAL & sd.top_k(sd.bound(sd.q, sd.k, 4), 2)),
    scores.Antidiagonal: sd.attend(CAUSAL & sd.top_k(sd.antidiagonal(sd.q, sd.k, 2, 4), 2)),
    scores.Softmax: sd.attend(CAUSAL & sd.top_p(BY.softmax(ENDED), 0.6, among=CAUSAL)),
    scores.Regroup: sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 2)).regroup(2), 2)),
    scores.Plus: sd.attend(CAUSAL & sd.top_k(BY + sd.dot(sd.q, sd.summary(sd.k, 4, "max")), 2)),
    scores.Gumbel: sd.attend(CAUSAL & sd.top_k(BY.gumbel(sd.input("seed", "1")), 2)),
    scores.Relu: sd.attend(CAUSAL & sd.top_k(BY.relu() - 0.1 * BY, 2)),
    scores.Scaled: sd.attend(CAUSAL & sd.threshold(2 * BY - 0.3, 0.1)),
    scores.Weighted: sd.attend(CAUSAL & sd.top_k((sd.input("w", "batch heads queries") * BY).over_heads("sum"), 2)),
    scores.Overlap: sd.attend(
        CAUSAL & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4, stride=2)).softmax(sd.kv_idx * 2 + 4 <= sd.q_idx + 1).overlap(4), 2)
    ),
    scores.GivenScores: sd.attend(CAUSAL & sd.top_k(sd.given_scores(sd.input("gate", "batch heads queries keys/4")), 2)),
    scores.GivenKeyScores: sd.compact(
        sd.keep_tokens(VOTES, tail=0.4, always=2), CAUSAL
    ),
    key_choices.Diagonals: sd.attend(CAUSAL & sd.top_k(sd.diagonals(sd.q, sd.k, rows=4), 6)),
    key_choices.ChosenKeys: sd.attend(CAUSAL & sd.top_k(SEEN, 6)),
    key_choices.Divergence: sd.patterns.flexprefill(4, 0.6, 0.19),
    given_blocks.Given: sd.attend(CAUSAL & sd.given(sd.input("lists", "batch one queries width"), 4)),
    scores.Grouped: sd.attend(CAUSAL & sd.top_k(BY.over_group("sum"), 2)),
    scores.GroupedKeys: sd.patterns.pbs(4, 8, share="group"),
    scores.Probe: sd.patterns.pbs(4, 8),
    scores.Smooth: sd.patterns.token_sparse(0.4, 4, 3, 2),
    orders.Order: sd.patterns.pbs(4, 8),
    orders.Inverse: sd.patterns.pbs(4, 8),
    orders.Tokens: sd.patterns.token_sparse(0.4, 4, 3, 2),
    select.TopK: sd.attend(CAUSAL & sd.top_k(BY, 2)),
    select.TopP: sd.attend(CAUSAL & sd.top_p(BY, 0.6)),
    select.Threshold: sd.attend(CAUSAL & sd.threshold(BY, 0.1)),
    sources.Slots: sd.patterns.nha(3, 4),
    branches.Attend: sd.joint(CAUSAL, ENDED),
    branches.Recall: sd.patterns.nha(3, 4),
    recurrences.Linear: sd.linear([0.5, 0.6, 0.7, 0.8]),
    branches.Joint: sd.joint(CAUSAL, ENDED),
    branches.Mix: sd.mix(CAUSAL, ENDED, weights=GATE),
    branches.Compact: sd.patterns.token_sparse(0.4, 4, 3, 2),
}  # fmt: skip

# Keys of programs that were found right already.
RIGHT: set[str] = set()


def bent(value: Any) -> Any:
    """What a rule gives, a little wrong."""
    if isinstance(value, ScoreSource):
        ramp = torch.linspace(40, 0, value.shape[2] * value.shape[3], dtype=torch.float64)
        return SumScores((value, TensorScores(ramp.view(1, 1, *value.shape[2:]))))
    if isinstance(value, SelectedBlocks):
        return replace(value, indices=value.indices.roll(1, 2), counts=value.counts.roll(1, 2))
    if isinstance(value, tuple):
        return value[0] * (1 + 1e-6), *value[1:]
    if isinstance(value, list):  # kept tokens: one fewer
        return [index[:, 1:] for index in value]
    return value.roll(1, min(2, value.ndim - 1))


def assert_seen(kind: type, program: Any, monkeypatch: pytest.MonkeyPatch, rule: Callable[[Any, Any], Any]) -> None:
    """The kit says that ``tiled`` is right, and that it is not once its rule for a kind is another."""
    attn = sd.compile(program, backend="tiled", allow=[LATER_QUERIES])
    assert any(type(node) is kind for node in attn.program.everything)
    sizes = zip("qkv", (CASE.q_shape, CASE.k_shape, CASE.v_shape), strict=True)
    given = {name: kit.tensor(*shape, seed=n, dtype=torch.float64) for n, (name, shape) in enumerate(sizes)}
    given |= named_inputs(attn.program, CASE, seed=5)
    if attn.program.key not in RIGHT:
        kit.assert_matches_reference(attn, **given)
        RIGHT.add(attn.program.key)
    monkeypatch.setitem(LOWERED_RULES, kind, rule)
    with pytest.raises(kit.Counterexample, match="backend 'tiled'"):
        kit.assert_matches_reference(attn, **given)


def test_both_tables_have_a_rule_for_every_kind() -> None:
    assert kinds_of_nodes() == set(LOWERED_RULES) == set(REFERENCE_RULES) == set(PROGRAMS)
    assert not {*LOWERED_RULES.values()} & {*REFERENCE_RULES.values()}


def test_a_kind_without_a_rule_is_no_import() -> None:
    for rules in (LOWERED_RULES, REFERENCE_RULES):
        with pytest.raises(TypeError, match="the table has no rule for Mix: write one"):
            Rules("the table", {kind: rule for kind, rule in rules.items() if kind is not branches.Mix})


def test_a_node_without_a_rule_is_refused_when_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, eq=False, repr=False)
    class Doubled(Branch):
        inner: Branch
        function = "doubled"

    program = one_of(Doubled(branches.as_branch("the test", CAUSAL)))
    for backend in ("reference", "tiled", "auto"):
        with pytest.raises(sd.UnsupportedError, match="the reference has no rule for nodes of the kind Doubled"):
            sd.compile(program, backend=backend)
    monkeypatch.setitem(REFERENCE_RULES, Doubled, lambda run, node: run.value(node.inner))
    for backend in ("reference", "tiled"):  # nothing falls to the dense meaning
        with pytest.raises(sd.UnsupportedError, match="the lowering has no rule for nodes of the kind Doubled"):
            sd.compile(program, backend=backend)


def test_the_reference_shares_nothing_with_the_lowering_but_the_call() -> None:
    """What it reaches, in any number of steps, of all that runs: its own folder, and the checks of a call."""
    floors = ("sparsedsl.runtime", "sparsedsl.selection", "sparsedsl.backends", "sparsedsl.execute")
    known = modules(ROOT)
    seen, waiting = set(), ["sparsedsl.backends.reference.nodes"]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(floors):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                waiting += [name if name in known else str(node.module) for name in names]
    own = {name for name in known if name.startswith("sparsedsl.backends.reference.")}
    shared = {name.removeprefix("sparsedsl.runtime.") for name in seen - own}
    # `backend` is how the registry sees the reference; nothing of what it means lies there.
    assert own - {"sparsedsl.backends.reference.backend"} <= seen
    assert shared == {
        "call",
        "places",
        "program_call",
        "interpreter",
        "dtypes",
        "linear_calls",
        "seen_products",
        "torch_modes",
        "vmap",
    }
    assert not issubclass(Lowering, Reference) and not issubclass(Reference, Lowering)


@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.__name__)
def test_every_rule_of_the_lowering_that_is_bent_is_seen(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LOWERED_RULES[kind]
    assert_seen(kind, PROGRAMS[kind], monkeypatch, lambda run, node: bent(right(run, node)))


def test_gradients_that_are_lost_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(run: Any, node: Any, right: Any = LOWERED_RULES[branches.Joint]) -> Any:
        out, lse = right(run, node)
        return (out + out.detach()) / 2, lse

    assert_seen(branches.Joint, PROGRAMS[branches.Joint], monkeypatch, detached)


# ---- faults that people make, seen by the whole battery ---------------------------------------------------------------------------


def other(kind: type, change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The rule of a kind, for another node than the one it is asked for."""
    right = LOWERED_RULES[kind]
    return lambda run, node: right(run, change(node))


def half(run: Any, node: Any, right: Any = LOWERED_RULES[branches.Joint]) -> Any:
    out, lse = right(run, node)
    return out / 2, lse


def shifted(run: Any, node: Any, right: Any = LOWERED_RULES[branches.Compact]) -> Any:
    out, lse = right(run, node)
    return out.roll(1, 2), lse


FAULTS: dict[str, tuple[type, Callable[[Any, Any], Any], str]] = {
    "gates of mix reversed": (
        branches.Mix, other(branches.Mix, lambda node: replace(node, branches=node.branches[::-1])), "out",
    ),
    "half a joint": (branches.Joint, half, "out"),
    "top_k off by one": (select.TopK, other(select.TopK, lambda node: replace(node, count=node.count + 1)), "top_k"),
    "softmax over other candidates": (scores.Softmax, other(scores.Softmax, lambda node: replace(node, among=CAUSAL)), "top_p"),
    "rows of compact put back beside": (branches.Compact, shifted, "out"),
    "take that leaves the order as it is": (orders.Take, lambda run, node: run.value(node.x), "out"),
    "key scores of a group by their maximum": (
        scores.GroupedKeys, other(scores.GroupedKeys, lambda node: replace(node, how="max")), "segment_sort",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_check_sees_a_fault_of_the_backend_that_has_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, rule, where = FAULTS[name]
    # Numbers are what it is about, and the first failure is enough: nobody waits for a smaller one.
    monkeypatch.setattr(battery, "PROGRAM_PROPERTIES", {"numbers": battery.PROGRAM_PROPERTIES["numbers"]})
    once = SimpleNamespace(generate=hypothesis.Phase.generate, shrink=hypothesis.Phase.generate)
    monkeypatch.setattr(battery, "hypothesis", SimpleNamespace(**(vars(hypothesis) | {"Phase": once})))
    monkeypatch.setitem(LOWERED_RULES, kind, rule)
    report = kit.check(PROGRAMS[kind], examples=6, seed=0, backend="tiled")
    assert not report.ok and where in report.properties[0].detail
