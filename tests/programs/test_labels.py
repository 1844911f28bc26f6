"""Labels of nodes: names that a user can read, the same in every process, in everything that shows a program."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl import kv_idx, q_idx
from sparsedsl.program.program_text import read_program
from sparsedsl.program_picture import parts, words

P = sd.patterns
causal = kv_idx <= q_idx
HASH = re.compile(r"[a-z_]+_[0-9a-f]{6}\b")


def selected(block: int, name: str = "") -> Any:
    return sd.top_k(sd.dot(sd.q, sd.summary(sd.k, block)), 2, name=name)


PROGRAMS = {
    "hsa": P.hsa(), "nha": P.nha(), "pbs": P.pbs(), "token_sparse": P.token_sparse(inside=P.pbs()),
    "ring_linear": P.ring_linear([0.9, 0.5, 0.3, 0.1]),
    "moba": P.moba(), "nsa": P.nsa(), "two": sd.attend(causal & (selected(16) | selected(64))),
}  # fmt: skip


def test_nodes_are_called_by_their_function_numbered_from_the_second_on():
    labels = list(sd.Program(PROGRAMS["two"]).labels.values())
    assert sorted(labels) == ["attend", "dot", "dot_2", "k", "q", "summary", "summary_2", "top_k", "top_k_2", "v"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_node_has_one_label_of_its_own_without_hashes(name):
    program = sd.Program(PROGRAMS[name])
    labels = program.labels
    assert set(labels) == set(program.everything) and len(set(labels.values())) == len(labels)
    shown = [
        program.text,
        str(sd.analyse(program, 1024, heads=4)),
        str(sd.compile(program).explain(1024, heads=4)),
        repr(program),
    ]
    shown += [str(sd.compile(program, backend="reference").explain(1024, heads=4)), str(program.labels.values())]
    shown += [text for part in parts(program).values() for node in part.graph for text in words(part, node, {})]
    assert [found for text in shown for found in HASH.findall(text)] == []
    assert read_program(program.text) == program


def test_names_that_were_given_are_kept_and_those_of_tables_and_inputs_left_free():
    dot = sd.input("dot", "batch kv_heads keys head_dim")
    summary = sd.table("summary")
    program = sd.Program(
        sd.attend(causal & (kv_idx >= summary[q_idx]) & (selected(16, "top_k") | sd.top_k(sd.dot(sd.q, dot), 3)))
    )
    by_function = {(node.function, program.labels[node]) for node in program.everything}
    assert {("input", "dot"), ("dot", "dot_2"), ("dot", "dot_3"), ("summary", "summary_2")} <= by_function
    assert {("top_k", "top_k"), ("top_k", "top_k_2")} <= by_function
    assert read_program(program.text) == program


def test_two_nodes_of_one_name_are_told_apart():
    program = sd.Program(sd.joint(sd.attend(causal & selected(16, "mine")), sd.attend(causal & selected(64, "mine"))))
    assert {"mine", "mine_2"} <= set(program.labels.values())
    q = k = v = torch.randn(1, 2, 128, 8)
    assert sorted(sd.compile(program).choices(q, k, v)) == ["mine", "mine_2"]
    assert read_program(program.text).text == program.text


def test_choices_and_states_have_these_keys():
    q = k = v = torch.randn(1, 2, 256, 8)
    assert sorted(sd.compile(PROGRAMS["two"]).choices(q, k, v)) == ["top_k", "top_k_2"]
    gate = torch.rand(1, 2, 256, 64)
    attn = sd.compile(P.nha())
    wanted = attn.program.inputs
    given = {"gate": gate} if "gate" in wanted else {}
    _, state = attn(q, k, v, return_state=True, **given)
    assert list(state.recurrent) == ["recall"]


def test_reasons_and_errors_use_them():
    program = sd.Program(P.token_sparse())
    attn = sd.compile(program)
    assert "keep_tokens is decided by probe," in sd.analyse(program, 256).causal.reason
    q, k, v = (torch.randn(1, 2, 256, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(sd.UnsupportedError, match=r"\(keep_tokens: decided by the last 128 queries"):
        attn(q, k, v)
    with pytest.raises(sd.ShapeError, match=r"^linear runs along the keys"):
        sd.compile(P.ring_linear([0.9, 0.5]))(q[:, :, :9], k[:, :, :9], v[:, :, :9], q_offset=2)


def test_they_are_the_same_in_another_process():
    code = "import sparsedsl as sd; print(sd.Program(sd.patterns.nsa()).text)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert {process.stdout.strip() for process in found} == {sd.Program(P.nsa()).text}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_node_alone_is_shown_without_a_hash(name):
    shown = [repr(node) for node in sd.Program(PROGRAMS[name]).everything]
    assert not [text for text in shown if HASH.search(text)]
    assert repr(sd.attend(causal & selected(16, "short"))) != repr(PROGRAMS["two"])


def test_a_node_alone_is_shown_as_it_is_written():
    assert repr(sd.Program(sd.attend(causal)).root) == "<Attend attend(kv_idx <= q_idx)>"
    assert repr(selected(64)) == "<TopK top_k(scores=dot, count=2)>"
    assert repr(selected(64, "short")) == "<TopK short>"
