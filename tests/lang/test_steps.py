"""Fast evaluation gives what the oracle gives, bit by bit."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx, score
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.evaluation import evaluate as walked
from sparsedsl.lang.steps import evaluate
from sparsedsl.testing import strategies

Q, KV = torch.arange(5)[:, None] + 3, torch.arange(9)


def environment(part, seed: int) -> dict:
    numbers = torch.Generator().manual_seed(seed)
    env = {"q_idx": Q, "kv_idx": KV, "h": torch.arange(2).view(2, 1, 1), "b": 0, "q_len": 8, "kv_len": 9}
    env["score"] = torch.randn(2, 5, 9, generator=numbers, dtype=torch.float64)
    ranks = {read.spec.name: len(read.args) for read in part.expr.atoms(sympy.Function) if hasattr(read, "spec")}
    for name, rank in ranks.items():
        spec, shape = part.tables[name], (3,) * rank
        if spec.dtype == "float":
            env[name] = torch.randn(shape, generator=numbers, dtype=torch.float64)
        else:
            env[name] = torch.randint(0, 2 if spec.dtype == "bool" else 7, shape, generator=numbers)
            env[name] = env[name].bool() if spec.dtype == "bool" else env[name]
    return env


def assert_same(part, env: dict, dtype: torch.dtype) -> None:
    mine, oracle = (f(part.expr, env, dtype=dtype) for f in (evaluate, walked))
    assert mine.dtype == oracle.dtype and mine.shape == oracle.shape
    assert torch.equal(mine.nan_to_num(7.0), oracle.nan_to_num(7.0))
    assert torch.equal(mine.isnan(), oracle.isnan())


@settings(max_examples=200)
@given(part=st.one_of(strategies.masks(), strategies.scores()), seed=st.integers(0, 99), narrow=st.booleans())
def test_it_is_the_oracle_point_by_point(part, seed, narrow):
    assert_same(part, environment(part, seed), torch.float32 if narrow else torch.float64)


@pytest.mark.parametrize(
    "part",
    [
        sd.tanh(score / 30) * 30 - kv_idx,
        sd.where(q_idx >= kv_idx, score, float("-inf")),
        sd.where(q_idx > kv_idx, q_idx // 3, -kv_idx) + score**2 / 3,
        score + sd.exp(-(q_idx - kv_idx)) + sd.sqrt(sd.relu(score) + 1) ** -1,
        sd.sigmoid(score) * abs(q_idx - kv_idx),
        ~(kv_idx <= q_idx) ^ (kv_idx % 3 == 0),
        sd.minimum(q_idx, kv_idx, 4) <= sd.maximum(q_idx - 2, 1),
        sd.table("bias", dtype=float)[q_idx - kv_idx] + score,
        sd.table("seen", dtype=bool)[kv_idx] & (q_idx & 3 == 1),
    ],
    ids=str,
)
def test_every_operation_is_the_oracle(part):
    for dtype in (torch.float32, torch.float64):
        assert_same(part, environment(part, 0), dtype)


def test_what_depends_on_no_tensor_goes_where_the_tensors_are():
    assert evaluate(sympy.true, {"q_idx": Q}).device == Q.device
    assert evaluate(sympy.Integer(3), {}).item() == 3


def test_equal_parts_are_computed_once(monkeypatch):
    table = sd.table("t", dtype=int)
    part = (table[kv_idx] + 1) * (table[kv_idx] + 2)
    from sparsedsl.lang import steps

    read = []
    monkeypatch.setattr(steps, "read_table", lambda t, i, name: read.append(name) or t[i[0]])
    steps._steps.cache_clear()
    assert evaluate(part.expr, {"t": torch.arange(9), "kv_idx": KV}).tolist() == [(x + 1) * (x + 2) for x in range(9)]
    assert read == ["t"]


def test_an_unknown_function_is_refused():
    with pytest.raises(UnsupportedError, match="no evaluation rule for gamma"):
        evaluate(sympy.gamma(q_idx.expr), {"q_idx": Q})
