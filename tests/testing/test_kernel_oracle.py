"""The oracle and the tolerance of the kit for kernels: gradients by hand against autograd, and what the rule sees and forgives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.testing.call_shapes import inputs, shapes
from sparsedsl.testing.kernels.expected_results import expectation
from sparsedsl.testing.kernels.oracle import Exact, Problem
from sparsedsl.testing.kernels.tolerance import Allowance
from sparsedsl.testing.numerics import gradients, plain_attention
from sparsedsl.testing.strategies import patterns, tables_for

CAUSAL = sd.kv_idx <= sd.q_idx


@settings(max_examples=60)
@given(patterns(), shapes(max_len=9, max_heads=4), st.data())
def test_gradients_by_hand_are_those_of_autograd(pattern, case, data):
    tables = data.draw(tables_for(pattern, case)) | pattern.bound
    q, k, v = data.draw(inputs(case, dtype=torch.float64))
    problem = Problem(pattern, q, k, v, tables, case.q_offset)
    exact = Exact(problem)
    d_out, d_lse = torch.randn_like(exact.out), torch.randn_like(exact.lse)
    leaves = {name: x.detach().requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    learned = {name: tables[name].double().requires_grad_() for name in problem.learned}
    out, lse = plain_attention(pattern, *leaves.values(), {**tables, **learned}, q_offset=case.q_offset)
    wanted = gradients(out, lse, leaves | learned, (d_out, d_lse))
    torch.testing.assert_close(exact.out, out.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(exact.lse, lse.detach(), rtol=1e-9, atol=1e-11)
    for name, value in exact.gradients(d_out, d_lse).values.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-7, atol=1e-9 + 1e-9 * float(wanted[name].abs().max()), msg=name)


def problem_of(mask=CAUSAL, dtype=torch.bfloat16, rows=8, keys=256, heads=2, seed=0):
    q, k, v = (kit.tensor(1, heads, n, 64, seed=seed + i, dtype=dtype) for i, n in enumerate((rows, keys, keys)))
    return Problem(sd.attend(mask), q, k, v, {}, keys - rows)


def kernel_like(problem, *, drop=None, scale=1.0):
    """A right kernel in the precision of the inputs, but for ``drop`` (of the mask) and ``scale``."""
    allowed = problem.allowed.clone()
    if drop is not None:
        allowed[drop] = False
    s = problem.q.float() @ problem.k.float().mT * problem.factor * scale
    s = s.masked_fill(~allowed, float("-inf"))
    p = torch.exp(s - s.amax(-1, keepdim=True))
    return ((p.to(problem.q.dtype).float() @ problem.v.float()) / p.sum(-1, keepdim=True)).to(problem.q.dtype)


WANTED = sd.testing.Kernel(lambda q, k, v: v, implements=CAUSAL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_right_kernel_lies_well_inside(dtype):
    worst = max(
        expectation(WANTED, problem).worst("out", kernel_like(problem))
        for problem in (problem_of(dtype=dtype, seed=seed) for seed in range(0, 40, 4))
    )
    assert 0.005 < worst < 0.6


@pytest.mark.parametrize("fault", [{"drop": (..., 0)}, {"scale": 1.02}, {"drop": (..., slice(-1, None), 255)}])
def test_small_faults_are_seen(fault):
    for seed in range(0, 20, 4):
        problem = problem_of(seed=seed)
        assert expectation(WANTED, problem).fault("out", kernel_like(problem, **fault)) is not None


def test_an_outlier_in_one_head_hides_nothing_in_another():
    problem = problem_of()
    problem.v[0, 0, 3] *= 1000
    got = kernel_like(problem, drop=(0, 1, slice(None), 0))
    fault = expectation(WANTED, problem).fault("out", got)
    assert fault is not None and fault.place[1] == 1
    assert expectation(WANTED, problem).fault("out", kernel_like(problem)) is None


def test_what_a_kernel_declares_to_round_is_allowed_and_no_more():
    problem = problem_of()
    exact = Exact(problem)
    least, usual, most = (
        Allowance(exact, torch.bfloat16, rounds).out() for rounds in (("out",), ("p", "out"), ("p", "out", "q", "s"))
    )
    assert bool((least < usual).all()) and bool((usual <= most).all())
    assert 1 < float((most / usual).mean()) < 10


def test_nan_and_infinity_are_compared_as_classes():
    problem = problem_of(rows=2, keys=4)
    wanted = expectation(WANTED, problem)
    for value, kind in ((float("nan"), "NaN"), (float("inf"), "infinite")):
        got = kernel_like(problem)
        got[0, 1, 1, 7] = value
        fault = wanted.fault("out", got)
        assert fault is not None and (fault.kind, fault.place) == (kind, (0, 1, 1, 7))


def test_rows_without_keys_are_0_with_an_lse_of_minus_infinity():
    q, k, v = (torch.randn(1, 1, n, 4) for n in (3, 2, 2))
    exact = Exact(Problem(sd.attend(CAUSAL), q, k, v, {}, -2))
    assert exact.out[0, 0, :2].abs().max() == 0
    assert exact.lse[0, 0, :2].tolist() == [-float("inf")] * 2
    grads = exact.gradients(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3)).values
    assert all(bool(torch.isfinite(x).all()) for x in grads.values())
    assert grads["dq"][0, 0, :2].abs().max() == 0


def test_of_a_modified_score_the_sinks_are_one_more_key():
    pattern = sd.attend(CAUSAL, sink=0.0)
    q = k = v = torch.zeros(1, 1, 1, 2)
    exact = Exact(Problem(pattern, q, k, v + 1, {}, 0))
    assert exact.out.flatten().tolist() == [0.5, 0.5]
    assert exact.lse.item() == pytest.approx(torch.tensor(2.0).log().item())
