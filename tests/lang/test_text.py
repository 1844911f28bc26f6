"""Text, hashes and pickles: what is written down reads back to the same expression, in every process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx, score
from sparsedsl.lang import numeric
from sparsedsl.lang.printing import Printer, reading_text, to_text
from sparsedsl.testing import indices, masks, patterns, scores

ROOT = Path(__file__).resolve().parents[2]
expressions = st.one_of(indices(), masks(), scores())

doc = sd.table("doc", monotone=True)
start = sd.table("start")
chosen = sd.table("chosen", dtype=bool)
slope = sd.table("slope", learned=True)

# What people write, and what they read back: the text of the canonical form.
WRITTEN = {
    "causal": (kv_idx <= q_idx, "q_idx >= kv_idx"),
    "strict": (kv_idx < q_idx, "q_idx > kv_idx"),
    "window": ((kv_idx <= q_idx) & (q_idx - kv_idx < 512), "(q_idx >= kv_idx) & (q_idx - kv_idx <= 511)"),
    "symmetric window": (abs(q_idx - kv_idx) < 8, "abs(kv_idx - q_idx) <= 7"),
    "documents": (doc[q_idx] == doc[kv_idx], "doc[q_idx] == doc[kv_idx]"),
    "nested tables": (kv_idx >= start[doc[q_idx]], "start[doc[q_idx]] <= kv_idx"),
    "block table": (chosen[q_idx // 64, kv_idx // 64], "chosen[q_idx // 64, kv_idx // 64]"),
    "not a block": (~chosen[h, kv_idx // 64], "~chosen[h, kv_idx // 64]"),
    "dilated": ((q_idx - kv_idx) % 4 == 0, "(q_idx - kv_idx) % 4 == 0"),
    "chunks": (q_idx // 16 == kv_idx // 16, "q_idx // 16 == kv_idx // 16"),
    "common factor": (4 * q_idx - 4 * kv_idx < 6, "q_idx - kv_idx <= 1"),
    "impossible": (2 * q_idx == 2 * kv_idx + 1, "False"),
    "always": (q_idx >= 0, "True"),
    "power of two mask": (kv_idx & 7, "kv_idx % 8"),
    "shift": (q_idx >> 3, "q_idx // 8"),
    "nested division": (q_idx // 4 // 8, "q_idx // 32"),
    "where": (sd.where(kv_idx < 4, score, float("-inf")), "where(kv_idx <= 3, score, -inf)"),
    "soft cap": (sd.tanh(score / 30) * 30, "30*tanh(score / 30)"),
    "alibi": (score + slope[h] * (kv_idx - q_idx), "score + slope[h]*(kv_idx - q_idx)"),
    "three-way xor": ((b < 1) ^ (h < 1) ^ (kv_idx < 3), "(b <= 0) ^ (h <= 0) ^ (kv_idx <= 2)"),
    "lengths": (kv_idx < kv_len - 3, "kv_idx - kv_len <= -4"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_text_of_what_people_write(name: str) -> None:
    expression, text = WRITTEN[name]
    assert expression.text.splitlines()[-1] == text
    assert sd.parse(expression.text).same_as(expression)


# What ``str`` and reports show, where it is not the canonical text: what one would write.
READ = {
    "causal": "kv_idx <= q_idx",
    "strict": "kv_idx < q_idx",
    "window": "(kv_idx <= q_idx) & (q_idx - kv_idx < 512)",
    "symmetric window": "abs(kv_idx - q_idx) < 8",
    "nested tables": "kv_idx >= start[doc[q_idx]]",
    "common factor": "q_idx - kv_idx < 2",
    "where": "where(kv_idx < 4, score, -inf)",
    "three-way xor": "(b <= 0) ^ (h <= 0) ^ (kv_idx <= 2)",
    "documents": "doc[q_idx] == doc[kv_idx]",
}


@pytest.mark.parametrize("name", READ)
def test_what_people_read(name: str) -> None:
    expression = WRITTEN[name][0]
    assert str(expression) == READ[name]
    assert repr(expression) == f"{type(expression).__name__}({READ[name]})"


@pytest.mark.parametrize(
    ("mask", "read"),
    [
        (kv_idx <= q_idx + 3, "kv_idx <= q_idx + 3"),
        (q_idx - kv_idx >= 2, "q_idx - kv_idx >= 2"),
        (kv_idx > q_idx, "kv_idx > q_idx"),
        (kv_idx // 64 <= q_idx // 64, "kv_idx // 64 <= q_idx // 64"),
        (q_idx < sd.table("end")[kv_idx], "q_idx < end[kv_idx]"),
        (abs(q_idx - kv_idx) <= 128, "abs(kv_idx - q_idx) <= 128"),
        (kv_idx == 0, "kv_idx == 0"),
    ],
)
def test_signs_are_not_turned(mask: Any, read: str) -> None:
    assert str(mask) == read
    assert sd.parse(to_text(mask.expr, write=reading_text)).same_as(mask)


@given(expressions)
@settings(max_examples=300)
def test_printing_and_parsing_keep_the_expression(expression: Any) -> None:
    read = sd.parse(expression.text)
    assert read.expr == expression.expr, expression.text
    shown = to_text(expression.expr, write=reading_text)
    assert sd.parse(shown).expr == expression.expr, shown
    # A score of whole numbers alone has no kind of its own in text: it reads back as the index it is.
    assert type(read) is type(expression) or (isinstance(expression, sd.Score) and expression.expr.is_integer)
    assert read.text == expression.text


@given(patterns())
@settings(max_examples=50)
def test_pattern_text_is_code_that_makes_the_pattern(pattern: sd.Pattern) -> None:
    words = ("table", "attend", "b", "h", "q_idx", "kv_idx", "q_len", "kv_len", "score", *numeric.__all__)
    names: dict[str, Any] = {name: getattr(sd, name) for name in words} | {"inf": float("inf")}
    *declarations, call = pattern.text.split("\n")
    exec("\n".join(declarations), names)
    assert eval(call, names) == pattern


@given(expressions)
@settings(max_examples=100)
def test_pickle_keeps_expression_and_kind(expression: Any) -> None:
    copy = pickle.loads(pickle.dumps(expression))
    assert type(copy) is type(expression)
    assert copy.same_as(expression)
    assert copy.key == expression.key


def test_pickle_keeps_bound_tensors() -> None:
    ids = torch.tensor([0, 0, 1])
    mask = (doc[q_idx] == doc[kv_idx]).bind(doc=ids)
    copy = pickle.loads(pickle.dumps(sd.attend(mask & (kv_idx <= q_idx))))
    assert torch.equal(copy.bound["doc"], ids)


_KEYS = """
import sys
import sparsedsl as sd
for line in sys.stdin.read().split("\\0"):
    print(sd.parse(line).key, sd.attend(sd.parse(line)).key)
