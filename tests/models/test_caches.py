"""Caches fitted to patterns: the same logits and tokens as without a cache, with no more keys held than the bound says."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.models.kept_keys import FixedKeys, KeptKeys
from sparsedsl.models.program_keys import FoldedKeys, SummarisedKeys
from tests.models.families import WINDOW, build, left_padded, tokens

causal = kv_idx <= q_idx
PATTERNS = {
    "window": causal & (q_idx - kv_idx < 4),
    "a window wider than the layer's": causal & (q_idx - kv_idx < WINDOW + 5),
    "first ones": causal & ((q_idx - kv_idx < 4) | (kv_idx < 2)),
    "chunks": causal & (q_idx // 5 == kv_idx // 5),
    "every 6th": causal & ((q_idx - kv_idx < 3) | (kv_idx % 6 == 1)),
    "by head": causal & (q_idx - kv_idx < 2 + 3 * h),
}
FAMILIES = ("llama", "gemma3", "mistral", "llama4", "gpt_oss")
HEADS = 4
ATOL = 1e-9
# Llama 4 turns queries and keys in float32, whatever the weights are.
ATOLS = {"llama4": 1e-5, "gpt_oss": 3e-5}


def double(family: str) -> Any:
    """In float64; GPT-OSS multiplies by its experts in float32 at most."""
    return build(family) if family == "gpt_oss" else build(family).double()


def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def in_pieces(model: Any, ids: torch.Tensor, cache: Any, sizes: tuple[int, ...] = (7, 13, 1, 1, 1)) -> torch.Tensor:
    """The logits of chunked prefill and decoding."""
    left = ids.shape[1] - sum(sizes)
    return torch.cat([logits(model, part, past_key_values=cache) for part in ids.split([*sizes, left], dim=1)], 1)


def assert_holds_what_is_needed(cache: Any, mask: sd.Mask, seen: int) -> None:
    wanted = sd.cache_bound(mask).keep(seen, heads=HEADS).tolist()
    kept = [layer for layer in cache.layers if isinstance(layer, KeptKeys)]
    assert kept, "some layer is fitted"
    for layer in kept:
        assert layer.slots.tolist() == wanted and layer.keys.shape[2] == layer.values.shape[2] == len(wanted)
        assert layer.get_seq_length() == seen


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_with_a_fitted_cache_give_the_logits_of_the_whole(family: str, name: str) -> None:
    model, ids = double(family), tokens(length=40)
    with sd.models.apply(model, PATTERNS[name], backend="reference") as applied:
        wanted = logits(model, ids, use_cache=False)
        cache = applied.cache()
        torch.testing.assert_close(in_pieces(model, ids, cache), wanted, atol=ATOLS.get(family, ATOL), rtol=0)
        assert_holds_what_is_needed(cache, PATTERNS[name], 40)


@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_other_backends_attend_to_keys_with_gaps(backend: str) -> None:
    model, ids = build("llama"), tokens(length=40)
    with sd.models.apply(model, PATTERNS["first ones"], backend=backend) as applied:
        wanted = logits(model, ids, use_cache=False)
        torch.testing.assert_close(in_pieces(model, ids, applied.cache()), wanted, atol=3e-5, rtol=0)


@pytest.mark.parametrize("how", ["greedy", "beams", "lookup", "static", "sampled twice"])
@pytest.mark.parametrize("name", ["first ones", "chunks"])
def test_generate_gives_the_tokens_that_it_gives_without_a_cache(name: str, how: str) -> None:
    model, ids = double("llama"), tokens(1 if how == "lookup" else 2, 12)
    words: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    words |= {"beams": {"num_beams": 3}, "sampled twice": {"num_return_sequences": 2, "num_beams": 2}}.get(how, {})
    cached = {"lookup": {"prompt_lookup_num_tokens": 3}, "static": {"cache_implementation": "static"}}.get(how, {})
    with sd.models.apply(model, PATTERNS[name], backend="reference"):
        wanted = model.generate(ids, use_cache=False, **words)
        found = model.generate(ids, return_dict_in_generate=True, **words, **cached)
    assert found.sequences.tolist() == wanted.tolist()
    if how != "lookup":
        held = len(sd.cache_bound(PATTERNS[name]).keep(31))
        assert all(layer.keys.shape[2] == held for layer in found.past_key_values.layers)


@pytest.mark.parametrize("name", PATTERNS)
def test_left_padding_keeps_what_any_row_needs(name: str) -> None:
    model = double("llama")
    given = left_padded(length=24)
    ids, mask = given["input_ids"], given["attention_mask"]
    with sd.models.apply(model, PATTERNS[name], backend="reference") as applied:
        wanted = model.generate(**given, use_cache=False, max_new_tokens=12, do_sample=False)
        assert model.generate(**given, max_new_tokens=12, do_sample=False).tolist() == wanted.tolist()
        cache, found = applied.cache(), []
        for start in range(0, 24, 6):
            part = ids[:, start : start + 6]
            found.append(logits(model, part, attention_mask=mask[:, : start + 6], past_key_values=cache))
        real = mask.bool()
        wanted = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(torch.cat(found, 1)[real], wanted[real], atol=ATOL, rtol=0)
        cache = applied.cache()
        logits(model, ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        cache.activate_past_recording()
        logits(model, ids[:, :3], attention_mask=mask[:, :15], past_key_values=cache)
        cache.crop(-3)
        again = logits(model, ids[:, 12:], attention_mask=mask, past_key_values=cache)
        torch.testing.assert_close(again, wanted[:, 12:], atol=ATOL, rtol=0)


def test_a_static_cache_takes_its_memory_once() -> None:
    model, ids, mask = double("llama"), tokens(length=40), PATTERNS["first ones"]
    with sd.models.apply(model, mask, backend="reference") as applied:
        cache = applied.cache(64)
        assert all(type(layer) is FixedKeys and layer.get_max_length() == 64 for layer in cache.layers)
        wanted = logits(model, ids, use_cache=False)
        first = torch.cat([logits(model, part, past_key_values=cache) for part in ids[:, :20].split(10, dim=1)], 1)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        rest = torch.cat([logits(model, part, past_key_values=cache) for part in ids[:, 20:].split(1, dim=1)], 1)
        torch.testing.assert_close(torch.cat([first, rest], 1), wanted, atol=ATOL, rtol=0)
        assert [layer.keys.data_ptr() for layer in cache.layers] == places
        assert_holds_what_is_needed(cache, mask, 40)
        assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * 2 * 5 * 8 * 8  # 2 rows, 2 heads, 2 + 3 keys, 8 wide


def test_layers_that_are_good_as_they_are_stay() -> None:
    model = double("gemma3")
    with sd.models.apply(model, sd.models.native_patterns(model)) as applied:
        assert [type(layer) for layer in applied.cache().layers] == [DynamicSlidingWindowLayer, DynamicLayer]
    with sd.models.apply(model, {0: causal, 1: PATTERNS["window"]}) as applied:
        assert [type(layer) for layer in applied.cache().layers] == [DynamicLayer, KeptKeys]
    with sd.models.apply(model, {1: sd.patterns.moba(8, 2)}) as applied:
        assert not any(isinstance(layer, KeptKeys) for layer in applied.cache().layers)


def test_a_cache_without_layers_is_fitted_too() -> None:
    model, ids = double("llama"), tokens(length=30)
    with sd.models.apply(model, {1: PATTERNS["window"]}, backend="reference"):
        cache = DynamicCache()
        torch.testing.assert_close(in_pieces(model, ids, cache), logits(model, ids, use_cache=False), atol=ATOL, rtol=0)
        assert [layer.keys.shape[2] for layer in cache.layers] == [30, 3]


def test_a_bias_by_distance_reads_the_distance_between_slots() -> None:
    model, ids = double("llama"), tokens(length=40)
    bias = torch.randn(HEADS, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    table = sd.table("bias", dtype=float)
    pattern = sd.attend(PATTERNS["first ones"], score=score + table[h, sd.clamp(q_idx - kv_idx, 0, 39)]).bind(bias=bias)
    with sd.models.apply(model, pattern, backend="reference") as applied:
        wanted = logits(model, ids, use_cache=False)
        torch.testing.assert_close(in_pieces(model, ids, applied.cache()), wanted, atol=ATOL, rtol=0)


# ---- what transformers does to caches ------------------------------------------------------------------------------------------


def test_tokens_are_taken_back_where_they_were_recorded_and_refused_where_keys_are_gone() -> None:
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, PATTERNS["first ones"], backend="reference") as applied:
        wanted = logits(model, ids, use_cache=False)
        cache = applied.cache()
        logits(model, ids[:, :20], past_key_values=cache)
        cache.activate_past_recording()
        for wrong in (3, 5):
            logits(model, torch.full((2, wrong), 7), past_key_values=cache)
        cache.crop(-8)
        assert cache.get_seq_length() == 20
        assert_holds_what_is_needed(cache, PATTERNS["first ones"], 20)
        torch.testing.assert_close(logits(model, ids[:, 20:], past_key_values=cache), wanted[:, 20:], atol=ATOL, rtol=0)

        cache = applied.cache()
        logits(model, ids[:, :20], past_key_values=cache)
        with pytest.raises(
            sd.UnsupportedError, match=r"crop\(-2\) wants the cache as it was after 18 tokens.*activate_past_recording"
        ):
            cache.crop(-2)
        with pytest.raises(sd.ShapeError, match="by a negative number"):
            cache.crop(2)


def test_reset_copies_and_saved_caches() -> None:
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, PATTERNS["every 6th"], backend="reference") as applied:
        wanted = logits(model, ids, use_cache=False)
        cache = applied.cache()
        logits(model, torch.full((3, 17), 5), past_key_values=cache)
        cache.reset()
        logits(model, ids[:, :20], past_key_values=cache)
        saved = io.BytesIO()
        torch.save(cache, saved)
        saved.seek(0)
        for other in (copy.deepcopy(cache), torch.load(saved, weights_only=False), cache):
            torch.testing.assert_close(logits(model, ids[:, 20:], past_key_values=other), wanted[:, 20:], atol=ATOL, rtol=0)


def test_batches_are_repeated_selected_and_reordered() -> None:
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, PATTERNS["first ones"], backend="reference") as applied:
        wanted = logits(model, ids, use_cache=False)
        cache = applied.cache()
        logits(model, ids[:, :20], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        found = logits(model, ids.flip(0)[:, 20:], past_key_values=cache)
        torch.testing.assert_close(found, wanted.flip(0)[:, 20:], atol=ATOL, rtol=0)


def test_keys_on_their_way_to_the_host_are_let_go_of_when_they_are_back() -> None:
    """An offloaded layer's keys are copied while the layer attends; they are looked at again when the next tokens come."""
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, PATTERNS["first ones"], backend="reference") as applied:
        wanted, cache = logits(model, ids, use_cache=False), applied.cache()
        found = [logits(model, ids[:, :10], past_key_values=cache)]
        for layer in cache.layers:
            layer.device = torch.device("meta")  # the keys are elsewhere
        found.append(logits(model, ids[:, 10:20], past_key_values=cache))
        assert [layer.slots.numel() for layer in cache.layers] == [15, 15]
        for layer in cache.layers:
            layer.device = ids.device
        found.append(logits(model, ids[:, 20:], past_key_values=cache))
        torch.testing.assert_close(torch.cat(found, 1), wanted, atol=ATOL, rtol=0)
        assert_holds_what_is_needed(cache, PATTERNS["first ones"], 40)


