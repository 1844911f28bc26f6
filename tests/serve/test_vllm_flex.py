"""Masks in vLLM's own FlexAttention back end: functions of positions, and tiles that hold every pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.lang.evaluation import evaluate

CAUSAL = sd.kv_idx <= sd.q_idx
keep = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.4
MASKS: dict[str, Any] = {
    "causal": CAUSAL,
    "window": sd.patterns.sliding_window(13),
    "streaming": sd.patterns.streaming_llm(10, 3),
    "chunked": CAUSAL & (sd.kv_idx // 16 == sd.q_idx // 16),
    "dilated": CAUSAL & ((sd.q_idx - sd.kv_idx) % 4 == 0) & (sd.q_idx - sd.kv_idx < 24),
    "strided": CAUSAL & ((sd.q_idx - sd.kv_idx < 5) | (sd.kv_idx % 9 == 8)),
    "tiles": (CAUSAL & sd.table("keep", dtype=bool)[sd.q_idx // 8, sd.kv_idx // 8]).bind(keep=keep),
    "nothing": CAUSAL & (sd.kv_idx > sd.q_idx),
}
# Of 24 x 24 tiles of 4: how many the past has, and how many bounds leave.
PAST = 300
LEFT = {
    "causal": PAST,
    "window": 90,
    "streaming": 110,
    "chunked": 60,
    "dilated": 147,
    "strided": PAST,
    "tiles": PAST,
    "nothing": 0,
}


@pytest.mark.parametrize("name", MASKS)
def test_hooks_are_the_mask_and_tiles_hold_every_pair(name: str) -> None:
    layer, size, count = SimpleNamespace(), 4, 24
    hooks = sd.serve.vllm.attach_flex({"layers.0.attn": layer}, {0: MASKS[name]})["layers.0.attn"]
    assert (layer.logical_mask_mod, layer.block_sparsity_hint) == (hooks.logical_mask_mod, hooks.block_sparsity_hint)
    at = torch.arange(size * count)
    wanted = evaluate(MASKS[name].expr, {"q_idx": at[:, None], "kv_idx": at, **MASKS[name].bound}).expand(len(at), len(at))
    found = hooks.logical_mask_mod(torch.tensor(0), torch.tensor(0), at[:, None], at)
    assert torch.equal(found.expand_as(wanted), wanted)
    # vLLM asks for each token, by the number of its block.
    tiles = hooks.block_sparsity_hint.hint_fn(at[:, None] // size, torch.arange(count)[None], size)
    assert tiles.shape == (len(at), count)
    assert not (wanted.unflatten(1, (count, size)).any(2) & ~tiles).any()
    assert int(tiles[::size].sum()) == LEFT[name]


def test_every_layer_is_told_and_those_that_are_alike_share() -> None:
    layers = {f"layers.{n}.attn": SimpleNamespace() for n in range(4)}
    hooks = sd.serve.vllm.attach_flex(layers, {0: MASKS["window"], 2: MASKS["window"]})
    first, second, third, fourth = hooks.values()
    assert first is third
    assert second is fourth
    assert layers["layers.1.attn"].logical_mask_mod(0, 0, torch.tensor(3), torch.tensor(90)).item() is False


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (sd.patterns.quest(page=4, pages=3), "a program chooses from q and k"),
        (sd.attend(CAUSAL, score=sd.patterns.softcap(3), sink=0.0), "the pattern has a score and a sink"),
        (CAUSAL & (sd.q_idx - sd.kv_idx < 4 + sd.h), "the mask differs by head"),
        (CAUSAL & (sd.q_idx - sd.kv_idx < sd.table("sinks")[0]), "nothing binds the table sinks"),
        (sd.kv_idx >= 0, "lets queries see later keys"),
    ],
)
def test_what_it_has_no_place_for(given: Any, says: str) -> None:
    with pytest.raises(sd.SparseDSLError, match=says):
        sd.serve.vllm.attach_flex({"layers.0.attn": SimpleNamespace()}, given)
