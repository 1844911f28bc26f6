"""Rows of tables as short vectors, and functions that count or ask along one, value by value as torch runs them."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from sparsedsl.errors import TraceError
from sparsedsl.testing import assert_matches_reference, tensor

GENERATOR = torch.Generator().manual_seed(0)
CHOSEN = torch.randint(0, 17, (2, 3, 12, 4), generator=GENERATOR)
PLACE = torch.randint(-4, 5, (17, 3), generator=GENERATOR)
SMALL = PLACE.to(torch.int8)
POINT, OTHER = (torch.randn(17, 3, generator=GENERATOR) for _ in range(2))
FEW, EDGES = torch.tensor([1, 4, 7, 11]), torch.tensor([3, 3, 10, 14])
WEIGHT, SLOPE = torch.tensor([0.5, -1.0, 2.0]), torch.tensor(0.25)
FLAGS = torch.rand(17, 3, generator=GENERATOR) < 0.5

MASKS = {
    "any": lambda b, h, q, kv: (CHOSEN[b, h, q] == kv).any(-1),
    "all": lambda b, h, q, kv: ((PLACE[q] - PLACE[kv]).abs() <= 4).all(),
    "sum of whole numbers": lambda b, h, q, kv: (PLACE[q] - PLACE[kv]).abs().sum(-1) < 7,
    "sum of a narrow type": lambda b, h, q, kv: (SMALL[q] * SMALL[kv]).sum() > 3,
    "sum of booleans": lambda b, h, q, kv: (FLAGS[q] & FLAGS[kv]).sum(dim=0, keepdim=True).squeeze() >= 2,
    "largest": lambda b, h, q, kv: (PLACE[q] - PLACE[kv]).abs().amax(-1) <= torch.maximum(PLACE[q], PLACE[kv]).min(),
    "two axes": lambda b, h, q, kv: (PLACE[q].unsqueeze(0) == PLACE[kv].flip(0).view(3, 1)).any(0).all(),
    "where": lambda b, h, q, kv: torch.where(FLAGS[q], PLACE[kv], h).sum() < 4,
    "isin": lambda b, h, q, kv: torch.isin(kv, FEW) | torch.isin(q - kv, FEW, invert=True),
    "bucketize": lambda b, h, q, kv: torch.bucketize(q, EDGES) == torch.bucketize(kv, EDGES, right=True),
    "searchsorted": lambda b, h, q, kv: torch.searchsorted(EDGES, kv, side="right") <= h,
    "powers as divisors": lambda b, h, q, kv: ((q - kv) // 2**h < 3) & (q % (1 << h) == kv % (2 << 1)),
    "guarded divisor": lambda b, h, q, kv: q % torch.where(kv > 0, kv, 1) == 0,
    "guarded read": lambda b, h, q, kv: FEW[torch.where(kv < 4, kv, 0)] <= q,
}
SCORES = {
    "distance": lambda s, b, h, q, kv: s - (POINT[q] - OTHER[kv]).pow(2).sum(-1),
    "norm": lambda s, b, h, q, kv: s - torch.linalg.vector_norm(POINT[q] - OTHER[kv]),
    "dot": lambda s, b, h, q, kv: s + torch.dot(POINT[q], OTHER[kv]),
    "weighted": lambda s, b, h, q, kv: s * torch.sigmoid(POINT[q] * WEIGHT).mean(),
    "prelu": lambda s, b, h, q, kv: torch.nn.functional.prelu(s, SLOPE),
    "xlogy": lambda s, b, h, q, kv: s + torch.xlogy(torch.relu(s), 1.0 + kv),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(compare, name):
    compare.mask(MASKS[name])


@pytest.mark.parametrize("name", SCORES)
def test_scores(compare, name):
    compare.score(SCORES[name])


def test_learned_rows_receive_gradients():
    place = POINT.clone().requires_grad_()
    traced = sd.trace_score(lambda s, b, h, q, kv: s - (place[q] - place[kv]).pow(2).sum(-1))
    q, k, v = (tensor(1, 2, 17, 8, seed=n) for n in range(3))
    assert "dplace" in assert_matches_reference(sd.compile(sd.attend(True, score=traced), backend="tiled"), q, k, v)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda b, h, q, kv: (POINT[q] - POINT[kv]).pow(2).sum(-1) < 1, "order in which torch adds"),
        (lambda b, h, q, kv: (PLACE[q] > PLACE[kv]), "must return a single value"),
        (lambda b, h, q, kv: torch.arange(40)[kv : kv + 1].any(), "cannot trace"),
        (lambda b, h, q, kv: (torch.zeros(9, 40)[h] == kv).any(), "shape"),
        (lambda b, h, q, kv: PLACE[q].max(-1)[0] > 2, r"amax\(dim\)"),
    ],
)  # fmt: skip
def test_refused(function, words):
    with pytest.raises(TraceError, match=words):
        sd.trace_mask(function)


@pytest.mark.parametrize("backend", ["cpp", "tiled"])
def test_powers_of_two_of_heads_as_divisors(backend):
    """Also where it is C++ that divides."""
    q, k, v = (tensor(1, 3, 30, 8, seed=n) for n in range(3))
    assert_matches_reference(
        sd.compile(((q_idx - kv_idx) % (1 << h) == 0) & (q_idx // 2**h >= kv_idx // 2**h), backend=backend), q, k, v
    )
