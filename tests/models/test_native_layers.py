"""Layers that are given nothing stay native, bit for bit; layers that are given something run it, or the call raises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.models.carried import request_of
from tests.models.families import build, left_padded, made, tokens

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 4)
_SIZES = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SHARED = {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


def _made(kind: str, config: str, **changes: Any) -> Any:
    return made(kind, config, **{**_SIZES, **changes})


def gemma4() -> Any:
    """Its last two layers read the keys of the first two, and see the mask's last rows alone where few logits are asked for."""
    return _made("Gemma4ForCausalLM", "Gemma4TextConfig", **_SHARED)


def gemma3n() -> Any:
    extra = {"vocab_size_per_layer_input": 89, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
    return _made("Gemma3nForCausalLM", "Gemma3nTextConfig", **_SHARED, **extra, activation_sparsity_pattern=[0.0] * 4)


def deepseek() -> Any:
    """Every layer masks keys that its indexer did not choose, where the implementation is called eager or sdpa."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "first_k_dense_replace": 4}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    return _made("DeepseekV32ForCausalLM", "DeepseekV32Config", **{**latent, **index, **experts, "num_key_value_heads": 4})


def minimax() -> Any:
    """Its first layer keeps no keys, and transformers asks it how many there are."""
    kinds = ["linear_attention", "full_attention"] * 2
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return _made("MiniMaxForCausalLM", "MiniMaxConfig", head_dim=8, layer_types=kinds, block_size=16, **experts)


@contextlib.contextmanager
def outputs(model: Any, layer: int, put: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
    """What a decoder layer gave, in the order of calls; ``put`` takes its place."""
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, out: Any) -> Any:
        seen.append(out[0] if isinstance(out, tuple) else out)
        return None if put is None else (put, *out[1:]) if isinstance(out, tuple) else put

    hook = model.base_model.layers[layer].register_forward_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "whole": lambda: {"input_ids": tokens()},
    "padded": left_padded,
    "short": lambda: {"input_ids": tokens(length=5)},  # within the window, where transformers makes no mask at all
    "one logit": lambda: {"input_ids": tokens(), "logits_to_keep": 1},
    "two logits": lambda: {"input_ids": tokens(), "logits_to_keep": 2},
}
MODELS = {"gemma4": gemma4, "gemma3n": gemma3n, "deepseek": deepseek, "minimax": minimax}


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_given_nothing_compute_the_same_bits(name: str) -> None:
    """One layer has a pattern, and its output is put back to what it was: then nothing else may differ."""
    model = MODELS[name]()
    for inputs in INPUTS.values():
        given = inputs()
        for layer in sd.models.layers.attention_layers(model):
            with outputs(model, layer) as seen:
                wanted = logits(model, **given)
            with (
                outputs(model, layer, put=seen[0]) as changed,
                sd.models.apply(model, {layer: sd.attend(window)}, backend="reference"),
            ):
                got = logits(model, **given)
            assert torch.equal(got, wanted)
            assert not torch.equal(changed[0], seen[0]), "the pattern did not run"


@pytest.mark.parametrize("name", ["gemma4", "gemma3n", "minimax"])
def test_native_patterns_of_all_layers_or_of_one_give_the_models_own_logits_and_tokens(name: str) -> None:
    model = MODELS[name]()
    native, greedy = sd.models.native_patterns(model), {"max_new_tokens": 10, "do_sample": False}
    generated = model.generate(tokens(), **greedy)
    for inputs in INPUTS.values():
        given = inputs()
        wanted = logits(model, **given)
        for patterns in (native, {min(native): native[min(native)]}, {max(native): native[max(native)]}):
            with sd.models.apply(model, patterns, backend="reference"):
                torch.testing.assert_close(logits(model, **given), wanted, atol=1e-4, rtol=0)
    for patterns in (native, {max(native): native[max(native)]}):
        with sd.models.apply(model, patterns, backend="reference"):
            assert torch.equal(model.generate(tokens(), **greedy), generated)


def test_shared_keys_are_kept_for_all_who_read_them_or_refused() -> None:
    model, ids = gemma3n(), tokens()
    own = sd.models.native_patterns(model)
    for given in ({0: causal}, {2: causal}):
        with sd.models.apply(model, given, backend="reference") as applied:
            assert logits(model, input_ids=ids, use_cache=False).isfinite().all()
            with pytest.raises(
                sd.UnsupportedError, match=r"shares its keys with native layer [20], .* Give all of \[0, 2\] patterns"
            ):
                applied.cache()
    for given in ({0: causal, 2: own[2]}, {0: own[0], 2: causal}):
        with sd.models.apply(model, given, backend="reference") as applied:
            cache = applied.cache()
            parts = [logits(model, input_ids=part, past_key_values=cache) for part in ids.split([12, 1, 8], dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, input_ids=ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("given", ["states", "states and choices"])
def test_programs_share_what_is_kept_of_keys(given: str) -> None:
    """Each layer goes on from a state of its own; where one of them chooses, the keys stay for both."""
    model, ids = gemma3n(), tokens()
    rings = [sd.patterns.ring_linear([decay] * 4) for decay in (0.5, 0.9)]
    programs = dict.fromkeys((0, 1), rings[0]) | {2: sd.patterns.moba(4, 2) if "choices" in given else rings[1], 3: rings[1]}
    with sd.models.apply(model, programs, backend="tiled") as applied:
        cache = applied.cache()
        parts = [logits(model, input_ids=part, past_key_values=cache) for part in ids.split([12, 1, 8], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, input_ids=ids), atol=1e-4, rtol=0)
        assert [layer.keys.shape[2] for layer in cache.layers[:2]] == [0 if given == "states" else 21, 0]


def test_a_linear_first_layer_does_not_count_keys() -> None:
    """MiniMax's cache tells transformers that no token was seen; with patterns in all its softmax layers that is noticed by none.

    (transformers' own padded steps and chunks of a prompt come out wrong there: they are no measure.)
    """
    model, ids, greedy = minimax(), tokens(), {"max_new_tokens": 8, "do_sample": False}
    for given in (causal, window):
        with sd.models.apply(model, given, backend="reference") as applied:
            whole = logits(model, input_ids=ids, use_cache=False)
            cache = applied.cache()
            with pytest.raises(sd.UnsupportedError, match="leave max_length out"):
                applied.cache(64)
            parts, start = [], 0
            for part in ids.split([12, 1, 1, 7], dim=1):
                place = torch.arange(start, start + part.shape[1])[None].expand(2, -1)
                parts.append(logits(model, input_ids=part, position_ids=place, past_key_values=cache))
                start += part.shape[1]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
            for inputs in ({"input_ids": ids}, left_padded()):
                assert torch.equal(model.generate(**inputs, **greedy), model.generate(**inputs, **greedy, use_cache=False))


# ---- what carries a request ------------------------------------------------------------


def carried(native: bool) -> tuple[Any, Any]:
    """The mask of a Llama as its layers see it, where one of them is native or none is, and the mask they saw before."""
    model, seen = build("llama"), []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    logits(model, **left_padded())
    with sd.models.apply(model, {0: window} if native else window, backend="reference"):
        logits(model, **left_padded())
    hook.remove()
    return seen[1], seen[0]


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "one row": lambda m: m[:, 0],
    "one sequence": lambda m: m[:1],
    "later keys": lambda m: m[..., 3:],
    "every other query": lambda m: m[:, :, ::2],
    "joined": lambda m: torch.cat([m, m], dim=-1),
    "padded": lambda m: torch.nn.functional.pad(m, (0, 3)),
    "combined": lambda m: m & torch.ones_like(m).tril(),
    "inverted": lambda m: ~m,
    "expanded": lambda m: m.expand(-1, 4, -1, -1),
    "as numbers": lambda m: m.to(torch.float32),
    "chosen": lambda m: torch.where(m, 0.0, -1.0),
    "counted": lambda m: m.sum(),
    "looked at": lambda m: m[0, 0, 3].tolist(),
    "decided": lambda m: bool(m.all()),
    "attention": lambda m: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 2, 4, 21, 8), attn_mask=m),
}


@pytest.mark.parametrize("native", [True, False], ids=["some native", "none native"])
def test_an_operation_on_a_mask_is_that_on_the_native_mask_and_loses_the_request(native: bool) -> None:
    mask, wanted = carried(native)
    assert request_of(mask) is not None
    assert (mask.shape, mask.dtype, mask.device) == (wanted.shape, wanted.dtype, wanted.device)
    for name, operation in OPERATIONS.items():
        got, right = operation(mask), operation(wanted)
        assert torch.equal(got, right) if isinstance(right, torch.Tensor) else got == right, name
        assert request_of(got) is None, name
    for same in (mask.clone(), mask.detach(), mask.to("cpu"), mask[:], mask[..., :21]):
        assert request_of(same) is request_of(mask) or request_of(same).part(0, 21, 21).q_length == 21
    part = mask[:, :, -3:, :]
    assert (request_of(part).q_offset, request_of(part).q_length, part.shape[2]) == (18, 3, 3)
    assert torch.equal(torch.where(part, 1, 0), torch.where(wanted[:, :, -3:], 1, 0))


def test_a_mask_changed_in_place_is_no_request_any_more() -> None:
    mask, _ = carried(native=True)
    mask = mask.clone()
    mask[:, :, 0] = False
    assert request_of(mask) is None
    mask, _ = carried(native=False)
    with pytest.raises(sd.UnsupportedError, match=r"computes __setitem__\(\) with its attention mask"):
        mask[:, :, 0] = False


# ---- names, and modules that do not call the interface ------------------------------------------------------------


def test_a_model_with_patterns_keeps_the_name_of_its_implementation() -> None:
    for implementation in ("sdpa", "eager"):
        model = build("gemma3", implementation)
        with sd.models.apply(model, {0: window}):
            name = model.config._attn_implementation
            assert name == implementation and name in ("sdpa", "eager") and f"{name}" == implementation
            assert model.model.layers[1].self_attn.config is model.config
            model.config.note = "seen by both"
            assert model.model.layers[0].self_attn.config.note == "seen by both"
            assert "note" in model.config.to_dict()
        assert type(model.config._attn_implementation) is str
        assert model.model.layers[0].self_attn.config is model.config


class Silent(LlamaAttention):
    """Computes its attention itself."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.o_proj(self.q_proj(hidden_states)), None


class Wrapping(LlamaAttention):
    """Leaves the attention to the class it inherits from."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Deciding(LlamaAttention):
    """Its source names the interface, ``ALL_ATTENTION_FUNCTIONS.get_interface(``, but it is not called."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 7:
            kwargs["interface"] = "ALL_ATTENTION_FUNCTIONS.get_interface("
        return self.o_proj(self.q_proj(hidden_states)), None


def test_a_module_that_never_calls_the_interface_is_refused() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Silent
    for given in (window, {1: window}, lambda index: window):
        with pytest.raises(sd.UnsupportedError, match=r"layer 1 \(Silent\): the module's own forward does not call"):
            sd.models.apply(model, given)
    with sd.models.apply(model, {0: window}) as applied:
        assert list(applied.patterns) == [0]
        logits(model, input_ids=tokens())
    model.model.layers[1].self_attn.__class__ = Wrapping
    with sd.models.apply(model, window) as applied:
        assert list(applied.patterns) == [0, 1]
        logits(model, input_ids=tokens())


def test_the_first_forward_confirms_that_every_layer_called() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Deciding
    with (
        sd.models.apply(model, window),
        pytest.raises(sd.UnsupportedError, match=r"layer 1: the forward ended, and the layer did not call"),
    ):
        logits(model, input_ids=tokens())


def test_inference_mode_with_padding() -> None:
    model, given = build("llama"), left_padded()
    with sd.models.apply(model, window):
        wanted = logits(model, **given)
        with torch.inference_mode():
            assert torch.equal(model(**left_padded()).logits, wanted)
            got = model.generate(**left_padded(), max_new_tokens=3, do_sample=False)
        assert torch.equal(got, model.generate(**given, max_new_tokens=3, do_sample=False))


# ---- the model files of the installed transformers ------------------------------------------------------------
