"""Several ``sd.models.apply`` on one model, copies and pickles of it: what stands, and what ``restore()`` gives back."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.models.kept_keys import KeptKeys
from tests.models.families import build, left_padded, tokens

ROOT = Path(__file__).resolve().parents[2]
causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 4)
blocks = causal & (q_idx // 5 == kv_idx // 5)
strided = causal & ((q_idx - kv_idx) % 3 == 0)


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def alone(model: Any, patterns: dict[int, Any]) -> torch.Tensor:
    """Logits with these patterns, all from one call."""
    with sd.models.apply(model, patterns, backend="reference"):
        return logits(model, **left_padded())


def apply(model: Any, patterns: Any) -> Any:
    return sd.models.apply(model, patterns, backend="reference")


# ---- several calls ------------------------------------------------------------


def test_patterns_of_different_layers_all_stand() -> None:
    model = build("llama")
    native, both = logits(model, **left_padded()), alone(model, {0: window, 1: blocks})
    first_only, second_only = alone(model, {0: window}), alone(model, {1: blocks})
    for order in ((0, 1), (1, 0)):
        handles = [apply(model, {0: window}), apply(model, {1: blocks})]
        assert torch.equal(logits(model, **left_padded()), both)
        handles[order[0]].restore()
        assert torch.equal(logits(model, **left_padded()), (second_only, first_only)[order[0]])
        handles[order[1]].restore()
        assert torch.equal(logits(model, **left_padded()), native)
    assert_native(model)


def test_the_latter_wins_until_it_is_restored_in_any_order() -> None:
    model = build("gemma3")
    given = [{0: window, 1: window}, {1: blocks}, {0: strided, 1: strided}]
    right: dict[tuple[int, ...], torch.Tensor] = {}
    for order in itertools.permutations(range(3)):
        handles = [apply(model, patterns) for patterns in given]
        standing = (0, 1, 2)
        for gone in order:
            if standing not in right:
                effective = {layer: pattern for index in standing for layer, pattern in given[index].items()}
                right[standing] = alone(build("gemma3"), effective)
            assert torch.equal(logits(model, **left_padded()), right[standing])
            handles[gone].restore()
            handles[gone].restore()
            standing = tuple(index for index in standing if index != gone)
        assert_native(model)


def assert_native(model: Any) -> None:
    """Nothing of ours is left in the model or its configuration."""
    assert sd.models.applied(model) == ()
    assert type(model.config._attn_implementation) is str
    assert not hasattr(model.config, "sparsedsl")
    for module in model.modules():
        assert not [name for name in vars(module) if "sparsedsl" in name or name == "save_pretrained"]
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert getattr(module, "config", model.config) is model.config


def test_with_blocks_may_be_nested() -> None:
    model = build("llama")
    outer_alone = alone(model, {0: window, 1: window})
    with apply(model, window) as outer:
        with apply(model, {1: blocks}) as inner:
            assert sd.models.applied(model) == (outer, inner)
            assert "layer 0, 1" not in repr(outer)
            assert "given another by a later apply: layer 1" in repr(outer)
            assert "given one by another apply: layer 0" in repr(inner)
        assert torch.equal(logits(model, **left_padded()), outer_alone)
    assert_native(model)


def test_applying_to_the_inner_model_and_to_the_whole_is_applying_to_the_same_layers() -> None:
    model = build("llama")
    both = alone(model, {0: window, 1: blocks})
    whole, inner = apply(model, {0: window}), apply(model.model, {1: blocks})
    assert torch.equal(logits(model, **left_padded()), both)
    whole.restore()
    inner.restore()
    assert_native(model)


def test_a_failed_apply_changes_nothing() -> None:
    model = build("llama")
    with pytest.raises(sd.PatternError):
        apply(model, {0: window, 1: 5})
    assert_native(model)
    with apply(model, {0: window}) as first:
        before = logits(model, **left_padded())
        with pytest.raises(sd.PatternError):
            apply(model, {0: blocks, 1: 5})
        assert sd.models.applied(model) == (first,)
        assert torch.equal(logits(model, **left_padded()), before)
    assert_native(model)


def test_caches_and_generation_follow_what_stands() -> None:
    """The first patterns need no more than the window of 8, the second everything."""
    model, greedy = build("mistral"), {"max_new_tokens": 12, "do_sample": False}
    with apply(model, {0: strided, 1: window}):
        wanted = model.generate(tokens(), **greedy)
    first = apply(model, window)
    assert [layer.is_sliding for layer in DynamicCache(config=model.config).layers] == [True, True]
    assert [kind_of(layer) for layer in first.cache().layers] == ["ring", "ring"]
    second = apply(model, {0: strided})
    assert [kind_of(layer) for layer in first.cache().layers] == ["grows", "ring"]
    assert torch.equal(model.generate(tokens(), **greedy), wanted)
    second.restore()
    assert [kind_of(layer) for layer in first.cache().layers] == ["ring", "ring"]


def kind_of(layer: Any) -> str:
    """Of what a layer of a cache holds."""
    if isinstance(layer, KeptKeys):
        return layer.bound.kind
    return "ring" if layer.is_sliding else "grows"


# ---- copies ------------------------------------------------------------


def test_a_copy_runs_the_patterns_and_is_a_model_of_its_own() -> None:
    model = build("gemma3")
    native = logits(model, **left_padded())
    handle = apply(model, {1: blocks})
    wanted, both = logits(model, **left_padded()), alone(build("gemma3"), {0: window, 1: blocks})
    twin = copy.deepcopy(model)
    (its_own,) = sd.models.applied(twin)
    assert its_own is not handle and its_own.model is twin and list(its_own.patterns) == [1]
    assert torch.equal(logits(twin, **left_padded()), wanted)

    with apply(twin, {0: window}):
        assert torch.equal(logits(twin, **left_padded()), both)
        assert torch.equal(logits(model, **left_padded()), wanted), "the copy is not the model"
    its_own.restore()
    assert torch.equal(logits(twin, **left_padded()), native)
    assert_native(twin)
    assert torch.equal(logits(model, **left_padded()), wanted)
    with apply(twin, {1: blocks}):
        handle.restore()
        assert torch.equal(logits(twin, **left_padded()), wanted)
    assert_native(model)
    assert_native(twin)


def test_a_copy_of_the_handle_is_that_of_a_copied_model() -> None:
    model = build("llama")
    with apply(model, window) as handle:
        other = copy.deepcopy(handle)
        assert sd.models.applied(other.model) == (other,)
        other.restore()
        assert_native(other.model)
        assert sd.models.applied(model) == (handle,)


# ---- other processes ------------------------------------------------------------

_LOADING = """
import pickle, sys, torch
by_torch, by_pickle, wanted = sys.argv[1:]
first = torch.load(by_torch, weights_only=False)
with open(by_pickle, "rb") as opened:
    second = pickle.load(opened)
