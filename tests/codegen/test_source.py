"""The text writer."""

from __future__ import annotations

from sparsedsl.codegen.source import Source


def test_lines_and_blocks():
    source = Source()
    with source.block("def f(x):"):
        with source.block("if x:"):
            source.line("return 1")
        source.line()
        source.lines("y = 2\n\nreturn y")
    assert source.text == "def f(x):\n    if x:\n        return 1\n\n    y = 2\n\n    return y\n"


def test_fresh_names_are_free_and_no_keywords():
    source = Source(taken=["torch"])
    assert [source.fresh(stem) for stem in ("torch", "torch", "t", "t", "lambda")] == [
        "torch_1",
        "torch_2",
        "t",
        "t_1",
        "lambda_1",
    ]