"""


def test_keys_are_the_same_in_every_process() -> None:
    texts = [expression.text for expression, _ in WRITTEN.values() if isinstance(expression, sd.Mask)]
    texts += [
        "minimum(q_idx, maximum(kv_idx, minimum(h, b))) + abs(q_idx - kv_idx) <= 9",
        "((b <= 3) | (h <= 4)) ^ ((kv_idx <= 5) & ((q_idx <= 6) | (kv_len <= 7)))",
    ]

    def keys(seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _KEYS], input="\0".join(texts), capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.stdout

    first = keys("1")
    assert first == keys("2") == keys("77")
    assert len(set(first.split())) == 2 * len(texts), "different expressions need different keys"
    assert first.split()[0] == sd.parse(texts[0]).key


def test_equal_meaning_by_construction_gives_one_key() -> None:
    assert (kv_idx <= q_idx).key == (q_idx >= kv_idx).key == (~(kv_idx > q_idx)).key == (q_idx - kv_idx + 1 > 0).key
    assert ((kv_idx < 3) & (h < 2)).key == ((h < 2) & (kv_idx < 3)).key
    assert (q_idx + 0).key == q_idx.key != kv_idx.key
    assert sd.Index(q_idx.expr).key != sd.Score(q_idx.expr).key, "the kind is part of the key"


def test_declared_facts_are_part_of_the_key() -> None:
    plain, risen = sd.table("t"), sd.table("t", monotone=True)
    assert (plain[q_idx] == plain[kv_idx]).key != (risen[q_idx] == risen[kv_idx]).key


def test_one_name_cannot_be_two_tables() -> None:
    both = (sd.table("t")[q_idx] < 3) & (sd.table("t", monotone=True)[kv_idx] < 3)
    with pytest.raises(sd.PatternError, match="two different tables are called 't'"):
        _ = both.text


def test_an_unknown_node_has_no_text() -> None:
    with pytest.raises(sd.UnsupportedError, match="Printer has no rule for the function gamma"):
        Printer().text(sympy.gamma(q_idx.expr))


def test_floats_keep_every_digit() -> None:
    for value in (0.1, 1 / 3, 1e-300, 1e300, 2.0**-1074, -123456789.123456789):
        read = sd.parse((score * value).text)
        assert read.same_as(score * value), value


BRACKETS = {
    "h*(kv_idx + q_idx)": (q_idx + kv_idx) * h,
    "q_idx % 3 - 1": q_idx % 3 - 1,
    "-(q_idx % 3)": -(q_idx % 3),
    "(q_idx + 1) // 3": (q_idx + 1) // 3,
    "q_idx // 3 + 1": q_idx // 3 + 1,
    "2*(q_idx // 2)": q_idx // 2 * 2,
    "(q_idx % 5)**2": (q_idx % 5) ** 2,
    # a number and a sum must not meet before the other factors are there: sympy would multiply them out
    "0.5*score*(kv_idx - q_idx)": score * (kv_idx - q_idx) * 0.5,
    "-score*(kv_idx - q_idx)": -(score * (kv_idx - q_idx)),
    "-((score + 1)*(score + 2))": -((score + 1) * (score + 2)),
    "3*((score + 1) / (score + 2))": 3 * ((score + 1) / (score + 2)),
    "(score + 1) / (score + 2) / 3": (score + 1) / (score + 2) / 3,
}


@pytest.mark.parametrize("text", BRACKETS)
def test_brackets_follow_precedence(text: str) -> None:
    assert str(BRACKETS[text]) == text
    assert sd.parse(text).same_as(BRACKETS[text])
