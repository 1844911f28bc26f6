"""Programs in the layers of models: what runs on a prompt, what runs after it, what is the layer's own, and every refusal."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.models import sinks
from sparsedsl.program.rebuilding import rebuilt
from tests.models.families import build, tokens

ATOL = 3e-5
causal = kv_idx <= q_idx
PBS = sd.patterns.pbs(block=4, segment=8, mass=0.5)
TSA = sd.patterns.token_sparse(coverage=0.3, probe=4, pool=3, min_tokens=8)
BOTH = sd.patterns.token_sparse(coverage=0.3, probe=4, pool=3, min_tokens=8, inside=PBS)
MOBA = sd.patterns.moba(chunk=4, top_k=2)
FOR_PREFILL = {"pbs": PBS, "tsa": TSA, "both": BOTH}
PROGRAMS = {**FOR_PREFILL, "moba": MOBA}
SETTINGS = pytest.mark.parametrize("name", PROGRAMS)


def forward(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


@contextlib.contextmanager
def replaced(model: Any, layer: int, attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """One layer computes ``attend(query, key, value, scaling)``, without this project's models in between."""
    own = model.config._attn_implementation
    eager = __import__(type(model).__module__, fromlist=["x"]).eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **words: Any) -> Any:
        if module.layer_idx != layer:
            return function(module, q, k, v, mask, **words)
        return attend(q, k, v, words["scaling"]).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", ALL_MASK_ATTENTION_FUNCTIONS[own])
    model.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def scaled(program: Any) -> Callable[..., torch.Tensor]:
    """The program on queries that carry the layer's scale, so that every product of theirs has it."""
    attn = sd.compile(program, backend="reference")
    return lambda q, k, v, scaling: attn(q * scaling * q.shape[3] ** 0.5, k, v)


@SETTINGS
@pytest.mark.parametrize("family", ["gemma3", "granite", "llama_groups_of_3"])
def test_a_program_chooses_and_attends_with_the_layers_scale(family: str, name: str) -> None:
    model, ids = build(family), tokens(2, 43)
    with replaced(model, 1, scaled(PROGRAMS[name])):
        wanted = forward(model, ids)
    with sd.models.apply(model, {1: PROGRAMS[name]}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)
    assert (forward(model, ids) - wanted).abs().max() > 10 * ATOL, "sparse enough to show"


def test_the_layers_scale_decides_what_is_chosen() -> None:
    """Granite's 0.3 is no head_dim ** -0.5: with the latter in the proxies another set of blocks holds the mass."""
    model, ids = build("granite"), tokens(2, 43)
    attn = sd.compile(PBS, backend="reference")
    with replaced(model, 1, lambda q, k, v, scaling: attn(q, k, v, scale=scaling)):
        only_in_attention = forward(model, ids)
    with sd.models.apply(model, {1: PBS}, backend="reference"):
        assert (forward(model, ids) - only_in_attention).abs().max() > 10 * ATOL


def test_inputs_that_stand_for_the_queries_take_the_layers_scale() -> None:
    """A layer gives no inputs, so that an input whose default is q is q."""
    asked = sd.input("asked", " ".join(sd.q.axes), default=sd.q)
    program = sd.attend(causal & sd.top_p(sd.dot(sd.summary(asked, 4), sd.summary(sd.k, 4)), 0.5))
    model, ids = build("granite"), tokens(2, 43)
    with replaced(model, 1, scaled(program)):
        wanted = forward(model, ids)
    with sd.models.apply(model, {1: program}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)


def test_scales_of_the_program_stay() -> None:
    model, ids = build("granite"), tokens(2, 43)
    own = sd.attend(causal & sd.top_p(sd.dot(sd.summary(sd.q, 4), sd.summary(sd.k, 4), scale=0.7), 0.5), scale=0.9)
    attn = sd.compile(own, backend="reference")
    with replaced(model, 1, lambda q, k, v, scaling: attn(q, k, v)):
        wanted = forward(model, ids)
    with sd.models.apply(model, {1: own}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)


def _with_score(node: Any) -> Any:
    """An attention with the soft cap of the tiny Gemma 2 written out."""
    capped = sd.tanh(score / 2) * 2
    return sd.attend(node.pattern.mask, capped, q=node.x, k=node.y, v=node.z)


@pytest.mark.parametrize("name", ["pbs", "moba"])
def test_the_layers_soft_cap_stays(name: str) -> None:
    model, ids, program = build("gemma2"), tokens(2, 43), PROGRAMS[name]
    with replaced(model, 1, scaled(_with_score(program))):
        wanted = forward(model, ids)
    with replaced(model, 1, scaled(program)):
        uncapped = forward(model, ids)
    assert (uncapped - wanted).abs().max() > 10 * ATOL
    with sd.models.apply(model, {1: program}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)
    with sd.models.apply(model, {1: _with_score(program)}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)


