"""Layers of a stand-in of vLLM run patterns: every request gets dense attention over its own positions, whatever a step is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.serve.vllm_classes import classes
from tests.serve import stand_in
from tests.serve.stand_in import Engine, LayerOptions, Request
from tests.serve.steps import (
    CAUSAL,
    FIRST,
    SECOND,
    STREAM,
    THIRD,
    THIRDS,
    by_mask,
    causal,
    prompts,
    serve,
    streams,
    thirds,
    windowed,
)

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stand_in.installed():
        yield


@pytest.mark.parametrize("backend", ["tiled", "auto", "reference"])
def test_every_request_gets_dense_attention_over_its_positions(backend: str) -> None:
    sd.serve.vllm.register({FIRST: STREAM, 1: THIRDS}, backend=backend)
    engine = Engine(dict.fromkeys((FIRST, SECOND, THIRD), LayerOptions()))
    serve(engine, by_mask(engine, {FIRST: streams, SECOND: thirds, THIRD: causal}), share=True)


def test_windows_free_pages_and_layers_without_a_pattern_have_the_models_window() -> None:
    near = sd.patterns.sliding_window(5) & ((sd.kv_idx % 2 == 0) | (sd.q_idx - sd.kv_idx < 2))
    sd.serve.vllm.register({SECOND: near}, backend="tiled")
    engine = Engine({FIRST: LayerOptions(9), SECOND: LayerOptions(9), THIRD: LayerOptions()})
    masks = {FIRST: windowed(9), SECOND: lambda q, k: (k <= q) & (q - k < 5) & ((k % 2 == 0) | (q - k < 2)), THIRD: causal}
    serve(engine, by_mask(engine, masks), share=False)
    assert len(engine.free[9]) > len(engine.free[None]) + 5


# ---- what the model hands in -------------------------------------------------------------------------------------------------------


def test_a_mask_keeps_cap_slopes_and_sinks_of_its_layer() -> None:
    slopes, sinks = [0.5, 0.25, 0.125, 0.0625], torch.tensor([0.3, -1.0, 2.0, 0.0])
    words = {FIRST: {"logits_soft_cap": 2.0, "sinks": sinks}, SECOND: {"alibi_slopes": slopes}, THIRD: {"sinks": sinks + 1}}
    sd.serve.vllm.register({FIRST: STREAM, SECOND: STREAM}, backend="tiled")
    engine = Engine({name: LayerOptions(words=own) for name, own in words.items()})
    masks = {FIRST: streams, SECOND: streams, THIRD: causal}

    def wanted(name: str, request: Request, more: int) -> Tensor:
        at = torch.arange(request.seen + more)
        biased = torch.tensor(slopes).double()[:, None, None] * (at - at[request.seen :, None])
        own: dict[str, dict[str, Any]] = {
            FIRST: {"logit": lambda x: 2 * torch.tanh(x / 2), "sinks": sinks},
            SECOND: {"logit": lambda x: x + biased},
            THIRD: {"sinks": sinks + 1},
        }
        return by_mask(engine, masks, **own[name])(name, request, more)

    serve(engine, wanted, share=True)


def test_a_pattern_may_read_the_layers_tables() -> None:
    slopes = [0.5, 0.25, 0.125, 0.0625]
    given = sd.attend(STREAM, score=sd.patterns.alibi(), scale=0.3)
    sd.serve.vllm.register(given, backend="tiled")
    engine = Engine({FIRST: LayerOptions(words={"alibi_slopes": slopes})})

    def wanted(name: str, request: Request, more: int) -> Tensor:
        at = torch.arange(request.seen + more)
        biased = torch.tensor(slopes).double()[:, None, None] * (at - at[request.seen :, None])
        # (the scale is the pattern's own)
        return by_mask(engine, {FIRST: streams}, logit=lambda x: x * (0.3 / engine.scale) + biased)(name, request, more)

    serve(engine, wanted, share=True)


@pytest.mark.parametrize(("kind", "element"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_quantised_caches(kind: str, element: torch.dtype) -> None:
    sd.serve.vllm.register(STREAM, backend="tiled")
    engine = Engine({FIRST: LayerOptions()}, dtype=torch.float32, kv_dtype=kind)
    engine.values[f"{FIRST} v place"][:] *= 300 if kind == "fp8" else 30_000  # some are more than float8 holds

    serve(engine, by_mask(engine, {FIRST: streams}, element=element), share=True)


@pytest.mark.parametrize(
    "program", [sd.patterns.quest(page=4, pages=3), sd.patterns.moba(chunk=8, top_k=2)], ids=["quest", "moba"]
)
def test_programs_choose_as_they_do_alone(program: Any) -> None:
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    sd.serve.vllm.register({FIRST: program}, backend="tiled")
    engine = Engine({FIRST: LayerOptions(), SECOND: LayerOptions(words={"sinks": sinks})})
    alone = sd.compile(program, backend="reference")

    def wanted(name: str, request: Request, more: int) -> Tensor:
        if name == SECOND:
            return by_mask(engine, {SECOND: causal}, sinks=sinks)(name, request, more)
        tokens = request.tokens[: request.seen + more]
        q, k, v = (engine.rows(name, what, tokens).transpose(0, 1)[None] for what in "qkv")
        found: Tensor = alone(q * engine.scale * engine.head_dim**0.5, k, v)  # the layer's scale, for what it chooses by as well
        return found[0].transpose(0, 1)[request.seen :]

    serve(engine, wanted, share=True)


def test_a_rank_of_tensor_parallel_layers_has_its_own_heads() -> None:
    stand_in.SHARD.update(rank=1, size=2)
    reach = torch.tensor([1, 2, 3, 4, 9, 5, 2, 12])
    by_table = (CAUSAL & (sd.q_idx - sd.kv_idx < sd.table("reach")[sd.h])).bind(reach=reach)
    alibi = sd.attend(CAUSAL, score=sd.patterns.alibi(8))
    sd.serve.vllm.register(
        {FIRST: CAUSAL & (sd.q_idx - sd.kv_idx < 2 + 3 * sd.h), 1: by_table, 2: alibi},
        backend="tiled",
    )  # fmt: skip
    engine = Engine(dict.fromkeys((FIRST, SECOND, THIRD), LayerOptions()))
    own = {FIRST: 2 + 3 * torch.arange(4, 8), SECOND: reach[4:], THIRD: torch.full((4,), 1000)}

    def wanted(name: str, request: Request, more: int) -> Tensor:
        at = torch.arange(request.seen + more)
        apart = at[request.seen :, None] - at
        slopes = 2.0 ** -torch.arange(5.0, 9.0).double()[:, None, None] if name == THIRD else torch.zeros(())
        masks: dict[str, Any] = {name: lambda q, k: (k <= q) & (q - k < own[name][:, None, None])}
        return by_mask(engine, masks, logit=lambda x: x - slopes * apart)(name, request, more)

    serve(engine, wanted, share=True)


def test_a_rank_has_the_slopes_and_sinks_of_its_heads() -> None:
    stand_in.SHARD.update(rank=1, size=2)
    slopes, sinks = [0.5, 0.25, 0.125, 0.0625], torch.tensor([0.3, -1.0, 2.0, 0.0])
    reach = CAUSAL & (sd.q_idx - sd.kv_idx < 2 + 3 * sd.h)
    given = {FIRST: sd.attend(CAUSAL, score=sd.patterns.alibi()), SECOND: reach}
    sd.serve.vllm.register(given, backend="tiled")
    words = {FIRST: {"alibi_slopes": slopes}, SECOND: {"sinks": sinks}, THIRD: {"sinks": sinks}}
    engine = Engine({name: LayerOptions(words=own) for name, own in words.items()})
    heads = torch.arange(4, 8)[:, None, None]
    masks: dict[str, Any] = {FIRST: causal, SECOND: lambda q, k: (k <= q) & (q - k < 2 + 3 * heads), THIRD: causal}

    def wanted(name: str, request: Request, more: int) -> Tensor:
        at = torch.arange(request.seen + more)
        biased = torch.tensor(slopes).double()[:, None, None] * (at - at[request.seen :, None])
        own: dict[str, Any] = {"logit": lambda x: x + biased} if name == FIRST else {"sinks": sinks}
        return by_mask(engine, masks, **own)(name, request, more)

    a, b = prompts(20, 30)
    engine.step([(a, 9), (b, 20)], wanted)
    engine.step([(a, 1), (b, 1)], wanted)


def test_a_layer_may_read_the_keys_of_another() -> None:
    sd.serve.vllm.register({FIRST: STREAM, SECOND: THIRDS}, backend="tiled")
    engine = Engine({FIRST: LayerOptions(), SECOND: LayerOptions(shares=FIRST)})
    serve(engine, by_mask(engine, {FIRST: streams, SECOND: thirds}), share=True)


# ---- once a step -------------------------------------------------------------------------------------------------------------------


def test_what_is_seen_is_found_once_a_step_and_a_pattern() -> None:
    names = [f"layers.{n}.attn" for n in range(6)]
    sinks = {name: torch.randn(4) for name in names[4:]}
    sd.serve.vllm.register({**dict.fromkeys(names[:3], STREAM), 3: THIRDS}, backend="tiled")
    engine = Engine({name: LayerOptions(words={"sinks": sinks[name]} if name in sinks else {}) for name in names})
    steps: list[Any] = []
    (builder,) = engine.builders.values()
    build = builder.build
    builder.build = lambda *args: steps.append(build(*args)) or steps[-1]
    masks: dict[str, Any] = {**dict.fromkeys(names, causal), **dict.fromkeys(names[:3], streams), names[3]: thirds}

    def wanted(name: str, request: Request, more: int) -> Tensor:
        return by_mask(engine, masks, sinks=sinks.get(name))(name, request, more)

    a, b = prompts(60, 50)
    engine.step([(a, 7), (b, 16)], wanted)
    engine.step([(a, 1), (b, 1)], wanted)
    assert [len(step.plans) for step in steps] == [3, 3]


def test_the_classes_are_what_vllm_looks_for() -> None:
    sd.serve.vllm.register(STREAM)
    backend = stand_in.AttentionBackendEnum.CUSTOM.get_class()
    assert backend is sd.serve.vllm.Backend is classes()["Backend"]
    assert (backend.__module__, backend.__qualname__, backend.get_name()) == ("sparsedsl.serve.vllm", "Backend", "CUSTOM")
    assert issubclass(backend, stand_in.AttentionBackend)
    assert issubclass(backend.get_impl_cls(), stand_in.AttentionImpl)
    assert issubclass(backend.get_builder_cls(), stand_in.AttentionMetadataBuilder)
    assert backend.get_builder_cls()._cudagraph_support == stand_in.AttentionCGSupport.NEVER
    assert backend.get_kv_cache_stride_order(True) == (1, 0, 2, 3, 4, 5)
    assert not backend.forward_includes_kv_cache_update
    with pytest.raises(AttributeError, match=r"Did you mean 'register'\?"):
        sd.serve.vllm.registers  # type: ignore[attr-defined]


def test_pages_of_all_layers_may_lie_in_one_tensor() -> None:
    """The order that the back end asks for with all layers together: pages of a layer lie those of all apart."""
    sd.serve.vllm.register(STREAM, backend="tiled")
    engine = Engine(dict.fromkeys((FIRST, SECOND), LayerOptions()))
    shape = (2, *engine.layers[FIRST].kv_cache.shape)
    order = sd.serve.vllm.Backend.get_kv_cache_stride_order(True)
    together = torch.full([shape[dim] for dim in order], float("nan"), dtype=torch.float64)
    views = together.permute([order.index(dim) for dim in range(len(order))])
    for layer, view in zip(engine.layers.values(), views, strict=True):
        assert not view.is_contiguous()
        layer.kv_cache = view
    serve(engine, by_mask(engine, {FIRST: streams, SECOND: streams}), share=True)


def test_a_slot_may_be_that_of_another_back_end() -> None:
    sd.serve.vllm.register(STREAM, backend="tiled", slot="CPU_ATTN")
    engine = Engine({FIRST: LayerOptions()}, slot="CPU_ATTN")
    (a,) = prompts(20)
    engine.step([(a, 9)], by_mask(engine, {FIRST: streams}))


def test_registering_again_takes_the_place_of_what_was_before() -> None:
    sd.serve.vllm.register(THIRDS, backend="tiled")
    sd.serve.vllm.register(lambda name: STREAM if sd.serve.vllm.layer_index(name) else None, backend="tiled")
    engine = Engine(dict.fromkeys((FIRST, SECOND), LayerOptions()))
    a, b = prompts(20, 30)
    engine.step([(a, 9), (b, 20)], by_mask(engine, {FIRST: causal, SECOND: streams}))


def test_a_step_is_what_it_was_when_it_was_built() -> None:
    """vLLM writes the next step into the tensors of this one."""
    sd.serve.vllm.register(STREAM)
    (builder,) = Engine({FIRST: LayerOptions()}).builders.values()
    given = [torch.tensor([0, 3]), torch.tensor([3]), torch.tensor([[5, 1]])]
    ends, lens, table = given
    step = builder.build(0, stand_in.CommonAttentionMetadata(ends, lens, 1, 3, 3, 3, table, ends))
    for tensor in given:
        tensor.fill_(-9)
    assert (step.q_ends.tolist(), step.kv_lens.tolist(), step.block_table.tolist()) == ([0, 3], [3], [[5, 1]])
