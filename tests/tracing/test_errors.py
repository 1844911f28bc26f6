"""What cannot be traced: the operation, the line and the way out that each message names."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsedsl.errors import TraceError
from sparsedsl.tracing import trace_mask, trace_score

TABLE = torch.arange(40)
GRID = torch.arange(64).reshape(8, 8)
WIDE = torch.arange(320).reshape(8, 40)
COUNT = torch.tensor(0)
NUMBERS = list(range(40))


def branch(b, h, q, kv):
    if q >= kv:  # the line named
        return q > 0
    return kv > 0


def elif_branch(b, h, q, kv):
    if TABLE is None:
        return True
    elif (q == 1) | (kv == 1):  # the line named
        return False
    return True


def while_loop(b, h, q, kv):
    while q > 0:  # the line named
        q = q // 2
    return q == kv


def asserting(b, h, q, kv):
    assert q >= 0  # the line named
    return q >= kv


def over_two_lines(b, h, q, kv):
    # fmt: off
    return (
        q >= kv
        and q - kv < 4
    )
    # fmt: on


def item_assignment(b, h, q, kv):
    flags = torch.zeros(4, dtype=torch.bool)
    flags[q] = True  # the line named
    return flags[kv]


def augmented(b, h, q, kv):
    q += 1  # the line named
    return q >= kv


def counting(b, h, q, kv):
    COUNT.add_(1)  # the line named
    return q >= kv


def no_return(b, h, q, kv):
    q >= kv


MASKS = {
    "if": (
        branch,
        "`if` on a traced value at FILE:LINE, `if q >= kv:  # the line named`. The branch depends on the index: write",
    ),
    "elif": (elif_branch, "`if` on a traced value at FILE:LINE, `elif (q == 1)"),
    "ternary": (lambda b, h, q, kv: q > 0 if q >= kv else kv > 0, "`if` on a traced value at FILE:LINE"),
    "while": (while_loop, "`while` on a traced value at FILE:LINE, `while q > 0:  # the line named`. The number of steps"),
    "assert": (asserting, "`assert` on a traced value at FILE:LINE"),
    "and": (lambda b, h, q, kv: q >= kv and kv > 2, "`and` on a traced value at FILE:LINE, .* Write a & b, with brackets"),
    "and, two lines": (over_two_lines, "`and` on a traced value"),
    "or": (lambda b, h, q, kv: q >= kv or kv > 2, "`or` on a traced value at FILE:LINE, .* Write a | b"),
    "not": (lambda b, h, q, kv: not q >= kv, "`not` on a traced value at FILE:LINE, .* Write ~a"),
    "chain": (
        lambda b, h, q, kv: 0 <= q - kv < 5,
        "a chained comparison on a traced value at FILE:LINE, .* write (a <= x) & (x < b)",
    ),
    "in": (lambda b, h, q, kv: q in (1, 2), "`in` on a traced value at FILE:LINE, .* Write (x == a) | (x == b)"),
    "min": (lambda b, h, q, kv: min(q, 5) == kv, "Python's min() on a traced value at FILE:LINE, .* Write torch.minimum"),
    "max": (lambda b, h, q, kv: max(q, kv) == kv, "Python's max() on a traced value at FILE:LINE, .* Write torch.maximum"),
    "any": (lambda b, h, q, kv: any([q > kv, q < 2]), "Python's any() on a traced value at FILE:LINE, .* Join with |"),
    "all": (lambda b, h, q, kv: all(x > 1 for x in (q, kv)), "Python's all() on a traced value at FILE:LINE, .* Join with &"),
    "bool": (lambda b, h, q, kv: bool(q >= kv), "bool() on a traced value at FILE:LINE"),
    "int": (lambda b, h, q, kv: int(q / 2) == kv, "int() at FILE:LINE, .* Write x.to(torch.int64)"),
    "float": (lambda b, h, q, kv: float(q) > 2.5, "float(), or a function of Python's math at FILE:LINE"),
    "math": (lambda b, h, q, kv: math.log(q + 1) > kv, "float(), or a function of Python's math at FILE:LINE, .* torch.log"),
    "range": (lambda b, h, q, kv: sum(kv == i for i in range(q)) > 0, "use as a Python index, range() or hex() at FILE:LINE"),
    "list": (lambda b, h, q, kv: NUMBERS[q] == kv, "use as a Python index, .* table = torch.tensor(values); table[q_idx]"),
    "item": (lambda b, h, q, kv: q.item() >= kv, ".item(), .tolist() or a conversion to a Python number at FILE:LINE"),
    "tolist": (lambda b, h, q, kv: q.tolist() >= kv, ".item(), .tolist() or a conversion to a Python number at FILE:LINE"),
    "numpy": (lambda b, h, q, kv: np.abs(q) >= kv, "conversion to numpy at FILE:LINE, .* the torch function of the same name"),
    "len": (lambda b, h, q, kv: len(q) > 0, "len() at FILE:LINE"),
    "unpacking": (lambda b, h, q, kv: [*q], "iteration over a traced value at FILE:LINE"),
    "item assignment": (item_assignment, "a write in place (torch.Tensor.__setitem__) at FILE:LINE, .* Make a new value"),
    "augmented": (augmented, "a write in place (torch.Tensor.add_) at FILE:LINE, .* x = x + 1"),
    "in place": (lambda b, h, q, kv: q.clamp_(min=3) >= kv, "a write in place (torch.Tensor.clamp_) at FILE:LINE"),
    "out": (lambda b, h, q, kv: torch.add(q, 1, out=COUNT) >= kv, "a write in place (torch.add) at FILE:LINE"),
    "write to a captured tensor": (counting, "a write in place (torch.Tensor.add_) at FILE:LINE"),
    "sum": (lambda b, h, q, kv: q.sum() >= kv, "torch.Tensor.sum(), a reduction at FILE:LINE, .* reduce outside of the function"),
    "any of a table": (
        lambda b, h, q, kv: (WIDE[q] == kv).any(),
        "arithmetic with WIDE, a tensor of shape (40,) at FILE:LINE, .* WIDE[?]; rows of up to 32 numbers can be taken whole",
    ),
    "cumsum": (lambda b, h, q, kv: q.cumsum(0) >= kv, "torch.Tensor.cumsum(), a reduction at FILE:LINE"),
    "searchsorted": (lambda b, h, q, kv: torch.searchsorted(TABLE, q) == kv, "torch.searchsorted(), a reduction at FILE:LINE"),
    "bucketize": (lambda b, h, q, kv: torch.bucketize(q, TABLE) == kv, "torch.bucketize(), a reduction at FILE:LINE"),
    "matmul": (lambda b, h, q, kv: q @ kv, "torch.Tensor.matmul() at FILE:LINE, .* torch refuses it"),
    "dot": (
        lambda b, h, q, kv: torch.dot(WIDE[q], WIDE[kv]) > 0,
        "torch.dot(), a matrix product at FILE:LINE, .* sees no vectors",
    ),
    "arange": (lambda b, h, q, kv: torch.arange(q)[0] == kv, "at FILE:LINE"),
    "random": (
        lambda b, h, q, kv: torch.rand(()) < 0.5,
        "a random number (torch.rand) at FILE:LINE, .* draw outside of the function",
    ),
    "random, like": (lambda b, h, q, kv: torch.rand_like(q.float()) < 0.5, "a random number (torch.rand_like) at FILE:LINE"),
    "dropout": (lambda b, h, q, kv: F.dropout(q.float()) < 0.5, "a random number (torch.nn.functional.dropout) at FILE:LINE"),
    "bernoulli": (lambda b, h, q, kv: torch.bernoulli(q / 100) > 0, "a random number (torch.bernoulli) at FILE:LINE"),
    "view": (lambda b, h, q, kv: q.view(1) >= kv, "torch.Tensor.view(), a change of shape at FILE:LINE"),
    "stack": (lambda b, h, q, kv: torch.stack([q, kv]).max() > 1, "torch.stack(), a change of shape at FILE:LINE"),
    "index_select": (
        lambda b, h, q, kv: TABLE.index_select(0, q) == kv,
        "torch.Tensor.index_select(), a change of shape at FILE:LINE",
    ),
    "empty": (lambda b, h, q, kv: torch.empty_like(q) == kv, "torch.empty_like(), uninitialised memory at FILE:LINE"),
    "unknown": (
        lambda b, h, q, kv: torch.lgamma(q.float()) < kv,
        "torch.lgamma() at FILE:LINE, .* does not know the operation aten::lgamma",
    ),
    "whole table": (
        lambda b, h, q, kv: TABLE == q,
        "arithmetic with TABLE, a tensor of shape (40,) at FILE:LINE, .* read one element, TABLE[?]",
    ),
    "row of a table": (lambda b, h, q, kv: WIDE[q] == kv, "arithmetic with WIDE, a tensor of shape (40,) at FILE:LINE"),
    "slice": (lambda b, h, q, kv: GRID[q, 2:] == kv, "the slice slice(2, None, None) as an index of GRID at FILE:LINE"),
    "new axis": (lambda b, h, q, kv: TABLE[q, None] == kv, "TABLE[...] with 2 indices at FILE:LINE, .* has shape (40,)"),
    "too many indices": (lambda b, h, q, kv: GRID[q, kv, 0] == 0, "the read GRID[...] with 3 indices at FILE:LINE"),
    "bool index": (
        lambda b, h, q, kv: TABLE[q > kv] == 0,
        "torch.bool as an index of TABLE at FILE:LINE, .* index.to(torch.int64)",
    ),
    "float index": (lambda b, h, q, kv: TABLE[q / 2] == 0, "torch.float32 as an index of TABLE at FILE:LINE, .* use //"),
    "constant out of range": (lambda b, h, q, kv: GRID[q, 9] == 0, "GRID[9] at FILE:LINE, .* Dimension 1 of GRID has 8 entries"),
    "index of a value": (lambda b, h, q, kv: q[0] == kv, "indexing of a traced value .* at FILE:LINE"),
    "complex table": (lambda b, h, q, kv: (TABLE + 1j)[q].real > 0, "a tensor of type torch.complex64 at FILE:LINE"),
    "sparse table": (
        lambda b, h, q, kv: TABLE.to_sparse()[q] > 0,
        "a tensor of layout torch.sparse_coo at FILE:LINE, .* to_dense",
    ),
    "difference of booleans": (
        lambda b, h, q, kv: (q > kv) - (q < kv),
        "torch.Tensor.sub() at FILE:LINE, .* torch refuses it: Subtraction",
    ),
    "invert a float": (lambda b, h, q, kv: ~(q / 2), "torch.Tensor.__invert__() at FILE:LINE, .* torch refuses it"),
    "divisor that may be zero": (
        lambda b, h, q, kv: q % kv == 0,
        "`remainder` at FILE:LINE, .* divisor .* must be known not to be zero",
    ),
    "NaN": (lambda b, h, q, kv: q / 2 < float("nan"), "the constant nan at FILE:LINE"),
}


def expected(text: str) -> str:
    """``text`` as a pattern: FILE and LINE stand for this file and a number, ``.*`` for anything."""
    pattern = ".*".join(map(re.escape, text.split(" .* ")))
    return pattern.replace("FILE", re.escape(__file__)).replace("LINE", r"\d+")


@pytest.mark.parametrize("name", MASKS)
def test_untraceable(name):
    function, text = MASKS[name]
    with pytest.raises(TraceError) as caught:
        trace_mask(function)
    message = str(caught.value)
    assert re.search(expected(text), message), message
    assert message.startswith("cannot trace ")


@pytest.mark.parametrize("function", [branch, elif_branch, while_loop, asserting, item_assignment, augmented, counting])
def test_the_line_is_the_users(function):
    with pytest.raises(TraceError, match="# the line named"):
        trace_mask(function)
    assert COUNT.item() == 0


RESULTS = {
    "integer": (
        lambda b, h, q, kv: q - kv,
        "mask_mod .* must return a boolean; it returned torch.int64. Write `!= 0` at the end",
    ),
    "float": (lambda b, h, q, kv: q / 2, "must return a boolean; it returned torch.float32. Write `!= 0`"),
    "Python number": (lambda b, h, q, kv: 1, "must return a boolean; it returned torch.int64"),
    "nothing": (no_return, "mask_mod no_return must return a tensor; it returned NoneType. Does every path `return` a value?"),
    "tuple": (lambda b, h, q, kv: (q > kv, kv), "must return a tensor; it returned tuple"),
    "row": (lambda b, h, q, kv: GRID[q], "must return a single value; it returned shape (8,). Read tables down to one element"),
    "no callable": (TABLE, "mask_mod must take (b, h, q_idx, kv_idx); got Tensor, which cannot be called"),
    "three arguments": (lambda h, q, kv: q > kv, "mask_mod must take (b, h, q_idx, kv_idx); .* takes (h, q, kv)"),
    "a score": (lambda s, b, h, q, kv: s, "takes (s, b, h, q, kv). With 5 arguments it is one for sd.trace_score"),
    "keyword only": (lambda b, h, *, q, kv: q > kv, "mask_mod must take (b, h, q_idx, kv_idx)"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_wrong_masks(name):
    function, text = RESULTS[name]
    with pytest.raises(TraceError, match=expected(text)):
        trace_mask(function)


def test_wrong_scores():
    with pytest.raises(TraceError, match=r"With 4 arguments it is one for sd.trace_mask"):
        trace_score(branch)
    with pytest.raises(TraceError, match=r"must return a real number; it returned torch.complex64"):
        trace_score(lambda score, b, h, q, kv: torch.tensor(1j))
    with pytest.raises(TraceError, match=r"division by zero"):
        trace_score(lambda score, b, h, q, kv: score / 0)
    with pytest.raises(TraceError, match=r"`if` on a traced value"):
        trace_score(lambda score, b, h, q, kv: score if score > 0 else score * 0.1)


def test_errors_of_the_users_own_code_pass_through():
    with pytest.raises(ZeroDivisionError):
        trace_mask(lambda b, h, q, kv: q >= 1 // 0)
    with pytest.raises(AttributeError, match="no_such_method"):
        trace_mask(lambda b, h, q, kv: q.no_such_method() >= 1)
    with pytest.raises(IndexError):
        trace_mask(lambda b, h, q, kv: q >= TABLE[99])


def test_code_without_source():
    """Functions made by exec have no lines to quote; the message still names file and construct as far as it can."""
    with pytest.raises(TraceError, match=r"bool\(\) on a traced value at <string>:1\. "):
        trace_mask(eval("lambda b, h, q, kv: q > kv and True"))


def test_printing_while_tracing_is_harmless(capsys):
    def mask_mod(b, h, q, kv):
        print(q, f"{q >= kv}", repr(GRID[q, :]), q.shape, q.dtype, q.device, q.ndim)
        return q >= kv

    trace_mask(mask_mod)
    assert "traced torch.int64 value" in capsys.readouterr().out