# ---- refusals ------------------------------------------------------------------------------------------------------------------


def test_a_model_without_the_pattern_does_not_take_its_cache() -> None:
    model, ids = double("llama"), tokens(length=21)
    with sd.models.apply(model, PATTERNS["window"], backend="reference") as applied:
        cache = applied.cache()
        logits(model, ids[:, :20], past_key_values=cache)
    with pytest.raises(
        sd.UnsupportedError, match="holds 3 of 20 keys; the model that was called with it runs without the pattern"
    ):
        logits(model, ids[:, 20:], past_key_values=cache)
    other = pytest.raises(sd.UnsupportedError, match="the cache was filled for another pattern")
    with sd.models.apply(model, PATTERNS["first ones"], backend="reference"), other:
        logits(model, ids[:, 20:], past_key_values=cache)


def test_an_empty_cache_of_other_patterns_is_fitted_anew() -> None:
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, PATTERNS["window"], backend="reference") as applied:
        cache = applied.cache()
    with sd.models.apply(model, PATTERNS["first ones"], backend="reference"):
        torch.testing.assert_close(in_pieces(model, ids, cache), logits(model, ids, use_cache=False), atol=ATOL, rtol=0)
    with sd.models.apply(model, PATTERNS["window"], backend="reference") as applied:
        cache = applied.cache()
    torch.testing.assert_close(in_pieces(model, ids, cache), logits(model, ids, use_cache=False), atol=ATOL, rtol=0)


