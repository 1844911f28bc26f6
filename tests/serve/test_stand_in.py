"""The stand-in of vLLM finds what a back end may do wrong: a plain one passes, and each fault that is planted in it is seen."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.serve import stand_in
from tests.serve.stand_in import Engine, LayerOptions, Request, dense

Tensor = torch.Tensor
WINDOW = 6
FAULT: dict[str, str | None] = {"planted": None}


class PlainBuilder(stand_in.AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.page = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        told = common_attn_metadata
        parts = {"ends": told.query_start_loc, "lens": told.seq_lens, "table": told.block_table_tensor}
        return SimpleNamespace(page=self.page, **{name: part.long().clone() for name, part in parts.items()})


class PlainImpl(stand_in.AttentionImpl):
    """Gathers the keys of one request after the other."""

    def __init__(self, heads: int, head_dim: int, scale: float, *others: Any, **words: Any) -> None:
        self.scale = scale

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        kept = slice(None) if FAULT["planted"] == "slot -1 written" else slot_mapping >= 0
        slots, page = slot_mapping[kept], kv_cache.shape[2]
        for side, rows in enumerate((key, value)):
            kv_cache[slots // page, side, slots % page] = rows[kept]

    def forward(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any, *others: Any
    ) -> Any:
        output.zero_()
        if attn_metadata is None:
            return output
        fault, page = FAULT["planted"], attn_metadata.page
        for number, length in enumerate(attn_metadata.lens.tolist()):
            begin, end = attn_metadata.ends[number : number + 2].tolist()
            if begin == end:
                continue
            first = 0 if fault == "positions from 0" else length - (end - begin)
            dead = 0 if fault == "freed keys read and then masked" else max(first - WINDOW + 1, 0)
            stop = length + page if fault == "table garbage read" else length
            keys = torch.arange(dead, stop)
            pages = attn_metadata.table[number, keys // page].clamp(0, len(kv_cache) - 1)
            k, v = kv_cache[pages, 0, keys % page], kv_cache[pages, 1, keys % page]
            at = torch.arange(first, first + end - begin)[:, None]
            allowed = (keys <= at) & (at - keys < WINDOW)
            output[begin:end] = dense(query[begin:end], k, v, self.scale, allowed[None])
        if fault == "padding left":
            output[attn_metadata.ends[-1] :] = 7
        return output


class PlainBackend(stand_in.AttentionBackend):
    supported_dtypes = (torch.float64,)
    get_name = staticmethod(lambda: "SPARSE" if FAULT["planted"] == "another name" else "CUSTOM")
    get_impl_cls = staticmethod(lambda: PlainImpl)
    get_builder_cls = staticmethod(lambda: PlainBuilder)
    get_kv_cache_shape = staticmethod(lambda pages, page, heads, dim, kind="auto": (pages, 2, page, heads, dim))
    get_kv_cache_stride_order = staticmethod(lambda layers=False: (0, 1, 2, 3, 4))


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with stand_in.installed():
        stand_in.register_backend(stand_in.AttentionBackendEnum.CUSTOM, f"{__name__}.PlainBackend")
        yield
    FAULT["planted"] = None


def serve() -> None:
    engine = Engine({"layer": LayerOptions(WINDOW)})

    def wanted(name: str, request: Request, more: int) -> Tensor:
        tokens = request.tokens[: request.seen + more]
        q, k, v = (engine.rows(name, what, tokens) for what in "qkv")
        at = torch.arange(len(tokens))
        apart = at[request.seen :, None] - at
        return dense(q[request.seen :], k, v, engine.scale, ((apart >= 0) & (apart < WINDOW))[None])

    a, b = Request(list(range(25))), Request(list(range(4, 29)))
    engine.step([(a, 7), (b, 9)], wanted)
    for _ in range(10):
        engine.step([(a, 1), (b, 1)], wanted, padding=2, empty=1)


def test_a_plain_back_end_passes() -> None:
    serve()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("positions from 0", AssertionError),
        ("table garbage read", AssertionError),
        ("slot -1 written", AssertionError),
        ("freed keys read and then masked", AssertionError),
        ("padding left", AssertionError),
        ("another name", KeyError),
    ],
)
def test_a_planted_fault_is_seen(fault: str, error: type[Exception]) -> None:
    FAULT["planted"] = fault
    with pytest.raises(error):
        serve()
