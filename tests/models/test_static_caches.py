"""Static caches with programs and patterns: memory taken once, summaries of finished blocks, native layers beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import StaticCache

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.models.kept_keys import FixedKeys
from sparsedsl.models.program_keys import FoldedKeys, StaticSummarisedKeys
from tests.models.families import build, left_padded, tokens

ATOL = 1e-9
causal = kv_idx <= q_idx
OWN = q_idx // 4 == kv_idx // 4
MOBA = sd.patterns.moba(8, 2)
PROGRAMS = {
    "moba": MOBA,
    "bounds": sd.attend(causal & (OWN | sd.top_k(sd.bound(sd.q, sd.k, 4), 3, among=kv_idx // 4 < q_idx // 4))),
    "windows": sd.patterns.infllm_v2(length=8, stride=4, select=8, top_k=3, local=1),
}
RING = sd.patterns.ring_linear([0.5, 0.7, 0.9, 0.99])


def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def in_pieces(model: Any, ids: torch.Tensor, cache: Any, sizes: tuple[int, ...] = (7, 13, 1, 1, 1)) -> torch.Tensor:
    left = ids.shape[1] - sum(sizes)
    parts = ids.split([*sizes, *([left] if left else [])], dim=1)
    return torch.cat([logits(model, part, past_key_values=cache) for part in parts], 1)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_pieces_give_the_logits_of_the_whole_in_memory_taken_once(family: str, name: str) -> None:
    model, ids = build(family).double(), tokens(length=40)
    with sd.models.apply(model, PROGRAMS[name], backend="tiled") as applied:
        wanted, cache = logits(model, ids, use_cache=False), applied.cache(48)
        assert all(type(layer) is StaticSummarisedKeys and layer.get_max_length() == 48 for layer in cache.layers)
        first = in_pieces(model, ids[:, :20], cache, (7, 12, 1))
        ((kept,),) = (rows.shares for rows in cache.layers[0].kept.values())
        places = [cache.layers[0].keys.data_ptr(), *(rows.buffer.data_ptr() for rows in kept._rows.values())]
        rest = in_pieces(model, ids[:, 20:], cache, (1,) * 20)
        torch.testing.assert_close(torch.cat([first, rest], 1), wanted, atol=ATOL, rtol=0)
        assert [cache.layers[0].keys.data_ptr(), *(rows.buffer.data_ptr() for rows in kept._rows.values())] == places
        assert kept.tokens == 40 and cache.layers[0].keys.shape[2] == 48
        cache.reset()
        assert not cache.layers[0].kept and cache.get_seq_length() == 0
        torch.testing.assert_close(in_pieces(model, ids, cache), wanted, atol=ATOL, rtol=0)


def test_a_step_reads_no_key_that_it_does_not_attend_to() -> None:
    """With NaN in the place of a block's keys and values, the step shows whether it read them."""
    model, ids, block = build("llama").double(), tokens(1, 65), 4
    with sd.models.apply(model, {1: sd.patterns.moba(block, 2)}, backend="tiled") as applied:
        cache = applied.cache(80)
        logits(model, ids[:, :64], past_key_values=cache)

        def read(forget: bool) -> int:
            count = 0
            for number in range(64 // block - 1):  # (by the last token of the last one the sequence is known again)
                other = copy.deepcopy(cache)
                layer = other.layers[1]
                for x in (layer.keys, layer.values):
                    x[:, :, number * block : (number + 1) * block] = float("nan")
                if forget:
                    layer.kept.clear()
                count += bool(logits(model, ids[:, 64:], past_key_values=other).isnan().any())
            return count

        assert read(forget=True) == 15  # every mean is made again
        assert 1 <= read(forget=False) <= 4  # a head picks one block beside its own


def test_what_transformers_does_to_caches() -> None:
    model, ids = build("llama").double(), tokens(length=40)
    with sd.models.apply(model, MOBA, backend="tiled") as applied:
        wanted, cache = logits(model, ids, use_cache=False), applied.cache(48)
        logits(model, ids[:, :20], past_key_values=cache)
        logits(model, torch.full((2, 9), 7), past_key_values=cache)
        with pytest.raises(sd.ShapeError, match="by a negative number"):
            cache.crop(9)
        cache.crop(-9)
        assert cache.get_seq_length() == 20
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        found = in_pieces(model, ids.flip(0)[:, 20:], cache, sizes=(1, 1))
        torch.testing.assert_close(found, wanted.flip(0)[:, 20:], atol=ATOL, rtol=0)


def test_batches_with_padding_give_what_each_row_gives_alone() -> None:
    model, padded = build("llama").double(), left_padded(length=24)
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static"}
    with sd.models.apply(model, MOBA, backend="tiled"):
        found = model.generate(**padded, **how, return_dict_in_generate=True)
        alone = model.generate(padded["input_ids"][:1, 5:], max_new_tokens=10, do_sample=False, use_cache=False)
        beams = model.generate(**padded, **how, num_beams=3)
        plain = model.generate(**padded, max_new_tokens=10, do_sample=False, num_beams=3, use_cache=False)
    assert found.sequences[0, 5:].tolist() == alone[0].tolist()
    assert beams.tolist() == plain.tolist()
    for layer in found.past_key_values.layers:
        (rows,) = layer.kept.values()
        assert {one.tokens for one in rows.shares} == {28, 33}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("program", [causal & (q_idx - kv_idx < 4), MOBA, RING], ids=["window", "moba", "ring"])
def test_native_layers_beside_see_what_is_written(program: Any, family: str, index: int) -> None:
    """One static layer is replaced: masks are still those of static layers, and a single query does without none."""
    model, ids = build(family).double(), tokens(length=30)
    with sd.models.apply(model, {index: program}, backend="tiled") as applied:
        wanted, cache = logits(model, ids, use_cache=False), applied.cache(40)
        assert isinstance(cache.layers[index], (FixedKeys, FoldedKeys, StaticSummarisedKeys))
        torch.testing.assert_close(in_pieces(model, ids, cache, (5, 1, 6, 17, 1)), wanted, atol=ATOL, rtol=0)
        assert cache.layers[index].get_max_length() == 40


def test_a_static_cache_of_windows_alone_tells_no_length() -> None:
    """As transformers makes it for a model all of whose layers slide; keys then take memory as they come."""
    model, ids = build("mistral").double(), tokens(length=30)
    for program in (MOBA, causal & (q_idx - kv_idx < 12), causal):
        with sd.models.apply(model, {1: program}, backend="tiled"):
            wanted, cache = logits(model, ids, use_cache=False), StaticCache(config=model.config, max_cache_len=40)
            torch.testing.assert_close(in_pieces(model, ids, cache, (5, 1, 6, 17, 1)), wanted, atol=ATOL, rtol=0)
            assert cache.layers[1].get_max_length() == -1


@pytest.mark.parametrize("program", [causal & (q_idx - kv_idx < 50), MOBA, RING], ids=["window", "moba", "ring"])
def test_the_native_model_does_not_take_it(program: Any) -> None:
    """transformers would let its other layers see slots that are not written yet."""
    model, ids = build("llama").double(), tokens(length=30)
    with sd.models.apply(model, {1: program}, backend="tiled") as applied:
        empty, cache = applied.cache(40), applied.cache(40)
        logits(model, ids[:, :20], past_key_values=cache)
    for one, part in ((empty, ids), (cache, ids[:, 20:])):
        with pytest.raises(sd.UnsupportedError, match=r"Give it a cache of its own|runs without the program"):
            logits(model, part, past_key_values=one)


def test_room_for_summaries_is_taken_at_once_and_grows_if_it_must() -> None:
    attn, q = sd.compile(MOBA, backend="tiled"), torch.randn(1, 2, 96, 8, dtype=torch.float64)
    kept = attn.keep_summaries(64)
    with torch.no_grad():
        sizes = []
        for length in (1, 40, 64, 96):
            found = attn(q[:, :, length - 1 : length], q[:, :, :length], q[:, :, :length], q_offset=length - 1, summaries=kept)
            torch.testing.assert_close(found, attn(q[:, :, :length], q[:, :, :length], q[:, :, :length])[:, :, -1:])
            sizes.append(kept.nbytes)
    assert sizes == [2 * 8 * 8 * 8] * 3 + [2 * 24 * 8 * 8]
    with pytest.raises(sd.ShapeError, match="max_length must be a whole number"):
        attn.keep_summaries(0)