def test_lengths_of_caches_are_checked() -> None:
    model = double("llama")
    with (
        sd.models.apply(model, PATTERNS["window"]) as applied,
        pytest.raises(sd.ShapeError, match="max_length must be a whole number"),
    ):
        applied.cache(0)


# ---- programs ------------------------------------------------------------------------------------------------------------------

MOBA = sd.patterns.moba(8, 2)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_programs_that_choose_keep_their_summaries(family: str) -> None:
    model, ids = double(family), tokens(length=40)
    with sd.models.apply(model, MOBA, backend="tiled") as applied:
        wanted = logits(model, ids, use_cache=False)
        cache = applied.cache()
        assert all(type(layer) is SummarisedKeys for layer in cache.layers)
        torch.testing.assert_close(in_pieces(model, ids, cache), wanted, atol=ATOL, rtol=0)
        ((kept,),) = (rows.shares for rows in cache.layers[0].kept.values())
        assert kept.tokens == 40 and kept.nbytes > 0


def test_kept_summaries_follow_what_transformers_does_to_caches() -> None:
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, MOBA, backend="tiled") as applied:
        wanted = logits(model, ids, use_cache=False)
        cache = applied.cache()
        logits(model, ids[:, :20], past_key_values=cache)
        logits(model, torch.full((2, 9), 7), past_key_values=cache)
        cache.crop(-9)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        cache.reorder_cache(torch.tensor([1, 0]))
        found = in_pieces(model, ids.flip(0)[:, 20:], cache, sizes=(1, 1))
        torch.testing.assert_close(found, wanted.flip(0)[:, 20:], atol=ATOL, rtol=0)
        cache.reset()
        torch.testing.assert_close(in_pieces(model, ids, cache), wanted, atol=ATOL, rtol=0)


