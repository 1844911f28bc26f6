"""Systems as declarations: short, each built of nodes, with errors that name the argument."""

from __future__ import annotations

import ast
import inspect

import pytest

import sparsedsl as sd
from sparsedsl.patterns import systems

NAMES = ("hsa", "nha", "pbs", "token_sparse", "ring_linear", "moba", "nsa", "minference")


def code_lines(function) -> int:
    """Lines of a function without its docstring, blank lines and comments."""
    source = inspect.getsource(function)
    tree = ast.parse(source).body[0]
    first = tree.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    inside = set(range(first.lineno, first.end_lineno + 1)) if documented else set()
    lines = source.splitlines()
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") for n, line in enumerate(lines, start=1) if n not in inside
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_system_is_a_declaration_of_at_most_25_lines(name):
    assert code_lines(getattr(systems, name)) <= 25


def test_lines_are_counted():
    assert code_lines(code_lines) == 10


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sd.patterns.hsa(chunk=0), "hsa(): chunk must be at least 1; got 0"),
        (lambda: sd.patterns.hsa(weights="mean"), "weights must be one of 'softmax', 'softmax1'"),
        (lambda: sd.patterns.nha(empty="none"), "empty must be one of 'zero_sink', 'masked'; got 'none'"),
        (lambda: sd.patterns.nha(window=-1), "nha(): window must be at least 0; got -1"),
        (lambda: sd.patterns.pbs(block=96), "block must divide segment, which is 256; got 96"),
        (lambda: sd.patterns.pbs(mass=0), "share must be above 0 and at most 1; got 0"),
        (lambda: sd.patterns.pbs(share="all"), "share must be one of 'head', 'group'; got 'all'"),
        (lambda: sd.patterns.token_sparse(coverage=2), "tail must be a share between 0 and 1; got 2"),
        (lambda: sd.patterns.token_sparse(pool=4), "pool must be odd"),
        (lambda: sd.patterns.minference(slash=0), "minference(): slash must be at least 1; got 0"),
        (lambda: sd.patterns.minference(columns=-1), "minference(): columns must be at least 0; got -1"),
        (lambda: sd.patterns.ring_linear([1.5]), "decay must be one factor in (0, 1]"),
        (lambda: sd.patterns.moba(top_k=0), "moba(): top_k must be at least 1; got 0"),
        (lambda: sd.patterns.nsa(block=48), "select must be a multiple of block, which is 48; got 64"),
        (lambda: sd.decay_table(4, 5, 5), "layer must be below layers, which is 5; got 5"),
        (lambda: sd.schedule(8, 4, full=1, other=2, last=4), "last must be below group, which is 4; got 4"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(sd.PatternError) as error:
        make()
    assert words in str(error.value)


def test_a_moba_of_one_chunk_is_static():
    assert isinstance(sd.patterns.moba(chunk=8, top_k=1), sd.Pattern)