given, right = torch.load(wanted)
import sparsedsl as sd
for model in (first, second):
    with torch.no_grad():
        assert torch.equal(model(**given).logits, right["patterns"]), "with patterns"
        model.generate(given["input_ids"], max_new_tokens=3, do_sample=False)
        for handle in sd.models.applied(model):
            handle.restore()
        assert torch.equal(model(**given).logits, right["native"]), "restored"
        with sd.models.apply(model, {0: sd.kv_idx <= sd.q_idx}):
            model(**given)
print("fine")
"""


def test_a_saved_model_runs_its_patterns_in_another_process(tmp_path: Path) -> None:
    model = build("gemma3")
    slope = sd.table("slope", dtype=float)
    alibi = sd.attend(causal, score=sd.score - slope[sd.h] * (q_idx - kv_idx)).bind(slope=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    right = {"native": logits(model, **left_padded())}
    apply(model, {0: alibi})
    apply(model, {1: blocks})
    right["patterns"] = logits(model, **left_padded())
    files = [tmp_path / name for name in ("torch", "pickle", "wanted")]
    torch.save(model, files[0])
    files[1].write_bytes(pickle.dumps(model))
    torch.save((left_padded(), right), files[2])
    done = subprocess.run(
        [sys.executable, "-c", _LOADING, *map(str, files)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fine"]


def test_a_program_is_pickled_with_its_model() -> None:
    model = build("llama")
    with apply(model, {1: sd.patterns.moba(4, 2)}):
        wanted = logits(model, input_ids=tokens())
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), input_ids=tokens()), wanted)
