"""Which blocks a row may choose, against the pairs of each two blocks one by one."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.execute.candidate_rules import candidates_of
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.selection.candidates import IntervalRule

ROWS, KEYS = 30, 50
# A mask, and whether the blocks that a block of queries may choose are the fewest ranges that its intervals allow.
MASKS = {
    "causal": (kv_idx <= q_idx, True),
    "window": ((kv_idx <= q_idx) & (q_idx - kv_idx < 9), True),
    "first keys and a window": ((kv_idx < 3) | ((kv_idx <= q_idx) & (q_idx - kv_idx < 9)), True),
    "ended blocks": ((kv_idx // 4 + 1) * 4 <= q_idx, True),
    "some queries see nothing": ((kv_idx <= q_idx) & (q_idx % 3 == 0), True),
    "far apart": ((kv_idx >= 20 * (q_idx % 2)) & (kv_idx < 20 * (q_idx % 2) + 4), False),
    "no ranges": ((kv_idx + q_idx) % 3 == 0, False),
}


def brute(mask: sd.Mask, q_block: int, kv_block: int, offset: int) -> torch.Tensor:
    pairs = torch.zeros(-(-ROWS // q_block), -(-KEYS // kv_block), dtype=torch.bool)
    env = {"q_idx": torch.arange(ROWS)[:, None] + offset, "kv_idx": torch.arange(KEYS)[None, :]}
    table = evaluate(mask.expr, env).expand(ROWS, KEYS)
    for i in range(ROWS):
        for j in range(KEYS):
            pairs[i // q_block, j // kv_block] |= bool(table[i, j])
    return pairs


@pytest.mark.parametrize("blocks", [(1, 4), (7, 4), (8, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_a_block_may_be_chosen_if_it_holds_an_allowed_pair(name, blocks):
    mask, ranges = MASKS[name]
    q_block, kv_block = blocks
    domain = Domain(ROWS, KEYS, 5)
    candidates = candidates_of(mask.expr, domain, q_block, kv_block, 1, torch.device("cpu"))
    want = brute(mask, q_block, kv_block, 5)
    scores = candidates.mask_(torch.zeros(1, 1, *want.shape), slice(0, want.shape[0]), slice(0, want.shape[1]))
    assert torch.equal(scores[0, 0] == 0, want)
    if ranges and candidates.allowed is not None:
        assert isinstance(candidates.allowed, IntervalRule) and candidates.allowed.blocks[0].shape[3] <= 2
