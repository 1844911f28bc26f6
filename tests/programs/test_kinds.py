"""The description of every kind of node: there is one for each, its words about axes and effects are true, and the manual shows them."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl.program import branches, given_blocks, key_choices, orders, recurrences, scores, select, sources, tensors
from sparsedsl.program.axes import base_of, block_of, join_heads, windows_of
from sparsedsl.program.effect_rules import reasons
from sparsedsl.program.kinds import KINDS, kinds_table
from sparsedsl.program.node import Node

SEEN = sd.probe(sd.q, sd.k, rows=8)
ORDER = sd.segment_sort(SEEN, 16)
MEANS = sd.summary(sd.k, 4)
DOT = sd.dot(sd.q, MEANS)
BLOCKS = sd.dot(sd.summary(sd.q, 8), sd.summary(sd.k, 8))
PICKS = sd.top_k(DOT, 2)
GATE = sd.input("gate", "batch kv_heads keys 16")
MEMORY = sd.slots(GATE, delay=4)
RETRIEVAL = sd.input("rq", "batch retrieval_heads queries rdim"), sd.input("marks", "batch retrieval_heads keys/8 rdim")
WINDOW = sd.attend(sd.patterns.sliding_window(4), k=sd.input("k_rope", "batch kv_heads keys head_dim", default=sd.k))
TOKENS = sd.keep_tokens(SEEN, tail=0.1, always=8)

GIVEN_AXES = "batch heads queries keys/4", "batch kv_heads queries/8 keys/8"

# More than one where what is said of the kind depends on how it is used.
EXAMPLES: dict[str, list[Node]] = {
    "input": [sd.q, sd.k, sd.v, GATE],
    "summary": [MEANS, sd.summary(sd.q, 8), sd.summary(MEANS, 4, "max")],
    "take": [sd.take(sd.k, ORDER), sd.take(sd.v, sd.segment_sort(SEEN.over_group("mean"), 16))],
    "dot": [DOT, BLOCKS, sd.dot(sd.q, sd.k), sd.dot(*RETRIEVAL), sd.dot(sd.input("one_q", "batch one queries head_dim"), sd.k)],
    "bound": [sd.bound(sd.q, sd.k, 8), sd.bound(sd.summary(sd.q, 4), MEANS, 4)],
    "antidiagonal": [sd.antidiagonal(sd.q, sd.k, 4, 8)],
    "softmax": [DOT.softmax(), BLOCKS.softmax(sd.kv_idx <= sd.q_idx)],
    "regroup": [DOT.regroup(4), BLOCKS.regroup(2, "max")],
    "gumbel": [DOT.gumbel(sd.input("seed", "1"))],
    "plus": [DOT + DOT.over_group().softmax(), BLOCKS + BLOCKS.over_heads()],
    "rectified": [DOT.relu(), BLOCKS.softmax().relu()],
    "scaled": [2 * DOT, BLOCKS - 1, -DOT],
    "weighted": [sd.input("w", "batch heads queries") * DOT, BLOCKS * sd.input("factor", "batch one queries/8")],
    "overlap": [
        sd.dot(sd.q, sd.summary(sd.k, 8, stride=4)).softmax().overlap(16),
        sd.dot(sd.summary(sd.q, 8), sd.summary(sd.k, 4, stride=4)).softmax().over_heads().overlap(8, "max"),
    ],
    "given_scores": [sd.given_scores(sd.input(f"made_{n}", axes)) for n, axes in enumerate(GIVEN_AXES)],
    "given_key_scores": [sd.given_key_scores(sd.input("votes", "batch heads keys"))],
    "given": [
        sd.given(sd.input("lists", "batch one queries width"), 4),
        sd.given(sd.input("bits", "batch heads queries keys/8")),
    ],
    "grouped": [DOT.over_group("max"), BLOCKS.over_heads(), SEEN.over_group("mean"), SEEN.over_heads()],
    "probe": [SEEN, sd.probe(sd.q, sd.k, rows=4, pooled=8), sd.probe(sd.q, sd.take(sd.k, ORDER), rows=4, causal=True)],
    "smooth": [sd.smooth(SEEN, 7), sd.smooth(SEEN, 3, "max")],
    "diagonals": [sd.diagonals(sd.q, sd.k, rows=8)],
    "keys_chosen": [
        sd.top_k(SEEN, 8),
        sd.top_p(sd.diagonals(sd.q, sd.k, rows=8), 0.9),
        sd.top_k(sd.given_key_scores(sd.input("votes", "batch heads keys")), 8),
        sd.top_k(SEEN, 2, block=8),
    ],
    "divergence": [
        sd.divergence(sd.probe(sd.q, sd.k, rows=8, pooled=4), SEEN),
        sd.divergence(*(sd.given_key_scores(sd.input(name, "batch heads keys")) for name in ("votes", "marks"))),
    ],
    "top_k": [PICKS, sd.top_k(BLOCKS, 2)],
    "top_p": [sd.top_p(DOT, 0.5), sd.top_p(BLOCKS, 0.5), sd.top_p(BLOCKS, 0.5, over="map")],
    "threshold": [sd.threshold(DOT, 0.5), sd.threshold(BLOCKS, 0.5)],
    "segment_sort": [ORDER, sd.segment_sort(sd.given_key_scores(sd.input("votes", "batch heads keys")), 16)],
    "inverse": [orders.Inverse(ORDER)],
    "keep_tokens": [TOKENS],
    "slots": [MEMORY],
    "attend": [
        WINDOW,
        sd.attend((sd.kv_idx <= sd.q_idx) & PICKS),
        sd.attend((sd.kv_idx + 1) * 4 <= sd.q_idx, k=MEANS, v=sd.summary(sd.v, 4)),
        sd.attend(sd.kv_idx <= sd.q_idx, k=sd.take(sd.k, ORDER), v=sd.take(sd.v, ORDER)),
    ],
    "recall": [sd.recall(MEMORY)],
    "linear": [
        sd.linear([0.5, 0.9]),
        sd.linear(log_decay=sd.input("g", "batch value_heads keys head_dim"), beta=sd.input("beta", "batch value_heads keys")),
        sd.linear(1.0, features="elu1", normalised="sum"),
    ],
    "joint": [sd.joint(WINDOW, sd.recall(MEMORY))],
    "mix": [sd.mix(WINDOW, sd.linear([0.5]), weights=sd.input("w", "batch heads queries 2"))],
    "compact": [sd.compact(TOKENS, sd.kv_idx <= sd.q_idx)],
}
# Not a node: a rule that an attention holds.
RULES = {"per_chunk": sources.PerChunk}


def classes() -> set[type]:
    """Every class of nodes that is not a base of others."""
    modules = (branches, given_blocks, key_choices, orders, recurrences, scores, select, sources, tensors)
    found = {thing for module in modules for thing in vars(module).values() if inspect.isclass(thing) and issubclass(thing, Node)}
    return {thing for thing in found if "function" in vars(thing)}


def test_every_kind_of_node_is_described_and_no_other():
    functions = {thing.function for thing in classes()}
    assert len(functions) > 20
    assert functions | set(RULES) == set(KINDS)
    assert {rule.function for rule in RULES.values()} == set(RULES)


def test_every_kind_has_examples_of_all_its_classes():
    assert set(EXAMPLES) == set(KINDS) - set(RULES)
    assert {type(node) for nodes in EXAMPLES.values() for node in nodes} == classes()
    assert all(node.function == function for function, nodes in EXAMPLES.items() for node in nodes)


def assert_axes(template: str, axes: tuple[str, ...], known: dict[str, str]) -> None:
    """``axes`` are as ``template`` says, where ``known`` holds what its letters stand for, and learns of new ones."""
    words = template.split()
    if words[-1] == "..":
        words, axes = words[:-1], axes[: len(words) - 1]
    assert len(words) == len(axes), f"{template!r} is not {axes}"
    for word, axis in zip(words, axes, strict=True):
        base, _, blocks = word.partition("/")
        if "+" in base:
            wanted = join_heads("the test", *(known[letter] for letter in base.split("+")))
        elif base.isupper():
            wanted = known.setdefault(base, base_of(axis))
        else:
            wanted = base
        assert base_of(axis) == wanted, f"{template!r}: {word} is {axis}"
        if "+" in blocks:
            assert windows_of(axis) is not None, f"{template!r}: {word} is {axis}"
        elif blocks and not base.isdecimal():
            letters = [known.setdefault(letter, str(block_of(axis))) for letter in blocks]
            size = 1
            for letter in letters:
                size *= int(letter)
            assert block_of(axis) == size, f"{template!r}: {word} is {axis}"
        else:
            assert block_of(axis) == 1, f"{template!r}: {word} is {axis}"


def taken(node: Node) -> list[Node]:
    """What the words about axes speak of, in their order: an attention's choices and gates come last."""
    return [node.x, node.y, node.z] if isinstance(node, (branches.Attend, recurrences.Linear)) else list(node.inputs)


