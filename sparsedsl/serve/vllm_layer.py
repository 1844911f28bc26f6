"""One attention layer in vLLM: new keys into the pages of its cache, then the output of its queries.

The cache of a layer is ``(pages, 2, page, Hkv, D)``: keys and values of a page beside each other, both read where they lie.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.serve.layer_facts import LayerFacts, LayerRun
from sparsedsl.serve.layer_patterns import registered
from sparsedsl.serve.vllm_step import Step

__all__ = ["CACHE_DTYPES", "LayerWork", "cache_shape"]

Tensor = torch.Tensor
# What vLLM calls the dtype of a cache -> that of its elements; None: that of the model.
CACHE_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def cache_shape(pages: int, page: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Of the cache of a layer."""
    return (pages, 2, page, kv_heads, head_dim)


class LayerWork:
    """What vLLM calls of a layer, without its abstract class; of :class:`Impl`."""

    dcp_world_size: int
    pcp_world_size: int

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None, kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: Any = "decoder", kv_sharing_target_layer_name: str | None = None, sinks: Tensor | None = None, **extra: Any,
    ) -> None:  # fmt: skip
        kind = str(getattr(attn_type, "value", attn_type))
        if kind != "decoder":
            raise UnsupportedError(
                f"attn_type={kind!r}: patterns run in decoders, over keys in pages. Serve this model by another attention backend"
            )
        if kv_cache_dtype not in CACHE_DTYPES:
            raise UnsupportedError(f"kv_cache_dtype={kv_cache_dtype!r} is not known here; use one of {', '.join(CACHE_DTYPES)}")
        if unknown := sorted(name for name, value in extra.items() if value is not None and value is not False and value != -1):
            raise UnsupportedError(
                f"the model hands {', '.join(f'{name}={extra[name]!r}' for name in unknown)} to its attention, which would be lost here. "
                "Serve it by another attention backend"
            )
        for word, size in (("decode", getattr(self, "dcp_world_size", 1)), ("prefill", getattr(self, "pcp_world_size", 1))):
            if size > 1:
                raise UnsupportedError(
                    f"{word}_context_parallel_size={size} spreads the keys of a request over ranks, and a pattern needs them in one place. "
                    "Set it to 1"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes, self.sinks, self.sliding_window = alibi_slopes, sinks, sliding_window
        self.kv_cache_dtype, self.logits_soft_cap = kv_cache_dtype, logits_soft_cap
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._runs: dict[str, LayerRun] = {}

    # ---- what it runs ---------------------------------------------------------------------------------------------------------------

    def run(self, name: str, device: torch.device) -> LayerRun:
        """What the layer of this name runs, found as it is first called, which is before anything is served."""
        if name not in self._runs:
            given = registered()
            found = self._facts(device).run(name, given.of(name), given.compiled)
            found.check_window(self.sliding_window)
            self._runs[name] = found
        return self._runs[name]

    def _facts(self, device: torch.device) -> LayerFacts:
        rank, size = _tensor_parallel()
        slopes = self.alibi_slopes
        with torch.inference_mode(False):
            told = None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32).to(device, copy=True)
        return LayerFacts(
            self.num_heads, self.head_size, self.scale, self.sliding_window, self.logits_soft_cap or None, told,
            None if self.sinks is None else self.sinks.detach(), rank * self.num_heads, size * self.num_heads,
        )  # fmt: skip

    # ---- a step ---------------------------------------------------------------------------------------------------------------------

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """New keys and values ``(T, Hkv, D)`` to their rows of the cache; a slot of -1 is padding, which is written nowhere."""
        rows = slot_mapping.numel()
        if not kv_cache.numel() or not rows:
            return
        slots = slot_mapping.to(torch.int64)
        real = slots >= 0
        # Nothing is looked at, which on a GPU would wait: padding writes what a real row writes or, if there is none, what is there.
        source = torch.where(real, torch.arange(rows, device=slots.device), real.to(torch.int8).argmax())
        target = slots[source].clamp(min=0)
        pools, page = self._pools(kv_cache, layer), kv_cache.shape[2]
        for pool, rows_of, scale in zip(pools, (key, value), _scales(layer), strict=True):
            new = self._as_stored(rows_of[:rows][source], scale, pool.dtype)
            at = target // page, target % page
            old = _bytes(pool)
            old[at] = torch.where(real.any(), _bytes(new), old[at])

    def forward(
        self, layer: Any, query: Tensor, key: Tensor | None, value: Tensor | None, kv_cache: Tensor, attn_metadata: Step | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The output of ``query (T, Hq, D)``, written into ``output``; rows behind the last request are 0."""
        name = layer.layer_name
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(
                f"layer {name}: the output is to be quantised inside of attention (output_scale), which this back end does not do: "
                "fused_output_quant_supported() says so. Switch that fusion off"
            )
        if value is not None and value.shape[-1] != self.head_size:
            raise UnsupportedError(
                f"layer {name}: values are {value.shape[-1]} wide and keys {self.head_size}; caches of this back end have one width. "
                "Serve this model by another attention backend"
            )
        run = self.run(name, query.device)
        if attn_metadata is None or not attn_metadata.rows:  # vLLM measures memory, when there are no keys yet; or nobody asks
            return output.fill_(0)
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"layer {name}: lists of pages are made anew in each step, which a CUDA graph cannot do; vLLM was told so "
                "(AttentionCGSupport.NEVER). Use cudagraph_mode='PIECEWISE' or enforce_eager=True"
            )
        run.check_window(attn_metadata.window)
        rows = attn_metadata.rows
        k_pool, v_pool = self._pools(kv_cache, layer)
        k_scale, v_scale = _scales(layer) if self._is_quantised else (None, None)
        try:
            # What is remembered of a step is to count the writes to it, which tensors of inference mode do not.
            with torch.inference_mode(False), torch.no_grad():
                plan = attn_metadata.plan(run, self.num_heads, k_pool.shape[0], k_pool.shape[1], query.device)
                found = plan(
                    query[:rows], k_pool, v_pool, scale=run.scale, k_scale=k_scale, v_scale=v_scale, tables=run.tables or None
                )
        except (ShapeError, TableError, UnsupportedError) as error:
            raise type(error)(f"layer {name}: {error}") from error
        output[:rows] = found.reshape(rows, *output.shape[1:])
        output[rows:] = 0
        return output

    # ---- the cache ------------------------------------------------------------------------------------------------------------------

    @property
    def _is_quantised(self) -> bool:
        return self.kv_cache_dtype.startswith("fp8")

    def _pools(self, kv_cache: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``(pages, page, Hkv, D)`` of the cache, where they lie."""
        wanted = cache_shape(kv_cache.shape[0], kv_cache.shape[2] if kv_cache.ndim > 2 else 0, self.num_kv_heads, self.head_size)
        if tuple(kv_cache.shape) != wanted:
            raise ShapeError(
                f"layer {layer.layer_name}: the cache is {tuple(kv_cache.shape)}; wanted (pages, 2, page, {self.num_kv_heads}, "
                f"{self.head_size}), as get_kv_cache_shape() says"
            )
        element = CACHE_DTYPES[self.kv_cache_dtype]
        if element is not None and self._is_quantised:
            kv_cache = kv_cache.view(element)
        return kv_cache[:, 0], kv_cache[:, 1]

    def _as_stored(self, rows: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        if not self._is_quantised:
            return rows.to(dtype)
        most = torch.finfo(dtype).max  # (beyond it e5m2 is infinite)
        return (rows.float() / scale).clamp(-most, most).to(dtype)


def _scales(layer: Any) -> tuple[float, float]:
    """Of quantised keys and values."""
    return float(getattr(layer, "_k_scale_float", 1.0)), float(getattr(layer, "_v_scale_float", 1.0))


def _bytes(x: Tensor) -> Tensor:
    """Elements of one byte by their number: not every device writes the short types by index."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _tensor_parallel() -> tuple[int, int]:
    """This process's rank among those that share the heads, and how many they are."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    try:
        return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    except AssertionError:  # nothing was started, as in tests of one process
        return 0, 1
