"""Generated kernels, interpreted, against plain attention in float64: random patterns, tables, shapes, dtypes, layouts, tile sizes."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.backends.triton.limits import LIMITS, Limits
from sparsedsl.gpu.configs import Config
from sparsedsl.testing import inputs, patterns, shapes, tables_for, tensor
from sparsedsl.testing.numerics import expect, gradients

# Tiles, splits of decode, scratch memory; a longest length of 0 means positions of 64 bits.
CUTS = (
    Limits(splits=1),
    Limits(splits=3),
    Limits(Config(16, 32, 4, 1, heavy_first=True), splits=2),
    Limits(Config(32, 16, 4, 1), decode_rows=0, splits=1, pair_bytes=1),
    Limits(Config(32, 32, 4, 1), decode_rows=100, splits=5),
    Limits(Config(32, 16, 4, 1), longest=0, splits=2, pair_bytes=20_000),
)


@contextlib.contextmanager
def cut(how: Limits) -> Iterator[None]:
    """Calls inside are cut so, and memory that nobody has written to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with LIMITS.using(**vars(how)):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def assert_right(pattern: Any, q: Any, k: Any, v: Any, *, q_offset: int, **tables: Any) -> None:
    """Output, LSE and all gradients of one call are those of plain attention, as closely as the precision allows."""
    learned = {name: tables[name].detach().requires_grad_() for name, spec in pattern.tables.items() if spec.learned}
    leaves = {name: t.detach().requires_grad_() for name, t in {"q": q, "k": k, "v": v}.items()}
    out, lse = sd.compile(pattern, backend="triton")(**leaves, q_offset=q_offset, return_lse=True, **(tables | learned))
    cotangents = tensor(*out.shape, seed=91), tensor(*lse.shape, seed=92)
    got = {"out": out, "lse": lse} | gradients(out, lse, leaves | learned, cotangents)
    wanted = expect(pattern, q, k, v, tables, q_offset=q_offset, cotangents=cotangents)
    faults = [fault for name, value in got.items() if (fault := wanted.fault(name, value))]
    assert not faults, f"{pattern!r}: {'; '.join(faults)}"


SHAPES = shapes(max_len=40, max_heads=4, head_dims=(8, 16, 20)) | shapes(max_len=80, max_batch=1, max_heads=2, head_dims=(4, 16))


@given(
    pattern=patterns(),
    case=SHAPES,
    how=st.sampled_from(CUTS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    data=st.data(),
)
@settings(max_examples=12)
def test_random_patterns(pattern, case, how, dtype, data):
    tables = data.draw(tables_for(pattern, case))
    q, k, v = data.draw(inputs(case, dtype=dtype))
    with cut(how):
        assert_right(pattern, q, k, v, q_offset=case.q_offset, **tables)


# Reads of a learned table along each of the axes that gradients are summed along, in every place of a score.
READS = {
    "rows": ("[h, q_idx]", "[b, q_idx // 3]", "[q_idx % 5]", "[h]", "[doc[q_idx]]", "[2 * q_idx + h]"),
    "columns": ("[h, kv_idx]", "[b, kv_idx // 3]", "[kv_idx % 5]", "[doc[kv_idx]]"),
    "difference": ("[h, maximum(q_idx - kv_idx, 0)]", "[b, clamp(q_idx - kv_idx + 9, 0, 20)]", "[abs(q_idx - kv_idx)]",
                   "[(q_idx - kv_idx) // 4 + 99]"),
    "pairs": ("[q_idx, kv_idx]", "[h, q_idx // 8, kv_idx // 8]", "[(q_idx + kv_idx) % 7]", "[clamp(q_idx * kv_idx, 0, 99)]"),
}  # fmt: skip
MASKS = ("kv_idx <= q_idx", "True", "(kv_idx <= q_idx) & (q_idx - kv_idx < 12)", "(q_idx * kv_idx) % 3 < 2", "q_idx - kv_idx > 9",
         "kv_idx <= q_idx - 4 * h", "doc[q_idx] == doc[kv_idx]", "keep[kv_idx]")  # fmt: skip
SCORES = ("score + {0}", "score * {0}", "tanh(score * {0}) * 2 + {1}", "score + {0} * {1}",
          "where(kv_idx % 2 == 0, score + {0}, score * {1})",
          "maximum(score, {0}) - {1}", "{0} - {1}", "score * (1 + {0} * {0})", "score - abs({0}) * (q_idx - kv_idx) * 0.1")  # fmt: skip
LENGTHS = {"b": 2, "h": 4}


def rank(read: str) -> int:
    """How many indices a read has."""
    index = ast.parse("table" + read, mode="eval").body.slice
    return len(index.elts) if isinstance(index, ast.Tuple) else 1


@given(
    reads=st.lists(st.sampled_from(sorted(READS)).flatmap(lambda axis: st.sampled_from(READS[axis])), min_size=2, max_size=2),
    same=st.booleans(),
    mask=st.sampled_from(MASKS),
    score=st.sampled_from(SCORES),
    case=SHAPES,
    how=st.sampled_from(CUTS),
    data=st.data(),
)
@settings(max_examples=12)
def test_learned_tables(reads, same, mask, score, case, how, data):
    """One table read twice, or two tables, along any of the axes."""
    names = ("near", "near" if same and rank(reads[0]) == rank(reads[1]) else "far")
    terms = [name + read for name, read in zip(names, reads, strict=True)]
    lines = ["near = table('near', learned=True)", "far = table('far', learned=True)", "doc = table('doc', monotone=True)"]
    lines = [*lines, "keep = table('keep', dtype=bool)"]
    text = score.format(*terms)
    used = [line for line in lines if f"{line.split()[0]}[" in text + mask]
    pattern = sd.attend(sd.parse("\n".join([*used, mask])), score=sd.parse("\n".join([*used, text])))
    tables = data.draw(tables_for(pattern, case))
    q, k, v = data.draw(inputs(case, dtype=torch.float32))
    with cut(how):
        assert_right(pattern, q, k, v, q_offset=case.q_offset, **tables)
