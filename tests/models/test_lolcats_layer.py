"""Linear attention with learned maps beside a window (LoLCATs): the donor inside, its sum written out, what is kept. In float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.models.donor import project
from tests.models.families import left_padded, tokens
from tests.models.hybrid_models import DONORS, LOLCATS, convert, donor, spread

EACH = pytest.mark.parametrize("name", DONORS)
ALL = functools.partial(sd.models.LoLCATs, window=64)


def logits(model: Any, *ids: torch.Tensor, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(*ids, **words).logits
    return found


@EACH
def test_with_a_window_over_all_keys_it_is_the_donor(name: str) -> None:
    model, padded = donor(name), left_padded()
    before = [logits(model, tokens()), logits(model, **padded)]
    handle = convert(model, {1: ALL})
    spread(handle)
    for found, wanted in zip([logits(model, tokens()), logits(model, **padded)], before, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_the_sum_written_out(name: str, first: int) -> None:
    """Pair by pair: softmax weights in the window and of the first tokens, products of features further back, one divisor."""
    model, ids, window = donor(name), tokens(1, 19), 4
    handle = convert(model, {1: functools.partial(LOLCATS, first=first)})
    spread(handle)
    layer, module, lesson = handle.layers[1], model.model.layers[1].self_attn, handle.teacher(1)(ids)
    _, rope = project(module, lesson.inputs, lesson._words["position_embeddings"])
    k, v = (rows.repeat_interleave(2, dim=1) for rows in (rope.k, rope.v))
    maps_q, maps_k = rope.q @ layer.query_map, rope.k.double() @ layer.key_map
    maps_k = maps_k.repeat_interleave(2, dim=1)
    products = sum((sign * maps_q).exp() @ (sign * maps_k).exp().mT for sign in (1, -1)) * layer.bias.exp()[:, None, None]
    i, j = torch.arange(19)[:, None], torch.arange(19)
    near, seen = (i - j < window) | (j < first), j <= i
    weights = torch.where(near, (rope.q @ k.mT * module.scaling).exp(), products) * seen
    sums = weights.sum(-1, keepdim=True)
    if name == "gpt_oss":
        sums = sums + module.sinks.exp()[:, None, None]
    wanted = module.o_proj((weights @ v / sums).transpose(1, 2).flatten(2))
    torch.testing.assert_close(lesson.student(), wanted, atol=1e-10, rtol=0)


def test_what_is_kept_has_one_size() -> None:
    model = donor("llama")
    handle = convert(model, {1: functools.partial(LOLCATS, first=2)})
    spread(handle)
    ids, sizes = tokens(2, 40), []
    whole = logits(model, ids, use_cache=False)
    for length in (12, 40):
        cache = handle.cache()
        parts = [
            logits(model, part, past_key_values=cache) for part in ids[:, :length].split([3, 1, 5, 1, 1, length - 11], dim=1)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, :length], atol=1e-10, rtol=0)
        sizes.append(cache.layers[1].nbytes)
    bound = sd.cache_bound(handle.layers[1].program)
    assert bound.kind == "state" and bound.first == 2
    assert sizes == [bound.bytes(40, 2, 8, "float64", batch=2, heads=4, sizes={"feature_dim": 6})] * 2


def test_initialisation_and_what_learns() -> None:
    model, ids = donor("llama"), tokens()
    calibrated = convert(model, {1: functools.partial(sd.models.LoLCATs, window=4)})
    unit = torch.eye(8, dtype=torch.float64) * 8**-0.25
    assert all(torch.equal(part, unit) for part in calibrated.layers[1].query_map)
    with sd.models.apply(donor("llama"), {1: (sd.kv_idx <= sd.q_idx) & ((sd.q_idx - sd.kv_idx < 4) | (sd.kv_idx < 1))}) as window:
        near = logits(window.model, ids)
    assert (logits(model, ids) - near).abs().mean() < 0.05
    with torch.no_grad():
        calibrated.layers[1].bias.fill_(-60.0)
    torch.testing.assert_close(logits(model, ids), near, atol=1e-9, rtol=0)
    calibrated.restore()
    handle = convert(model, {1: LOLCATS}, init="published")
    published = handle.layers[1]
    assert float(published.query_map.abs().max()) <= (6 / 8) ** 0.5 and float(published.query_map.std()) > 0.3
    torch.testing.assert_close(published.bias.exp(), torch.full((4,), 10.0, dtype=torch.float64))
    handle.freeze()
    assert not published.decays("bias") and published.decays("query_map")
    optimizer, losses, lesson = torch.optim.Adam(handle.new_parameters(), lr=0.05), [], handle.teacher(1)(ids)
    for _ in range(15):
        losses.append(lesson.loss())
        losses[-1].backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in handle.new_parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(sd.PatternError, match=r"LoLCATs\(\): features must be at least 1; got 0"):
        convert(donor("llama"), {1: functools.partial(sd.models.LoLCATs, features=0)})


def test_half_precision() -> None:
    model = donor("llama", torch.bfloat16)
    handle = convert(model, {1: LOLCATS})
    cache, ids = handle.cache(), tokens()
    logits(model, ids[:, :20], past_key_values=cache)
    found = logits(model, ids[:, 20:], past_key_values=cache)
    assert found.dtype is torch.bfloat16 and bool(found.isfinite().all())
    assert cache.layers[1].held[0].state.recent["feature_k"].dtype is torch.float32
