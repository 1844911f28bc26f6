"""Expressions as Triton code: text that reads well, that the compiler takes (not the interpreter alone), and that rounds down."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import warnings

import pytest
import sympy
from hypothesis import given, settings

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx, q_len, score
from sparsedsl import testing as kit
from sparsedsl.codegen.derivatives import derivative
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_expression import TableNames, TritonNames, needs_exact, write_expression, write_expressions
from sparsedsl.codegen.triton_functions import FUNCTIONS, functions_for
from sparsedsl.lang.tables import table_reads

SYMBOLS = {name: name for name in ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len", "score")}
doc, packed = sd.table("doc"), sd.table("packed", values_in=(0, 4))
bias, chosen = sd.table("bias", dtype=float), sd.table("chosen", dtype=bool)
_numbers = itertools.count()


def names_for(expr, **more):
    ranks = {read.spec.name: len(read.args) for read in table_reads(expr)}
    tables = {name: TableNames(name, tuple(f"{name}_{i}" for i in range(rank))) for name, rank in ranks.items()}
    return TritonNames(SYMBOLS, tables, **more)


def printed(expression, real=None, **more):
    """What ``write_expression`` writes and returns, as one text."""
    source = Source()
    real = real or ("tl.float32" if isinstance(expression, sd.Score) else "tl.float64")
    result = write_expression(source, expression.expr, names_for(expression.expr, **more), real=real)
    return (source.text + result).strip()


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ((kv_idx <= q_idx) & (q_idx - kv_idx < 512), "(q_idx >= kv_idx) & (q_idx - kv_idx <= 511)"),
        (q_idx // 64 == kv_idx // 3, "q_idx // 64 == kv_idx // 3"),
        (doc[q_idx] == doc[kv_idx], "tl.load(doc + tl.minimum(q_idx, doc_0 - 1)) == tl.load(doc + tl.minimum(kv_idx, doc_0 - 1))"),
        (~chosen[q_idx // 64, 0], "(tl.load(chosen + tl.minimum(q_idx // 64, chosen_0 - 1)*chosen_1) == 0)"),
        (doc[q_idx - kv_idx] > 2, "tl.load(doc + tl.minimum(tl.maximum(q_idx - kv_idx, 0), doc_0 - 1)) >= 3"),
        (sd.tanh(score / 30) * 30, "30*_tanh(0.03333333333333333*score)"),
        (sd.tanh(score / 3) < 0.5, "_tanh_double(0.3333333333333333*score) < 0.5"),
        (sd.where(kv_idx < 4, score, float("-inf")), 'tl.where(kv_idx <= 3, score, float("-inf"))'),
        (score - 0.1 * (q_idx - kv_idx), "score + 0.1*(kv_idx - q_idx).to(tl.float32)"),
        (score + bias[h, 3], "score + tl.load(bias + tl.minimum(h, bias_0 - 1)*bias_1 + tl.minimum(3, bias_1 - 1)).to(tl.float32)"),
        (sd.clamp(q_idx - kv_idx, 0, 63) + b, "b + tl.minimum(tl.maximum(q_idx - kv_idx, 0), 63)"),
        (2 ** (-0.5 * h) * score, "score*tl.exp2(-0.5*h.to(tl.float32))"), (3.0**score, "tl.exp2(1.584962500721156*score)"),
        (sd.relu(kv_idx) + score, "score + tl.maximum(kv_idx.to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)"),
        (sd.where(h < 2, 0.1, 0.25) < 0.5, "tl.where(h <= 1, tl.full([], 0.1, tl.float64), tl.full([], 0.25, tl.float64)) < 0.5"),
        (bias[h, 0] < 0.1, "tl.load(bias + tl.minimum(h, bias_0 - 1)*bias_1).to(tl.float64) < tl.full([], 0.1, tl.float64)"),
        (q_idx * kv_idx < 9, "kv_idx.to(tl.int64)*q_idx.to(tl.int64) <= 8"),
        (q_idx + doc[kv_idx] < 9, "q_idx.to(tl.int64) + tl.load(doc + tl.minimum(kv_idx, doc_0 - 1)).to(tl.int64) <= 8"),
        (q_idx + packed[kv_idx] < 9, "q_idx + tl.load(packed + tl.minimum(kv_idx, packed_0 - 1)) <= 8"),
        (sd.attend(True).mask, "True"),
    ],
    ids=str,
)  # fmt: skip
def test_text(expression, text):
    assert printed(expression) == text


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ((q_idx - kv_idx) // 4 == 1, "((q_idx - kv_idx) >> 2) == 1"),
        ((q_idx - kv_idx) % 4 == 1, "((q_idx - kv_idx) & 3) == 1"),
        ((q_idx - kv_idx) // 3 == 1, "_floor_div(q_idx - kv_idx, 3) == 1"),
        ((q_idx - kv_idx) % 3 == 1, "_floor_mod(q_idx - kv_idx, 3) == 1"),
        ((q_idx - kv_idx) % kv_len == 1, "_floor_mod(q_idx - kv_idx, kv_len) == 1"),
        (q_idx // (h + 2) == 1, "q_idx // (h + 2) == 1"),
        (q_idx % -3 == -1, "_floor_mod(q_idx, -3) == -1"),
        (abs(q_idx - kv_idx) % 3 == 1, "tl.abs(kv_idx - q_idx) % 3 == 1"),
        (sd.table("rank", values_in=(-3, 4))[h] % 3 == 1, "_floor_mod(tl.load(rank + tl.minimum(h, rank_0 - 1)), 3) == 1"),
        (packed[h] % 3 == 1, "tl.load(packed + tl.minimum(h, packed_0 - 1)) % 3 == 1"),
    ],
    ids=str,
)
def test_plain_division_only_where_nothing_is_negative(expression, text):
    assert printed(expression) == text


@pytest.mark.parametrize("name", ["_floor_div", "_floor_mod"])
def test_the_functions_round_down_under_either_meaning_of_division(name):
    """The functions' text, run with a division that rounds towards zero (compiled, interpreted) and with one that rounds down."""

    class Truncating(int):
        def __floordiv__(self, other):
            return Truncating(abs(self) // abs(other) * (1 if (self < 0) == (other < 0) else -1))

        def __mod__(self, other):
            return Truncating(abs(self) % abs(other) * (-1 if self < 0 else 1))

    class Triton:
        where = staticmethod(lambda condition, a, c: a if condition else c)
        jit = staticmethod(lambda function: function)

    namespace = {"tl": Triton, "triton": Triton}
    exec(FUNCTIONS[name], namespace)
    for a, c in itertools.product(range(-20, 21), (1, 2, 3, 7, -1, -2, -3, -7)):
        wanted = a // c if name == "_floor_div" else a % c
        assert namespace[name](a, c) == wanted
        assert namespace[name](Truncating(a), Truncating(c)) == wanted


def test_what_is_used_twice_gets_a_name_also_across_expressions():
    distance = q_idx - kv_idx
    assert printed((distance % 4 == 0) & (bias[h, distance] > 0.5)) == (
        "t = q_idx - kv_idx\n"
        "((t & 3) == 0) & (tl.load(bias + tl.minimum(h, bias_0 - 1)*bias_1 + tl.minimum(tl.maximum(t, 0), bias_1 - 1))"
        ".to(tl.float64) > 0.5)"
    )
    capped = (sd.tanh(score / 30) * 30).expr
    source = Source(taken=["t"])
    texts = write_expressions(source, [capped, derivative(capped)], TritonNames(SYMBOLS), real="tl.float32")
    assert (source.text, texts) == ("t_1 = _tanh(0.03333333333333333*score)\n", ["30*t_1", "1 - t_1*t_1"])


def test_values_at_hand_are_not_computed_again():
    first = {(q_idx // 64).expr: "block", doc[q_idx].expr: "doc_q"}
    assert printed((q_idx // 64 == kv_idx // 64) & (doc[q_idx] == 3), replaced=first) == "(block == kv_idx // 64) & (doc_q == 3)"
    assert printed(score + q_idx // 64, replaced=first) == "score + block.to(tl.float32)"


def test_what_is_known_of_tables_keeps_arithmetic_in_32_bits():
    text = "q_idx + tl.load(doc + tl.minimum(kv_idx, doc_0 - 1)) <= 8"
    assert printed(q_idx + doc[kv_idx] < 9, table_ranges={"doc": (0, 1000)}) == text


def test_large_tables_are_indexed_with_64_bits():
    text = "tl.load(bias + tl.minimum(h, bias_0 - 1).to(tl.int64)*bias_1 + tl.minimum(kv_idx, bias_1 - 1)).to(tl.float32)"
    assert printed(bias[h, kv_idx], wide_tables=frozenset({"bias"})) == text


@pytest.mark.parametrize(
    ("expression", "exact"),
    [
        (q_idx * 0.1 + kv_idx < 3, True), (sd.parse("f32_lt(f32_add(f32_mul(q_idx, 0.1), 1), 3)"), True),
        (sd.parse("score + f32_round(f32_mul(q_idx, 0.3))"), True), (bias[q_idx] < 0.5, False), (q_idx * 0.1 < 3, False),
        (sd.parse("f32_lt(f32_sub(1, f32_neg(f32_mul(q_idx, q_idx))), 3)"), True), (score * 0.1 + kv_idx, False),
        ((q_idx - kv_idx) // 3 < doc[q_idx] * 2, False), ((q_idx * 0.1 + kv_idx < 3) & (kv_idx <= q_idx), True),
        (sd.parse("score + f32_floor(f32_div(q_idx, 3))"), False), (sd.parse("f32_lt(f32_add(q_idx * 3, 1), 3)"), False),
    ],
    ids=str,
)  # fmt: skip
def test_what_must_not_be_fused(expression, exact):
    assert needs_exact(expression.expr) == exact


def test_what_has_no_text_raises_and_says_what_to_do():
    with pytest.raises(sd.UnsupportedError, match="no rule for the function gamma"):
        write_expression(Source(), sympy.gamma(q_idx.expr), TritonNames(SYMBOLS), real="tl.float32")
    with pytest.raises(
        sd.UnsupportedError, match=r"cannot do f32_log\(...\) exactly as torch.*backend='flex' or backend='tiled'"
    ):
        printed(sd.parse("f32_log(q_idx * kv_idx + 1) < 3"))


def test_one_printing_of_a_deep_expression_is_quick():
    deep = q_idx
    for step in range(8):
        deep = sd.minimum(deep + kv_idx * step, deep // 2)
    assert len(printed(deep)) < 3_000


# ---- compiled -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles expressions for an sm_90 GPU; none is needed."""
    triton = pytest.importorskip("triton", reason="the text is compiled by Triton; pip install '.[triton]'")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process (TRITON_INTERPRET=1)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    folder = tmp_path_factory.mktemp("generated")

    def run(expr, real):
        kernel, text = loaded(expr, real, folder)
        kinds = {"int": "*i32", "bool": "*i1", "float": "*fp32"}
        specs = {f"{read.spec.name}_ptr": read.spec for read in table_reads(expr)}
        types = {"out_ptr": "*fp64", "score_ptr": "*fp32", "BLOCK": "constexpr"}
        signature = {n: kinds[specs[n].dtype] if n in specs else types.get(n, "i32") for n in kernel.arg_names}
        try:
            return triton.compile(ASTSource(kernel, signature, {"BLOCK": 32}), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        except Exception as error:
            raise AssertionError(text) from error

    return run


def loaded(expr, real, folder):
    """A kernel that stores ``expr`` on a tile of 32 x 32, and the text of its module."""
    ranks = {read.spec.name: len(read.args) for read in table_reads(expr)}
    tables = {name: TableNames(f"{name}_ptr", tuple(f"{name}_{i}" for i in range(rank))) for name, rank in ranks.items()}
    arguments = [text for table in tables.values() for text in (table.pointer, *table.sizes)]
    source = Source(taken=[*arguments, *SYMBOLS])
    source.line("@triton.jit")
    with source.block(
        f"def kernel({', '.join(['out_ptr', 'score_ptr', 'q_len', 'kv_len', *arguments, 'BLOCK: tl.constexpr'])}):"
    ):
        source.line("b, h = tl.program_id(0), tl.program_id(1)")
        source.line("q_idx = tl.arange(0, BLOCK)[:, None]")
        source.line("kv_idx = tl.arange(0, BLOCK)[None, :]")
        source.line("score = tl.load(score_ptr + q_idx * BLOCK + kv_idx)")
        result = write_expression(source, expr, TritonNames(SYMBOLS, tables), real=real)
        if not isinstance(expr, sympy.Expr):
            result = f"tl.where({result}, 1, 0)"
        source.line(f"tl.store(out_ptr + q_idx * BLOCK + kv_idx, tl.zeros([BLOCK, BLOCK], tl.float64) + {result})")
    text = f"import triton\nimport triton.language as tl\n\n{functions_for(source.text)}\n\n{source.text}"
    path = folder / f"module_{next(_numbers)}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.kernel, text


@given(kit.masks(depth=4))
@settings(max_examples=15)
def test_masks_compile(compiled, mask):
    compiled(mask.expr, "tl.float64")


@given(kit.scores(depth=3))
@settings(max_examples=15)
def test_scores_and_their_derivatives_compile(compiled, expression):
    compiled(expression.expr, "tl.float32")
    compiled(derivative(expression.expr), "tl.float32")


@pytest.mark.parametrize(
    "expression",
    [
        sd.sqrt((q_idx % 8 - kv_idx % 8) ** 2 + 1.5) + sd.sin(q_idx * 0.1) + sd.exp(-0.1 * kv_idx) + sd.log(q_idx + 1.0) < 9,
        sd.tanh(kv_idx * 0.1) + sd.erf(q_idx * 0.1) + sd.softplus(q_idx * 0.1) + 2 ** (0.1 * h) + sd.cos(kv_idx) + sd.sigmoid(h * 0.1) < 9,
        sd.minimum(kv_idx * 0.1, 0.3) + sd.where(h < 2, 0.1, 0.25) < sd.maximum(bias[h, q_idx], 0.1),
        (q_idx * kv_idx * 3 < 5_000_000_000) | (7_000_000_000 - q_idx * q_idx == kv_idx) | (sd.minimum(q_idx * q_len, 3_000_000_000) < 7),
        chosen[q_idx // 4, kv_idx // 4] & ~chosen[kv_idx // 4, 3] ^ (doc[q_idx] == doc[doc[kv_idx]]),
        ((q_idx - kv_idx) // 3 == 1) | ((q_idx - kv_idx) % 5 == h) | (3 // (h + 2) == 1) | (5 <= q_idx) | (kv_idx % -3 == h - 5),
        sd.tanh(score / 30) * 30, sd.sin(score) + sd.cos(score), sd.erf(score) + sd.exp(score) + sd.log(1 + abs(score)),
        sd.softplus(score) + sd.sigmoid(score) + sd.relu(score),
        abs(score) ** 0.3 + score**5 + score**-2 + score ** (h * 0.5) + abs(score) ** -0.5,
        sd.parse("f32_lt(f32_sqrt(f32_add(f32_mul(q_idx, kv_idx), f32_div(kv_idx, 3))), f32_reciprocal(kv_idx))"),
        sd.parse("f64_le(f64_sqrt(f64_div(q_idx, kv_idx + 1)), f64_floor(f64_round(f64_trunc(f64_ceil(f64_mul(kv_idx, 0.3))))))"),
        sd.parse("f16_lt(f16_mul(q_idx, 3), bf16_add(kv_idx, 1)) == f32_to_int32(f32_sign(f32_neg(f32_abs(f32_sub(q_idx, kv_idx)))))"),
        sd.parse("f32_where(q_idx < kv_idx, f32_minimum(q_idx, 3), f32_maximum(f32_relu(kv_idx), 2)) < f32_cast(f64_add(q_idx, 0.1))"),
        doc[sd.parse("i64_wrap(q_idx - kv_idx, 16)")] + sd.parse("i64_add(i64_mul(q_idx, kv_idx), f32_to_int64(f32_round(score)))"),
    ],
    ids=lambda e: str(e)[:60],
)  # fmt: skip
def test_everything_that_can_be_printed_compiles(compiled, expression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(expression.expr, "tl.float32" if expression.expr.has(score.expr) else "tl.float64")


def test_the_functions_are_accurate_where_the_hardware_is_not(compiled):
    ptx = compiled((sd.tanh(score / 30) * 30).expr, "tl.float32")
    assert "tanh.approx" not in ptx and "ex2.approx" not in ptx  # a rational function: a division is its only slow step
    exact = compiled(sd.parse("f32_lt(f32_sqrt(f32_div(q_idx, 3)), 2)").expr, "tl.float64")
    assert "sqrt.rn.f32" in exact and "div.rn.f32" in exact