NEAR = q_idx - kv_idx < 4
RING = sd.patterns.ring_linear([0.5, 0.7, 0.9, 0.99])
UNIONS = {
    "first ones": sd.joint(causal & NEAR, causal & ~NEAR & (kv_idx < 2)),
    "chunks": sd.joint(causal & NEAR, causal & ~NEAR & (q_idx // 6 == kv_idx // 6)),
}


@pytest.mark.parametrize("name", UNIONS)
def test_a_program_of_attentions_holds_what_they_ask_for_together(name: str) -> None:
    model, ids, program = double("mistral"), tokens(length=40), UNIONS[name]
    padded = left_padded(length=24)
    ids_of, mask = padded["input_ids"], padded["attention_mask"]
    with sd.models.apply(model, program, backend="tiled") as applied:
        cache = applied.cache()
        torch.testing.assert_close(in_pieces(model, ids, cache), logits(model, ids, use_cache=False), atol=ATOL, rtol=0)
        kept = sd.cache_bound(program).keep(40).tolist()
        assert len(kept) < 8 and all(layer.slots.tolist() == kept for layer in cache.layers)
        cache = applied.cache()
        places, parts = (mask.cumsum(-1) - 1).clamp(min=0), []
        for i in range(0, 24, 6):
            words = {"attention_mask": mask[:, : i + 6], "position_ids": places[:, i : i + 6]}
            parts.append(logits(model, ids_of[:, i : i + 6], **words, past_key_values=cache))
        alone = logits(model, ids_of[:1, 5:], use_cache=False)  # five tokens of padding
        torch.testing.assert_close(torch.cat(parts, 1)[:1, 5:], alone, atol=ATOL, rtol=0)
        assert applied.cache_report(4096).layers[0].most_tokens == 5


@pytest.mark.parametrize("program", [RING, sd.patterns.based()], ids=["ring", "based"])
def test_programs_with_a_state_hold_it_and_no_key(program: Any) -> None:
    model, ids = double("llama"), tokens(length=40)
    with sd.models.apply(model, program, backend="tiled") as applied:
        wanted, cache, sizes = logits(model, ids, use_cache=False), applied.cache(), []
        for length in (20, 40):
            found = in_pieces(model, ids[:, :length], cache, sizes=(7, 1))
            torch.testing.assert_close(found, wanted[:, :length], atol=ATOL, rtol=0)
            assert all(type(layer) is FoldedKeys and layer.keys.shape[2] == 0 for layer in cache.layers)
            sizes += [cache.layers[0].nbytes]
            cache.reset()
        report = applied.cache_report(1 << 20, batch=2)
        assert sizes == [sd.cache_bound(program).bytes(40, 2, 8, "float64", batch=2, heads=4)] * 2 == [report.layers[0].bytes] * 2
        assert "layers 0, 1: state: of constant size; 256 B a token" in str(report)
        for parts in ((torch.tensor([0, 0, 1]), "batch_select_indices"), (torch.tensor([1, 0]), "reorder_cache")):
            rows, how = parts
            cache = applied.cache()
            logits(model, ids[:, :20], past_key_values=cache)
            getattr(cache, how)(rows)
            found = in_pieces(model, ids[rows, 20:], cache, sizes=(1,))
            torch.testing.assert_close(found, wanted[rows, 20:], atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    "words", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}], ids=str
)
@pytest.mark.parametrize("program", [MOBA, RING, UNIONS["first ones"]], ids=["moba", "ring", "first ones"])
def test_generate_with_a_program_gives_the_tokens_that_it_gives_without_a_cache(program: Any, words: dict[str, Any]) -> None:
    model, ids = double("llama"), tokens(1, 20)
    how = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    with sd.models.apply(model, program, backend="tiled"):
        found = model.generate(ids, **how, **words)
        plain = {name: number for name, number in words.items() if name == "num_beams"}
        assert found.sequences.tolist() == model.generate(ids, **how, use_cache=False, **plain).sequences.tolist()
    if program is RING:
        looks_up = "prompt_lookup_num_tokens" in words  # tokens are taken back after each step: every key stays
        assert all(layer.holds_all == looks_up for layer in found.past_key_values.layers)
        assert all((layer.keys.shape[2] > 0) == looks_up for layer in found.past_key_values.layers)