def test_the_layers_sink_logits_stand_once_in_the_softmax() -> None:
    model, ids = build("gpt_oss"), tokens(2, 43)
    selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2, among=causal)
    near, far = causal & (q_idx - kv_idx < 4), causal & (q_idx - kv_idx >= 4) & selected
    for without, explicit in (
        (causal & selected, sd.attend(causal & selected, sink=sinks[h])),
        (sd.joint(near, far), sd.joint(near, sd.attend(far, sink=sinks[h]))),
        (sd.patterns.token_sparse(0.3, 4, 3, 8), sd.patterns.token_sparse(0.3, 4, 3, 8, inside=sd.attend(causal, sink=sinks[h]))),
    ):
        with sd.models.apply(model, {1: explicit}, backend="reference"):
            wanted = forward(model, ids)
        with sd.models.apply(model, {1: without}, backend="reference"):
            torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)
        with sd.models.apply(model, {1: sd.attend(causal, sink=sinks[h])}, backend="reference"):
            assert (forward(model, ids) - wanted).abs().max() > 10 * ATOL


@SETTINGS
def test_tiled_computes_the_same(name: str) -> None:
    model, ids = build("gemma3"), tokens(2, 43)
    with sd.models.apply(model, {1: PROGRAMS[name]}, backend="reference"):
        wanted = forward(model, ids)
    with sd.models.apply(model, {1: PROGRAMS[name]}, backend="tiled"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)


# ---- after the prompt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOR_PREFILL)
@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral"])
def test_what_chooses_by_later_queries_leaves_all_but_the_prompt_to_the_native_pattern(family: str, name: str) -> None:
    """The same continuation, by transformers itself, of the cache that the program's prompt has filled."""
    model, (prompt, chunk, token) = build(family), tokens(2, 47).split([40, 6, 1], dim=1)
    with sd.models.apply(model, PROGRAMS[name], backend="reference") as applied:
        cache = applied.cache()
        forward(model, prompt, past_key_values=cache)
        twin = copy.deepcopy(cache)
        got = [forward(model, part, past_key_values=cache) for part in (chunk, token)]
    wanted = [forward(model, part, past_key_values=twin) for part in (chunk, token)]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)
    native = DynamicCache(config=model.config)
    forward(model, prompt, past_key_values=native)
    assert (forward(model, chunk, past_key_values=native) - wanted[0]).abs().max() > 10 * ATOL, "the prompt was sparse"


