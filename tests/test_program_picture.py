"""Pictures of programs: every node, its kind, its axes and its edges are there, nothing covers anything, and wrong arguments are named."""

from __future__ import annotations

from itertools import combinations

import pytest

import sparsedsl as sd
from sparsedsl.program_picture import COLOURS, parts, places, words

to_hex = pytest.importorskip("matplotlib.colors").to_hex
P = sd.patterns
PROGRAMS = {
    "hsa": P.hsa(),
    "nha": P.nha(),
    "pbs": P.pbs(),
    "token_sparse": P.token_sparse(),
    "ring_linear": P.ring_linear([0.5, 0.9]),
    "moba": P.moba(),
    "nsa": P.nsa(),
    "mask": (sd.kv_idx <= sd.q_idx) & (P.sliding_window(64) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4)),
}


def boxes(axes):
    """Label -> text of its box."""
    return {text.get_text().splitlines()[0]: text for text in axes.texts if text.get_text()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_node_has_a_box_of_its_kind_with_its_axes(name):
    program = sd.Program(PROGRAMS[name])
    figure = sd.plot(program)
    drawn = boxes(figure.axes[0])
    assert set(drawn) == {program.labels[node] for node in program.graph}
    for node in program.graph:
        box = drawn[program.labels[node]]
        assert to_hex(box.get_bbox_patch().get_facecolor()) == COLOURS[node.gives]
        assert " ".join(box.get_text().split()).endswith(f"[{' '.join(node.axes)}]")
    named = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert named == {node.gives for node in program.graph}


@pytest.mark.parametrize("name", PROGRAMS)
def test_edges_run_down_from_a_node_to_those_that_read_it(name):
    graph = sd.Program(PROGRAMS[name]).graph
    placed, paths = places(graph)
    assert {(path[0], path[-1]) for path in paths} == set(graph.edges)
    for path in paths:
        heights = [placed[thing][1] for thing in path]
        assert heights == list(range(int(heights[0]), int(heights[-1]) - 1, -1))
    assert placed[sd.Program(PROGRAMS[name]).root][1] == 0
    figure = sd.plot(PROGRAMS[name])
    arrows = [text for text in figure.axes[0].texts if not text.get_text()]
    assert len(arrows) == graph.number_of_edges()


@pytest.mark.parametrize("name", PROGRAMS)
def test_boxes_do_not_cover_each_other(name):
    figure = sd.plot(PROGRAMS[name], 131072)
    figure.savefig("/dev/null", format="png")  # lays the text out
    for first, second in combinations([text.get_bbox_patch().get_window_extent() for text in boxes(figure.axes[0]).values()], 2):
        assert not first.overlaps(second)


def test_the_same_program_gives_the_same_picture():
    first, second = (places(sd.Program(P.nsa()).graph)[0] for _ in range(2))
    assert {str(thing): place for thing, place in first.items()} == {str(thing): place for thing, place in second.items()}


def test_sizes_are_shown_where_lengths_are_given():
    program = sd.Program(P.moba(512, 3))
    selected = program.root.selections[0]
    assert words(program, selected, {})[2] == "batch heads queries keys/512"
    assert words(program, selected, {"queries": 100, "keys": 1300})[2].split() == ["batch", "heads", "queries=100", "keys/512=3"]
    figure = sd.plot(P.moba(512, 3), 100, q_offset=1200)
    assert "keys/512=3" in boxes(figure.axes[0])[program.labels[selected]].get_text()


def test_arguments_are_shown_and_long_ones_cut():
    program, pbs = sd.Program(P.moba(512, 3)), sd.Program(P.pbs())
    label, said, _ = words(program, program.root.selections[0], {})
    assert label == "top_k" and "count=2" in said and "among=(q_idx >= kv_idx) &" in said
    said = words(pbs, pbs.root, {})[1]
    assert said.endswith(" ...") and said.count("\n") == 3 and "segment_sort[" in said
    nha = sd.Program(P.nha())
    assert words(nha, nha.inputs["k_rope"], {})[1] == "default k"


def test_what_runs_on_kept_tokens_has_a_graph_beside():
    program = P.token_sparse(inside=P.pbs())
    assert list(parts(sd.Program(program))) == ["", "inside compact"]
    figure = sd.plot(program, title="both")
    assert [axes.get_title() for axes in figure.axes] == ["", "inside compact"]
    assert "segment_sort" in "".join(boxes(figure.axes[1])) and "segment_sort" not in "".join(boxes(figure.axes[0]))
    assert figure.get_suptitle() == "both"


def test_into_axes_of_ones_own():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    assert sd.plot(P.moba(), ax=axes) is axes.figure
    assert boxes(axes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"panels": "pairs"}, sd.PatternError, "the graph is drawn, which panels says nothing of; leave it out"),
        ({"head": 2}, sd.PatternError, "which head says nothing of"),
        ({"doc": 1}, sd.PatternError, "which doc says nothing of"),
        ({"kv_len": 64}, sd.ShapeError, "kv_len and q_offset need q_len"),
        ({"q_len": 0}, sd.ShapeError, "q_len must be"),
        ({"ax": 3}, sd.PatternError, "ax must be 1 matplotlib axes"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        sd.plot(P.moba(), **options)


def test_a_pattern_is_not_drawn_without_a_length():
    with pytest.raises(sd.ShapeError, match="q_len, the number of queries to draw, is missing"):
        sd.plot(P.causal())
