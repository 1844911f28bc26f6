"""Stacks beside a decoder of text: encoders, decoders that attend to an encoder, hybrid layers, towers of images, linear first layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.lang.evaluation import evaluate
from tests.models.families import made, tokens

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 4)
near = (q_idx - kv_idx < 3) & (kv_idx - q_idx < 3)
ATOL = 1e-4
_BART = {
    "vocab_size": 89, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "forced_eos_token_id": None, "decoder_start_token_id": 2,
}  # fmt: skip


def padded(side: str = "right") -> dict[str, torch.Tensor]:
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    part = slice(-5, None) if side == "right" else slice(0, 5)
    ids[0, part], mask[0, part] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def dense(mask: Any, length: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    a = torch.arange
    env: dict[str, Any] = {"q_idx": a(length)[:, None], "kv_idx": a(length)[None], "q_len": length, "kv_len": length}
    allowed = evaluate(mask.expr, env)[None, None].expand(2, 1, length, length)
    return allowed if valid is None else allowed & valid[:, None, None].bool()


# ---- encoder and decoder ------------------------------------------------------------


def bart() -> Any:
    return made("BartForConditionalGeneration", "BartConfig", **_BART)


def whisper() -> Any:
    sizes = {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}
    del sizes["max_position_embeddings"], sizes["forced_eos_token_id"]
    return made("WhisperForConditionalGeneration", "WhisperConfig", **sizes)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    if model.config.model_type == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))}
    return padded()


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_of(model), decoder_input_ids=tokens(length=13), use_cache=False, **more).logits


@pytest.mark.parametrize("make", [bart, whisper])
def test_native_patterns_of_both_stacks_give_the_models_own_logits_and_tokens(make: Any) -> None:
    model = make()
    greedy = {"max_new_tokens": 8, "do_sample": False}
    wanted, generated = logits(model), model.generate(**inputs_of(model), **greedy)
    beams = model.generate(**inputs_of(model), **greedy, num_beams=2)
    for stack in (model.get_encoder(), model.get_decoder()):
        with sd.models.apply(stack, sd.models.native_patterns(stack), backend="reference") as applied:
            assert list(applied.patterns) == [0, 1]
            torch.testing.assert_close(logits(model), wanted, atol=ATOL, rtol=0)
            if stack is model.get_decoder():
                assert torch.equal(model.generate(**inputs_of(model), **greedy), generated)
            assert torch.equal(model.generate(**inputs_of(model), **greedy, num_beams=2), beams)
    encoder = sd.models.apply(model.get_encoder(), {0: True}, backend="reference")
    decoder = sd.models.apply(model.get_decoder(), {1: causal}, backend="reference")
    torch.testing.assert_close(logits(model), wanted, atol=ATOL, rtol=0)
    assert len(sd.models.applied(model)) == 2
    encoder.restore()
    decoder.restore()
    assert torch.equal(logits(model), wanted)
    assert not hasattr(model.config, "sparsedsl")


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_graph_of_a_model_of_two_stacks(stack: str) -> None:
    """Whisper copies its configuration in its forward; the mask of a stack without patterns is its own."""
    model, pattern = whisper(), {"encoder": near, "decoder": window}[stack]
    with sd.models.apply(getattr(model, f"get_{stack}")(), pattern, backend="reference"):
        given = {**inputs_of(model), "decoder_input_ids": tokens(length=13)}
        torch._dynamo.reset()
        with torch.no_grad():
            got = torch.compile(model, backend="eager", fullgraph=True)(**given).logits
            torch._dynamo.reset()
            torch.testing.assert_close(got, model(**given).logits, atol=ATOL, rtol=0)


def test_a_pattern_in_an_encoder_is_its_dense_mask() -> None:
    model, given = bart(), padded()
    encoder, real = model.get_encoder(), given["attention_mask"].bool()
    with torch.no_grad():
        wanted = encoder(given["input_ids"], attention_mask=dense(near, 21, given["attention_mask"])).last_hidden_state
        with sd.models.apply(encoder, near, backend="reference"):
            got = encoder(**given).last_hidden_state
    seen = real & dense(near, 21, given["attention_mask"])[:, 0].any(-1)
    torch.testing.assert_close(got[seen], wanted[seen], atol=ATOL, rtol=0)


@pytest.mark.parametrize("make", [bart, whisper])
def test_a_pattern_in_a_decoder_leaves_cross_attention_native(make: Any) -> None:
    """Greedy search by a cache against one forward under the dense mask, with as many keys as the encoder has on the way."""
    model = make()
    given = inputs_of(model) if model.config.model_type == "whisper" else {"input_ids": tokens(length=16)}
    ids = torch.full((2, 1), 2)
    with torch.no_grad():
        hidden = model.get_encoder()(**given).last_hidden_state
        outputs = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)
        while ids.shape[1] < 20:
            out = model.get_decoder()(
                ids, attention_mask=dense(window, ids.shape[1]), encoder_hidden_states=hidden, use_cache=False
            )
            head = getattr(model, "lm_head", None) or model.proj_out
            best = head(out.last_hidden_state[:, -1]) + getattr(model, "final_logits_bias", 0.0)
            ids = torch.cat([ids, best.argmax(-1, keepdim=True)], dim=1)
    with sd.models.apply(model.get_decoder(), window, backend="reference"):
        got = model.generate(encoder_outputs=outputs, max_new_tokens=19, do_sample=False)
    assert torch.equal(got, ids[:, -got.shape[1] :]) and got.shape[1] >= 19  # (Whisper leaves out the start)


def test_a_decoder_alone_with_room_for_cross_attention() -> None:
    model = made("BartForCausalLM", "BartConfig", **_BART)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        wanted, dense_window = model(**padded("left")).logits, model(tokens(), attention_mask=dense(window, 21)).logits
    generated = model.generate(**padded("left"), **greedy)
    real = padded("left")["attention_mask"].bool()
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference") as applied, torch.no_grad():
        assert list(applied.patterns) == [0, 1]
        torch.testing.assert_close(model(**padded("left")).logits[real], wanted[real], atol=ATOL, rtol=0)
        assert torch.equal(model.generate(**padded("left"), **greedy), generated)
    with sd.models.apply(model, window, backend="reference"), torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, dense_window, atol=ATOL, rtol=0)


def test_the_whole_is_refused_and_the_advice_works() -> None:
    model = bart()
    for call in (lambda: sd.models.apply(model, causal), lambda: sd.models.native_patterns(model)):
        with pytest.raises(sd.UnsupportedError, match=r"models.apply\(model.get_encoder\(\), ...\)"):
            call()


def test_stacks_with_a_configuration_of_their_own() -> None:
    """T5Gemma: rotary positions, an encoder that sees both ways."""
    part = {"vocab_size": 89, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    part |= {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2}
    part |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_logit_softcapping": None}
    model = made("T5GemmaForConditionalGeneration", "T5GemmaConfig", encoder=part, decoder=part, vocab_size=89)
    model.config.decoder_start_token_id = 2
    wanted = logits(model)
    for stack in (model.get_encoder(), model.get_decoder()):
        with sd.models.apply(stack, sd.models.native_patterns(stack), backend="reference"):
            torch.testing.assert_close(logits(model), wanted, atol=ATOL, rtol=0)


# ---- hybrid layers ------------------------------------------------------------


def falcon_h1() -> Any:
    sizes = {"vocab_size": 89, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    sizes |= {
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return made("FalconH1ForCausalLM", "FalconH1Config", **sizes)


def test_attention_inside_hybrid_layers_takes_masks_and_programs() -> None:
    model, ids, greedy = falcon_h1(), tokens(), {"max_new_tokens": 8, "do_sample": False}
    native = sd.models.native_patterns(model)
    assert [str(pattern) for pattern in native.values()] == ["attend(kv_idx <= q_idx)"] * 2
    with torch.no_grad():
        wanted, generated = model(**padded("left")).logits, model.generate(**padded("left"), **greedy)
        real = padded("left")["attention_mask"].bool()
        for given in (native, causal, {1: causal}):
            with sd.models.apply(model, given, backend="reference"):
                torch.testing.assert_close(model(**padded("left")).logits[real], wanted[real], atol=ATOL, rtol=0)
                assert torch.equal(model.generate(**padded("left"), **greedy), generated)
        dense_window = model(ids, attention_mask=dense(window, 21), use_cache=False).logits
        with sd.models.apply(model, window, backend="reference"):
            torch.testing.assert_close(model(ids).logits, dense_window, atol=ATOL, rtol=0)
        with sd.models.apply(model, sd.patterns.moba(4, 5), backend="reference"):  # 5 chunks of 4 and the own one: all keys
            whole = model(ids[:, :20]).logits
            torch.testing.assert_close(whole, model(ids[:, :20], use_cache=False).logits, atol=ATOL, rtol=0)
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids[:, :20].split([13, 1, 6], dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=ATOL, rtol=0)


# ---- towers of images ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Siglip", "CLIP"])
def test_layers_that_are_called_without_any_mask(kind: str) -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    model = made(f"{kind}VisionModel", f"{kind}VisionConfig", **sizes)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state
        for given in (sd.models.native_patterns(model), {1: True}, sd.kv_idx >= 0):
            with sd.models.apply(model, given, backend="reference"):
                torch.testing.assert_close(model(pixels).last_hidden_state, wanted, atol=ATOL, rtol=0)
        with sd.models.apply(model, near, backend="reference"):
            assert (model(pixels).last_hidden_state - wanted).abs().max() > 0.01
        with sd.models.apply(model, sd.kv_idx == sd.q_idx, backend="reference"):  # each patch its own value
            alone = model(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, wanted)
    assert (alone - wanted).abs().max() > 0.01


def test_the_tower_and_the_text_of_one_model() -> None:
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision, text = {**layers, "image_size": 16, "patch_size": 4}, {**layers, "vocab_size": 89, "max_position_embeddings": 21}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = made("SiglipModel", "SiglipConfig", text_config=text, vision_config=vision)
    given = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": tokens()}
    with torch.no_grad():
        wanted = model(**given).logits_per_image
        tower = sd.models.apply(model.vision_model, True, backend="reference")
        words = sd.models.apply(model, True, backend="reference")
        assert (list(tower.patterns), list(words.patterns)) == ([0, 1], [0, 1])
        torch.testing.assert_close(model(**given).logits_per_image, wanted, atol=ATOL, rtol=0)
        assert set(sd.models.applied(model)) == {tower, words}
        tower.restore()
        words.restore()
        assert torch.equal(model(**given).logits_per_image, wanted)
