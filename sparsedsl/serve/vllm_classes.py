"""The classes that vLLM asks for, made as subclasses of its abstract classes where it is installed."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.serve.vllm_layer import CACHE_DTYPES, LayerWork, cache_shape
from sparsedsl.serve.vllm_step import StepBuilder

__all__ = ["NAMES", "classes", "vllm_modules"]

NAMES = ("Backend", "MetadataBuilder", "Impl")
# Where vLLM's layer looks its enumeration up by the name of the back end: any other name is a KeyError there.
CUSTOM = "CUSTOM"


def vllm_modules() -> tuple[Any, Any]:
    """vLLM's abstract classes, and its registry.

    Raises:
        UnsupportedError: it is not installed, or another version.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "sd.serve.vllm makes subclasses of vLLM's attention classes, and vLLM is not installed here: pip install vllm where the model "
            "is served. Without it attn.ragged and attn.paged take batches of requests, and sd.models.apply runs transformers' own batching"
        ) from error
    try:
        from vllm.v1.attention import backend
        from vllm.v1.attention.backends import registry
    except ImportError as error:
        raise UnsupportedError(
            f"vLLM {getattr(vllm, '__version__', '')} has no vllm.v1.attention.backend, with the attention classes that this back end is "
            "written against: install a vLLM that has it, such as 0.25"
        ) from error
    return backend, registry


@functools.cache
def classes() -> dict[str, type]:
    """``Backend``, ``MetadataBuilder`` and ``Impl``, by name."""
    abstract, _ = vllm_modules()

    class Impl(LayerWork, abstract.AttentionImpl):  # type: ignore[name-defined]
        """One layer."""

    class MetadataBuilder(StepBuilder, abstract.AttentionMetadataBuilder):  # type: ignore[name-defined]
        """One step of a group of layers."""

        # Lists of pages have other addresses in every step.
        _cudagraph_support = abstract.AttentionCGSupport.NEVER
        reorder_batch_threshold = None
        supports_update_block_table = False

        def use_cascade_attention(self, *args: Any, **words: Any) -> bool:
            return False

    class Backend(abstract.AttentionBackend):  # type: ignore[name-defined]
        """What vLLM is told of the back end."""

        supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
        supported_kv_cache_dtypes: ClassVar[list[str]] = list(CACHE_DTYPES)
        accept_output_buffer = True
        forward_includes_kv_cache_update = False

        @staticmethod
        def get_name() -> str:
            return CUSTOM

        @staticmethod
        def get_impl_cls() -> type:
            return Impl

        @staticmethod
        def get_builder_cls() -> type:
            return MetadataBuilder

        @staticmethod
        def get_supported_kernel_block_sizes() -> list[Any]:
            return [abstract.MultipleOf(1)]

        @staticmethod
        def get_kv_cache_shape(
            num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
        ) -> tuple[int, ...]:
            return cache_shape(num_blocks, block_size, num_kv_heads, head_size)

        @staticmethod
        def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
            # Pages come first; with all layers in one tensor a page holds those of all.
            return (1, 0, 2, 3, 4, 5) if include_num_layers_dimension else (0, 1, 2, 3, 4)

        @classmethod
        def supports_sink(cls) -> bool:
            return True

        @classmethod
        def supports_combination(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any) -> str | None:
            stored = CACHE_DTYPES.get(kv_cache_dtype or "auto")
            if stored is not None and stored.itemsize > 1 and stored != dtype:
                return f"kv_cache_dtype={kv_cache_dtype} with a model in {dtype}: keys are stored as they are, or as fp8"
            return None

    made: dict[str, type] = {kind.__name__: kind for kind in (Backend, MetadataBuilder, Impl)}
    for name, kind in made.items():
        kind.__module__, kind.__qualname__ = "sparsedsl.serve.vllm", name  # where vLLM imports it from
    return made
