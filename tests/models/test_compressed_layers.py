"""Layers that see a window and compressed keys (CSA, HCA): their caches hold the window's keys and a row for each block, and no more."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from tests.models.families import left_padded, tokens
from tests.models.hybrid_models import convert, donor

ATOL = 1e-10
BLOCK, WINDOW = 4, 6


class Compressed(sd.models.Layer):
    """Entries are projections of a block's mean; ``kind`` says which are seen, ``first`` how many tokens stay."""

    def __init__(self, donor: Any, kind: str = "csa", first: int = 0) -> None:
        picked = kind == "csa"
        made = sd.patterns.csa(BLOCK, 2, WINDOW) if picked else sd.patterns.hca(BLOCK, WINDOW)
        if first:
            _, far = made.branches
            made = sd.joint(sd.attend((kv_idx <= q_idx) & ((kv_idx < first) | (q_idx - kv_idx < WINDOW + h))), far)
        super().__init__(donor, made)
        self.picked = picked
        self.entry = nn.Linear(donor.hidden_size, donor.kv_heads * donor.head_dim)
        self.index = nn.Linear(donor.hidden_size, 3 + 2 * 3 + 2)

    def inputs(self, x: torch.Tensor, raw: Any, rope: Any) -> dict[str, torch.Tensor]:
        rows = self.index(x)
        return {"index_q": self.heads(rows[..., 3:9], 2), "index_weights": rows[..., 9:].transpose(1, 2)} if self.picked else {}

    def landmarks(self, chunks: torch.Tensor) -> dict[str, torch.Tensor]:
        means = chunks.mean(2)
        made = {"entries": self.heads(self.entry(means))}
        return made | {"index_entries": self.index(means)[:, None, :, :3]} if self.picked else made


KINDS = {
    "csa": Compressed,
    "hca": functools.partial(Compressed, kind="hca"),
    "first ones and windows by head": functools.partial(Compressed, kind="hca", first=2),
}


def converted(kind: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = donor("llama")
    return model, convert(model, {1: KINDS[kind]})


def logits(model: Any, ids: torch.Tensor, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, **words).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_batches_and_moved_rows_are_one(kind: str) -> None:
    model, handle = converted(kind)
    ids = tokens(2, 33)
    whole, cache = logits(model, ids, use_cache=False), handle.cache()
    parts = [logits(model, part, past_key_values=cache) for part in ids[:, :20].split([3, 1, 14, 1, 1], dim=1)]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :20], atol=ATOL, rtol=0)
    rows = torch.tensor([1, 0, 0, 1])
    rest = [logits(model, part, past_key_values=cache) for part in ids[rows, 20:].split([1, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(rest, 1), whole[rows, 20:], atol=ATOL, rtol=0)
    padded = left_padded(length=24)
    together = model.generate(**padded, max_new_tokens=9, do_sample=False)
    alone = model.generate(padded["input_ids"][:1, 5:], max_new_tokens=9, do_sample=False, use_cache=False)
    assert together[0, 5:].tolist() == alone[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_grows_by_rows_of_blocks_alone(kind: str) -> None:
    model, handle = converted(kind)
    program = handle.layers[1].program
    bound = sd.cache_bound(program)
    sizes = {"index_dim": 3, "index_heads": 2}
    for length in (5, 16, 40, 80):
        cache = handle.cache()
        logits(model, tokens(2, length), past_key_values=cache)
        (held,) = cache.layers[1].held
        assert held.places.tolist() == bound.keep(length, heads=4).tolist()
        kept, blocks = len(held.places), length // BLOCK
        assert held.rows["k"].shape[2] == held.rows["v"].shape[2] == kept == min(length, bound.most(length, heads=4))
        assert held.landmarks["entries"].shape[2] == blocks
        took = sum(x.numel() * 8 for part in (held.rows, held.landmarks) for x in part.values())
        assert took == bound.bytes(length, 2, 8, "float64", batch=2, heads=4, sizes=sizes)
        assert cache.layers[1].nbytes == took + held.hidden.numel() * 8


def test_bounds_of_windows_beside_blocks() -> None:
    found = sd.cache_bound(sd.patterns.csa(block=4, top_k=3, window=8))
    assert (found.kind, found.recent, found.blocks) == ("ring + blocks", 8, {"index_entries": 4, "entries": 4})
    assert found.verdict == sd.PROVED
    assert "a ring of 8 keys, a row of" in str(found) and "entries for each 4 keys" in str(found)
    found = sd.cache_bound(sd.patterns.hca(block=8, window=16))
    assert (found.kind, found.recent, found.blocks) == ("ring + blocks", 16, {"entries": 8})
    assert found.witness.q_idx - found.witness.kv_idx == 15
    assert found.bytes(1 << 20, 1, 16, "float32") == (15 * 32 + (1 << 17) * 16) * 4
    entries = sd.input("entries", "batch kv_heads keys/8 head_dim")
    over = (kv_idx + 1) * 8 <= q_idx + 1
    causal = kv_idx <= q_idx
    means = sd.summary(sd.k, 8)
    for grows in (
        sd.joint(causal, sd.attend(over, k=entries, v=entries)),  # every key as it is
        sd.joint(sd.attend(causal & sd.top_k(sd.dot(sd.q, means), 2)), sd.attend(over, k=entries, v=entries)),  # picks among keys
        sd.joint(sd.patterns.sliding_window(8), sd.attend(over, k=means, v=sd.summary(sd.v, 8))),  # makes the rows itself
    ):
        assert sd.cache_bound(grows).kind == "grows"
