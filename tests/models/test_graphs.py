"""Models with patterns in ``torch.compile`` and ``torch.export``: one graph, the same logits, and every refusal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx
from tests.models.families import build, left_padded, made, tokens

ROOT = Path(__file__).resolve().parents[2]
causal = kv_idx <= q_idx
window = causal & (q_idx - kv_idx < 4)
anchored = causal & ((q_idx - kv_idx < 4) | (kv_idx < 2))
ATOL = 3e-5


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def packed() -> dict[str, Any]:
    position = torch.tensor([[*range(13), *range(8)], [*range(3), *range(18)]])
    return {"input_ids": tokens(), "position_ids": position, "use_cache": False}


def right_padded() -> dict[str, Any]:
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    ids[0, -5:], mask[0, -5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


INPUTS = {
    "plain": lambda: {"input_ids": tokens()},
    "no cache": lambda: {"input_ids": tokens(), "use_cache": False},
    "left padding": left_padded,
    "right padding": right_padded,
    "all real": lambda: {"input_ids": tokens(), "attention_mask": torch.ones(2, 21, dtype=torch.long)},
    "packed": packed,
}
GIVEN: dict[str, tuple[str, Any]] = {
    "llama": ("llama", {1: anchored}),
    "gemma3": ("gemma3", anchored),
    "gpt_oss": ("gpt_oss", {0: window}),
    "llama4": ("llama4", "native"),
    "bert": ("bert", {0: (q_idx - kv_idx < 4) & (kv_idx - q_idx < 4)}),
    "opt": ("opt", anchored),
    "program": ("llama", {0: sd.patterns.moba(4, 2)}),
}


# Each graph takes a second to make: every kind of input once, and twice where families differ.
KINDS = {
    "llama": ("plain", "no cache", "left padding", "all real", "packed"),
    "gemma3": ("left padding", "packed"),
    "gpt_oss": ("plain", "right padding"),
    "llama4": ("left padding",),
    "bert": ("plain", "right padding"),
    "opt": ("left padding",),
    "program": ("plain",),
}


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", GIVEN)
def test_one_graph_with_the_logits_of_no_graph(name: str) -> None:
    family, patterns = GIVEN[name]
    model = build(family)
    patterns = sd.models.native_patterns(model) if isinstance(patterns, str) else patterns
    for kind in KINDS[name]:
        given = INPUTS[kind]()
        real = given["attention_mask"].bool() if "attention_mask" in given else torch.ones(2, 21, dtype=torch.bool)
        counter = Counting()
        with sd.models.apply(model, patterns, backend="reference"):
            wanted = logits(model, given)
            got = logits(torch.compile(model, backend=counter, fullgraph=True), given)
        torch.testing.assert_close(got[real], wanted[real], atol=ATOL, rtol=0)
        assert counter.graphs == 1, kind
        torch._dynamo.reset()


def test_no_more_graphs_than_sdpa_for_other_lengths_and_a_cache() -> None:
    def count(model: Any) -> tuple[int, list[torch.Tensor]]:
        torch._dynamo.reset()
        counter, results = Counting(), []
        compiled = torch.compile(model, backend=counter)
        for length in (21, 13, 17):
            results.append(logits(compiled, {"input_ids": tokens(length=length)}))
        cache = DynamicCache(config=model.config)
        for part in tokens().split([16, 1, 1, 3], dim=1):
            results.append(logits(compiled, {"input_ids": part, "past_key_values": cache}))
        return counter.graphs, results

    model = build("llama")
    native, _ = count(model)
    with sd.models.apply(model, anchored, backend="reference") as applied:
        ours, results = count(model)
        assert ours <= native
        for length, got in zip((21, 13, 17), results, strict=False):
            torch.testing.assert_close(got, logits(model, {"input_ids": tokens(length=length)}), atol=ATOL, rtol=0)
        whole = logits(model, {"input_ids": tokens(), "past_key_values": applied.cache()})
        torch.testing.assert_close(torch.cat(results[3:], dim=1), whole, atol=ATOL, rtol=0)


def test_gradients_are_those_of_no_graph() -> None:
    model, ids = build("gpt_oss"), tokens()
    slope = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    table = sd.table("slope", learned=True)
    learned = sd.attend(causal, score=sd.score - table[h] * (q_idx - kv_idx), sink=sd.models.sinks[h]).bind(slope=slope)

    def gradients(called: Any) -> list[torch.Tensor]:
        model.zero_grad()
        slope.grad = None
        called(ids, labels=ids).loss.backward()
        assert slope.grad is not None
        return [slope.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with sd.models.apply(model, {0: window, 1: learned}, backend="reference"):
        wanted = gradients(model)
        got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for one, two in zip(wanted, got, strict=True):
        torch.testing.assert_close(two, one, atol=1e-4, rtol=1e-3)


def test_other_stacks() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    model = made("SiglipVisionModel", "SiglipVisionConfig", **sizes)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with sd.models.apply(model, {0: (q_idx - kv_idx < 4) & (kv_idx - q_idx < 4)}, backend="reference"), torch.no_grad():
        wanted = model(pixels).last_hidden_state
        got = torch.compile(model, backend="eager", fullgraph=True)(pixels).last_hidden_state
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0)


# ---- export ------------------------------------------------------------

_RUNNING = """
import sys, torch
import sparsedsl.models
program = torch.export.load(sys.argv[1])
given, wanted = torch.load(sys.argv[2])
for inputs, right in zip(given, wanted):
    got = program.module()(**inputs)
    assert (got - right).abs().max() < 1e-4, (got - right).abs().max()
