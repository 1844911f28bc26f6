"""What the launches of kernels leave out of Triton's interpreter changes no bit, is put back, and is there where it is asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton.runtime import interpreter

from sparsedsl.gpu.interpreter import _NAMES, quick_interpreter
from sparsedsl.gpu.loading import load

TEXT = """
import triton
import triton.language as tl


@triton.jit
def squared(x):
    return tl.sum(x, 1) * tl.max(x, 1)


@triton.jit
def kernel(out_ptr, x_ptr, factor, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    place = at[:, None] * BLOCK + at[None, :]
    x = tl.load(x_ptr + place).to(tl.float16).to(tl.float32)
    tl.store(out_ptr + at, squared(x) + tl.exp2(tl.sum(x, 0)) + tl.cdiv(at * factor, 3))
"""


def run(factor=5):
    out, x = torch.zeros(16), torch.linspace(-1, 1, 256)
    load(TEXT)["kernel"][(1,)](out, x, factor, 16)
    return out


def replaced():
    return [getattr(interpreter, name) for name in _NAMES], interpreter.interpreter_builder.options


def test_nothing_that_is_computed_changes():
    before, plain = replaced(), run()
    with quick_interpreter():
        assert not interpreter.interpreter_builder.options.sanitize_overflow
        assert torch.equal(run(), plain)
    assert plain.isfinite().all() and plain.unique().numel() > 8
    assert replaced() == before


def test_all_is_put_back_after_an_error():
    before = replaced()
    with pytest.raises(ZeroDivisionError), quick_interpreter():
        raise ZeroDivisionError
    assert replaced() == before


def test_overflows_are_looked_for_where_they_are_asked_for(monkeypatch):
    builder = interpreter.interpreter_builder
    run(1 << 30)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    with pytest.raises(Exception, match="int32 overflow detected"), quick_interpreter():
        run(1 << 30)


def test_a_triton_with_other_names_runs_as_it_is(monkeypatch):
    plain = run()
    monkeypatch.delattr(interpreter, "_get_np_dtype")
    with quick_interpreter():
        assert interpreter.interpreter_builder.options.sanitize_overflow
    monkeypatch.undo()
    assert torch.equal(run(), plain)
