"""The evaluator beyond what random text reaches: tables outside their range, constants, types, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sympy
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.lang.evaluation import evaluate, read_table

t = sd.table("t")
kept = sd.table("kept", dtype=bool)
slope = sd.table("slope", learned=True)
Q = torch.arange(4)[:, None]
KV = torch.arange(5)


def value(expression: Any, **env: Any) -> torch.Tensor:
    return evaluate(expression.expr, {"q_idx": Q, "kv_idx": KV, "h": 0, "b": 0, "q_len": 4, "kv_len": 5, **env})


def test_reads_outside_a_table_give_its_nearest_element() -> None:
    table = torch.tensor([10, 20, 30])
    assert value(t[kv_idx - 1], t=table).tolist() == [10, 10, 20, 30, 30]
    assert value(t[q_idx * 2, kv_idx - 3], t=torch.arange(6).view(2, 3)).tolist() == [[0, 0, 0, 0, 1]] + [[3, 3, 3, 3, 4]] * 3


def test_a_table_read_at_a_number() -> None:
    assert value(t[1] + 0 * q_idx, t=torch.tensor([5, 7])).item() == 7
    assert value(sd.minimum(t[0], t[1]), t=torch.tensor([5, 7])).item() == 5
    assert value(slope[0] < 0.5, slope=torch.tensor([0.25])).item() is True


def test_constants_need_no_tensors() -> None:
    assert value(sd.parse("True")).item() is True
    assert value(sd.parse("3")).item() == 3
    assert value(sd.where(h < 1, 2, 3)).item() == 2
    assert value(sd.maximum(sd.sigmoid(0), 0.25)).item() == 0.5
    assert value(sd.tanh(1)).item() == pytest.approx(math.tanh(1), abs=1e-15)


def test_results_broadcast() -> None:
    assert value(q_idx + 1).shape == (4, 1)
    assert value(kv_idx <= q_idx).shape == (4, 5)
    assert value(kept[kv_idx], kept=torch.tensor([True, False, True, False, True])).dtype == torch.bool


def test_integers_stay_exact() -> None:
    assert value((kv_idx + 2**52) * 8 + 1).tolist() == [(i + 2**52) * 8 + 1 for i in range(5)]
    assert value(q_idx // 3, q_idx=torch.tensor([2**53 + 1])).tolist() == [(2**53 + 1) // 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_are_computed_in_the_wanted_type(dtype: torch.dtype) -> None:
    found = evaluate((score / 3 + kv_idx).expr, {"score": torch.ones(5, dtype=dtype), "kv_idx": KV}, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, torch.ones(5, dtype=dtype) * (torch.tensor(1.0, dtype=dtype) / 3) + KV)


def test_infinity_is_a_value() -> None:
    found = value(sd.where(kv_idx < 2, score, -math.inf), score=torch.zeros(4, 5))
    assert found[0].tolist() == [0.0, 0.0, -math.inf, -math.inf, -math.inf]


def test_gradients_reach_learned_tables() -> None:
    table = torch.tensor([1.0, 2.0], requires_grad=True)
    value(score + slope[h] * (kv_idx - q_idx), score=torch.zeros(4, 5, dtype=torch.float64), slope=table, h=1).sum().backward()
    assert table.grad.tolist() == [0.0, float((KV - Q).sum())]


def test_what_cannot_be_read() -> None:
    with pytest.raises(sd.TableError, match=r"table 't' is read with 2 indices but has shape \(3,\)"):
        read_table(torch.arange(3), [0, 0], "t")
    with pytest.raises(sd.TableError, match=r"table 't' is empty \(shape \(0,\)\) but the pattern reads it"):
        read_table(torch.arange(0), [0], "t")


def test_an_unknown_node_is_refused() -> None:
    with pytest.raises(sd.UnsupportedError, match="no evaluation rule for gamma in gamma"):
        evaluate(sympy.gamma(q_idx.expr), {"q_idx": Q})
