"""What ``sd.models.apply`` means: patterns of the user's own against a dense mask given to transformers, and every refusal."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.models import left_padding, sinks
from tests.models.families import WINDOW, build, left_padded, tokens

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 4)
anchored = causal & ((q_idx - kv_idx < 4) | (kv_idx < 2))
strided = causal & ((q_idx - kv_idx) % 3 == 0)
blocks = causal & (q_idx // 5 == kv_idx // 5)
per_head = causal & (q_idx - kv_idx < 2 + 3 * h)
HYBRIDS = {"window": window, "anchored": anchored, "strided": strided, "blocks": blocks, "per_head": per_head}
ATOL = 3e-5


def forward(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def dense(mask: sd.Mask, rows: int, keys: int, *, heads: int = 4, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The mask as the 4-D boolean tensor that transformers takes, (2, heads, rows, keys)."""
    a = torch.arange
    env = {
        "b": a(2).view(2, 1, 1, 1),
        "h": a(heads).view(1, heads, 1, 1),
        "q_idx": a(rows).view(1, 1, rows, 1),
    }
    env |= {"kv_idx": a(keys).view(1, 1, 1, keys), "q_len": rows, "kv_len": keys}
    allowed = evaluate(mask.expr, env).expand(2, heads, rows, keys)
    return allowed if valid is None else allowed & valid[:, None, None, :].bool()


