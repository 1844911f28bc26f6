"""Programs on generated kernels, interpreted, against their dense meaning: forward, LSE and gradients of every system."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.testing import assert_matches_reference, tensor

P = sd.patterns
causal = kv_idx <= q_idx
LENGTH = 50


def of(*shape: int, seed: int) -> torch.Tensor:
    return tensor(1, *shape, seed=seed)


RETRIEVAL = {"retrieval_q": of(1, LENGTH, 16, seed=3), "landmarks": of(1, LENGTH // 16, 16, seed=4)}
CASES = {
    "hsa": (P.hsa(16, 2), RETRIEVAL),
    "hsa of sticks": (P.hsa(16, 2, "stick_breaking", inner="softmax1"), RETRIEVAL),
    "nha": (P.nha(16, 4), {"gate": of(1, LENGTH, 16, seed=5)}),
    "ring": (P.ring_linear([0.5, 0.9]), {}),
    "moba": (P.moba(16, 2), {}),
    "moba of long chunks": (P.moba(160, 2), {}),
    "nsa": (P.nsa(8, 16, 3, 8), {"gate": of(2, LENGTH, 3, seed=6)}),
    "window or picks": (
        sd.attend(causal & (P.sliding_window(11) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 1)), sink=0.3),
        {},
    ),
    "pbs": (P.pbs(16, 32, 0.5), {}),
    "token sparse": (P.token_sparse(0.3, 8, 3, 8), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_mean_what_the_reference_does(name):
    program, inputs = CASES[name]
    attn = sd.compile(program, backend="triton", allow=["selection reads later queries"])
    length = 340 if "long" in name else LENGTH
    q, k, v = of(2, length, 16, seed=0), of(1, length, 16, seed=1), of(1, length, 16, seed=2)
    compared = assert_matches_reference(attn, q, k, v, **inputs)
    assert {"out", "dq", "dk", "dv"} <= set(compared)


def test_a_mask_that_is_no_interval_is_refused_with_the_way_out():
    picks = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 1)
    attn = sd.compile(sd.attend(causal & (kv_idx % 3 != 0) & picks), backend="triton")
    with pytest.raises(sd.UnsupportedError, match=r"no single interval of keys for each query\. Use backend='tiled'"):
        attn(*(of(1, 32, 16, seed=n) for n in range(3)))
