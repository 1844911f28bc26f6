"""Operators of Python on what is no operand, or no value yet: refused by an error of ours on both sides of every operator."""

from __future__ import annotations

import builtins
import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx, score
from sparsedsl.program.score_values import Scores

causal = kv_idx <= q_idx
t, other = sd.table("t"), sd.table("other")
probe = sd.probe(sd.q, sd.k, rows=8)
dot = sd.dot(sd.q, sd.summary(sd.k, 64))
selected = sd.top_k(dot, 4)

# No operand by themselves: whatever is done with them is a mistake.
UNREAD: dict[str, Any] = {
    "table": t, "bool table": sd.table("keep", dtype=bool), "q": sd.q, "summary": sd.summary(sd.k, 64), "key scores": probe,
    "order": sd.segment_sort(probe, 64), "tokens": sd.keep_tokens(probe, tail=0.1, always=8), "branch": sd.attend(causal & selected),
}  # fmt: skip
EXPRESSIONS: dict[str, Any] = {"index": q_idx, "mask": causal, "score": score, "scores": dot, "selected": selected}
OTHERS: dict[str, Any] = {
    **UNREAD, **EXPRESSIONS, "number": 3, "float": 1.5, "bool": True, "None": None, "text": "a", "list": [1], "complex": 1j,
    "numpy number": np.int64(3), "numpy bool": np.True_, "array": np.arange(3), "array of no dimension": np.array(3),
    "tensor": torch.arange(3), "tensor of no dimension": torch.tensor(3), "bool tensor": torch.ones(2) > 0,
    "parameter": torch.nn.Parameter(torch.zeros(2)),
}  # fmt: skip
BINARY = [
    getattr(operator, name)
    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and_",
        "or_",
        "xor",
        "lshift",
        "rshift",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
    ]
] + [divmod]
UNARY: dict[str, Callable[[Any], Any]] = {
    "bool": bool, "not": operator.not_, "int": int, "float": float, "complex": complex, "len": len, "list": list, "round": round,
    "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "index": operator.index, "range": range, "sqrt": math.sqrt,
    "in": lambda x: 3 in x, "in a list": lambda x: x in [1, 2], "sorted": lambda x: sorted([x, x]), "max": lambda x: max(x, 1),
    "list index": lambda x: [1, 2][x], "unpacked": lambda x: builtins.print(*x),
}  # fmt: skip


def is_number_format(operation: Any, left: Any) -> bool:
    """``"text" % x`` is Python's formatting of texts."""
    return operation is operator.mod and isinstance(left, str)


@pytest.mark.parametrize("name", UNREAD)
def test_no_operator_takes_what_must_be_read_first(name: str) -> None:
    """``==`` and ``!=`` most of all: True or False of two tables would stand in a mask as if it were one."""
    value = UNREAD[name]
    for x in OTHERS.values():
        for operation in BINARY:
            for pair in ((value, x), (x, value)):
                if not is_number_format(operation, pair[0]):
                    with pytest.raises(sd.PatternError):
                        operation(*pair)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_operators_give_expressions_or_an_error_of_ours(name: str) -> None:
    value = EXPRESSIONS[name]
    for x in OTHERS.values():
        for operation in BINARY:
            for pair in ((value, x), (x, value)):
                try:
                    found = None if is_number_format(operation, pair[0]) else operation(*pair)
                except sd.SparseDSLError:
                    continue
                assert found is None or isinstance(found, (sd.Index, sd.Mask, sd.Score, Scores)), (pair, operation)


@pytest.mark.parametrize("conversion", UNARY)
def test_nothing_has_a_value_before_the_call(conversion: str) -> None:
    for name, value in (UNREAD | EXPRESSIONS).items():
        with pytest.raises(sd.PatternError):
            print(name, UNARY[conversion](value))


def test_comparing_bare_tables_is_refused_and_says_how_to_read_one() -> None:
    for use in (lambda: t == t, lambda: t != other, lambda: causal & (t == other), lambda: t in [other]):
        with pytest.raises(sd.PatternError, match=r"must be read with indices before it is used: (t|other)\[q_idx\]"):
            use()
    with pytest.raises(sd.PatternError, match=r"sd\.q_idx and sd\.kv_idx"):
        sd.q <= sd.k


def test_tables_and_nodes_are_keys_all_the_same() -> None:
    """One object a declaration, so that identity finds it; also when it was declared again, copied or sent to another process."""
    for value, again in ((t, sd.table("t")), (selected, sd.top_k(dot, 4)), (sd.q, copy.deepcopy(sd.q))):
        assert value is again and {value: 1}[again] == 1
        assert pickle.loads(pickle.dumps(value)) is value
    assert t.spec == sd.table("t").spec and t.spec != other.spec
    assert len({t: 1, other: 2, selected: 3, dot: 4, sd.q: 5}) == 5
    assert selected.same_as(sd.top_k(dot, 4)) and not selected.same_as(dot)
    with pytest.raises(AttributeError, match="frozen"):
        t.spec = other.spec


def test_numpy_numbers_are_numbers_on_either_side() -> None:
    assert (np.int64(3) + q_idx).same_as(q_idx + 3)
    assert (np.int64(3) <= q_idx).same_as(q_idx >= 3)


def test_scores_stay_scores_under_sums_and_factors_and_say_where_they_do_not() -> None:
    factor = sd.input("factor", "batch heads queries")
    for made in (dot + dot, dot - dot, 2 * dot, dot / 2, -dot, 1 - dot, dot + 1, factor * dot, dot * factor, sd.relu(dot)):
        assert made.axes == dot.axes and sd.top_k(made, 4).scores is made
    assert (dot * factor) is (factor * dot) and sd.relu(dot) is dot.relu()
    with pytest.raises(sd.PatternError, match="scores of blocks are joined by \\+ and - alone"):
        dot * dot
    for logit in (dot**2, dot + q_idx, abs(dot), dot * sd.score):
        with pytest.raises(sd.PatternError, match="This is the logit of a pair"):
            sd.top_k(logit, 4)
    with pytest.raises(sd.PatternError, match="This is the logit of a pair"):
        sd.per_chunk(selected, scores=sd.exp(dot))
    with pytest.raises(sd.PatternError, match="operators have no meaning on it"):
        factor * 2
    assert isinstance(dot > 0, sd.Mask)
    with pytest.raises(sd.PatternError, match="is read with four indices"):
        selected[q_idx, kv_idx]


def test_choices_compare_as_masks_do() -> None:
    more = sd.top_k(dot, 8)
    assert (selected == more).same_as(selected.as_expression() == more.as_expression())
    assert (selected != causal).same_as(selected ^ causal)


def test_equality_of_quotients_means_blocks() -> None:
    with pytest.raises(sd.PatternError, match=r"`/` divides exactly.* write `//`: q_idx // 64 == kv_idx // 64"):
        q_idx / 64 == kv_idx / 64
    assert isinstance(q_idx / 64 <= kv_idx / 64, sd.Mask)
    assert isinstance(score == 0.5, sd.Mask)
