"""Expressions of many terms: each step takes time in proportion to them, or says which limit is met."""

from __future__ import annotations

import functools
import operator
import time
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx, score


def shared(depth: int) -> Any:
    """Each level stands twice in the next: written out, it doubles."""
    x: Any = kv_idx
    for i in range(depth):
        x = sd.where(x > i, x - 1, x)
    return x <= q_idx


def chain(depth: int) -> Any:
    """Each level stands once in the next."""
    x: Any = kv_idx
    for i in range(depth):
        x = sd.where(q_idx % (i + 2) == 0, x, i)
    return x <= q_idx


def any_of(masks: list[Any]) -> Any:
    return functools.reduce(operator.or_, masks)


WIDE = {
    "or": lambda: any_of([kv_idx == 7 * i for i in range(300)]),
    "and": lambda: functools.reduce(operator.and_, [kv_idx != 7 * i for i in range(300)]),
    "xor": lambda: functools.reduce(operator.xor, [kv_idx <= 7 * i for i in range(150)]),
    "minimum": lambda: sd.minimum(*[kv_idx * (i % 7 + 1) + q_idx * (i * 5 % 11) + 3 * i for i in range(120)]) <= q_idx,
    "minimum, one by one": lambda: functools.reduce(sd.minimum, [q_idx * i + (80 - i) * kv_idx for i in range(80)]) <= q_idx,
    "where": lambda: chain(12),
    "product": lambda: functools.reduce(operator.mul, [q_idx + i for i in range(60)]) <= 3,
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_expressions(name: str) -> None:
    begin = time.process_time()
    mask = WIDE[name]()
    assert sd.parse(mask.text).same_as(mask)
    assert time.process_time() - begin < 5, "over 25 s before"


def test_a_wide_mask_runs() -> None:
    mask = any_of([kv_idx == 7 * i for i in range(60)])
    x = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    out = sd.compile(mask, backend="tiled")(x, x, x)
    torch.testing.assert_close(out, sd.compile(kv_idx % 7 == 0, backend="reference")(x, x, x))


def test_the_joined_form_is_that_of_the_operators() -> None:
    parts = [kv_idx <= 3, q_idx >= 2, (kv_idx == 5) & (q_idx <= 9), kv_idx >= 4, kv_idx <= 3]
    for sign, join in (("|", operator.or_), ("&", operator.and_), ("^", operator.xor)):
        one_by_one = functools.reduce(join, parts)
        assert sd.parse(f" {sign} ".join(f"({part})" for part in parts)).same_as(one_by_one)


@pytest.mark.parametrize("make", [lambda: shared(12), lambda: chain(100)], ids=["written out", "deep"])
def test_limits_are_named(make: Any) -> None:
    begin = time.process_time()
    with pytest.raises(sd.PatternError, match=r"the limit is (10,000|80)\. .*sd\.table"):
        make()
    assert time.process_time() - begin < 10


def test_the_deepest_expression_goes_through_every_stage() -> None:
    made: Any = score
    for i in range(76):
        made = sd.where(kv_idx == i, float(i), made)
    pattern = sd.attend(kv_idx <= q_idx, score=made)
    assert sd.parse(pattern.score.text).same_as(pattern.score)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = sd.compile(pattern, backend="reference")(x, x, x)
    torch.testing.assert_close(sd.compile(pattern, backend="tiled")(x, x, x), wanted, atol=1e-5, rtol=1e-5)
    assert "torch.where" in sd.compile(pattern, backend="flex").source
    assert sd.analyse(pattern, 64, 64).causal == sd.PROVED
