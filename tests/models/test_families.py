"""Native patterns compute what transformers computes: every family, with and without padding, through caches and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from tests.models.families import DECODERS, FAMILIES, WINDOW, build, left_padded, tokens

ATOL = 3e-5  # logits of size 1-5, fp32, two layers: 4 times the most that reordering the same sums was seen to give


def right_padded() -> dict[str, torch.Tensor]:
    """Model inputs whose first row ends with padding."""
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    ids[0, -5:], mask[0, -5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


INPUTS = {
    "no padding": lambda: {"input_ids": tokens()},
    "left padding": left_padded,
    "right padding": right_padded,
}


def logits(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    """Logits of the real tokens, (tokens, vocabulary). Rows of padding attend to nothing, where implementations differ."""
    with torch.no_grad():
        out = model(**inputs, **more).logits
    return out[inputs["attention_mask"].bool()] if "attention_mask" in inputs else out.flatten(0, 1)


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("inputs", INPUTS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("family", FAMILIES)
def test_native_patterns_give_the_models_own_logits(family: str, inputs: str) -> None:
    model, given = build(family), INPUTS[inputs]()
    wanted = logits(model, given)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        assert_same(logits(model, given), wanted)
    assert torch.equal(logits(model, given), wanted), "restore() gives the model back as it was"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_would_notice_a_wrong_pattern(family: str) -> None:
    model, given = build(family), left_padded()
    wanted = logits(model, given)
    for index, pattern in sd.models.native_patterns(model).items():
        one_key_less = pattern.mask & (sd.kv_idx != WINDOW)
        with sd.models.apply(model, {index: one_key_less}, backend="reference"):
            assert (logits(model, given) - wanted).abs().max() > 10 * ATOL


@pytest.mark.parametrize("family", DECODERS)
def test_generate_gives_the_same_tokens(family: str) -> None:
    """Left padding, and more tokens than the sliding windows and chunks hold, so that caches are cropped."""
    model, given = build(family), left_padded()
    greedy = {"max_new_tokens": 2 * WINDOW, "do_sample": False}
    wanted = model.generate(**given, **greedy)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        assert torch.equal(model.generate(**given, **greedy), wanted)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "llama4", "gpt_oss"])
@pytest.mark.parametrize("how", [{"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generate_with_other_caches(family: str, how: dict[str, Any]) -> None:
    model, given = build(family), left_padded()
    greedy = {"max_new_tokens": 2 * WINDOW, "do_sample": False, **how}
    wanted = model.generate(**given, **greedy)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        assert torch.equal(model.generate(**given, **greedy), wanted)


@pytest.mark.parametrize("family", DECODERS)
def test_chunked_prefill_and_decode_give_the_logits_of_one_forward(family: str) -> None:
    from transformers import DynamicCache

    model, given = build(family), left_padded(length=24)
    wanted = logits(model, given)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"), torch.no_grad():
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for length in (9, 1, 1, 6, 5, 1, 1):
            stop = start + length
            mask = given["attention_mask"][:, :stop]
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
            step = {
                "input_ids": given["input_ids"][:, start:stop],
                "attention_mask": mask,
                "past_key_values": cache,
            }
            parts.append(model(**step, position_ids=position).logits)
            start = stop
    got = torch.cat(parts, dim=1)[given["attention_mask"].bool()]
    with torch.no_grad():
        one = model(**given, position_ids=(given["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    assert_same(got, one[given["attention_mask"].bool()])
    assert wanted.shape == got.shape


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_models_too(family: str) -> None:
    model, given = build(family, "eager"), left_padded()
    wanted = logits(model, given)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        assert_same(logits(model, given), wanted)
    with sd.models.apply(model, {0: sd.models.native_patterns(model)[0]}, backend="reference"):
        assert_same(logits(model, given), wanted)  # the other layer runs transformers' eager function, over its eager mask


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "llama4", "gpt_oss"])
def test_packed_positions(family: str) -> None:
    model = build(family)
    given = {"input_ids": tokens(), "use_cache": False}
    given["position_ids"] = torch.tensor([[*range(13), *range(8)], [*range(3), *range(18)]])
    wanted = logits(model, given)
    alone = logits(model, {**given, "position_ids": torch.arange(21)[None]})
    assert (wanted - alone).abs().max() > 10 * ATOL, "transformers itself sees the sequences"
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        assert_same(logits(model, given), wanted)


@pytest.mark.parametrize("family", ["gemma3", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_exact_as_transformers_own(family: str, dtype: torch.dtype) -> None:
    model, given = build(family), left_padded()
    exact = logits(model, given)
    model.to(dtype)
    own = logits(model, given)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        got = logits(model, given)
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (own - exact).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_tiled_gives_the_same_logits(family: str) -> None:
    model, given = build(family), left_padded()
    wanted = logits(model, given)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="tiled"):
        assert_same(logits(model, given), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_tiled_gives_the_same_tokens(family: str) -> None:
    model, given = build(family), left_padded()
    greedy = {"max_new_tokens": 2 * WINDOW, "do_sample": False}
    wanted = model.generate(**given, **greedy)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="tiled"):
        assert torch.equal(model.generate(**given, **greedy), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3"])
def test_flex_gives_the_same_logits_and_tokens(family: str) -> None:
    model, given = build(family), left_padded(length=40)
    wanted, greedy = logits(model, given), {"max_new_tokens": WINDOW + 2, "do_sample": False}
    generated = model.generate(**given, **greedy)
    with sd.models.apply(model, sd.models.native_patterns(model), backend="flex"):
        assert_same(logits(model, given), wanted)
        assert torch.equal(model.generate(**given, **greedy), generated)