@pytest.mark.parametrize("family", ["gemma3", "mistral", "qwen3"])
def test_other_programs_run_in_every_call(family: str) -> None:
    """Chunks and single tokens give the logits of the whole; windowed caches are widened, since the program asks for all keys."""
    model, ids = build(family), tokens(2, 45)
    with sd.models.apply(model, MOBA, backend="reference") as applied:
        whole, cache = forward(model, ids), applied.cache()
        parts = [forward(model, part, past_key_values=cache) for part in ids.split([17, 1, 1, 13, 12, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=ATOL, rtol=0)


ALL_BLOCKS = sd.patterns.pbs(4, 8, 1.0)
DENSE = {
    "pbs": ALL_BLOCKS,
    "tsa": sd.patterns.token_sparse(0.0, 4, 3, 8),
    "both": sd.patterns.token_sparse(0.0, 4, 3, 8, inside=ALL_BLOCKS),
}


@pytest.mark.parametrize("name", DENSE)
def test_settings_that_drop_nothing_change_nothing(name: str) -> None:
    model, ids = build("gemma3"), tokens(2, 43)
    wanted = forward(model, ids)
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    with sd.models.apply(model, {1: DENSE[name]}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)
        static = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
        assert torch.equal(static, generated)


def test_layers_with_a_program_for_prompts_keep_their_windowed_cache() -> None:
    model = build("mistral")
    with sd.models.apply(model, PBS) as applied:
        assert applied.cache().layers[0].is_sliding
    with sd.models.apply(model, MOBA) as applied:
        assert not applied.cache().layers[0].is_sliding


def test_a_cache_that_has_dropped_keys_is_refused_for_programs_that_would_miss_them() -> None:
    model, ids = build("mistral"), tokens(1, 30)
    with sd.models.apply(model, MOBA, backend="reference"):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(sd.UnsupportedError, match=r"layer 0: its cache has dropped the keys .*handle.cache\(\)"):
            forward(model, ids[:, :1], past_key_values=cache)


# ---- handles ---------------------------------------------------------------------------------------------------------------------


def test_programs_for_all_layers_or_some_and_what_the_handle_says() -> None:
    model, ids = build("llama"), tokens(2, 43)
    with sd.models.apply(model, PBS, backend="reference") as applied:
        both = forward(model, ids)
        assert [program.root is PBS for program in applied.patterns.values()] == [True, True]
        assert len({id(made) for binding in applied._bindings.values() for made in binding._by_scale.values()}) == 1
    with sd.models.apply(model, lambda index: sd.Program(PBS), backend="reference"):
        assert torch.equal(forward(model, ids), both)
    with sd.models.apply(model, {0: causal, 1: MOBA}) as applied:
        said = repr(applied)
        assert said.startswith(
            "<AppliedPatterns on LlamaForCausalLM: layer 0 attend(kv_idx <= q_idx); layer 1 attend((kv_idx <= q_idx) &"
        )
        assert "top_k[b, h, q_idx, kv_idx // " in said
    with sd.models.apply(model, {1: TSA}) as applied:
        assert "layer 1 compact(tokens=keep_tokens, inside=attend), prompts only; native: layer 0" in repr(applied)


def test_copies_and_saved_models_keep_their_programs() -> None:
    model, ids = build("gemma3"), tokens(2, 43)
    applied = sd.models.apply(model, {1: BOTH}, backend="reference")
    wanted, twin, file = forward(model, ids), copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    applied.restore()
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(forward(other, ids), wanted)
    assert not torch.equal(forward(model, ids), wanted)


SYSTEMS = {
    **PROGRAMS,
    "hsa": sd.patterns.hsa(8, 2),
    "nha": sd.patterns.nha(4, 4),
    "nsa": sd.patterns.nsa(4, 8, 3, 8),
    "ring": sd.patterns.ring_linear([0.5, 0.9]),
    "pbs_group": sd.patterns.pbs(4, 8, 0.5, share="group"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_program_rebuilt_without_a_change_is_the_same(name: str) -> None:
    assert rebuilt(sd.Program(SYSTEMS[name]), lambda node: node).root is SYSTEMS[name]


# ---- refusals ------------------------------------------------------------------------------------------------------------------------

allowed = sd.table("allowed", dtype=bool)
WITH_TABLE = sd.attend(causal & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2) & allowed[kv_idx])
REFUSED = {
    "inputs": (
        "llama",
        {1: sd.patterns.hsa(8, 2)},
        sd.UnsupportedError,
        r"layer 1: the program reads the inputs 'landmarks', 'retrieval_q', which the layer does not compute\. Give it a program over q, k",
    ),
    "one input": ("llama", {0: sd.patterns.nha(4, 4)}, sd.UnsupportedError, "layer 0: the program reads the input 'gate', which"),
    "tables": (
        "llama",
        {1: WITH_TABLE},
        sd.TableError,
        r"layer 1: nothing binds the table allowed .*mask.bind\(allowed=tensor\)",
    ),
    "sinks": (
        "gpt_oss",
        {1: sd.patterns.ring_linear([0.9] * 4)},
        sd.UnsupportedError,
        r"layer 1 has sink logits, and the program no single softmax .* sink=sd.models.sinks\[sd.h\]",
    ),
    "no such layer": ("llama", {7: PBS}, sd.PatternError, r"no attention layer has the index \[7\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_no_call_could_run_are_refused_at_once(name: str) -> None:
    family, patterns, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        sd.models.apply(build(family), patterns)


CALLS = {
    "gradients": (TSA, lambda m: m(tokens()), r"layer 1: selection reads later queries .* For inference call it under torch.no_grad\(\)"),
    "decays": (sd.patterns.ring_linear([0.9] * 3), lambda m: forward(m, tokens()), "layer 1: .* 3 decays; q has 4 heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_a_program_cannot_take_are_refused_with_the_layer(name: str) -> None:
    program, call, message = CALLS[name]
    model = build("llama")
    with sd.models.apply(model, {1: program}, backend="reference"), pytest.raises(sd.SparseDSLError, match=message):
        call(model)


def test_what_is_refused_in_training_can_be_allowed() -> None:
    model = build("llama")
    with sd.models.apply(model, {1: TSA}, backend="reference", allow=["selection reads later queries"]):
        model(tokens(2, 43), labels=tokens(2, 43)).loss.backward()
    assert model.model.layers[1].self_attn.q_proj.weight.grad.abs().max() > 0


def test_antidiagonal_sums_under_another_scale_are_refused() -> None:
    xattention = sd.attend(causal & sd.top_p(sd.antidiagonal(sd.q, sd.k, 2, 4), 0.9))
    with (
        sd.models.apply(build("granite"), {1: xattention}, backend="reference") as applied,
        pytest.raises(sd.UnsupportedError, match=r"layer 1 multiplies q @ k by 0\.3, and antidiagonal\(\) knows 0\.35"),
    ):
        forward(applied.model, tokens(2, 44))
    with sd.models.apply(build("llama"), {1: xattention}, backend="reference") as applied:
        assert forward(applied.model, tokens(2, 44)).isfinite().all()


def test_tables_bound_in_a_program_reach_the_call() -> None:
    model, ids = build("llama"), tokens(2, 43)
    every_other = allowed[kv_idx].bind(allowed=torch.arange(64) % 2 == 0)
    masked = sd.attend(causal & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 99, among=causal) & every_other)
    with sd.models.apply(model, {1: causal & every_other}, backend="reference"):
        wanted = forward(model, ids)
    with sd.models.apply(model, {1: masked}, backend="reference"):
        torch.testing.assert_close(forward(model, ids), wanted, atol=ATOL, rtol=0)
