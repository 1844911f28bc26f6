"""Layers of a stand-in of vLLM on generated kernels, which read rows of its pages where they lie."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sparsedsl as sd
from tests.serve import stand_in
from tests.serve.stand_in import Engine, LayerOptions
from tests.serve.steps import FIRST, SECOND, STREAM, THIRD, THIRDS, by_mask, causal, serve, streams, thirds


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stand_in.installed():
        yield


@pytest.mark.parametrize(("kv_dtype", "element"), [("auto", None), ("fp8", torch.float8_e4m3fn)])
def test_every_request_gets_dense_attention_over_its_positions(kv_dtype: str, element: torch.dtype | None) -> None:
    sd.serve.vllm.register({FIRST: STREAM, 1: THIRDS}, backend="triton")
    engine = Engine(dict.fromkeys((FIRST, SECOND, THIRD), LayerOptions()), dtype=torch.float32, kv_dtype=kv_dtype)
    serve(engine, by_mask(engine, {FIRST: streams, SECOND: thirds, THIRD: causal}, element=element), share=True)


def test_windows_free_pages() -> None:
    sd.serve.vllm.register({SECOND: sd.patterns.sliding_window(5)}, backend="triton")
    engine = Engine({FIRST: LayerOptions(9), SECOND: LayerOptions(9)}, dtype=torch.float32)
    masks = {FIRST: lambda q, k: (k <= q) & (q - k < 9), SECOND: lambda q, k: (k <= q) & (q - k < 5)}
    serve(engine, by_mask(engine, masks), share=False)
    assert len(engine.free[9]) > 5
