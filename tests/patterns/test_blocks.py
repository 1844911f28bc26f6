"""Patterns in blocks against their definitions."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.lang.evaluation import evaluate

sizes = st.integers(1, 5)


@given(
    sizes,
    sizes,
    st.integers(1, 20),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_blocks(assert_pairs, block_q, block_kv, q_len, kv_len, heads, batched, seed):
    shape = (2,) * batched + (3,) * heads + (-(-q_len // block_q), -(-kv_len // block_kv))
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = sd.patterns.blocks("chosen", block_q, block_kv, heads=heads, batched=batched)
    b, h = 1, 2
    own = chosen[(b,) * batched + (h,) * heads].tolist()
    assert_pairs(mask, lambda q, kv: own[q // block_q][kv // block_kv], q_len, kv_len, b=b, h=h, chosen=chosen)


def test_blocks_are_square_by_default(assert_pairs):
    chosen = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    assert_pairs(sd.patterns.blocks(block_q=3), lambda q, kv: q // 3 >= kv // 3, 6, block_table=chosen)


@given(st.integers(1, 7), st.integers(1, 20), st.integers(1, 20))
def test_block_causal(assert_pairs, block, q_len, kv_len):
    def allowed(q, kv):
        last_of_block = q - q % block + block - 1
        return kv <= last_of_block

    assert_pairs(sd.patterns.block_causal(block), allowed, q_len, kv_len)


@pytest.mark.parametrize("causal", [False, True])
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_random_blocks_are_whole_and_no_more_than_asked_for(values, causal, block, count, q_len, kv_len, seed):
    got = values(sd.patterns.random_blocks(block, count, seed=seed, causal=causal), q_len, kv_len)
    for q in range(q_len):
        seen = {kv // block for kv in range(kv_len) if got[q, kv]}
        whole = {kv for kv in range(kv_len) if kv // block in seen and (not causal or kv <= q)}
        assert {kv for kv in range(kv_len) if got[q, kv]} == whole
        assert len(seen) <= count and (not causal or max(seen, default=0) <= q // block)
        if count and not (causal and q >= kv_len):
            assert seen
        first = q - q % block
        assert causal or torch.equal(got[q], got[first])


def test_random_blocks_depend_on_the_seed_alone(values):
    one, again, other = (values(sd.patterns.random_blocks(4, 2, seed=seed), 256, 256) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([8, 64, 250]))
def test_random_blocks_are_spread_evenly(seed, blocks):
    """Every block is drawn about equally often: no count leaves six standard deviations."""
    mask = sd.patterns.random_blocks(1, 1, seed=seed)
    draws = 20_000
    env = {
        "kv_len": blocks,
        "q_len": draws,
        "b": 0,
        "h": 0,
        "kv_idx": torch.arange(blocks)[None],
        "q_idx": torch.arange(draws)[:, None],
    }
    counts = evaluate(mask.expr, env).sum(0).double()
    mean = draws / blocks
    assert counts.sum() == draws
    assert (counts - mean).abs().max() < 6 * mean**0.5


@pytest.mark.parametrize("row", [0, 65_520, 65_521, 2**31 - 1])
def test_random_blocks_stay_inside_int32(row):
    """No intermediate value of the hash reaches 2**31, at any length."""
    place = {sd.q_idx.expr: row, sd.kv_idx.expr: 0, sd.kv_len.expr: 2**31 - 1}
    for seed in range(50):
        for node in sympy.preorder_traversal(sd.patterns.random_blocks(1, 1, seed=seed).expr.lhs):
            assert abs(node.subs(place)) < 2**31


@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_block_diffusion(assert_pairs, block, blocks, given_length):
    n = block * blocks
    noisy = [("noisy", i // block) for i in range(n)]
    clean = [("clean", i // block) for i in range(n)]
    tokens = noisy + clean

    def allowed(q, kv):
        (half_q, block_q), (half_kv, block_kv) = tokens[q], tokens[kv]
        match half_q, half_kv:
            case "noisy", "noisy":
                return block_q == block_kv
            case "noisy", "clean":
                return block_kv < block_q
            case "clean", "clean":
                return block_kv <= block_q
        return False

    assert_pairs(sd.patterns.block_diffusion(block, length=n if given_length else None), allowed, 2 * n)
