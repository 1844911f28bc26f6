"""Converted models under ``torch.compile``: their layers run between graphs, with the results that they have without graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sparsedsl as sd
from tests.models.families import left_padded, tokens
from tests.models.hybrid_models import LAYERS, NHA, convert, donor, spread


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def converted(name: str, layers: dict[int, Any]) -> tuple[Any, Any]:
    """A model and its handle."""
    model = donor(name)
    handle = convert(model, layers)
    spread(handle)
    return model, handle


def logits(model: Any, input_ids: torch.Tensor, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=input_ids, **words).logits
    return found


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gemma3", {0: LAYERS["delta"], 1: LAYERS["hsa"]}),
        (
            "llama",
            {0: sd.patterns.sliding_window(4), 1: LAYERS["nsa"]},
        ),  # a pattern beside, which by itself would be part of the graph
    ],
)
def test_what_a_converted_model_gives_is_what_it_gives_compiled(name: str, layers: dict[int, Any]) -> None:
    model, handle = converted(name, layers)
    ids = tokens(2, 12)
    padded = left_padded()
    real, wanted, wanted_padded = padded["attention_mask"].bool(), logits(model, ids), logits(model, **padded)
    slopes = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, handle.new_parameters(), allow_unused=True)
    graphs: list[int] = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(sum(node.op in ("call_function", "call_method", "call_module") for node in graph.graph.nodes))
        return graph

    made = torch.compile(model, backend=counted)
    assert torch.equal(logits(made, ids), wanted)
    assert sum(graphs) > 20  # the rest of the model is in graphs
    assert torch.equal(logits(made, **padded)[real], wanted_padded[real])
    found = torch.autograd.grad(made(input_ids=ids, labels=ids).loss, handle.new_parameters(), allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, slopes, strict=True))


def test_tokens_are_those_without_graphs() -> None:
    model, _ = converted("llama", {1: LAYERS["hsa"]})
    ids = tokens(2, 12)
    said = model.generate(ids, max_new_tokens=3, do_sample=False)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), said)


def test_by_the_compiler_of_torch() -> None:
    model, _ = converted("llama", {1: NHA})
    ids = tokens(2, 12)
    torch.testing.assert_close(
        logits(torch.compile(model), ids), logits(model, ids), rtol=1e-4, atol=1e-4
    )  # norms are in float32


def test_one_graph_is_refused_and_so_is_an_exported_one() -> None:
    model, handle = converted("llama", {1: NHA})
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"layers that sd\.models\.convert has put in run between graphs"):
        logits(torch.compile(model, backend="eager", fullgraph=True), tokens())
    for strict in (False, True):
        with pytest.raises(Exception, match=r"converted layers have no form in an exported graph"):
            torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=strict)
    handle.restore()
    torch._dynamo.reset()
    assert torch.isfinite(logits(torch.compile(model, backend="eager", fullgraph=True), tokens())).all()


def test_patterns_are_part_of_graphs_again_when_no_layer_is_converted() -> None:
    model, handle = converted("llama", {0: sd.patterns.sliding_window(4), 1: NHA})
    handle.restore()
    with sd.models.apply(model, {0: sd.patterns.sliding_window(4)}, backend="tiled"):
        ids = tokens()
        wanted = logits(model, ids, use_cache=False)
        made = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(logits(made, ids, use_cache=False), wanted)
