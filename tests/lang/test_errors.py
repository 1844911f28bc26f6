"""Wrong uses of the language, and the message each gets. See also ``tests/test_errors.py``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score

causal = kv_idx <= q_idx
t = sd.table("t")
doc = sd.table("doc", monotone=True)
keep = sd.table("keep", dtype=bool)
slope = sd.table("slope", learned=True)

NO_TRUTH = "has no truth value while it is being declared. `and`, `or`, `not`, `if`, `in` and chained comparisons (`0 <= x < 5`) ask for one and would drop a side. Write `a & b`, `a | b`, `~a`, `(0 <= x) & (x < 5)`"
UNKNOWN = "its value is not known while it is being declared"
UNREAD = "a table must be read with indices before it is used: t[q_idx]; got the bare table 't'"
NOT_A_NUMBER = "a mask is not a number: kv_idx <= q_idx. Join masks with & | ^ ~, or make a number with sd.where(mask, 1, 0)"
DIVISOR = "must be known not to be zero; got {}. Use a constant, a length, or a table declared with values_in=(1, ...)"

# fmt: off
# ruff: noqa: E501 (a use and its message stand on one line)
PYTHON: dict[str, tuple[Callable[[], Any], str]] = {
    "and": (lambda: causal and h < 1, NO_TRUTH),
    "or": (lambda: causal or h < 1, NO_TRUTH),
    "not": (lambda: not causal, NO_TRUTH),
    "if": (lambda: 1 if causal else 0, NO_TRUTH),
    "chained comparison": (lambda: 0 <= kv_idx < 5, NO_TRUTH),
    "index as bool": (lambda: bool(q_idx), f"Index(q_idx) {NO_TRUTH}"),
    "score as bool": (lambda: bool(score), f"Score(score) {NO_TRUTH}"),
    "in a list": (lambda: q_idx in [1, 2], NO_TRUTH),
    "in an expression": (lambda: 3 in q_idx, "`in` is not possible on Index(q_idx)"),
    "int": (lambda: int(q_idx), f"int() is not possible on Index(q_idx): {UNKNOWN}. Keep it symbolic"),
    "float": (lambda: float(score), f"float() is not possible on Score(score): {UNKNOWN}"),
    "math": (lambda: math.sqrt(q_idx), f"float() is not possible on Index(q_idx): {UNKNOWN}"),
    "range": (lambda: range(q_idx), "To look a value up by position declare a table: t = sd.table('t'); t[expression]"),
    "list index": (lambda: [1, 2][q_idx], "use as a Python index is not possible on Index(q_idx)"),
    "len": (lambda: len(q_idx), "len() is not possible on Index(q_idx): its value is not known while it is being declared. Use sd.q_len or sd.kv_len"),
    "iteration": (lambda: list(causal), "iteration is not possible on Mask(kv_idx <= q_idx)"),
    "min": (lambda: min(q_idx, kv_idx), NO_TRUTH),
    "precedence of &": (lambda: q_idx >= kv_idx & h < 1, NO_TRUTH),
}

OPERATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "division by zero": (lambda: q_idx // 0, f"the divisor in q_idx // 0 {DIVISOR.format(0)}"),
    "remainder by zero": (lambda: q_idx % 0, f"the divisor in q_idx % 0 {DIVISOR.format(0)}"),
    "division by an index": (lambda: q_idx // kv_idx, f"the divisor in q_idx // kv_idx {DIVISOR.format('kv_idx')}"),
    "division by a table": (lambda: q_idx // t[h], f"the divisor in q_idx // t[h] {DIVISOR.format('t[h]')}"),
    "number by an index": (lambda: 5 % h, f"the divisor in 5 % h {DIVISOR.format('h')}"),
    "division by a float": (lambda: q_idx // 2.0, "`//` wants whole numbers on both sides; got 2.0. For scores use `/`"),
    "float division by zero": (lambda: score / 0.0, "division by zero: score / 0.0"),
    "hidden zero": (lambda: 1 / (q_idx - q_idx), "division by zero: 1 / 0"),
    "// of a score": (lambda: score // 2, "`//` wants whole numbers; score is a score. Use `/`"),
    "// by a score": (lambda: 2 // score, "`//` wants whole numbers; score is a score. Use `/`"),
    "% of a score": (lambda: score % 2, "`%` wants whole numbers; score is a score"),
    "& of a score": (lambda: score & causal, "`& | ^ ~` join masks; score is a score. Put brackets around comparisons"),
    "~ of a score": (lambda: ~score, "`& | ^ ~` join masks; score is a score"),
    "index & mask": (lambda: q_idx & (h < 1), "`&` between an index and a mask: q_idx & h <= 0. Put brackets around comparisons: (a < b) & (c == d)"),
    "mask & index": (lambda: (h < 1) & q_idx, "operand must be a mask; got Index(q_idx) (Index). A comparison makes a mask: write e.g. `x != 0`"),
    "mask & number": (lambda: causal & 1, "operand must be a mask; got 1 (int)"),
    "mask & tensor": (lambda: causal & torch.tensor(True), "operand must be a mask; got a Tensor of shape () and torch.bool. Tensors are read through a table: keep = sd.table('keep', dtype=bool)"),
    "mask & function": (lambda: causal & (lambda b, h, q, k: q >= k), "To use a FlexAttention mask function write sd.trace_mask(function)"),
    "mask == number": (lambda: causal == 1, "operand must be a mask; got 1 (int)"),
    "mask + mask": (lambda: causal + causal, NOT_A_NUMBER),
    "-mask": (lambda: -causal, NOT_A_NUMBER),
    "mask < number": (lambda: causal < 1, NOT_A_NUMBER),
    "mask * number": (lambda: 2 * causal, NOT_A_NUMBER),
    "index + tensor": (lambda: q_idx + torch.arange(3), "an expression cannot be combined with Tensor. Read tensors through a table: t = sd.table('t'); t[kv_idx], bound as attn(q, k, v, t=tensor)"),
    "tensor + index": (lambda: torch.arange(3) + q_idx, "an expression cannot be combined with Tensor"),
    "index + text": (lambda: q_idx + "a", "an expression cannot be combined with str"),
    "index == None": (lambda: q_idx == None, "an expression cannot be combined with NoneType"),  # noqa: E711
    "negative shift": (lambda: q_idx << -1, "a shift wants a number of bits from 0 to 62, or an index that cannot be negative; got -1"),
    "shift by an index": (lambda: q_idx >> (h - 1), "a shift wants a number of bits from 0 to 62, or an index that cannot be negative; got Index(h - 1)"),
    "shift of a number": (lambda: 1 << -q_idx, "a shift wants a number of bits from 0 to 62, or an index that cannot be negative; got Index(-q_idx)"),
    "NaN": (lambda: score + math.nan, "operand must not be NaN; to drop a pair use the mask, or -inf through sd.where"),
    "where of an index": (lambda: sd.where(q_idx, 1, 2), "condition of where() must be a mask; got Index(q_idx) (Index)"),
    "where of text": (lambda: sd.where(causal, "a", 2), "argument of where() must be an index expression or a whole number; got 'a' (str)"),
    "clamp without bounds": (lambda: sd.clamp(q_idx), "clamp(x, low, high) wants at least one bound"),
    "tanh of a tensor": (lambda: sd.tanh(torch.ones(2)), "argument of tanh() must be a score or index expression or a number; got a Tensor of shape (2,) and torch.float32. Tensors are read through a table"),
    "exp of a table": (lambda: sd.exp(slope), "argument of exp() must be a score or index expression or a number; got table('slope', learned=True)"),
}

TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "in arithmetic": (lambda: q_idx + t, UNREAD),
    "first in arithmetic": (lambda: t * 2, UNREAD),
    "in a comparison": (lambda: t < 3, UNREAD),
    "== number": (lambda: t == 3, UNREAD),
    "as a mask": (lambda: causal & keep, "A table must be read with indices: t[q_idx, kv_idx]"),
    "as bool": (lambda: bool(t), "table 't' has no truth value; read it: t[q_idx]"),
    "iterated": (lambda: list(t), "table 't' cannot be iterated; read it: t[q_idx]"),
    "slice": (lambda: t[1:2], "table 't' is read one element at a time; got slice(1, 2, None) as an index"),
    "no index": (lambda: t[()], "table 't' must be read with at least one index"),
    "mask as index": (lambda: t[causal], "table 't': an index must be an integer expression; got the mask Mask(kv_idx <= q_idx)"),
    "score as index": (lambda: t[score], "index of table 't' must be an index expression or a whole number; got Score(score) (Score)"),
    "float as index": (lambda: t[1.5], "index of table 't' must be an index expression or a whole number; got 1.5 (float)"),
    "float table as index": (lambda: t[slope[h]], "index of table 't' must be an index expression or a whole number; got Score(slope[h])"),
    "two forms": (lambda: ((t[q_idx] < 1) & (t[q_idx, kv_idx] < 1)).text, "indices; use one form"),
    "two declarations": (lambda: ((t[q_idx] < 1) & (sd.table("t", monotone=True)[q_idx] < 1)).text, "two different tables are called 't'"),
}

DECLARATIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "no identifier": (lambda: sd.table("1x"), "table name must be a Python identifier, since it is passed as attn(..., name=tensor); got '1x'"),
    "keyword": (lambda: sd.table("lambda"), "table name must be a Python identifier"),
    "dtype": (lambda: sd.table("x", dtype="complex64"), "table 'x': dtype must be int, bool, float or a torch dtype of these kinds; got 'complex64'"),
    "learned int": (lambda: sd.table("x", dtype=int, learned=True), "table 'x': only float tables can be learned; got dtype int. Write dtype=float"),
    "monotone float": (lambda: sd.table("x", dtype=float, monotone=True), "table 'x': monotone, bijective and values_in are facts about int tables; got dtype float"),
    "empty range": (lambda: sd.table("x", values_in=(3, 1)), "table 'x': values_in wants low <= high; got (3, 1)"),
    "one bound": (lambda: sd.table("x", values_in=3), "table 'x': values_in wants (low, high), two integers; got 3"),
    "fractional bounds": (lambda: sd.table("x", values_in=(0.5, 2.5)), "table 'x': values_in wants (low, high), two integers; got (0.5, 2.5)"),
    "bind an unknown table": (lambda: causal.bind(x=torch.arange(3)), "cannot bind table 'x': the expression reads no table"),
    "two tensors": (lambda: (doc[q_idx] < 1).bind(doc=torch.arange(3)) & (doc[kv_idx] < 1).bind(doc=torch.arange(3)), "two different tensors are captured under the table name 'doc'"),
}

PATTERNS: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: sd.attend(lambda b, h, q, k: q >= k), "To use a FlexAttention mask function write sd.trace_mask(function)"),
    "an index": (lambda: sd.attend(q_idx), "the mask of attend() must be a mask; got Index(q_idx) (Index)"),
    "nothing": (lambda: sd.attend(None), "the mask of attend() must be a mask; got None (NoneType)"),
    "a score function": (lambda: sd.attend(causal, score=abs), "the score of attend() must be a score or index expression or a number"),
    "mask of scores": (lambda: sd.attend(score > 0), "the mask score > 0 depends on `score`; drop pairs by score inside the score: sd.where(condition, score, -inf)"),
    "sink by position": (lambda: sd.attend(causal, sink=slope[kv_idx]), "a sink is one logit per batch entry and head; slope[kv_idx] also depends on ['kv_idx']"),
    "negative scale": (lambda: sd.attend(causal, scale=-1), "scale must be a positive number or None for head_dim ** -0.5; got -1"),
    "learned mask": (lambda: sd.attend(slope[h] > 0), "table 'slope' is learned but read in the mask, through which no gradient flows; use it in the score"),
}

TEXT: dict[str, tuple[Callable[[], Any], str]] = {
    text: (lambda text=text: sd.parse(text), message)
    for text, message in {
        "q_idx <=": "cannot read 'q_idx <=': invalid syntax at line 1",
        "x < 3": "cannot read 'x': unknown name 'x'; declare it above: x = table('x')",
        "0 <= q_idx < 3": "cannot read '0 <= q_idx < 3': chained comparisons drop a side; write (a < b) & (b < c)",
        "q_idx < 3 and h < 2": "write & and | instead of `and` and `or`",
        "not (q_idx < 3)": "write ~a instead of `not a`",
        "__import__('os').system('true')": "Call is not part of the language",
        "q_idx.expr": "cannot read 'q_idx.expr': Attribute is not part of the language",
        "lambda: 3": "Lambda is not part of the language",
        "q_idx @ kv_idx": "the operator MatMult is not part of the language",
        "import os": "only `name = table(...)` lines and expressions may stand here",
        "q_idx = 3\nq_idx": "cannot read 'q_idx = 3': only `name = table(...)` lines and expressions may stand here",
        "q_idx\nkv_idx": "the text form holds one expression after its tables; got 2",
        "": "the text form holds one expression after its tables; got 0",
        "where(q_idx < 3)": "cannot read 'where(q_idx < 3)': where(): missing a required argument: 'a'",
        "x = table('x', colour=3)\nx[h]": "table(): unexpected argument colour: it takes name, dtype",
        "3 // 0": "cannot read '3 // 0': integer division or modulo by zero",
        "3[q_idx]": "cannot read '3[q_idx]': 'int' object is not subscriptable",
        "-'a'": "bad operand type for unary -: 'str'",
        "2**'a'": "cannot read \"2**'a'\": the operator does not join int and str",
        "'a' + q_idx": "must be a score or index expression or a number; got 'a' (str)",
    }.items()
} | {"no text": (lambda: sd.parse(3), "parse() reads text; got 3 (int)")}  # type: ignore[misc]

# fmt: on
CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "python": PYTHON,
        "operators": OPERATORS,
        "tables": TABLES,
        "declarations": DECLARATIONS,
        "patterns": PATTERNS,
        "text": TEXT,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_wrong_uses_and_their_messages(name: str) -> None:
    use, message = CASES[name]
    with pytest.raises(sd.PatternError, match=re.escape(message)):
        use()


FROZEN = [q_idx, causal, score, sd.attend(causal)]


@pytest.mark.parametrize("value", FROZEN, ids=repr)
def test_expressions_and_patterns_are_frozen(value: Any) -> None:
    for name in ("expr", "_expr", "mask", "anything"):
        with pytest.raises(AttributeError):
            setattr(value, name, 1)
    with pytest.raises(AttributeError):
        delattr(value, "mask" if isinstance(value, sd.Pattern) else "_expr")


def test_bound_tensors_cannot_be_changed_from_outside() -> None:
    mask = (doc[q_idx] < 1).bind(doc=torch.arange(3))
    mask.bound.clear()
    assert set(mask.bound) == {"doc"}


@pytest.mark.parametrize("name", ["clamp", "logical_and", "item", "shape"])
def test_attributes_of_tensors_point_to_tracing(name: str) -> None:
    with pytest.raises(
        AttributeError, match=rf"has no attribute '{name}'. To use a function written for tensors, trace it: sd.trace_mask"
    ):
        getattr(causal, name)


def test_a_mask_counts_as_zero_and_one_next_to_an_index() -> None:
    for value in (q_idx + causal, causal + q_idx, 2 * q_idx - causal):
        assert isinstance(value, sd.Index)
    assert (causal + q_idx).same_as(q_idx + causal)
    assert isinstance(causal * score, sd.Score)


def test_equal_expressions_have_equal_hashes_but_only_keys_compare_as_python_does() -> None:
    again = operator.ge(q_idx, kv_idx)
    assert hash(again) == hash(causal)
    assert {causal.key: "found"}[again.key] == "found"
    with pytest.raises(sd.PatternError, match="has no truth value"):
        {causal: "found"}[again]
