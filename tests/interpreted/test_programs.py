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
# Slots pass from row to row, which takes the interpreter longest; tests/interpreted/test_scan_kernels.py has longer ones.
SHORT = 20


def of(*shape: int, seed: int) -> torch.Tensor:
    return tensor(1, *shape, seed=seed)


def scored_hsa():
    """HSA over the even keys of its chunks, each chunk with a softmax of capped logits."""
    retrieval = sd.input("retrieval_q", "batch retrieval_heads queries retrieval_dim")
    landmarks = sd.input("landmarks", "batch retrieval_heads keys/16 retrieval_dim")
    ended = (kv_idx // 16 + 1) * 16 <= q_idx
    selected = sd.top_k(sd.dot(retrieval, landmarks), 2, among=ended)
    return sd.attend(ended & selected & (kv_idx % 2 == 0), score=P.softcap(2.0), normaliser=sd.per_chunk(selected))


ROWS = "batch kv_heads keys head_dim"
VECTOR = sd.input("g", ROWS)
SHORT_ONES = ("nha", "kda", "rwkv6", "rwkv7", "before, documents", "before, constants")
GATE = sd.table("gate", dtype=float, learned=True)
RETRIEVAL = {"retrieval_q": of(1, LENGTH, 16, seed=3), "landmarks": of(1, LENGTH // 16, 16, seed=4)}
CASES = {
    "hsa": (P.hsa(16, 2), RETRIEVAL),
    "hsa of sticks": (P.hsa(16, 2, "stick_breaking", inner="softmax1"), RETRIEVAL),
    "nha": (P.nha(16, 4), {"gate": of(1, SHORT, 16, seed=5)}),
    "ring": (P.ring_linear([0.5, 0.9]), {}),
    "kda": (P.kda(), {"g": -of(1, SHORT, 16, seed=5).abs(), "beta": of(1, SHORT, seed=6).sigmoid()}),
    "rwkv6": (
        sd.linear(log_decay=VECTOR, reads="before", bonus=sd.input("u", "heads head_dim"), scale=1.0),
        {"g": -of(1, SHORT, 16, seed=5).abs(), "u": tensor(2, 16, seed=6)},
    ),
    "rwkv7": (
        sd.linear(log_decay=VECTOR, erase=sd.input("erase", ROWS), along=sd.input("along", ROWS), scale=1.0),
        {"g": -of(1, SHORT, 16, seed=5).abs(), "erase": of(1, SHORT, 16, seed=6) / 6, "along": of(1, SHORT, 16, seed=7) / 6},
    ),
    "before, documents": (
        sd.linear(log_decay=sd.input("g", "batch kv_heads keys"), reads="before", documents=sd.input("ids", "batch keys")),
        {"g": -of(1, SHORT, seed=5).abs(), "ids": (torch.arange(SHORT) > 6)[None].int()},
    ),
    "before, constants": (sd.linear(0.9, reads="before"), {}),
    "moba": (P.moba(16, 2), {}),
    "moba of long chunks": (P.moba(130, 2), {}),
    "nsa": (P.nsa(8, 16, 3, 8), {"gate": of(2, LENGTH, 3, seed=6)}),
    "window or picks": (
        sd.attend(causal & (P.sliding_window(11) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 1)), sink=0.3),
        {},
    ),
    "a choice beside scores": (
        sd.attend(
            causal & (P.sliding_window(5) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 2)) & (kv_idx % 5 != 3),
            score=P.softcap(5.0, P.alibi(2)),
            sink=0.3,
        ),
        {},
    ),
    "two choices beside learned scores": (
        sd.attend(
            causal & (sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 2) & ~sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2)),
            score=P.relative_bias(9, sd.score + GATE[sd.h, q_idx] - GATE[sd.h, kv_idx]),
        ),
        {"gate": tensor(2, LENGTH, seed=7), "relative_bias": tensor(19, 2, seed=8)},
    ),
    "hsa beside scores": (scored_hsa(), RETRIEVAL),
    "pbs": (P.pbs(16, 32, 0.5), {}),
    "token sparse": (P.token_sparse(0.3, 8, 3, 8), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_mean_what_the_reference_does(name):
    program, inputs = CASES[name]
    attn = sd.compile(program, backend="triton", allow=["selection reads later queries"])
    length = 270 if name == "moba of long chunks" else SHORT if name in SHORT_ONES else LENGTH
    q, k, v = of(1 if "long" in name else 2, length, 16, seed=0), of(1, length, 16, seed=1), of(1, length, 16, seed=2)
    compared = assert_matches_reference(attn, q, k, v, **inputs)
    assert {"out", "dq", "dk", "dv"} <= set(compared)


RETRIEVAL_OF_200 = {"retrieval_q": of(1, 200, 16, seed=3), "landmarks": of(1, 1, 16, seed=4)}


def test_the_source_of_a_program_shows_its_kernels_along_lists():
    program, _ = CASES["a choice beside scores"]
    source = sd.compile(program, backend="triton").source
    assert source.startswith(sd.compile(program, backend="tiled").source)
    assert "def selected_forward(" in source and "def selected_grad_kv(" in source
    assert "score = tl.dot(q, k.T, input_precision=PRECISION) * scale" in source


def chosen(block, score=None):
    return sd.attend(causal & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, block)), 1), score=score)


@pytest.mark.parametrize(
    ("program", "words", "why"),
    [
        (chosen(131), {}, "131 has no such divisor"),
        (P.hsa(160, 2), {"inputs": RETRIEVAL_OF_200}, "a block may have 128 tokens"),
        (chosen(16), {"dtype": torch.float64}, "have no float64"),
        (chosen(16), {"width": 272}, "heads up to 256 wide"),
        (chosen(16, sd.score + sd.parse("f32_log(q_idx * kv_idx + 1)")), {}, "exactly as torch rounds it"),
    ],
    ids=["block", "weighed block", "float64", "width", "exact operation"],
)
def test_what_kernels_along_lists_cannot_do_is_refused_at_once_and_the_way_out_works(program, words, why):
    q, k, v = (tensor(1, 1, 200, words.get("width", 16), seed=n, dtype=words.get("dtype", torch.float32)) for n in range(3))
    inputs = words.get("inputs", {})
    with pytest.raises(sd.UnsupportedError, match=rf"backend 'triton' cannot run this call: .*{why}.* Use backend='tiled'"):
        sd.compile(program, backend="triton")(q, k, v, **inputs)
    assert torch.isfinite(sd.compile(program, backend="tiled")(q, k, v, **inputs)).all()
