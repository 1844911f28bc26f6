"""Padding means nothing to a pattern: rows alone, padded anywhere and packed give the same, through caches and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx, q_len, score
from sparsedsl.models.native import left_padding
from tests.models.families import WINDOW, build, tokens
from tests.models.rows import (
    LENGTHS,
    alone,
    assert_generates_as_if_alone,
    assert_gradients_as_if_alone,
    assert_rows_as_if_alone,
    batch,
    exact,
    in_parts,
    logits,
    named,
    packed,
    padded,
    real_slots,
    tolerance,
)

causal = kv_idx <= q_idx
near = causal & (q_idx - kv_idx < 4)
numbers = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9])
by_key, by_query = sd.table("by_key"), sd.table("by_query")
gain = sd.table("gain", dtype=float)
few = (by_key[kv_idx] < 5) | (q_idx == kv_idx)
PATTERNS: dict[str, Any] = {
    "window": near,
    "anchored": causal & ((q_idx - kv_idx < 4) | (kv_idx < 2)),
    "strided": causal & ((q_idx - kv_idx) % 3 == 0),
    "blocks": causal & (q_idx // 5 == kv_idx // 5),
    "per_head": causal & (q_idx - kv_idx < 2 + 3 * h),
    "by key": causal & few.bind(by_key=numbers),
    "by query": causal & (q_idx - kv_idx < by_query[q_idx]).bind(by_query=numbers),
    "score by place": sd.attend(causal, score=score - 0.1 * (kv_idx % 7) + gain[h, kv_idx % 9]).bind(gain=torch.randn(4, 9)),
    "score by distance": sd.attend(near, score=score - 0.2 * (q_idx - kv_idx)),
    "old left padding": causal & ((q_idx - left_padding[b]) // 5 == (kv_idx - left_padding[b]) // 5),
}
BY_LENGTH = {
    "last": causal & ((kv_idx >= kv_len - 9) | (q_idx - kv_idx < 3)),
    "first half": causal & ((2 * kv_idx < q_len) | near),
    "a table as long as a row": causal & ((by_query[q_idx] != by_query[kv_idx]) | near).bind(by_query=numbers[: max(LENGTHS)]),
}
LAYOUTS = ["left", "right", "both", "holes"]


@pytest.mark.parametrize("name", [*PATTERNS, *BY_LENGTH])
def test_a_row_gives_what_it_gives_alone(name: str) -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, {**PATTERNS, **BY_LENGTH}[name], backend="reference"):
        assert_rows_as_if_alone(model, rows, [*LAYOUTS, "packed"])


@pytest.mark.parametrize("name", ["anchored", "blocks", "by key", "score by place", "last"])
@pytest.mark.parametrize("backend", ["tiled", "cpp"])
def test_other_backends_too(backend: str, name: str) -> None:
    model, rows = build("llama"), alone((70, 35, 9))
    pattern = {**PATTERNS, **BY_LENGTH}[name]
    if name == "by key":
        pattern = causal & few.bind(by_key=numbers.repeat(3))
    for layout in [*LAYOUTS, "packed"]:
        inputs, real = batch(rows, layout, 75)
        with sd.models.apply(model, pattern, backend="reference"):
            wanted = logits(model, **inputs)
        with sd.models.apply(model, pattern, backend=backend):
            torch.testing.assert_close(logits(model, **inputs)[real], wanted[real], atol=3e-5, rtol=0)


def test_encoders_see_both_ways() -> None:
    """Queries of padding look at real keys, and tables have no entries for them."""
    same_block = (by_key[q_idx] == by_key[kv_idx]).bind(by_key=torch.arange(21) // 4)
    both_ways = same_block | (kv_idx == kv_len - 1) | (kv_idx < 1)
    model, rows = exact("bert"), alone()
    with sd.models.apply(model, both_ways, backend="reference"):
        assert_rows_as_if_alone(model, rows, LAYOUTS)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral", "llama4", "gpt2"])
def test_families_with_windows_chunks_caps_and_sinks(family: str) -> None:
    model, rows = exact(family), alone()
    with sd.models.apply(model, PATTERNS["anchored"], backend="reference"):
        assert_rows_as_if_alone(model, rows, LAYOUTS)


# ---- through caches ------------------------------------------------------------------------------------------------------------------


CACHES: dict[str, Any] = {
    "dynamic": lambda applied: applied.cache(),
    "static": lambda applied: StaticCache(config=applied.model.config, max_cache_len=40),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("cache", CACHES)
def test_chunks_and_single_tokens(cache: str, name: str) -> None:
    """Chunk by chunk, some rows have no token yet, or none any more; padding on the right becomes a hole as soon as a token follows."""
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, PATTERNS[name], backend="reference") as applied:
        wanted = torch.cat([logits(model, input_ids=row)[0] for row in rows])
        for layout in LAYOUTS:
            inputs, real = batch(rows, layout)
            got = in_parts(model, inputs, [5, 1, 12, 1, 1, 7], CACHES[cache](applied))[real]
            torch.testing.assert_close(got, wanted, atol=tolerance(model, rows), rtol=0, msg=named(layout))


@pytest.mark.parametrize("name", ["anchored", "blocks", "by key"])
def test_rows_padded_on_the_right_go_on(name: str) -> None:
    model, prompts, more = exact("llama"), alone((14, 9, 6)), tokens(3, 8)[:, 4:]
    rows = [torch.cat([row, own[None]], dim=1) for row, own in zip(prompts, more, strict=True)]
    real = torch.cat([real_slots("right", (14, 9, 6), 14), torch.ones(3, 4, dtype=torch.bool)], dim=1)
    inputs = padded(rows, real)
    with sd.models.apply(model, PATTERNS[name], backend="reference") as applied:
        got = in_parts(model, inputs, [14, 1, 1, 2], applied.cache())[real]
        wanted = torch.cat([logits(model, input_ids=row)[0] for row in rows])
    torch.testing.assert_close(got, wanted, atol=tolerance(model, rows), rtol=0)


@pytest.mark.parametrize("layout", ["left", "right"])
def test_a_sliding_window_cache_that_has_dropped_keys(layout: str) -> None:
    """A window within the cache's own, cut by a table over keys: places are counted from the first token, though it is gone."""
    model, rows = exact("mistral"), alone()
    real = real_slots(layout)
    with sd.models.apply(model, near & few.bind(by_key=numbers), backend="reference") as applied:
        cache = applied.cache()
        got = in_parts(model, padded(rows, real), [9, *[1] * 9, 5, *[1] * 4], cache)[real]
        wanted = torch.cat([logits(model, input_ids=row)[0] for row in rows])
        # A row that ended earlier may go on from there.
        assert cache.layers[0].keys.shape[2] < (WINDOW if layout == "left" else 2 * WINDOW)
    torch.testing.assert_close(got, wanted, atol=tolerance(model, rows), rtol=0)


