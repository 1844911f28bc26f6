"""Printed Triton expressions, run tile by tile in the interpreter: masks exactly the evaluator's, scores within float32's rounding."""

from __future__ import annotations

import importlib.util
import itertools
import linecache
import sys

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx, q_len, score
from sparsedsl import testing as kit
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_expression import TableNames, TritonNames, write_expression
from sparsedsl.codegen.triton_functions import functions_for
from sparsedsl.gpu.interpreter import quick_interpreter
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.tables import table_reads

SYMBOLS = {"q_idx": "q_idx", "kv_idx": "kv_idx"} | {name: name for name in ("b", "h", "q_len", "kv_len", "score")}
BLOCK_M, BLOCK_N = 16, 64
_numbers = itertools.count()


def module(expr, *, real, positions="tl.int32", wide_tables=frozenset(), ranks=None):
    """The text of a module with a kernel that stores ``expr`` on a tile."""
    ranks = ranks if ranks is not None else {read.spec.name: len(read.args) for read in table_reads(expr)}
    tables = {name: TableNames(f"{name}_ptr", tuple(f"{name}_size_{i}" for i in range(n))) for name, n in ranks.items()}
    names = TritonNames(SYMBOLS, tables, wide_tables)
    arguments = [text for name in sorted(tables) for text in (tables[name].pointer, *tables[name].sizes)]
    source = Source(taken=[*arguments, *SYMBOLS])
    header = ["out_ptr", "score_ptr", "q_first", "q_end", "kv_end", *arguments, "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]
    source.line("@triton.jit")
    with source.block(f"def kernel({', '.join(header)}):"):
        source.lines(
            f"""
b = tl.program_id(0)
h = tl.program_id(1)
rows = tl.arange(0, BLOCK_M)[:, None]
columns = tl.arange(0, BLOCK_N)[None, :]
place = ((b * tl.num_programs(1) + h) * BLOCK_M + rows) * BLOCK_N + columns
score = tl.load(score_ptr + place)
q_idx = rows.to({positions}) + q_first
kv_idx = columns.to({positions})
q_len = tl.full([], 0, {positions}) + q_end
kv_len = tl.full([], 0, {positions}) + kv_end
"""
        )
        result = write_expression(source, expr, names, real=real)
        if not isinstance(expr, sympy.Expr):
            result = f"tl.where({result}, 1, 0)"
        source.line(f"value = tl.zeros([BLOCK_M, BLOCK_N], {'tl.float32' if real == 'tl.float32' else 'tl.int64'}) + {result}")
        source.line("tl.store(out_ptr + place, value)")
    return f"import triton\nimport triton.language as tl\n\n{functions_for(source.text)}\n\n{source.text}"


def loaded(text, folder):
    """The kernel of a module: Triton reads a function's source from its file."""
    path = folder / f"module_{next(_numbers)}.py"
    path.write_text(text, encoding="utf-8")
    linecache.checkcache()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found.kernel


def on_tile(expr, case, tables, folder, *, real, logits=None, **options):
    """The value of ``expr`` at every point of ``case``, computed by the generated kernel; and the text."""
    text = module(expr, real=real, **options)
    shape = (case.batch, case.heads, BLOCK_M, BLOCK_N)
    out = torch.full(shape, -99, dtype=torch.float32 if real == "tl.float32" else torch.int64)
    padded = torch.full(shape, 0.5)
    if logits is not None:
        padded[:, :, : case.q_len, : case.kv_len] = logits
    reads = {read.spec.name for read in table_reads(expr)}
    arguments = [x for name in sorted(reads) for x in (tables[name].contiguous(), *tables[name].shape)]
    end = case.q_offset + case.q_len
    try:
        kernel = loaded(text, folder)[case.batch, case.heads]
        with quick_interpreter():
            kernel(out, padded, case.q_offset, end, case.kv_len, *arguments, BLOCK_M, BLOCK_N)
    except Exception as error:
        raise AssertionError(text) from error
    return out[:, :, : case.q_len, : case.kv_len], text


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generated")


def shapes():
    return kit.shapes(max_len=BLOCK_M)


def logits_of(case):
    return torch.randint(-24, 24, case.positions.shape, generator=torch.Generator().manual_seed(1)) / 8


@given(st.data(), kit.masks(depth=4), shapes())
@settings(max_examples=150)
def test_masks_are_the_evaluators(folder, data, mask, case):
    tables = data.draw(kit.tables_for(mask, case))
    got, text = on_tile(mask.expr, case, tables, folder, real="tl.float64")
    wanted = evaluate(mask.expr, {**case.env, **tables}).expand(got.shape)
    assert torch.equal(got.bool(), wanted), text


@given(st.data(), kit.indices(depth=4), shapes(), st.sampled_from(("tl.int32", "tl.int64")))
@settings(max_examples=150)
def test_integers_are_the_evaluators(folder, data, index, case, positions):
    tables = data.draw(kit.tables_for(index, case))
    got, text = on_tile(index.expr, case, tables, folder, real="tl.float64", positions=positions)
    wanted = evaluate(index.expr, {**case.env, **tables}).expand(got.shape)
    assert torch.equal(got, wanted), text


@given(st.data(), kit.scores(depth=3), shapes())
@settings(max_examples=150)
def test_scores_are_the_evaluators_within_rounding(folder, data, expression, case):
    tables = data.draw(kit.tables_for(expression, case))
    env = {**case.env, "score": logits_of(case), **tables}
    got, text = on_tile(expression.expr, case, tables, folder, real="tl.float32", logits=env["score"])
    assert_close(got, expression.expr, env, text)


def assert_close(got, expr, env, text):
    """Not much further from the float64 value than torch in float32 is; other orders of the same operations are allowed."""
    exact = evaluate(expr, {**env, "score": env["score"].double()}).double().expand(got.shape)
    single = evaluate(expr, env, dtype=torch.float32).double().expand(got.shape)
    finite = torch.isfinite(exact)
    assert torch.equal(got.double()[~finite], exact[~finite]), text
    rounding = 4 * (single - exact)[finite].abs().max() if finite.any() else 0
    allowed = rounding + 2**-20 * (1 + exact[finite].abs())
    assert ((got.double() - exact)[finite].abs() <= allowed).all(), text


# ---- exact operations, sizes and places that random cases do not meet ------------------------------------------------------------

EXACT = {
    "grid distance": sd.parse("f32_lt(f32_sqrt(f32_add(f32_mul(q_idx % 8 - kv_idx % 8, q_idx % 8 - kv_idx % 8), kv_idx)), 3.1)"),
    "thirds": sd.parse("f32_le(f32_div(q_idx * kv_idx, 3), f32_mul(kv_idx, 0.1)) == 0"),
    "there and back": sd.parse("f32_eq(f32_mul(f32_div(q_idx * kv_idx, 49), 49), q_idx * kv_idx) != 0"),
    "rounding": sd.parse("f32_round(f32_div(q_idx * kv_idx - 9, 2)) < f32_trunc(f32_div(kv_idx - q_idx * kv_idx, 7))"),
    "floors": sd.parse("f64_floor(f64_div(q_idx - 2 * kv_idx, 3)) + f64_ceil(f64_neg(f64_div(q_idx * kv_idx, 7))) <= -2"),
    "double": sd.parse("f64_eq(f64_mul(f64_div(q_idx * kv_idx, 49), 49), q_idx * kv_idx)"),
    "choices": sd.parse("f32_maximum(f32_abs(f32_sub(q_idx, 2 * kv_idx)), 3) == f32_minimum(f32_relu(q_idx), f32_cast(kv_idx + 3))"),
    "integers": sd.parse("i64_sub(i64_mul(q_idx, kv_idx), 7) > i64_add(q_idx, kv_idx)"),
    "half": sd.parse("f16_lt(f16_mul(q_idx, 1001), f16_mul(kv_idx, 977)) != 0"),
    "to integers": sd.parse("f32_to_int64(f32_div(q_idx * 2 - kv_idx, 3)) == f32_to_int32(f32_sign(f32_sub(q_idx, kv_idx)))"),
    "from the end": sd.table("rank", values_in=(-3, 20))[sd.parse("i64_wrap(q_idx - kv_idx, 16)")] == 3,
    "reciprocal": sd.parse("f32_ne(f32_mul(f32_reciprocal(q_idx * 3 + kv_idx + 1), q_idx * 3 + kv_idx + 1), 1)"),
    "where": sd.parse("f32_where(q_idx < kv_idx, f32_div(q_idx, 3), 1) > f32_div(kv_idx, 7)"),
}  # fmt: skip


@pytest.mark.parametrize("mask", EXACT.values(), ids=EXACT)
def test_exact_operations_are_torchs_bit_by_bit(folder, mask):
    case = kit.AttentionCase(q_len=BLOCK_M, kv_len=BLOCK_N, heads=2)
    tables = {"rank": torch.arange(16) % 5}
    got, text = on_tile(mask.expr, case, tables, folder, real="tl.float64")
    wanted = evaluate(mask.expr, {**case.env, **tables}).expand(got.shape)
    assert torch.equal(got.bool(), wanted), text
    assert wanted.any() and not wanted.all()


FAR = 2**24 - BLOCK_M


@pytest.mark.parametrize(
    "index",
    [
        q_idx * kv_idx, q_idx**2 - kv_idx, q_idx**3, 200 * q_idx - kv_idx, q_idx * 130 + 5 * kv_len, (q_idx * q_idx) // 3,
        q_idx * q_len % 1000,
        sd.table("doc")[kv_idx] + sd.table("doc")[h], sd.where(q_idx > 3, 3_000_000_000, kv_idx), sd.minimum(q_idx * q_len, 3_000_000_000),
        (q_idx + 5_000_000_000) // 7, -q_idx * 2 // 5_000_000_000, abs(kv_idx - q_idx * q_idx), -(kv_idx * 3_000_000_000),
        sd.where(q_idx - 5_000_000_000 < kv_idx * 0, kv_idx, q_idx),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("positions", ["tl.int32", "tl.int64"])
def test_far_positions_do_not_overflow(folder, index, positions):
    case = kit.AttentionCase(q_len=8, kv_len=BLOCK_N, heads=2, q_offset=FAR)
    for doc in (torch.full((BLOCK_N,), 2**31 - 1, dtype=torch.int32), torch.full((BLOCK_N,), 2**40)):
        got, text = on_tile(index.expr, case, {"doc": doc}, folder, real="tl.float64", positions=positions)
        wanted = evaluate(index.expr, {**case.env, "doc": doc}).expand(got.shape)
        assert torch.equal(got, wanted), text


def test_masks_compute_in_float64_as_analysis_does(folder):
    case = kit.AttentionCase(q_len=BLOCK_M, kv_len=BLOCK_N, q_offset=FAR)
    bias = sd.table("bias", dtype=float)
    for mask in (
        kv_idx * 0.1 + q_idx * 0.5 > 0.5 * (q_idx + 1),
        q_idx / 49.0 * 49 == q_idx,
        q_idx / (kv_idx + 1) < 16777210 / 13,
        (q_idx - FAR) * 0.1 == kv_idx / 10,
        sd.minimum(kv_idx * 0.1, 0.3) >= 0.3,
        sd.where(q_idx > 3, 0.1, 0.2) + kv_idx < 0.3,
        bias[kv_idx] < 0.1,
        0.1 + bias[kv_idx] + bias[kv_idx] * 0.7 + h * 0.3 < 0.3 * kv_idx,
    ):
        tables = {"bias": torch.arange(BLOCK_N) * 0.05}
        got, text = on_tile(mask.expr, case, tables, folder, real="tl.float64")
        assert torch.equal(got.bool(), evaluate(mask.expr, {**case.env, **tables}).expand(got.shape)), text


def test_reads_outside_a_table_stay_inside_it(folder):
    start, packed = sd.table("start"), sd.table("packed")
    case = kit.AttentionCase(batch=2, heads=2, q_len=5, kv_len=40, q_offset=3)
    values = {"start": torch.tensor([7, 1, -90, 900, 3], dtype=torch.int32), "packed": torch.arange(6).view(2, 3)}
    for index in (
        start[q_idx - kv_idx],
        start[start[kv_idx]],
        packed[h - 1, kv_idx * 1000],
        packed[5, 2],
        packed[0, start[2]],
        packed[b, 0],
        start[0],
    ):
        for wide_tables in (frozenset(), frozenset({"start", "packed"})):
            got, text = on_tile(index.expr, case, values, folder, real="tl.float64", wide_tables=wide_tables)
            assert torch.equal(got, evaluate(index.expr, {**case.env, **values}).expand(got.shape)), text


@pytest.mark.parametrize("divisor", [1, 2, 3, 8, 12, -3, -4])
def test_division_rounds_down_for_either_sign(folder, divisor):
    case = kit.AttentionCase(q_len=BLOCK_M, kv_len=BLOCK_N)
    for index in (
        (q_idx - kv_idx) // divisor,
        (q_idx - kv_idx) % divisor,
        (q_idx - kv_idx) // (h + divisor if divisor > 0 else divisor - h),
    ):
        got, text = on_tile(index.expr, case, {}, folder, real="tl.float64")
        assert torch.equal(got, evaluate(index.expr, case.env).expand(got.shape)), text


@pytest.mark.parametrize(
    ("expression", "ulps"),
    [(sd.tanh(score), 4), (sd.softplus(score), 4), (sd.sigmoid(score), 4), (sd.tanh(score / 30) * 30, 6), (sd.relu(score), 0)],
    ids=str,
)
def test_functions_are_near_their_values_also_for_small_and_large_arguments(folder, expression, ulps):
    case = kit.AttentionCase(q_len=BLOCK_M, kv_len=BLOCK_N)
    sizes = 10.0 ** torch.linspace(-20, 1.9, BLOCK_M * BLOCK_N // 2)
    logits = torch.cat([sizes, -sizes]).view(1, 1, BLOCK_M, BLOCK_N)
    got, text = on_tile(expression.expr, case, {}, folder, real="tl.float32", logits=logits)
    wanted = evaluate(expression.expr, {"score": logits.double()})
    assert ((got.double() - wanted).abs() <= ulps * 2**-24 * wanted.abs() * 2).all(), text


def test_powers_are_torchs(folder):
    case = kit.AttentionCase(q_len=BLOCK_M, kv_len=BLOCK_N, heads=3)
    logits = (torch.arange(BLOCK_M * BLOCK_N) % 33 - 16).view(1, 1, BLOCK_M, BLOCK_N) / 8
    for expression in (
        score**2,
        score**5,
        score**-3,
        abs(score) ** 0.3,
        score ** (1.0 * h - 1),
        2 ** (0.5 * score),
        abs(score) ** -0.5,
        score**7.0,
        score ** (kv_idx - 3.0),
    ):
        env = {**case.env, "score": logits.expand(1, 3, BLOCK_M, BLOCK_N)}
        wanted = evaluate(expression.expr, env, dtype=torch.float32).expand(env["score"].shape)
        got, text = on_tile(expression.expr, case, {}, folder, real="tl.float32", logits=env["score"])
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6, equal_nan=True, msg=text)


def test_nan_and_infinity_pass_as_in_torch(folder):
    case = kit.AttentionCase(q_len=1, kv_len=3)
    logits = torch.tensor([float("nan"), float("inf"), -float("inf")]).view(1, 1, 1, 3)
    for expression in (
        sd.minimum(score, 5.0),
        sd.maximum(score, 5.0),
        sd.relu(score),
        sd.tanh(score),
        sd.clamp(score, -1.0, 1.0),
        abs(score),
        sd.sigmoid(score),
    ):
        got, text = on_tile(expression.expr, case, {}, folder, real="tl.float32", logits=logits)
        torch.testing.assert_close(
            got, evaluate(expression.expr, {"score": logits}, dtype=torch.float32), equal_nan=True, msg=text, rtol=1e-6, atol=0
        )


def test_constants_and_values_at_hand(folder):
    case = kit.AttentionCase(q_len=3, kv_len=3)
    for mask, wanted in ((sd.attend(True).mask, True), (~sd.attend(True).mask, False), ((q_len > 2) & (kv_len == 3), True)):
        got, _ = on_tile(mask.expr, case, {}, folder, real="tl.float64")
        assert torch.equal(got.bool(), torch.full_like(got, wanted, dtype=torch.bool))