def assert_shapes(shapes: str, node: Node) -> None:
    """A node has the axes that the words say."""
    before, _, after = shapes.partition("->")
    known = {"n": str(getattr(node, "block", getattr(node, "block", 0)))}
    templates = [part.strip() for part in before.split(",") if part.strip()]
    inputs = taken(node)
    if templates and templates[-1] == "..":
        templates, inputs = templates[:-1], inputs[: len(templates) - 1]
    assert len(templates) == len(inputs), shapes
    for template, source in zip(templates, inputs, strict=True):
        assert_axes(template, source.axes, known)
    assert_axes(after.strip(), node.axes, known)


@pytest.mark.parametrize("function", [name for name in EXAMPLES if name != "input"])
def test_words_about_axes_are_true(function):
    for node in EXAMPLES[function]:
        assert_shapes(KINDS[function].shapes, node)


def test_inputs_have_the_axes_they_are_declared_with():
    assert KINDS["input"].shapes == "-> as declared"
    assert GATE.axes == ("batch", "kv_heads", "keys", "16") and not GATE.inputs


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("dot", "batch H queries/u D, batch G keys/w D -> batch G+H queries keys/w"),
        ("dot", "batch H queries/u D, batch H keys/w D -> batch H queries/u keys/w"),
        ("summary", "batch H X/u D -> batch H X/u D"),
        ("regroup", "batch H queries/u keys/w -> batch H queries/u keys/nww"),
        ("probe", "batch H queries D, batch G keys D -> batch H+G queries"),
        ("slots", "batch H keys D, batch H keys E -> batch H keys E"),
        ("joint", "batch kv_heads queries value_dim, .. -> batch heads queries value_dim"),
    ],
)
def test_the_check_of_axes_can_fail(function, wrong):
    with pytest.raises(AssertionError):
        for node in EXAMPLES[function]:
            assert_shapes(wrong, node)