def test_a_window_over_a_hole_reaches_further_than_the_cache_keeps() -> None:
    model, rows, window = exact("mistral"), alone((16, 20)), causal & (q_idx - kv_idx < WINDOW - 1)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, 8:12] = False
    inputs = padded(rows, real)
    parts = [12, *[1] * 8]
    with sd.models.apply(model, window, backend="reference") as applied:
        wanted = torch.cat([logits(model, input_ids=row)[0] for row in rows])
        for cache in (applied.cache(), DynamicCache()):
            got = in_parts(model, inputs, parts, cache)[real]
            torch.testing.assert_close(got, wanted, atol=tolerance(model, rows), rtol=0)
        with torch.no_grad():  # a cache that the forward makes keeps the layer's own window
            made = model(
                inputs["input_ids"][:, :12], attention_mask=inputs["attention_mask"][:, :12], use_cache=True
            ).past_key_values
        left = {name: x if name == "attention_mask" else x[:, 12:13] for name, x in inputs.items()}
        left["attention_mask"] = left["attention_mask"][:, :13]
        dropped = r"layer 0: its cache has dropped the keys .*DynamicCache\(\), without a conf"
        with pytest.raises(sd.UnsupportedError, match=dropped):
            logits(model, **left, past_key_values=made)


@pytest.mark.parametrize("name", PATTERNS)
def test_generate_goes_on_as_each_row_alone(name: str) -> None:
    model = exact("llama")
    with sd.models.apply(model, PATTERNS[name], backend="reference"):
        assert_generates_as_if_alone(model, alone(), 8)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_generate_in_other_ways(family: str, how: dict[str, Any]) -> None:
    model = exact(family)
    pattern = causal & (q_idx - kv_idx < 7) & (kv_idx % 5 != 3) if "cache_implementation" in how else PATTERNS["anchored"]
    with sd.models.apply(model, pattern, backend="reference"):
        assert_generates_as_if_alone(model, alone(), 8, **how)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("layout", [*LAYOUTS, "packed"])
def test_gradients_are_those_of_the_rows_alone(layout: str) -> None:
    model, rows = exact("llama"), alone()
    with sd.models.apply(model, PATTERNS["anchored"], backend="reference"):
        assert_gradients_as_if_alone(model, rows, layout)


# ---- what transformers counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "llama4", "modernbert"])
def test_native_patterns_count_as_transformers_does_holes_too(family: str) -> None:
    model, (inputs, real) = build(family), batch(alone(), "holes")
    inputs["input_ids"] = tokens(*real.shape)
    if family == "modernbert":
        del inputs["position_ids"]
    wanted = logits(model, **inputs)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        torch.testing.assert_close(logits(model, **inputs)[real], wanted[real], atol=3e-5, rtol=0)


def test_indices_of_slots_are_there_by_name() -> None:
    model, rows = exact("llama"), alone()
    inputs, real = batch(rows, "left")
    shift = left_padding[b]
    own = causal & ((q_idx - kv_idx < 4) | ((kv_idx >= shift) & (kv_idx < shift + 2)))
    with sd.models.apply(model, PATTERNS["anchored"], backend="reference"):
        by_token = logits(model, **inputs)[real]
    with sd.models.apply(model, own, backend="reference", indices="slots"):
        torch.testing.assert_close(logits(model, **inputs)[real], by_token, atol=1e-12, rtol=0)
    with sd.models.apply(model, PATTERNS["anchored"], backend="reference", indices="slots"):
        assert (logits(model, **inputs)[real] - by_token).abs().max() > 0.01
    with pytest.raises(sd.PatternError, match='indices must be "tokens" or "slots", what q_idx and kv_idx count; got \'places\''):
        sd.models.apply(model, causal, indices="places")  # type: ignore[arg-type]


def test_packed_positions_that_begin_elsewhere() -> None:
    """Tokens are counted from the first of their sequence; slots are the positions that were given, as in transformers."""
    model, rows = exact("llama"), alone((9, 12))
    inputs = packed(rows)
    later = {**inputs, "position_ids": inputs["position_ids"] + torch.tensor([7] * 9 + [3] * 12)}
    mask = PATTERNS["blocks"]
    with sd.models.apply(model, mask, backend="reference"):
        by_token = logits(model, **inputs)
        # (rotations are relative)
        torch.testing.assert_close(logits(model, **later), by_token, atol=tolerance(model, rows), rtol=0)
    with sd.models.apply(model, mask, backend="reference", indices="slots"):
        assert (logits(model, **later) - by_token).abs().max() > 0.01
