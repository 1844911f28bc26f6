"""Expressions and patterns as C++: text that reads well, and that the compiler makes the same numbers of as ``evaluate``."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl import testing as kit
from sparsedsl.backends.cpp.build import compiler, library
from sparsedsl.codegen.cpp_expression import CppNames, CppPrinter, TableNames
from sparsedsl.codegen.cpp_loops import PairLoop, braces
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.to_cpp import CppVariant, _check_mask, cpp_source, fixed_part
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.tables import table_reads

SYMBOLS = {name: name for name in ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len", "score")}
doc, chosen = sd.table("doc"), sd.table("chosen", dtype=bool)
bias = sd.table("bias", dtype=float)


def printed(expression, real=None):
    """What the printer writes and returns, as one text."""
    ranks = {read.spec.name: len(read.args) for read in table_reads(expression.expr)}
    names = CppNames(SYMBOLS, {name: TableNames(name, tuple(f"{name}_{i}" for i in range(rank))) for name, rank in ranks.items()})
    source = Source()
    real = real or ("real" if isinstance(expression, sd.Score) else "double")
    text = CppPrinter(names, real).write(source, [expression.expr])[0]
    return (source.text + text).strip()


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ((kv_idx <= q_idx) & (q_idx - kv_idx < 512), "(q_idx >= kv_idx) & (q_idx - kv_idx <= 511)"),
        ((q_idx - kv_idx) // 64 == kv_idx % 3, "floor_div(q_idx - kv_idx, 64) == floor_mod(kv_idx, 3)"),
        (doc[q_idx] == doc[kv_idx], "doc[inside(q_idx, doc_0)] == doc[inside(kv_idx, doc_0)]"),
        (~chosen[q_idx // 64, 0], "chosen[inside(floor_div(q_idx, 64), chosen_0)*chosen_1 + inside(0, chosen_1)] == 0"),
        (sd.tanh(score / 30) * 30, "(real)30.0*tanh_of((real)0.03333333333333333*score)"),
        (sd.where(kv_idx < 4, score, float("-inf")), "((kv_idx <= 3) ? score : -infinite<real>())"),
        (score - 0.1 * (q_idx - kv_idx), "score + (real)0.1*(real)(kv_idx - q_idx)"),
        (score + bias[h, 3], "score + (real)bias[inside(h, bias_0)*bias_1 + inside(3, bias_1)]"),
        (sd.clamp(q_idx - kv_idx, 0, 63) + b, "b + smaller(larger(q_idx - kv_idx, 0), 63)"),
        (bias[h, 0] < 0.1, "(double)bias[inside(h, bias_0)*bias_1 + inside(0, bias_1)] < (double)0.1"),
    ],
)
def test_text(expression, text):
    assert printed(expression) == text


class Lanes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("count", "used", "b", "residue", "q_len", "kv_len")]
    _fields_ += [("q_idx", ctypes.c_void_p), ("h", ctypes.c_void_p)]


SIDE = 32


def written(number, mask):
    """A function that writes whether each pair of a block of SIDE keys and SIDE lanes is allowed."""
    source = Source()
    with braces(source, f'extern "C" void f{number}(const Lanes *lanes, i64 key, i64 keys, real *tile)'):
        for name in ("b", "q_len", "kv_len"):
            source.line(f"[[maybe_unused]] const i64 {name} = lanes->{name};")
        loop = PairLoop(source, CppNames(SYMBOLS), "double")
        with loop.over(mask.expr) as (text,):
            source.line(f"tile[j * lanes->count + i] = {text};")
    return source.text


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@given(masks=st.lists(kit.masks(tables=False), min_size=12, max_size=20, unique_by=lambda mask: str(mask)))
@settings(max_examples=5)
def test_compiled_masks_are_what_evaluate_says(masks):
    def exact(mask):
        try:
            _check_mask(mask.expr)
        except sd.UnsupportedError:
            return False
        return True

    masks = [mask for mask in masks if exact(mask)]
    text = fixed_part("pattern") + "".join(written(number, mask) for number, mask in enumerate(masks))
    made = library(text, "-ffp-contract=off", "-O1")
    heads = (torch.arange(SIDE) // 8).contiguous()
    for first, key in ((0, 0), (5, 3), (1000, 990), (70_000, 69_990)):
        rows = torch.arange(SIDE) + first
        lanes = Lanes(SIDE, SIDE, 1, 0, first + SIDE, key + SIDE, rows.data_ptr(), heads.data_ptr())
        env = {"b": 1, "h": heads, "q_idx": rows, "kv_idx": torch.arange(SIDE)[:, None] + key}
        env |= {"q_len": first + SIDE, "kv_len": key + SIDE}
        for number, mask in enumerate(masks):
            tile = torch.full((SIDE, SIDE), 7.0)
            getattr(made, f"f{number}")(
                ctypes.byref(lanes), ctypes.c_int64(key), ctypes.c_int64(SIDE), ctypes.c_void_p(tile.data_ptr())
            )
            wanted = evaluate(mask.expr, env).expand(SIDE, SIDE)
            assert torch.equal(tile == 1, wanted) and bool(((tile == 0) | (tile == 1)).all()), (mask, first, key)


def test_what_reads_no_key_is_worked_out_before_the_loops():
    text = cpp_source(sd.attend(q_idx * kv_idx % 3 < 2, score=score - bias[h, q_idx // 7] * kv_idx + doc[kv_idx])).text
    body = text.split('extern "C" void score')[1].split('extern "C"')[0]
    before, after = body.split("for (i64 j = 0")
    assert "of_lane[i] = (real)bias_table[" in before and "bias_table[" not in after
    assert "const i64 of_key = doc_table[" in after.split("for (i64 i")[0]


def test_functions_are_written_for_what_a_pattern_has():
    def functions(pattern):
        return cpp_source(pattern).functions

    assert functions(sd.attend(kv_idx <= q_idx)) == ("ends",)
    assert functions(sd.attend(q_idx * kv_idx % 3 < 2, sink=0.0)) == ("mask", "sink")
    learned = sd.table("t", learned=True)
    assert functions(sd.attend(True, score=score + learned[kv_idx])) == ("ends", "score", "slope", "gains")
    dilated = cpp_source(sd.attend((kv_idx <= q_idx) & ((q_idx - kv_idx) % 4 == 0)))
    assert dilated.step == 4 and "Positions of one residue modulo 4" in dilated.text


def test_a_table_of_doubles_is_read_as_such():
    pattern = sd.attend(True, score=score + bias[h, kv_idx])
    assert "const float *const bias_table" in cpp_source(pattern).text
    assert "const double *const bias_table" in cpp_source(pattern, CppVariant(True, frozenset({"bias"}))).text


def test_masks_that_only_torch_rounds_as_torch_does_are_refused():
    for mask in (sd.log(q_idx + 1) < 3, sd.exp(bias[h, 0]) < kv_idx, (q_idx + 1) ** 0.3 < 2):
        with pytest.raises(sd.UnsupportedError, match="whose last digit differs"):
            cpp_source(sd.attend(mask))
    cpp_source(sd.attend(sd.sqrt(q_idx * q_idx + 1) < 3))  # square roots are exact