def effects_of(node: Node) -> set[str]:
    """The effects that this very node has, wherever it stands."""
    root = {
        "selected": lambda: sd.attend((sd.kv_idx <= sd.q_idx) & node),
        "keys": lambda: sd.attend((sd.kv_idx <= sd.q_idx) & node),
        "order": lambda: sd.attend(node[sd.b, sd.h, sd.kv_idx] <= sd.q_idx),
        "tokens": lambda: sd.compact(node, sd.kv_idx <= sd.q_idx),
        "memory": lambda: sd.recall(node),
        "branch": lambda: node,
        "tensor": lambda: sd.attend(sd.top_k(sd.dot(sd.q, sd.k), 1)),
        "scores": lambda: sd.attend((sd.kv_idx <= sd.q_idx) & sd.top_k(node, 1)),
        "key scores": lambda: sd.attend(
            (sd.kv_idx <= sd.q_idx) & (sd.top_k(node, 8) if block_of(node.axes[2]) == 1 else sd.divergence(node, SEEN) < 0.1)
        ),
        "numbers of heads": lambda: sd.attend((sd.kv_idx <= sd.q_idx) & (node < 0.1)),
    }[node.gives]()
    labels = {label for part, label in sd.Program(root).labels.items() if type(part) is type(node)}
    return {effect for effect, found in reasons(sd.Program(root)).items() for why in found if why.partition(":")[0] in labels}


@pytest.mark.parametrize("function", EXAMPLES)
def test_words_about_effects_are_true(function):
    said = dict(KINDS[function].effects)
    found = [effects_of(node) for node in EXAMPLES[function]]
    assert set().union(*found) == set(said)
    for effect, when in said.items():
        assert when.startswith("always") == all(effect in effects for effects in found), (effect, when)


@pytest.mark.parametrize("function", [name for name in KINDS if hasattr(sd, name)])
def test_sources_are_those_of_the_docstring(function):
    written = set(re.findall(r"\d{4}\.\d{5}", inspect.getdoc(getattr(sd, function)) or ""))
    assert written == set(re.findall(r"\d{4}\.\d{5}", KINDS[function].source))


@pytest.mark.parametrize("kind", KINDS.values(), ids=str)
def test_nothing_is_left_unsaid(kind):
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name)
        assert field.name in ("effects", "source") or value, field.name
        assert "|" not in str(value) and "\n" not in str(value), "it stands in a table"


def test_the_manual_shows_the_table():
    manual = (ROOT / "docs" / "programs.md").read_text(encoding="utf-8")
    shown = manual.partition("<!-- kinds: made by docs/make_pictures.py -->\n")[2].partition("<!-- end of kinds -->")[0]
    assert shown == kinds_table(), "python docs/make_pictures.py --page"