def greedy_by_hand(model: Any, ids: torch.Tensor, new: int, mask: sd.Mask) -> torch.Tensor:
    """Greedy tokens without a cache, transformers' own attention under a dense mask."""
    for _ in range(new):
        best = forward(model, input_ids=ids, attention_mask=dense(mask, ids.shape[1], ids.shape[1]), use_cache=False)[:, -1]
        ids = torch.cat([ids, best.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_means_what_the_dense_mask_means_to_transformers(family: str, name: str) -> None:
    model, given, mask = build(family), left_padded(), HYBRIDS[name]
    real = given["attention_mask"].bool()
    allowed = dense(mask, 21, 21, valid=given["attention_mask"])
    mapping: Any = allowed
    if family in ("gemma2", "gpt_oss"):  # eager takes additive masks, these models one for each type of layer
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        mapping = {"full_attention": additive, "sliding_attention": additive}
    wanted = forward(model, input_ids=given["input_ids"], attention_mask=mapping)
    seen = given["attention_mask"][:, None, :].bool() & dense(mask, 21, 21)[:, 0]
    real &= seen.any(-1)
    with sd.models.apply(model, mask, backend="reference", indices="slots"):
        torch.testing.assert_close(forward(model, **given)[real], wanted[real], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generate_with_a_pattern_is_greedy_search_under_its_dense_mask(family: str, name: str) -> None:
    """Mistral's caches keep 8 keys; patterns that look further back get caches that keep all."""
    model, ids = build(family), tokens()
    wanted = greedy_by_hand(model, ids, 12, HYBRIDS[name])
    with sd.models.apply(model, HYBRIDS[name], backend="reference"):
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)


def test_layers_take_patterns_from_a_mapping_or_a_function_and_the_rest_stay_native() -> None:
    model, ids = build("llama"), tokens()
    native = forward(model, input_ids=ids)
    by_mapping = _applied(model, {1: window}, ids)
    assert torch.equal(_applied(model, lambda index: window if index == 1 else None, ids), by_mapping)
    assert torch.equal(_applied(model, lambda index: None, ids), native)
    assert not torch.equal(_applied(model, window, ids), by_mapping)
    assert (by_mapping - native).abs().max() > 0.01
    assert torch.equal(forward(model, input_ids=ids), native)


def _applied(model: Any, patterns: Any, ids: torch.Tensor) -> torch.Tensor:
    with sd.models.apply(model, patterns, backend="reference"):
        return forward(model, input_ids=ids)


def test_layers_with_the_same_pattern_share_one_compiled_attention() -> None:
    model = build("gemma3")
    with sd.models.apply(model, {0: window, 1: causal & (q_idx - kv_idx <= 3)}, backend="reference") as applied:
        forward(model, input_ids=tokens())
        compiled = {id(x) for binding in applied._bindings.values() for x, _ in binding._by_form.values()}
    assert len(compiled) == 1


def test_a_pattern_says_everything_and_a_mask_leaves_cap_and_sinks() -> None:
    model, ids = build("gpt_oss"), tokens()
    kept = _applied(model, causal, ids)
    assert torch.equal(_applied(model, sd.attend(causal, sink=sinks[h]), ids), kept)
    with pytest.warns(UserWarning, match="sink logits are not part of the pattern"):
        assert (_applied(model, sd.attend(causal), ids) - kept).abs().max() > 0.01
    capped = build("gemma2")
    with pytest.warns(UserWarning, match="soft cap"):
        assert (_applied(capped, sd.attend(causal), ids) - _applied(capped, causal, ids)).abs().max() > 0.001
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _applied(capped, sd.attend(causal, score=sd.tanh(score / 2) * 2), ids)


def test_bound_tables_scores_and_scale() -> None:
    model, ids = build("llama"), tokens()
    slope = sd.table("slope", dtype=float)
    alibi = sd.attend(causal, score=score - slope[h] * (q_idx - kv_idx), scale=0.5)
    with sd.models.apply(model, alibi.bind(slope=torch.tensor([0.1, 0.2, 0.3, 0.4])), backend="reference"):
        whole = forward(model, input_ids=ids)
        cache = DynamicCache(config=model.config)
        parts = [forward(model, input_ids=part, past_key_values=cache) for part in ids.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=ATOL, rtol=0)
    with pytest.raises(sd.TableError, match=r"nothing binds the table slope .* pattern.bind\(slope=tensor\)"):
        sd.models.apply(model, alibi)


def test_left_padding_is_there_for_patterns_of_slots_that_count_from_the_first_token() -> None:
    """Blocks counted from the first real token make padding invisible."""
    model, given = build("llama"), left_padded(padding=5)
    place = {i: i - left_padding[b] for i in (q_idx, kv_idx)}
    own = causal & (place[q_idx] // 5 == place[kv_idx] // 5)
    position = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with sd.models.apply(model, own, backend="reference", indices="slots"):
        padded = forward(model, **given, position_ids=position)[0, 5:]
        alone = forward(model, input_ids=given["input_ids"][:1, 5:])[0]
    torch.testing.assert_close(padded, alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["window", "anchored", "strided", "blocks", "per_head"])
def test_packed_sequences_are_as_if_alone(name: str) -> None:
    model, ids = build("llama"), tokens(1, 21)
    position = torch.tensor([[*range(13), *range(8)]])
    with sd.models.apply(model, HYBRIDS[name], backend="reference"):
        packed = forward(model, input_ids=ids, position_ids=position, use_cache=False)
        alone = [forward(model, input_ids=part, use_cache=False) for part in ids.split([13, 8], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=ATOL, rtol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradients_reach_weights_and_sinks() -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model, ids = build("gpt_oss"), tokens()
    wanted = gradients()
    with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
        got = gradients()
        model.train().gradient_checkpointing_enable()
        again = gradients()
    for one, two, three in zip(wanted, got, again, strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(three, one, atol=1e-4, rtol=1e-3)


# ---- other models, copies, leaving ------------------------------------------------------------


def test_a_model_that_shares_the_configuration_is_left_alone() -> None:
    model, ids = build("llama"), tokens()
    other = LlamaForCausalLM(model.config).eval()
    assert other.config is model.config
    wanted = forward(other, input_ids=ids)
    first = sd.models.apply(model, window, backend="reference")
    assert torch.equal(forward(other, input_ids=ids), wanted)
    second = sd.models.apply(other, window, backend="reference")
    changed = forward(other, input_ids=ids)
    first.restore()
    first.restore()
    assert torch.equal(forward(other, input_ids=ids), changed), "restoring one must not switch the other off"
    second.restore()
    assert torch.equal(forward(other, input_ids=ids), wanted)
    assert model.config._attn_implementation == "sdpa"


def test_copies_and_saved_models_keep_their_patterns() -> None:
    model, ids = build("gemma3"), tokens()
    applied = sd.models.apply(model, {1: anchored}, backend="reference")
    wanted = forward(model, input_ids=ids)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    applied.restore()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(forward(twin, input_ids=ids), wanted)
    assert torch.equal(forward(loaded, input_ids=ids), wanted)
    assert not torch.equal(forward(model, input_ids=ids), wanted)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_repr_names_what_runs_where() -> None:
    model = build("gemma3")
    with sd.models.apply(model, {1: window}) as applied:
        assert repr(applied) == (
            "<AppliedPatterns on Gemma3ForCausalLM: layer 1 attend((kv_idx <= q_idx) & (q_idx - kv_idx < 4)); native: layer 0>"
        )
        assert list(applied.patterns) == [1]
    assert ", restored" in repr(applied)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_torch_compile_of_the_model_gives_the_same_logits() -> None:
    model, ids = build("gemma3"), tokens()
    with sd.models.apply(model, {1: anchored}, backend="reference"):
        wanted = forward(model, input_ids=ids)
        got = forward(torch.compile(model, backend="eager"), input_ids=ids)
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


# ---- refusals ------------------------------------------------------------


def test_a_cropped_cache_is_refused_where_keys_are_missing() -> None:
    """A cache made inside a forward keeps a window: decoding with it is an error, never another result."""
    model, ids = build("mistral"), tokens()
    with sd.models.apply(model, anchored, backend="reference") as applied:
        with torch.no_grad():
            out = model(ids, use_cache=True)
        with pytest.raises(sd.UnsupportedError, match=r"dropped the keys before position 14 .*handle.cache\(\)"):
            forward(model, input_ids=ids[:, :1], past_key_values=out.past_key_values)
        cache = applied.cache()
        parts = [forward(model, input_ids=part, past_key_values=cache) for part in ids.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), out.logits, atol=ATOL, rtol=0)
    with sd.models.apply(model, causal, backend="reference"):  # a static one is made for the pattern, and keeps all
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static"), wanted)
    with sd.models.apply(model, window, backend="reference"):  # needs 4 keys of the 8
        cache = DynamicCache(config=model.config)
        parts = [forward(model, input_ids=part, past_key_values=cache) for part in ids.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), forward(model, input_ids=ids), atol=ATOL, rtol=0)


@pytest.mark.parametrize("given", [anchored, {0: strided}, sd.patterns.moba(4, 2)], ids=["anchored", "one layer", "program"])
@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_guessed_tokens_beyond_the_window_are_taken_back(given: Any, how: str) -> None:
    """Mistral's caches keep 8 keys, and record more where tokens may be taken back; patterns get caches that keep all."""
    model, ids = build("mistral"), tokens(1, 12).repeat(1, 2)
    greedy: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    assistant = build("mistral")
    for parameter in assistant.parameters():
        parameter.data.mul_(1.02)
    guesses = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_model": assistant}}[how]
    with sd.models.apply(model, given, backend="reference"):
        wanted = model.generate(ids, **greedy)
        assert torch.equal(model.generate(ids, **greedy, **guesses), wanted)


REFUSED_CALLS = {
    "4-D mask": (
        lambda m: m(tokens(), attention_mask=torch.ones(2, 1, 21, 21, dtype=torch.bool)),
        r"layer 0 got a finished mask \(2, 1, 21, 21\).*Pass a 2-D attention_mask",
    ),
    "attention weights": (
        lambda m: m(tokens(), output_attentions=True),
        "output_attentions=True asks for the S x S weights",
    ),
    "other keys": (
        lambda m: _with_other_keys(m),
        "the layer has 30 keys, but transformers announced 21",
    ),
}


def _with_other_keys(model: Any) -> None:
    cache = DynamicCache()
    heads = torch.zeros(2, 2, 9, 8)
    cache.update(heads, heads, 0)
    cache.get_mask_sizes = lambda length, layer: (length, 0)  # type: ignore[method-assign]
    cache.get_seq_length = lambda layer_idx=0: 0  # type: ignore[method-assign]
    model(tokens(), past_key_values=cache)


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_calls_that_would_lose_something_are_refused(name: str) -> None:
    call, message = REFUSED_CALLS[name]
    model = build("llama")
    with sd.models.apply(model, window, backend="reference"), pytest.raises(sd.SparseDSLError, match=message):
        call(model)


def test_overlays_of_the_model_or_its_caller_are_refused_but_native_layers_keep_them() -> None:
    model, ids = build("gemma3"), tokens()
    blocks_of_an_image = torch.full((2, 21), -1)
    blocks_of_an_image[:, 4:9] = 0

    def masks() -> dict[str, Any]:
        base = dict(
            config=model.config,
            inputs_embeds=torch.zeros(2, 21, 32),
            attention_mask=None,
            past_key_values=None,
        )
        return {
            "full_attention": create_causal_mask(**base, block_sequence_ids=blocks_of_an_image),
            "sliding_attention": create_sliding_window_causal_mask(**base),
        }

    wanted = forward(model, input_ids=ids, attention_mask=masks())
    native = sd.models.native_patterns(model)
    with sd.models.apply(model, {0: native[0]}, backend="reference"):
        torch.testing.assert_close(forward(model, input_ids=ids, attention_mask=masks()), wanted, atol=ATOL, rtol=0)
    with (
        sd.models.apply(model, {1: native[1]}, backend="reference"),
        pytest.raises(
            sd.UnsupportedError,
            match=r"combines its mask with transformers[.]masking_utils[.]blockwise_overlay",
        ),
    ):
        forward(model, input_ids=ids, attention_mask=masks())


def test_a_configuration_read_wrongly_is_noticed_when_the_model_asks_for_its_mask() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.is_causal = False
    message = r"layer 1: the model asks for the mask causal, but .* bidirectional"
    with sd.models.apply(model, sd.models.native_patterns(model)), pytest.raises(sd.UnsupportedError, match=message):
        model(tokens())


def test_a_stack_that_tells_its_layers_to_be_causal() -> None:
    """CLIP's attention is made for images; its text model hands it a causal mask."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=89, max_position_embeddings=40, **sizes)).eval()
    given = left_padded()
    real = given["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**given).last_hidden_state
        with sd.models.apply(model, sd.models.native_patterns(model), backend="reference"):
            torch.testing.assert_close(model(**given).last_hidden_state[real], wanted[real], atol=ATOL, rtol=0)


def test_dropout_is_refused_in_training_only() -> None:
    model = build("llama")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with sd.models.apply(model, window, backend="reference"):
        forward(model, input_ids=tokens())
        with pytest.raises(sd.UnsupportedError, match=r"attention dropout is 0\.1 in training"):
            model.train()(tokens())


def test_switching_the_implementation_under_applied_patterns_is_refused() -> None:
    model = build("llama")
    with sd.models.apply(model, window):
        model.set_attn_implementation("eager")
        with pytest.raises(sd.UnsupportedError, match=r"set to 'eager', which would ignore them; call restore\(\)"):
            model(tokens())


def _falcon() -> Any:
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(FalconConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def _t5(kind: str) -> Any:
    import transformers

    config = transformers.T5Config(vocab_size=8, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    return getattr(transformers, kind)(config)


REFUSED = {
    "no model": (
        lambda: (torch.nn.Linear(2, 2), window),
        sd.PatternError,
        "wants a transformers model .* got Linear",
    ),
    "no such layer": (
        lambda: (build("llama"), {7: window}),
        sd.PatternError,
        r"no attention layer has the index \[7\].*\[0, 1\]",
    ),
    "no pattern": (
        lambda: (build("llama"), {0: 5}),
        sd.PatternError,
        "the pattern of layer 0 must be a Mask or a Pattern; got 5",
    ),
    "nothing like it": (lambda: (build("llama"), 5), sd.PatternError, "must be a Mask or a Pattern; got 5"),
    "a list": (
        lambda: (build("llama"), [window]),
        sd.PatternError,
        r"got a list\. One for each layer .* dict\(enumerate\(patterns\)\)",
    ),
    "no interface": (
        lambda: (_falcon(), window),
        sd.UnsupportedError,
        "no layer that calls transformers' attention interface",
    ),
    "encoder-decoder": (lambda: (_t5("T5Model"), window), sd.UnsupportedError, "encoder-decoder"),
    "position bias": (lambda: (_t5("T5EncoderModel"), window), sd.UnsupportedError, "position bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_and_patterns_that_do_not_fit_are_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    model, patterns = make()
    with pytest.raises(error, match=message):
        sd.models.apply(model, patterns)


def test_native_patterns_read_what_the_model_says() -> None:
    def text(family: str) -> list[str]:
        return [str(pattern).splitlines()[-1] for pattern in sd.models.native_patterns(build(family)).values()]

    assert text("llama") == ["attend(kv_idx <= q_idx)"] * 2
    assert text("bert") == ["attend(True)"] * 2
    sliding = f"(kv_idx <= q_idx) & (q_idx - kv_idx < {WINDOW})"
    assert text("gemma2") == [
        f"attend({sliding}, score=2*tanh(score / 2))",
        "attend(kv_idx <= q_idx, score=2*tanh(score / 2))",
    ]
    assert text("gpt_oss") == [f"attend({sliding}, sink=sinks[h])", "attend(kv_idx <= q_idx, sink=sinks[h])"]
    assert "left_padding[b]" in text("llama4")[0]
