"""Text that nobody should have written: a PatternError in under a second, with a short echo, and never anything else."""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx, score
from sparsedsl.program.program_text import read_program
from sparsedsl.testing import masks, scores

REFUSED = {
    "power of numbers": "9**9**9",
    "shift of numbers": "1 << 10**12",
    "shift": "q_idx << 10**12",
    "power of an index": "(q_idx + kv_idx + 1)**400",
    "power of powers": "(" * 90 + "q_idx" + ")**2" * 90,
    "long string": "'a' * 10**10",
    "long tuple": "(1,) * 10**10",
    "format": "'%1000000000d' % 1",
    "brackets": "(" * 900 + "q_idx" + ")" * 900,
    "minus": "-" * 900 + "q_idx",
    "not": "~" * 90_000 + "(q_idx < 3)",
    "functions": "minimum(" * 180 + "q_idx" + ", 3)" * 180,
    "exponentials": "exp(" * 100 + "score" + ")" * 100,
    "wide or": "|".join(f"(kv_idx == {7 * i})" for i in range(5000)),
    "blanks": " " * 10**6,
    "lines": "\n" * 10**6 + "x",
    "digits": "9" * 4000,
    "too many digits": "9" * 100_000,
    "float power": "2.0**100000",
    "tower": "9.0**9.0**9.0",
    "complex": "(-8)**0.5",
    "zero byte": "q_idx\0",
    "surrogate": "q_idx\ud800",
    "a long name": "x" * 100_000,
    "nan": "inf - inf",
    "infinity times nothing": "0.0 * inf * score",
    "logarithm": "log(-1)",
    "number called": "3()",
    "starred": "where(*(1, 2, 3))",
    "words": "where(**{'a': 1})",
    "attribute": "q_idx.__class__.__mro__",
    "walrus": "(x := 3)",
    "f-string": "f'{q_idx}'",
    "exact operation of text": "f32_log('a')",
    "type": "int",
    "bare table": "t = table('t')\nt",
    "table by itself": "t = table('t')\nt[t]",
    "two declarations": "t = table('t')\nt = table('t')\nt[h]",
    "values_in": "t = table('t', values_in=(0, 'a'))\nt[h]",
}


def outcome(read: Callable[[str], Any], text: str) -> Any:
    """What ``read`` makes of a text: a value, or the PatternError; short in either case."""
    # Neither what other threads do nor the collection of what other tests have left is part of reading.
    gc.disable()
    begin = time.thread_time()
    try:
        found = read(text)
    except sd.PatternError as error:
        assert len(str(error)) <= 700, f"the echo has {len(str(error))} characters"
        found = error
    finally:
        took = time.thread_time() - begin
        gc.enable()
    assert took < 1 + 2e-4 * len(text[:5000]), f"{text[:80]!r} took {took:.2f} s"
    return found


@pytest.mark.parametrize("read", [sd.parse, read_program], ids=["expression", "program"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_soon_and_briefly(name: str, read: Callable[[str], Any]) -> None:
    assert isinstance(outcome(read, REFUSED[name]), sd.PatternError), name


def test_refused_soon_however_deep_python_may_nest() -> None:
    """Other code raises the limit of recursion, hypothesis and torch among it: what ends early without that must end early with it."""
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(100_000)
        for read in (sd.parse, read_program):
            assert isinstance(outcome(read, REFUSED["wide or"]), sd.PatternError)
    finally:
        sys.setrecursionlimit(limit)


def test_long_texts_of_sense_are_read() -> None:
    wide = sd.parse(" | ".join(f"(kv_idx == {7 * i})" for i in range(500)))
    assert sd.parse(wide.text).same_as(wide)
    deep = sd.parse("where(q_idx % 2 == 0, " * 40 + "kv_idx" + ", 1)" * 40)
    assert sd.parse(deep.text).same_as(deep)
    product = sd.parse("*".join(f"(q_idx + {i})" for i in range(60)) + " <= 3")
    assert sd.parse(product.text).same_as(product)


PIECES = ["q_idx", "kv_idx", "h", "score", "t[", "]", "(", ")", "**", "<<", ">>", "//", "%", "~", "-", "9", "0", "1e308", "inf", "'a'", ",",
          "where(", "minimum(", "exp(", "log(", "sqrt(", "table(", "f32_log(", "i64_shl(", " & ", " | ", " ^ ", "<=", "==", "=", "\n",
          "lambda:", "values_in=", "dtype=float", "True", "top_k(", "attend(", "input(", "q", "dot(", "joint(", "slots("]  # fmt: skip
PROGRAMS = [sd.Program(made).text for made in (sd.patterns.nsa(), sd.patterns.moba(), sd.patterns.pbs())]


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=40))
@settings(max_examples=150)
def test_random_text(text: str) -> None:
    for read in (sd.parse, read_program):
        outcome(read, "t = table('t')\n" + text)


@given(st.one_of(masks(), scores()).map(lambda e: e.text) | st.sampled_from(PROGRAMS), st.integers(0, 2**32))
@settings(max_examples=150)
def test_mutated_text(text: str, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        i, j = sorted(draw.choices(range(len(text) + 1), k=2))
        text = draw.choice(
            [text[:i] + draw.choice(PIECES) + text[i:], text[:i] + text[min(j, i + 8) :], text[:j] + text[i:j][:300] + text[j:]]
        )
    outcome(sd.parse, text)
    outcome(read_program, text)


def test_numbers_that_sympy_makes_are_written_in_the_language() -> None:
    slope = sd.table("slope", dtype=float)
    for made, text in (
        (sd.sqrt(score**2), "abs(score)"),
        (sd.sqrt(slope[0] ** 2) * 2, "2*abs(slope[0])"),
        ((score**2) ** 1.5, "abs(score)**3.0"),
        (sd.sqrt((q_idx - kv_idx) ** 2), "abs(kv_idx - q_idx)"),
        (score * 1e300 * 1e300, "inf*score"),
    ):
        assert str(made) == text
        assert sd.parse(made.text).expr == made.expr
    for made in ((score * 2) ** 400, (score / 3) ** 1000, (score * 0.5) ** 300.5):
        assert sd.parse(made.text).same_as(made), "no number is longer than a float"
        assert str(made).startswith("("), "3.0**-1000 is no float, while 3.0 may be the score"


NO_NUMBERS = {
    "log of nothing": lambda: sd.log(0),
    "log below 0": lambda: sd.log(-1.0),
    "root below 0": lambda: sd.sqrt(-4.0),
    "root of minus a square": lambda: sd.sqrt(-(score**2)),
    "sine of infinity": lambda: sd.sin(float("inf")),
    "infinity less infinity": lambda: score + float("inf") - float("inf") - score,
    "nothing to the minus one": lambda: (score * 0) ** -1,
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_real_number_is_refused(name: str) -> None:
    with pytest.raises(sd.PatternError, match="is no real number"):
        NO_NUMBERS[name]()
