"""A table may have any name that Python has for a variable: nothing a pattern is turned into may take the name for another thing."""

from __future__ import annotations

import builtins
import keyword
import re
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.codegen.expression import _TORCH
from sparsedsl.codegen.to_flex import _TAKEN, flex_functions
from sparsedsl.codegen.triton_writer import _LOCAL
from sparsedsl.lang import functions as fn
from sparsedsl.lang import numeric
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.symbols import CALL_WORDS, RESERVED_NAMES, SYMBOL_NAMES
from sparsedsl.program.program_text import read_given, read_program
from sparsedsl.testing import inputs, patterns, shapes, tables_for
from sparsedsl.testing.numerics import expect

SYMPY = [name for name in dir(sympy) if name.isidentifier()]
GENERATED = sorted(
    {*_TAKEN, *_LOCAL, *_TORCH, *numeric.__all__, *fn.REAL_FUNCTIONS, "t_1", "both", "both_1", "_tanh", "_power", "_softplus"}
)
UNICODE = [
    "é",
    "ß",
    "名前",
    "ª",
    "ﬁ",
    "ｄoc",
    "x²".replace("²", "2"),
    "Ω",
    "ℵ",
    "\u1e9b\u0323",
    "a\u0301",
    "µ",
    "٣".join(("n", "")),
]
NAMES = sorted(
    name
    for name in {*SYMPY, *dir(builtins), *keyword.softkwlist, *GENERATED, *UNICODE, *RESERVED_NAMES, *CALL_WORDS,
                 "inf", "nan", "table", "_", "__", "__class__",
                 "doc_table", "doc_size_0", "doc_here", "exact_difference", "tl", "triton", "args", "kwargs", "cls", "values", "lane"}
    if name.isidentifier() and not keyword.iskeyword(name)
)  # fmt: skip


def renamed(pattern: sd.Pattern, names: dict[str, str]) -> sd.Pattern:
    """The pattern with its tables called otherwise. In a text, ``x = table('y')`` gives a table another name for the lines below."""

    def part(expression: Any) -> Any:
        return sd.parse(re.sub(r"table\('(\w+)'", lambda found: f"table({names[found[1]]!r}", expression.text))

    sink = None if pattern.sink is None else part(pattern.sink)
    return sd.attend(part(pattern.mask), part(pattern.score), sink=sink, scale=pattern.scale)


@st.composite
def named(draw: st.DrawFn, pattern: sd.Pattern) -> dict[str, str]:
    """A hostile name for each table."""
    count = len(pattern.tables)
    hostile = st.sampled_from(NAMES) | st.sampled_from(sorted(SYMBOL_NAMES | CALL_WORDS))
    chosen = draw(st.lists(hostile, min_size=count, max_size=count, unique_by=lambda n: sd.table(n).spec.name))
    return dict(zip(pattern.tables, chosen, strict=True))


def normal(name: str) -> str:
    """The name as Python keeps it."""
    return sd.table(name).spec.name


def assert_text_reads_back(pattern: sd.Pattern) -> None:
    """Each part of the pattern is what its text says, hash included."""
    for part in (pattern.mask, pattern.score):
        read = sd.parse(part.text)
        assert read.expr == part.expr, part.text
        assert read.text == part.text


