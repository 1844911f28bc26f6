"""Keys that a query may not see hold anything: NaN, infinity, numbers that overflow. A random run over patterns, shapes and programs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.runtime.seen_products import seen_product
from sparsedsl.testing import AttentionCase, assert_unseen_keys_have_no_effect, patterns, shapes, tables_for, tensor

causal = kv_idx <= q_idx
NAN, INF = float("nan"), float("inf")
SEEDS = st.integers(0, 2**16)


@st.composite
def problems(draw):
    """A pattern, a problem and its tables."""
    pattern, case = draw(patterns(scores=False)), draw(shapes(max_len=70))
    return pattern, case, draw(tables_for(pattern, case)), draw(SEEDS)


@settings(max_examples=20)
@given(problems(), st.sampled_from(["reference", "tiled"]))
def test_unseen_keys_have_no_effect(problem, backend):
    pattern, case, tables, seed = problem
    assert_unseen_keys_have_no_effect(sd.compile(pattern, backend=backend), case, seed=seed, **tables)


WINDOW = causal & (q_idx - kv_idx < 7)
PLAIN = {
    "window": WINDOW,
    "sinks": (causal & (q_idx - kv_idx < 5)) | (kv_idx < 3),
    "scattered": causal & ((q_idx * kv_idx) % 3 < 2),
    "dilated": causal & ((q_idx - kv_idx) % 4 == 0),
    "per head": causal & (q_idx - kv_idx < 3 + 4 * h),
    "cap": sd.attend(WINDOW, score=sd.tanh(score / 5) * 5),
    "bias and sink": sd.attend(causal, score=score - 0.1 * (q_idx - kv_idx), sink=0.5),
    "any score": sd.attend(WINDOW, score=sd.exp(score * 0.1)),
}


@settings(max_examples=20)
@given(st.sampled_from(sorted(PLAIN)), shapes(max_len=140), SEEDS, st.sampled_from(["reference", "tiled"]))
def test_unseen_keys_of_ordinary_patterns(name, case, seed, backend):
    assert_unseen_keys_have_no_effect(sd.compile(PLAIN[name], backend=backend), case, seed=seed)


def test_unseen_keys_on_flex():
    attn = sd.compile(WINDOW, backend="flex")
    for seed in range(4):
        assert_unseen_keys_have_no_effect(attn, AttentionCase(heads=2, kv_heads=1, q_len=40, kv_len=40), seed=seed)


def test_queries_that_see_a_bad_key_say_so():
    """It is never hidden: what is put to 0 is put to 0 for those that do not see it."""
    q, k, v = (tensor(1, 1, 20, 16, seed=seed) for seed in range(3))
    v[:, :, 7, 3] = NAN
    for backend in ("reference", "tiled"):
        out = sd.compile(WINDOW, backend=backend)(q, k, v)
        assert out.isnan().any(-1).squeeze().nonzero().flatten().tolist() == list(range(7, 14))


# ---- programs: the rows of a cache that are not written yet --------------------------------------------------------------------------

PROGRAMS = {
    "selected": lambda: sd.attend(causal & (WINDOW | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2))),
    "hsa": lambda: sd.patterns.hsa(chunk=8, top_k=2),
    "moba": lambda: sd.patterns.moba(chunk=8, top_k=2),
    "linear": lambda: sd.patterns.ring_linear([0.9, 0.8]),
}


@settings(max_examples=12)
@given(
    st.sampled_from(sorted(PROGRAMS)),
    st.integers(1, 30),
    st.sampled_from([NAN, INF, -INF, 1e30]),
    st.sampled_from(["reference", "tiled"]),
)
def test_later_keys_of_programs_have_no_effect(name, rows, poison, backend):
    heads = 2 if name == "linear" else 1
    q, k, v = tensor(1, 2, rows, 8, seed=0), tensor(1, heads, 40, 8, seed=1), tensor(1, heads, 40, 8, seed=2)
    named = {}
    if name == "hsa":
        named = {"retrieval_q": tensor(1, 2, rows, 8, seed=3), "landmarks": tensor(1, 2, 5, 8, seed=4)}
    attn = sd.compile(PROGRAMS[name](), backend=backend)

    def run(fill):
        leaves = [x.clone() for x in (q, k, v)]
        for x in leaves[1:]:
            x[:, :, rows:] = fill
        leaves = [x.requires_grad_() for x in leaves]
        out = attn(*leaves, **named)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for clean, dirty in zip(run(0.0), run(poison), strict=True):
        torch.testing.assert_close(dirty, clean)


# ---- the product of the dense meaning ------------------------------------------------------------------------------------------------


def test_nothing_times_nan_is_nothing():
    x, y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, NAN]]), torch.tensor([[NAN], [2.0]])
    assert torch.equal(seen_product(x, y).isnan(), torch.tensor([[False], [True], [True]]))
    assert seen_product(x, y)[0, 0] == 2


def test_derivatives_of_the_product():
    x, y = tensor(2, 3, 4, seed=0, dtype=torch.float64), tensor(2, 4, 5, seed=1, dtype=torch.float64)
    inputs = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(seen_product, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(seen_product, inputs)
