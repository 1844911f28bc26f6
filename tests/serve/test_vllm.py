"""Layers of a stand-in of vLLM run patterns: every request gets dense attention over its own positions, whatever a step is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.serve.vllm_classes import classes
from tests.serve import stand_in
from tests.serve.stand_in import Engine, LayerOptions, Request, dense

Tensor = torch.Tensor
CAUSAL = sd.kv_idx <= sd.q_idx
FIRST, SECOND, THIRD = (f"model.layers.{n}.self_attn.attn" for n in range(3))
Allowed = Callable[[Tensor, Tensor], Tensor]

# Patterns, and the same by a formula of positions.
STREAM = sd.patterns.streaming_llm(6, sink_count=2)
THIRDS = CAUSAL & ((sd.kv_idx % 3 == 0) | (sd.q_idx - sd.kv_idx < 2))


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def streams(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((q - k < 6) | (k < 2))


def thirds(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((k % 3 == 0) | (q - k < 2))


def windowed(window: int) -> Allowed:
    return lambda q, k: (k <= q) & (q - k < window)


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stand_in.installed():
        yield


def by_mask(engine: Engine, masks: dict[str, Allowed], **words: Any) -> Callable[..., Tensor]:
    """What each layer is to give."""

    def wanted(name: str, request: Request, more: int) -> Tensor:
        tokens = request.tokens[: request.seen + more]
        q, k, v = (engine.rows(name, what, tokens) for what in "qkv")
        at = torch.arange(len(tokens))
        allowed = masks[name](at[request.seen :, None], at)
        return dense(q[request.seen :], k, v, engine.scale, allowed[None] if allowed.ndim == 2 else allowed, **words)

    return wanted


def prompts(*lens: int) -> list[Request]:
    made = torch.Generator().manual_seed(3)
    return [Request(torch.randint(stand_in.VOCAB, (n,), generator=made).tolist()) for n in lens]


def serve(engine: Engine, wanted: Callable[..., Tensor], *, share: bool) -> None:
    """Prompts, pieces of prompts, decoding with padding, a prefix that is shared, a preemption, a request that is done, pages used again."""
    a, b, c, d, e = prompts(60, 50, 40, 30, 30)
    engine.step([(a, 7), (b, 16), (c, 9)], wanted)
    engine.step([(a, 1), (b, 13), (c, 3)], wanted, padding=3)
    engine.step([(a, 1), (b, 1), (c, 1)], wanted, padding=5, empty=2)
    d.tokens[:22] = b.tokens[:22]
    if share:
        engine.share(d, b)
    engine.step([(d, 25 - d.seen), (a, 12), (b, 1)], wanted, padding=1)
    engine.drop(b)  # preempted
    engine.step([(a, 1), (c, 20), (d, 1)], wanted)
    engine.drop(a)  # done
    engine.step([(b, 33), (e, 20), (d, 1)], wanted)
    for _ in range(3):
        engine.step([(b, 1), (c, 1), (d, 1), (e, 2)], wanted, padding=2, empty=1)


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
