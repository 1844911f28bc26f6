"""``save_pretrained`` keeps patterns as text, ``sd.models.from_pretrained`` gives them back, and plain loading says what it lacks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.models import sinks
from tests.models.families import build, left_padded, tokens

causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 4)
slope = sd.table("slope", dtype=float)
keep = sd.table("keep", dtype=bool)
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
alibi = sd.attend(causal, score=score - slope[h] * (q_idx - kv_idx), scale=0.5)


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


GIVEN: dict[str, tuple[str, Any]] = {
    "mask": ("gemma3", {1: window}),
    "all": ("llama", True),
    "pattern": ("gpt_oss", {0: sd.attend(window, sink=sinks[h]), 1: causal}),
    "library": ("llama", {0: sd.attend(causal, score=sd.patterns.alibi(4)), 1: sd.patterns.sinks(2) & causal}),
    "bound": ("llama", alibi.bind(slope=SLOPES)),
    "bound masks": (
        "llama",
        {
            0: causal & keep[kv_idx].bind(keep=torch.arange(64) % 3 != 0),
            1: causal & keep[kv_idx].bind(keep=torch.arange(64) % 2 == 0),
        },
    ),
    "program": ("llama", {1: sd.patterns.moba(4, 2)}),
    "program with a bound table": (
        "llama",
        {0: causal & ((keep[kv_idx].bind(keep=torch.arange(64) % 2 == 0)) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 2))},
    ),
    "prefill program": ("llama", {1: sd.patterns.token_sparse(coverage=0.3, probe=8, min_tokens=4)}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_saved_model_comes_back_with_its_patterns(name: str, tmp_path: Path) -> None:
    family, patterns = GIVEN[name]
    model = build(family)
    with sd.models.apply(model, patterns, backend="reference") as handle:
        wanted, texts = logits(model, input_ids=tokens()), {i: p.text for i, p in handle.patterns.items()}
        before = dict(model.config.sparsedsl)
        model.save_pretrained(tmp_path)
        assert model.config.sparsedsl == before
    assert not hasattr(model.config, "sparsedsl")
    loaded = sd.models.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert type(loaded) is type(model)
    (again,) = sd.models.applied(loaded)
    assert {i: p.text for i, p in again.patterns.items()} == texts
    assert (again.backend, again.layers) == ("reference", handle.layers)
    assert torch.equal(logits(loaded, input_ids=tokens()), wanted)
    again.restore()
    assert torch.equal(logits(loaded, input_ids=tokens()), logits(model, input_ids=tokens()))
    assert not hasattr(loaded.config, "sparsedsl")


def test_the_configuration_holds_text_and_the_folder_the_tables(tmp_path: Path) -> None:
    model = build("llama")
    both = {0: alibi.bind(slope=SLOPES), 1: alibi.bind(slope=SLOPES)}
    with sd.models.apply(model, both, backend="tiled"), sd.models.apply(model, {1: window}):
        model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["sparsedsl"]
    assert written["version"] == 1
    first, second = written["applied"]
    assert (first["stack"], first["backend"], first["allow"]) == ("LlamaModel", "tiled", [])
    assert first["layers"]["0"] == alibi.text and first["tables"] == {"0": {"slope": "slope.0"}, "1": {"slope": "slope.0"}}
    assert second["layers"] == {"1": window.text} and second["tables"] == {}
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "sparsedsl.safetensors")["slope.0"], SLOPES)
    loaded = sd.models.from_pretrained(tmp_path, transformers.AutoModelForCausalLM, backend="reference")
    assert [handle.backend for handle in sd.models.applied(loaded)] == ["reference", "reference"]
    with sd.models.apply(model, {0: alibi.bind(slope=SLOPES), 1: window}, backend="reference"):
        assert torch.equal(logits(loaded, **left_padded()), logits(model, **left_padded()))


def test_a_loaded_model_is_saved_and_loaded_again_and_trains_on(tmp_path: Path) -> None:
    model = build("llama")
    sd.models.apply(model, {1: window}, backend="reference")
    model.save_pretrained(tmp_path / "one")
    loaded = sd.models.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two", max_shard_size="20KB")  # in several files
    again = sd.models.from_pretrained(tmp_path / "two")
    assert torch.equal(logits(again, **left_padded()), logits(model, **left_padded()))
    again.train()(tokens(), labels=tokens()).loss.backward()
    assert list(again.state_dict()) == list(model.state_dict())


def test_another_head_on_the_same_layers(tmp_path: Path) -> None:
    model = build("llama")
    sd.models.apply(model, {1: window}, backend="reference")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="weights of .* not used: lm_head.weight; not found: score.weight"):
        other = sd.models.from_pretrained(tmp_path, transformers.LlamaForSequenceClassification)
    assert list(sd.models.applied(other)[0].patterns) == [1]
    with pytest.raises(sd.PatternError, match="saved for the layers of a LlamaModel, of which MistralForCausalLM has none"):
        sd.models.from_pretrained(tmp_path, transformers.MistralForCausalLM)


def test_plain_loading_gives_the_native_model_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    native = logits(model, input_ids=tokens())
    sd.models.apply(model, {1: window}, backend="reference")
    model.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        said = caplog.text
        caplog.clear()
        sd.models.from_pretrained(tmp_path)
        unsaid = caplog.text
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.equal(logits(plain, input_ids=tokens()), native)
    assert "load_them_with_sd_models_from_pretrained" in said
    assert "load_them_with_sd_models_from_pretrained" not in unsaid
    assert plain.config.sparsedsl["applied"][0]["layers"] == {"1": window.text}
    with sd.models.apply(plain, {0: window}):
        assert list(plain.config.sparsedsl["applied"][0]["layers"]) == ["0"]
    assert list(plain.config.sparsedsl["applied"][0]["layers"]) == ["1"], "as it was before"


def test_models_that_share_a_configuration_are_saved_each_with_its_own(tmp_path: Path) -> None:
    model = build("llama")
    other = transformers.LlamaForCausalLM(model.config).eval()
    sd.models.apply(model, {0: window})
    sd.models.apply(other.model, {1: window})
    model.save_pretrained(tmp_path / "one")
    sd.models.save_pretrained(other, tmp_path / "two")
    for folder, layer in (("one", 0), ("two", 1)):
        (handle,) = sd.models.applied(sd.models.from_pretrained(tmp_path / folder))
        assert list(handle.patterns) == [layer]
    other.save_pretrained(tmp_path / "three")  # knows of no patterns: only a part of it was given any
    with pytest.raises(sd.UnsupportedError, match="two models with patterns shared this configuration"):
        sd.models.from_pretrained(tmp_path / "three")


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        sd.PatternError, match=r"without patterns and without converted layers: .* LlamaForCausalLM.from_pretrained"
    ):
        sd.models.from_pretrained(tmp_path / "plain")
    sd.models.apply(model.model, alibi.bind(slope=SLOPES))
    model.save_pretrained(tmp_path / "part")
    with pytest.raises(sd.TableError, match=r"has no tensor for the table slope: .* sd[.]models[.]save_pretrained"):
        sd.models.from_pretrained(tmp_path / "part")
    sd.models.save_pretrained(model, tmp_path / "whole")
    sd.models.from_pretrained(tmp_path / "whole")
    text = (tmp_path / "whole" / "config.json").read_text()
    for change, error, message in (
        (('"version": 1', '"version": 7'), sd.PatternError, "written by another version"),
        (("q_idx", "__import__"), sd.PatternError, "cannot read"),
        (("LlamaForCausalLM", "TheirLlama"), sd.UnsupportedError, "saved by TheirLlama, which is no class of transformers"),
    ):
        assert change[0] in text
        (tmp_path / "whole" / "config.json").write_text(text.replace(*change))
        with pytest.raises(error, match=message):
            sd.models.from_pretrained(tmp_path / "whole")


def test_pushing_with_bound_tables_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    with (
        sd.models.apply(model, alibi.bind(slope=SLOPES)),
        pytest.raises(sd.UnsupportedError, match=r"push_to_hub=True would upload the folder without sparsedsl.safetensors"),
    ):
        model.save_pretrained(tmp_path, push_to_hub=True)
