"""The text of the kernels along lists: files as they are for plain calls, printed lines at their places for masks and scores."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import sympy

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score, table
from sparsedsl.codegen import to_triton_selected as module
from sparsedsl.codegen.to_triton_selected import KERNELS, member_symbols, selected_source

FOLDER = Path(module.__file__).with_name("kernels")
FIRST, SECOND = member_symbols(2)
gate = table("gate", dtype=float, learned=True)


def code_of(text: str) -> str:
    return ast.dump(ast.parse(text))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_plain_call_runs_the_file_as_it_is(kernel):
    text = (FOLDER / f"{KERNELS[kernel]}.py").read_text()
    plain = selected_source().texts[kernel]
    note = re.search(module._NOTE, text)
    assert code_of(plain) == code_of(text.replace(note[0], "\n"))
    assert "# <- " not in plain
    assert selected_source().arguments[kernel] == ()


@pytest.mark.parametrize("file", sorted(set(KERNELS.values())))
def test_every_place_of_a_file_is_known(file):
    places = set(re.findall(r"# <- (\w+)$", (FOLDER / f"{file}.py").read_text(), re.M))
    assert places and all(hasattr(module._Places, f"_{place}") for place in places)


def lines_between(kernel: str, first: str, last: str, *expressions, **words) -> list[str]:
    text = selected_source(*expressions, **words).texts[kernel]
    inside = text[text.index(f"def {kernel}(") :]
    start = inside.index(first)
    return [line.strip() for line in inside[start : inside.index(last, start)].split("\n")][:-1]


def test_bits_of_choices_and_a_score_in_a_tile_of_queries():
    mask = sympy.And((kv_idx <= q_idx).expr, sympy.Or(FIRST, sympy.Not(SECOND)))
    assert lines_between("selected_forward", "kv_idx = key", "v = tl.load", mask, (sd.tanh(score / 30) * 30 + h).expr) == [
        "kv_idx = key",
        "bits = tl.load(members_ptr_here + slot, mask=own, other=0)",
        "chosen_0 = (bits & 1) != 0",
        "chosen_1 = (bits & 2) != 0",
        "pairs = own[:, None] & exists[None, :] & ((q_idx[:, None] >= kv_idx[None, :]) & (chosen_0[:, None] | ~chosen_1[:, None]))",
        "score = tl.dot(q, k.T, input_precision=PRECISION) * scale",
        "s = (h[:, None].to(tl.float32) + 30*_tanh(0.03333333333333333*score)) * LOG2E",
        's = tl.where(pairs, s, float("-inf"))',
    ]


def test_gradients_of_a_learned_table_where_keys_are_rows():
    expr = (score - gate[h, kv_idx]).expr
    assert lines_between("selected_grad_kv", "dx = p", "at_key", sympy.true, expr, learned=frozenset(["gate"])) == [
        "dx = p * (grad_p - delta[None, :])",
        "grad_s = dx",
        "d_grad_gate_0 = tl.where(pairs, dx * (-1), 0.0)",
        "if WEIGHTED:",
        "weight = tl.load(weights_ptr + weight_at + place, mask=own, other=0.0)",
        "d_grad_gate_0 *= weight[None, :]",
        "p = p * weight[None, :]",
        "grad_s = grad_s * weight[None, :]",
        "grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)",
        "grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)",
        "grad_gate_0 += tl.sum(d_grad_gate_0, 1)",
    ]


def test_what_wants_no_gradient_costs_none():
    expr = (score - gate[h, kv_idx]).expr
    assert "d_grad_gate" not in selected_source(sympy.true, expr).texts["selected_grad_kv"]


def test_far_positions_are_of_64_bits():
    text = selected_source((kv_idx <= q_idx).expr, wide=True).texts["selected_forward"]
    assert "q_idx = tl.cast(q_offset, tl.int64) + query" in text
    assert "kv_idx = key.to(tl.int64)" in text