print("fine")
"""


class Logits(torch.nn.Module):
    """A model as a function of tensors, which torch.export.save can write."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def test_an_exported_model_runs_its_patterns_in_another_process(tmp_path: Path) -> None:
    model, slope = build("gemma3"), sd.table("slope", dtype=float)
    alibi = sd.attend(causal, score=sd.score - slope[h] * (q_idx - kv_idx)).bind(slope=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    length = torch.export.Dim("length", min=3, max=64)
    dynamic = {"input_ids": {1: length}, "attention_mask": {1: length}}
    with sd.models.apply(model, {0: alibi, 1: anchored}, backend="reference"):
        program = torch.export.export(Logits(model), (), left_padded(), dynamic_shapes=dynamic)
        given = [left_padded(), left_padded(length=30)]
        wanted = [logits(model, {**inputs, "use_cache": False}) for inputs in given]
    assert sum(node.target is torch.ops.sparsedsl.model_attention.default for node in program.graph.nodes) == 2
    real = given[1]["attention_mask"].bool()
    torch.testing.assert_close(program.module()(**given[1])[real], wanted[1][real], atol=ATOL, rtol=0)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((given, wanted), tmp_path / "wanted")
    command = [sys.executable, "-c", _RUNNING, str(tmp_path / "program.pt2"), str(tmp_path / "wanted")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["fine"]


# ---- refusals ------------------------------------------------------------


def test_a_step_with_a_static_cache_is_refused_and_works_without_a_graph() -> None:
    model, ids = build("llama"), tokens()
    with sd.models.apply(model, anchored, backend="reference"):
        whole, cache = logits(model, {"input_ids": ids}), StaticCache(config=model.config, max_cache_len=32)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        prompt = logits(compiled, {"input_ids": ids[:, :20], "past_key_values": cache})
        torch.testing.assert_close(prompt, whole[:, :20], atol=ATOL, rtol=0)
        step = {"input_ids": ids[:, 20:], "past_key_values": cache}
        with pytest.raises(Exception, match=r"a static cache under torch[.]compile keeps its offset in a tensor"):
            logits(compiled, step)
        torch.testing.assert_close(logits(model, step), whole[:, 20:], atol=ATOL, rtol=0)


def test_a_finished_mask_is_refused() -> None:
    model = build("llama")
    given = {"input_ids": tokens(), "attention_mask": torch.ones(2, 1, 21, 21, dtype=torch.bool)}
    with sd.models.apply(model, window), pytest.raises(Exception, match="layer 0 got a finished mask"):
        logits(torch.compile(model, backend="eager", fullgraph=True), given)


class Changing(LlamaAttention):
    """Takes a key away from the mask on its way."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        changed = attention_mask & (torch.arange(attention_mask.shape[-1]) != 5)
        return super().forward(hidden_states, attention_mask=changed, **kwargs)


def test_a_mask_that_the_model_changes_is_refused_as_without_a_graph() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.__class__ = Changing
    with sd.models.apply(model, {1: window}):
        for called in (model, torch.compile(model, backend="eager", fullgraph=True)):
            with pytest.raises(Exception, match="layer 1 got a finished mask"):
                logits(called, left_padded())


def test_masks_joined_with_others_are_refused() -> None:
    """Gemma 3 sees both ways by another mask joined to the causal one: a graph does not show what that says."""
    model = build("gemma3_bidirectional")
    with sd.models.apply(model, window), pytest.raises(Exception, match="the model combines its mask with another one"):
        logits(torch.compile(model, backend="eager", fullgraph=True), {"input_ids": tokens()})
