"""Generating with converted layers: the cache in pieces, by row, in beams, and what it refuses. Tiny models in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparsedsl as sd
from tests.models.families import left_padded, tokens
from tests.models.hybrid_models import DONORS, LAYERS, convert, donor, spread

PAIRS = [("llama", kind) for kind in LAYERS] + [(name, "nha") for name in DONORS[1:]]
ATOL = 1e-10


def converted(name: str, kind: str, layers: tuple[int, ...] = (1,)) -> tuple[Any, Any]:
    model = donor(name)
    handle = convert(model, dict.fromkeys(layers, LAYERS[kind]))
    spread(handle)
    return model, handle


def logits(model: Any, ids: torch.Tensor, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, **words).logits
    return found


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_cached_in_pieces_and_batched_are_one(name: str, kind: str) -> None:
    model, handle = converted(name, kind, (0, 1) if name == "gemma3" else (1,))
    ids = tokens(2, 13)
    whole = logits(model, ids, use_cache=False)
    alone = torch.cat([logits(model, row[None], use_cache=False) for row in ids])
    torch.testing.assert_close(alone, whole, atol=ATOL, rtol=0)
    caches = (handle.cache(), DynamicCache(), DynamicCache(config=model.config))
    for cache in caches if kind == "nha" else caches[:1]:
        parts, at = [], 0
        for n in (5, 1, 6, 1):
            parts.append(logits(model, ids[:, at : at + n], past_key_values=cache))
            at += n
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=ATOL, rtol=0)
        assert cache.get_seq_length() == 13


@pytest.mark.parametrize("kind", ["nha", "hsa"])
def test_generation_is_one_forward_a_token(kind: str) -> None:
    model, _ = converted("llama", kind)
    ids = tokens(2, 9)
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
    slow = ids
    for _ in range(5):
        slow = torch.cat([slow, logits(model, slow, use_cache=False)[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(greedy, slow)
    pieces = model.generate(ids, max_new_tokens=5, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(pieces, slow)
    beams = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False)
    without = model.generate(ids, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, without)


@pytest.mark.parametrize("kind", ["nha", "hsa"])
def test_rows_of_a_cache_move_with_all_they_have(kind: str) -> None:
    model, handle = converted("llama", kind)
    ids, more = tokens(3, 13), tokens(3, 16)[:, 13:]
    whole = torch.cat([ids, more], 1)

    def after(change: Any, rows: list[int]) -> None:
        cache = handle.cache()
        logits(model, ids, past_key_values=cache)
        change(cache)
        found = logits(model, more[rows], past_key_values=cache)
        expected = logits(model, torch.cat([ids, more], 1)[rows] if rows == [2, 0, 0] else whole[rows], use_cache=False)[:, 13:]
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2])
    cache = handle.cache()
    logits(model, ids, past_key_values=cache)
    layer = cache.layers[1]
    layer.offload()
    layer.prefetch()
    assert layer.nbytes > 0
    cache.reset()
    assert layer.nbytes == 0 and cache.get_seq_length() == 0
    torch.testing.assert_close(logits(model, ids, past_key_values=cache), logits(model, ids, use_cache=False), atol=ATOL, rtol=0)


def test_taking_tokens_back() -> None:
    """Right where keys are kept; refused where a state has read them, and never wrong."""
    model, handle = converted("llama", "moba")
    ids = tokens(1, 15)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3), plain)
    assert handle.cache().is_croppable
    for kind in ("nha", "delta", "hsa"):
        model, handle = converted("llama", kind)
        cache = handle.cache()
        assert not cache.is_croppable
        logits(model, ids, past_key_values=cache)
        cache.layers[1].crop(0)
        with pytest.raises(sd.UnsupportedError, match="layer 1: 2 tokens cannot be taken back"):
            cache.crop(-2)
        repeated = torch.cat([ids[:, :6]] * 3, 1)
        expected = model.generate(repeated, max_new_tokens=8, do_sample=False)
        try:
            found = model.generate(repeated, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        except sd.UnsupportedError as error:
            assert "generate() without" in str(error)
        else:
            assert torch.equal(found, expected)


def test_caches_that_cannot_go_on() -> None:
    model, handle = converted("llama", "nha")
    ids = tokens(1, 9)
    with handle.identity():
        donors = model(ids).past_key_values
    with pytest.raises(sd.UnsupportedError, match="holds 9 tokens of the donor's own attention"):
        model(ids[:, :1], past_key_values=donors)
    ours = model(ids).past_key_values
    with handle.identity(), pytest.raises(sd.UnsupportedError, match="begun by the converted layer"):
        model(ids[:, :1], past_key_values=ours)
    with pytest.raises(sd.UnsupportedError, match="StaticLayer has room for"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    handle.restore()
    other = convert(model, {1: sd.models.MoBA})
    with pytest.raises(sd.UnsupportedError, match="begun by another layer's program"):
        model(ids[:, :1], past_key_values=ours)
    assert other.layers


def test_an_offloaded_cache() -> None:
    model, handle = converted("gemma3", "nha")
    ids = tokens(2, 12)
    cache = handle.cache()
    logits(model, ids, past_key_values=cache)
    assert all(x.device.type == "cpu" for held in cache.layers[1].held for x in held.tensors)


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        *(("llama", kind, "left") for kind in LAYERS),
        ("llama", "nha", "right"),
        ("gemma3", "nha", "left"),
        ("gpt_oss", "nha", "left"),
    ],
)
def test_padding_leaves_no_trace(name: str, kind: str, side: str) -> None:
    model, _ = converted(name, kind, (0, 1) if kind == "nha" else (1,))
    ids, lengths = tokens(3, 17), (17, 12, 3)
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(17 - length, 17) if side == "left" else slice(0, length)
        batch[row, where], mask[row, where] = ids[row, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, batch, attention_mask=mask, position_ids=positions)
    for row, length in enumerate(lengths):
        alone = logits(model, ids[row : row + 1, :length], use_cache=False)
        torch.testing.assert_close(found[row][mask[row].bool()], alone[0], atol=ATOL, rtol=0)


def test_what_a_program_says_of_rows_it_says_of_rows_of_the_batch() -> None:
    """Rows of one length run together; the second of these is row 1 for all that."""
    model, padded = donor("llama"), left_padded(2, 11, 4)
    native = logits(model, padded["input_ids"][1:])
    causal, near = sd.kv_idx <= sd.q_idx, sd.q_idx - sd.kv_idx < 3
    convert(model, {1: sd.joint(causal & near, causal & ~near & (sd.b == 1))})
    found = logits(model, padded["input_ids"], attention_mask=padded["attention_mask"])
    torch.testing.assert_close(found[1:], native, atol=ATOL, rtol=0)
    assert (logits(model, padded["input_ids"][1:]) - native).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["nha", "hsa", "moba"])
def test_batched_generation_of_prompts_of_any_length(kind: str) -> None:
    model, _ = converted("llama", kind)
    padded = left_padded(2, 11, 4)
    ids = padded["input_ids"]
    together = model.generate(**padded, max_new_tokens=4, do_sample=False)
    for row, begin in enumerate((4, 0)):
        alone = model.generate(ids[row : row + 1, begin:], max_new_tokens=4, do_sample=False)
        assert torch.equal(together[row, begin:], alone[0])
    pieces = model.generate(**padded, max_new_tokens=4, do_sample=False, prefill_chunk_size=3)  # the first holds padding alone
    assert torch.equal(pieces, together)
    beams = model.generate(**padded, max_new_tokens=4, num_beams=2, do_sample=False)
    alone = model.generate(ids[:1, 4:], max_new_tokens=4, num_beams=2, do_sample=False)
    assert torch.equal(beams[0, 4:], alone[0])


@pytest.mark.parametrize("kind", ["nha", "ring", "nsa"])
def test_packed_rows_are_sequences_by_themselves(kind: str) -> None:
    model, _ = converted("llama", kind)
    ids = tokens(2, 21)
    positions = torch.tensor([[*range(8), *range(13)], [*range(3), *range(9), *range(9)]])
    found = logits(model, ids, position_ids=positions, use_cache=False)
    for row, cuts in enumerate(((0, 8, 21), (0, 3, 12, 21))):
        for a, b in itertools.pairwise(cuts):
            alone = logits(model, ids[row : row + 1, a:b], use_cache=False)
            torch.testing.assert_close(found[row : row + 1, a:b], alone, atol=ATOL, rtol=0)
