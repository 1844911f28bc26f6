"""Generated kernels, interpreted, of patterns whose tables have the names of everything that stands in a kernel."""

from __future__ import annotations

import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.testing import inputs, patterns, shapes, tables_for
from sparsedsl.testing.numerics import expect

NAMES = [
    "floor",
    "Max",
    "Min",
    "And",
    "Or",
    "Not",
    "Xor",
    "Where",
    "Symbol",
    "Pow",
    "Mod",
    "exp",
    "log",
    "tanh",
    "inf",
    "nan",
    "tl",
    "triton",
    "torch",
    "row",
    "acc",
    "lane",
    "tile",
    "begin",
    "end",
    "lse",
    "min",
    "max",
    "float",
    "int",
    "range",
    "print",
    "q_ptr",
    "k_ptr",
    "out_ptr",
    "delta_ptr",
    "heads_table",
    "doc_table",
    "doc_size_0",
    "t",
    "t_1",
    "both",
    "_tanh",
    "_power",
    "_floor_div",
    "_",
    "__class__",
    "match",
    "case",
    "type",
    "é",
    "名前",
    "fi",
    "seq",
    "rows",
    "group",
    "BLOCK_M",
    "BLOCK",
    "ALIGN",
    "scale_",
    "kernel",
    "forward",
    "self_",
    "constexpr",
    "program_id",
]
NAMES += ["q", "k", "v", "b", "h", "score", "scale", "q_offset", "self", "kv_idx"]


@given(
    pattern=patterns(depth=2).filter(lambda p: p.tables),
    case=shapes(max_len=24, max_batch=2, max_heads=2, head_dims=(8, 16)),
    order=st.permutations(NAMES),
    data=st.data(),
)
@settings(max_examples=8)
def test_any_name_means_the_same(pattern, case, order, data):
    names = dict(zip(pattern.tables, order, strict=False))
    tables = data.draw(tables_for(pattern, case))
    q, k, v = data.draw(inputs(case, dtype=torch.float32))

    def renamed(expression):
        """In a text, ``x = table('y')`` gives a table another name for the lines below."""
        return sd.parse(re.sub(r"table\('(\w+)'", lambda found: f"table({names[found[1]]!r}", expression.text))

    sink = None if pattern.sink is None else renamed(pattern.sink)
    hostile = sd.attend(renamed(pattern.mask), renamed(pattern.score), sink=sink, scale=pattern.scale)
    passed = {names[name]: value for name, value in tables.items()}
    out, lse = sd.compile(hostile, backend="triton")(q, k, v, q_offset=case.q_offset, return_lse=True, tables=passed)
    wanted = expect(pattern, q, k, v, tables, q_offset=case.q_offset)
    assert not wanted.fault("out", out), hostile.text
    assert not wanted.fault("lse", lse), hostile.text