@given(pattern=patterns().filter(lambda p: p.tables), case=shapes(max_len=12, max_batch=2, max_heads=2), data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_name_means_the_same(pattern: Any, case: Any, data: Any) -> None:
    names = data.draw(named(pattern))
    tables = data.draw(tables_for(pattern, case))
    hostile = renamed(pattern, names)
    assert_text_reads_back(hostile)
    assert hostile.key != renamed(pattern, {name: f"{normal(names[name])}_x" for name in names}).key
    passed = {normal(names[name]): value for name, value in tables.items()}

    wanted = {
        part: evaluate(expr, {**case.env, "score": torch.tensor(0.5), **tables})
        for part, expr in zip("ms", pattern.exprs, strict=False)
    }
    for part, expr in zip("ms", hostile.exprs, strict=False):
        got = evaluate(expr, {**case.env, "score": torch.tensor(0.5), **passed})
        assert torch.allclose(got.double(), wanted[part].double(), rtol=1e-9, equal_nan=True), hostile.text

    source = flex_functions(hostile)
    made: dict[str, Any] = {}
    exec(source.text, made)
    ends = case.q_offset, case.q_offset + case.q_len, case.kv_len
    mask_mod, score_mod = made["mods"](*ends, *(passed[name] for name in source.values[len(ends) :]))
    grid = torch.meshgrid(*map(torch.arange, (case.batch, case.heads, case.q_len, case.kv_len)), indexing="ij")
    assert torch.equal(mask_mod(*grid).expand(grid[0].shape), wanted["m"].expand(grid[0].shape)), source.text
    if score_mod is not None:
        score = torch.full(grid[0].shape, 0.5, dtype=torch.float64)
        assert torch.allclose(
            score_mod(score, *grid).double(), wanted["s"].double().expand(score.shape), rtol=1e-5, atol=1e-5, equal_nan=True
        )

    q, k, v = data.draw(inputs(case, dtype=torch.float64))
    correct = expect(pattern, q, k, v, tables, q_offset=case.q_offset)
    for backend in ("reference", "tiled"):
        out, lse = sd.compile(hostile, backend=backend)(q, k, v, q_offset=case.q_offset, return_lse=True, tables=passed)
        assert not correct.fault("out", out) and not correct.fault("lse", lse), f"{backend}: {hostile.text}"


@pytest.mark.parametrize(
    "name", ["floor", "Max", "And", "Symbol", "exp", "inf", "torch", "min", "float", "table", "ﬁ", "_", "__class__"]
)
def test_own_functions_trace_back(name: str) -> None:
    doc = sd.table(name, values_in=(0, 9))
    mask = (doc[q_idx] == doc[kv_idx]) & (doc[kv_idx] // 2 <= q_idx)
    made: dict[str, Any] = {}
    source = flex_functions(sd.attend(mask))
    exec(source.text, made)
    ids = torch.arange(8) // 3
    mask_mod, _ = made["mods"](*({"q_offset": 0, "q_len": 8, "kv_len": 8, normal(name): ids}[value] for value in source.values))
    traced = sd.trace_mask(mask_mod)
    env = {"q_idx": torch.arange(8)[:, None], "kv_idx": torch.arange(8)[None, :]}
    assert torch.equal(evaluate(traced.expr, {**env, **traced.bound}), evaluate(mask.expr, {**env, normal(name): ids}))


def test_infinity_and_a_table_called_so() -> None:
    table = sd.table("inf", dtype=float)
    other = sd.table("float", dtype=float)
    score = sd.where(kv_idx < 3, sd.score + table[kv_idx] * other[q_idx], float("-inf"))
    assert sd.parse(score.text).same_as(score)


def test_names_that_python_takes_for_one_are_one() -> None:
    assert sd.table("ﬁ") is sd.table("fi")
    assert sd.table("ﬁ").spec.name == "fi"
    assert sd.table("ｑ_idx") is sd.table("q_idx_table")
    with pytest.raises(sd.TableError, match="must be a Python identifier"):
        sd.table("𝐢𝐟")


@pytest.mark.parametrize("name", ["b", "q_idx", "score", "q", "k", "scale", "tables", "self", "pattern"])
def test_names_of_indices_and_of_words_of_calls(name, backend="tiled"):
    """A table may be called as an index or a keyword is, and both mean in one formula what they are."""
    one, doc = sd.table(name, monotone=True), sd.table("doc", monotone=True)
    ids, q = torch.arange(9) // 2, torch.randn(2, 2, 9, 8, dtype=torch.float64)
    score = sd.score + sd.where(sd.h > 0, sd.b, sd.kv_len - sd.q_len + sd.kv_idx)
    hostile, plain = (sd.attend((kv_idx <= q_idx) & (t[q_idx] == t[kv_idx]), score=score) for t in (one, doc))
    wanted = sd.compile(plain, backend=backend)(q, q, q, doc=ids)
    attn = sd.compile(hostile, backend=backend)
    assert torch.equal(attn(q, q, q, tables={name: ids}), wanted)
    assert torch.equal(sd.compile(hostile.bind(**{name: ids}), backend=backend)(q, q, q), wanted)
    assert torch.equal(sd.attention(q, q, q, hostile, backend=backend, tables={name: ids}), wanted)
    assert torch.equal(sd.attention(q, q, q, hostile.bind(**{name: ids}), backend=backend), wanted)
    assert torch.equal(sd.nn.Attention(hostile, backend=backend, tables={name: ids})(q, q, q), wanted)
    program = sd.joint(hostile, sd.attend(sd.kv_idx < 0))
    assert read_program(sd.Program(program).text) == sd.Program(program)
    assert torch.allclose(sd.compile(program, backend=backend)(q, q, q, tables={name: ids}), wanted)
    assert read_given(hostile.text) == hostile
    assert sd.analyse(hostile.bind(**{name: ids}), 9).density == sd.analyse(plain, 9, doc=ids).density
    assert (sd.implies(hostile.mask, kv_idx <= q_idx), sd.implies(hostile.mask, kv_idx < q_idx)) == (sd.PROVED, sd.REFUTED)
    with pytest.raises(sd.TableError, match="missing table"):
        attn(q, q, q)


def test_a_table_called_as_an_index_is_passed_by_either_name():
    head = sd.table("h")
    q, ids = torch.randn(1, 2, 4, 8), torch.tensor([3, 1])
    attn = sd.compile(kv_idx < head[sd.h], backend="reference")
    assert repr(head) == "table('h_table')" and list(attn.pattern.tables) == ["h_table"]
    assert torch.equal(attn(q, q, q, h=ids), attn(q, q, q, h_table=ids))
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, q, q, h=ids), attn(q, q, q, h=ids))
    with pytest.raises(sd.TableError, match="is given twice: it is kept as 'h_table'"):
        attn(q, q, q, h=ids, h_table=ids)


def test_a_word_of_the_call_that_is_a_table_is_pointed_out():
    ids, q = torch.arange(4), torch.randn(1, 1, 4, 8)
    attn = sd.compile(sd.table("scale")[q_idx] >= kv_idx)
    with pytest.raises(
        sd.ShapeError, match=r"scale must be a positive number.*a Tensor of shape.*pass tables=\{'scale': tensor\}"
    ):
        attn(q, q, q, scale=ids)
    with pytest.raises(sd.TableError, match=r"dtype is a word of analyse\(\) too: bind it, pattern.bind\(dtype=tensor\)"):
        sd.analyse(sd.table("dtype")[q_idx] >= kv_idx, 4)


def test_reads_before_a_table_are_found_for_patterns_that_hash_alike() -> None:
    """-1 and -2 have one hash in Python, so a call remembered by it would pass for another."""
    table = sd.table("t", values_in=(0, 9))
    attn = [sd.compile((table[q_idx - far] <= kv_idx) & (q_idx >= 1), backend="reference") for far in (1, 2)]
    assert hash(attn[0].pattern) == hash(attn[1].pattern)
    x, values = torch.ones(1, 1, 4, 8), torch.arange(4)
    attn[0](x, x, x, t=values)
    with pytest.raises(sd.TableError):
        attn[1](x, x, x, t=values)