def test_summaries_are_kept_of_the_real_tokens_of_each_row() -> None:
    model, padded = double("llama"), left_padded(length=24)
    with sd.models.apply(model, MOBA, backend="tiled"):
        found = model.generate(**padded, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
        alone = model.generate(padded["input_ids"][:1, 5:], max_new_tokens=10, do_sample=False)
    assert found.sequences[0, 5:].tolist() == alone[0].tolist()
    for layer in found.past_key_values.layers:
        (rows,) = layer.kept.values()
        assert {one.tokens for one in rows.shares} == {28, 33} and all(one.nbytes > 0 for one in rows.shares)
        summed = [{kept.blocks for kept in one._rows.values()} for one in rows.shares]
        assert sorted(map(tuple, summed)) == [(3,), (4,)]


def test_a_cache_of_states_refuses_what_it_cannot_do() -> None:
    model, ids = double("llama"), tokens(length=21)
    with sd.models.apply(model, RING, backend="tiled") as applied:
        cache = applied.cache()
        logits(model, ids[:, :20], past_key_values=cache)
        cache.crop(0)
        with pytest.raises(sd.UnsupportedError, match=r"2 tokens cannot be taken back, since a state .* activate_past_recording"):
            cache.crop(-2)
        with pytest.raises(sd.UnsupportedError, match=r"layer 0: its cache has seen \[20\] real tokens of rows .* speaks of 18"):
            mask = torch.ones(2, 21, dtype=torch.long)
            mask[:, :2] = 0
            logits(model, ids[:, 20:], attention_mask=mask, past_key_values=cache)
        recorded = applied.cache()
        recorded.activate_past_recording()
        logits(model, ids[:, :20], past_key_values=recorded)
        recorded.crop(-3)
        wanted = logits(model, ids, use_cache=False)[:, 17:]
        torch.testing.assert_close(logits(model, ids[:, 17:], past_key_values=recorded), wanted, atol=ATOL, rtol=0)
    with pytest.raises(
        sd.UnsupportedError, match=r"its state after 21 tokens, and no keys; the model .* runs without the program"
    ):
        logits(model, ids[:, 20:], past_key_values=cache)
    other = pytest.raises(sd.UnsupportedError, match="the cache was filled for another program")
    with sd.models.apply(model, sd.patterns.based(), backend="tiled"), other:
        logits(model, ids[:, 20:], past_key_values=cache)


# ---- the report ----------------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_layers_hold() -> None:
    model = build("gemma3")  # 2 heads of 8 for keys, float32: 128 bytes a token
    with sd.models.apply(model, {1: PATTERNS["first ones"]}) as applied:
        found = applied.cache_report(4096, batch=2)
    lines = str(found).splitlines()
    assert lines[0] == "layer 0: the last 7 keys; 128 B a token, 1.75 KiB for 4,096 tokens"
    assert lines[1].startswith("layer 1: first + ring: the first 2 keys, a ring of 4 keys; PROVED")
    assert lines[1].endswith("128 B a token, 1.25 KiB for 4,096 tokens")
    assert lines[2] == "all layers: 3 KiB, where 2 MiB hold every key"
    assert found.to_dict()["layers"][0]["most_tokens"] == 7 and found.bytes == 3072
