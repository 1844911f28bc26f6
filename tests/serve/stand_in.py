"""A stand-in of what vLLM (v1) is to an attention back end: modules of its names with abstract classes and a registry, a layer that picks
its back end as vLLM's does, and an engine that makes steps of many requests over pages.

It is harsh where vLLM may be: pages that are free hold NaN, so do rows of a page that no key was written to; tables of pages have garbage
behind what a request needs; padding rows of q, k and v hold 12345, outputs 7 before they are written.
"""

from __future__ import annotations

import abc
import enum
import importlib
import random
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor
VOCAB, LONGEST = 29, 160
MADE = "sparsedsl.serve.vllm_classes"


class AttentionType(enum.StrEnum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class MultipleOf:
    def __init__(self, base: int) -> None:
        self.base = base


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    NEVER = 0


class AttentionBackend(abc.ABC):
    """What vLLM asks of a back end, and the answers that it has by itself."""

    supported_dtypes: Any = (torch.float16, torch.bfloat16)
    supported_kv_cache_dtypes: Any = ("auto",)
    forward_includes_kv_cache_update = True

    @staticmethod
    @abc.abstractmethod
    def get_name() -> str: ...

    @staticmethod
    @abc.abstractmethod
    def get_impl_cls() -> Any: ...

    @staticmethod
    @abc.abstractmethod
    def get_builder_cls() -> Any: ...

    @staticmethod
    @abc.abstractmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> Any: ...

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> Any:
        raise NotImplementedError

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def is_mla(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_combination(cls, *facts: Any) -> str | None:
        return None

    @classmethod
    def validate_configuration(
        cls, dtype: torch.dtype, kv_cache_dtype: str, page: int, sinks: bool, mla: bool, kind: str
    ) -> list[str]:
        sizes = [size.base if isinstance(size, MultipleOf) else size for size in cls.get_supported_kernel_block_sizes()]
        combined = cls.supports_combination(8, dtype, kv_cache_dtype, page, mla, sinks, False, False, None)
        checks = {
            "dtype": dtype in cls.supported_dtypes,
            "kv_cache_dtype": kv_cache_dtype in cls.supported_kv_cache_dtypes,
            "block_size": any(page % size == 0 for size in sizes),
            "sinks": cls.supports_sink() or not sinks,
            "MLA": cls.is_mla() == mla,
            "attention type": cls.supports_attn_type(kind),
            combined or "": combined is None,
        }
        return [name for name, fits in checks.items() if not fits]


class AttentionMetadataBuilder(abc.ABC):
    _cudagraph_support = AttentionCGSupport.NEVER
    reorder_batch_threshold: int | None = None
    supports_update_block_table = False

    @abc.abstractmethod
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None: ...

    @abc.abstractmethod
    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any: ...

    def use_cascade_attention(self, *args: Any, **words: Any) -> bool:
        return True


class AttentionImpl(abc.ABC):
    dcp_world_size: int
    pcp_world_size: int

    def __new__(cls, *args: Any, **words: Any) -> Any:
        made = super().__new__(cls)
        made.dcp_world_size = made.pcp_world_size = 1
        return made

    @abc.abstractmethod
    def __init__(self, *args: Any, **words: Any) -> None: ...

    @abc.abstractmethod
    def forward(self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, output: Any) -> Any: ...


@dataclass
class CommonAttentionMetadata:
    query_start_loc: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: Any = True
    mm_req_doc_ranges: Any = None
    dcp_local_seq_lens: Any = None


class AttentionBackendEnum(enum.Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    CUSTOM = None

    def get_class(self) -> Any:
        path = OVERRIDES.get(self, self.value)
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


OVERRIDES: dict[AttentionBackendEnum, str] = {}
SHARD = {"rank": 0, "size": 1}


def register_backend(backend: AttentionBackendEnum, class_path: str) -> None:
    OVERRIDES[backend] = class_path


@contextmanager
def installed() -> Iterator[None]:
    """vLLM's modules, for a while."""
    path = "vllm.v1.attention"
    modules = {name: types.ModuleType(name) for name in ("vllm", "vllm.v1", path, f"{path}.backend", f"{path}.backends")}
    registry, state = types.ModuleType(f"{path}.backends.registry"), types.ModuleType("vllm.distributed.parallel_state")
    modules |= {registry.__name__: registry, "vllm.distributed": types.ModuleType("vllm.distributed"), state.__name__: state}
    for part in (AttentionBackend, AttentionMetadataBuilder, AttentionImpl, AttentionCGSupport, AttentionType, MultipleOf):
        setattr(modules[f"{path}.backend"], part.__name__, part)
    vars(registry).update(AttentionBackendEnum=AttentionBackendEnum, register_backend=register_backend)
    vars(state).update(
        get_tensor_model_parallel_rank=lambda: SHARD["rank"], get_tensor_model_parallel_world_size=lambda: SHARD["size"]
    )
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        module.__path__ = []  # type: ignore[attr-defined]
        if above:
            setattr(modules[above], last, module)
    classes = importlib.import_module(MADE).classes
    classes.cache_clear()
    sys.modules.update(modules)
    OVERRIDES.clear()
    SHARD.update(rank=0, size=1)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        classes.cache_clear()


# ---- layers and requests -----------------------------------------------------------------------------------------------------------


@dataclass
class LayerOptions:
    """What a model hands to one of its layers."""

    window: int | None = None
    words: dict[str, Any] = field(default_factory=dict)
    shares: str | None = None


class Layer:
    """A layer as vLLM makes it: back end by the registry, asked whether it can, and looked up again by its own name."""

    _k_scale_float, _v_scale_float = 0.5, 0.25

    def __init__(self, engine: Engine, name: str, options: LayerOptions) -> None:
        self.layer_name, self.options = name, options
        self.attn_backend = AttentionBackendEnum[engine.slot].get_class()
        kind = options.words.get("attn_type", AttentionType.DECODER)
        reasons = self.attn_backend.validate_configuration(
            engine.dtype, engine.kv_dtype, engine.page, options.words.get("sinks") is not None, False, kind
        )
        if reasons:
            raise ValueError(f"back end {self.attn_backend.get_name()} cannot: {', '.join(reasons)}")
        words = {"alibi_slopes": None, "logits_soft_cap": None, "attn_type": kind, **options.words}
        self.impl = self.attn_backend.get_impl_cls()(
            engine.heads, engine.head_dim, engine.scale, engine.kv_heads, words.pop("alibi_slopes"), options.window, engine.kv_dtype,
            words.pop("logits_soft_cap"), words.pop("attn_type"), options.shares, **words,
        )  # fmt: skip
        self.backend = AttentionBackendEnum[self.attn_backend.get_name()]
        self.kv_cache = torch.tensor([])


@dataclass(eq=False)
class Request:
    """``tokens``: all that it will ever hold. ``seen``: how many keys are in pages. ``pages``: by the window of a group."""

    tokens: list[int]
    seen: int = 0
    pages: dict[int | None, list[int]] = field(default_factory=dict)


class Engine:
    """Makes steps. ``layers``: name -> options. Keys, values and queries of a token are told by the token and where it stands."""

    def __init__(
        self, layers: dict[str, LayerOptions], *, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, page: int = 4, pages: int = 60,
        dtype: torch.dtype = torch.float64, kv_dtype: str = "auto", slot: str = "CUSTOM", seed: int = 0,
    ) -> None:  # fmt: skip
        self.heads, self.kv_heads, self.head_dim, self.scale, self.page = heads, kv_heads, head_dim, 0.41, page
        self.dtype, self.kv_dtype, self.slot, self.rng = dtype, kv_dtype, slot, random.Random(seed)
        # Of sums of a few dozen numbers, in the dtype of the model and in units of the largest.
        self.close = 1e-9 if dtype == torch.float64 else 1e-5
        self.made = torch.Generator().manual_seed(seed)
        self.layers = {name: Layer(self, name, options) for name, options in layers.items()}
        self.free = {window: list(range(1, pages)) for window in {layer.options.window for layer in self.layers.values()}}
        self.users: dict[tuple[int | None, int], int] = {}
        config = types.SimpleNamespace(
            parallel_config=types.SimpleNamespace(pipeline_parallel_size=1),
            compilation_config=types.SimpleNamespace(static_forward_context=self.layers),
        )
        self.builders = {}
        for window in self.free:
            names = [name for name, layer in self.layers.items() if layer.options.window == window]
            spec = types.SimpleNamespace(block_size=page, sliding_window=window)
            backend = self.layers[names[0]].attn_backend
            self.builders[window] = backend.get_builder_cls()(spec, names, config, torch.device("cpu"))
            for name in names:
                self._profile(self.layers[name])
                self.layers[name].kv_cache = self._cache(backend, pages)
        for layer in self.layers.values():
            if layer.options.shares is not None:
                layer.kv_cache = self.layers[layer.options.shares].kv_cache
        self.values: dict[str, Tensor] = {}
        for name in self.layers:
            for what, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                for of, rows in (("token", VOCAB), ("place", LONGEST)):
                    self.values[f"{name} {what} {of}"] = torch.randn(
                        rows, count, head_dim, generator=self.made, dtype=torch.float64
                    )

    def _cache(self, backend: Any, pages: int) -> Tensor:
        shape = backend.get_kv_cache_shape(pages, self.page, self.kv_heads, self.head_dim, self.kv_dtype)
        order = backend.get_kv_cache_stride_order()
        back = [order.index(dim) for dim in range(len(order))]
        element = torch.uint8 if self.kv_dtype.startswith("fp8") else self.dtype
        cache = torch.zeros([shape[dim] for dim in order], dtype=element).permute(back)
        assert cache.shape == shape
        cache.fill_(0x7F if element == torch.uint8 else float("nan"))  # (0x7F is a NaN of float8)
        return cache

    def _profile(self, layer: Layer) -> None:
        """vLLM runs the model once before there are any keys."""
        rows = torch.full((5, self.heads, self.head_dim), 3.0, dtype=self.dtype)
        output = torch.full_like(rows, 7.0)
        layer.impl.forward(layer, rows, rows[:, : self.kv_heads], rows[:, : self.kv_heads], layer.kv_cache, None, output)
        assert not output.any()

    def rows(self, name: str, what: str, tokens: list[int]) -> Tensor:
        """``(len(tokens), heads, D)`` of float64."""
        of_layer = self.layers[name].options.shares or name if what != "q" else name
        return self.values[f"{of_layer} {what} token"][tokens] + self.values[f"{of_layer} {what} place"][: len(tokens)]

    # ---- pages ----------------------------------------------------------------------------------------------------------------------

    def _grow(self, request: Request, length: int) -> None:
        for window, free in self.free.items():
            held = request.pages.setdefault(window, [])
            while len(held) * self.page < length:
                held.append(free.pop(self.rng.randrange(len(free))))
                self.users[window, held[-1]] = 1

    def _release(self, window: int | None, page: int) -> None:
        self.users[window, page] -= 1
        if self.users[window, page]:
            return
        self.free[window].append(page)
        for layer in self.layers.values():
            if layer.options.window == window:
                layer.kv_cache[page] = 0x7F if layer.kv_cache.dtype == torch.uint8 else float("nan")

    def share(self, request: Request, other: Request) -> None:
        """The whole pages of the tokens that both begin with, as far as they were computed."""
        pairs = enumerate(zip(request.tokens, other.tokens, strict=False))
        same = next((n for n, (one, two) in pairs if one != two), len(request.tokens))
        count = min(same, other.seen, len(request.tokens) - 1) // self.page
        for window in self.free:
            assert window is None, "pages of windows are not shared here"
            request.pages[window] = other.pages[window][:count]
            for page in request.pages[window]:
                self.users[window, page] += 1
        request.seen = count * self.page

    def drop(self, request: Request) -> None:
        """It is done, or preempted: then it begins anew."""
        for window, held in request.pages.items():
            for page in held:
                if page:
                    self._release(window, page)
        request.pages, request.seen = {}, 0

    def _slide(self, request: Request) -> None:
        """Pages that a window has left are given back; entry 0 stands for nothing."""
        for window, held in request.pages.items():
            if window is not None:
                for number in range(max(request.seen - window + 1, 0) // self.page):
                    if held[number]:
                        self._release(window, held[number])
                        held[number] = 0

    # ---- a step ---------------------------------------------------------------------------------------------------------------------

    def step(self, work: list[tuple[Request, int]], wanted: Callable[..., Tensor], *, padding: int = 0, empty: int = 0) -> None:
        """``n`` more tokens of each request, and whether every layer gives what ``wanted(name, request, rows of q)`` is. ``padding`` rows,
        and ``empty`` requests, stand behind them."""
        self.rng.shuffle(work)
        for request, more in work:
            self._slide(request)
            self._grow(request, request.seen + more)
        lens = [more for _, more in work]
        ends = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        ends = torch.cat([ends, ends[-1:].expand(empty)])
        total = int(ends[-1])
        seq_lens = torch.tensor([request.seen + more for request, more in work] + [0] * empty, dtype=torch.int32)
        steps, slots = {}, {}
        for window, builder in self.builders.items():
            table, slots[window] = self._table(window, work, empty), self._slots(window, work, padding)
            told = CommonAttentionMetadata(
                ends, seq_lens, len(work) + empty, total, max(lens), int(seq_lens.max()) + 5, table, slots[window]
            )
            steps[window] = builder.build(0, told)
            # The engine makes the next step in the same memory while this one runs.
            table.fill_(2**30)
        places = ends.tolist()
        for told_of in (ends, seq_lens):
            told_of.fill_(-9)
        for name, layer in self.layers.items():
            window = layer.options.window
            q, k, v = (self._packed(name, what, work, padding) for what in "qkv")
            output = torch.full_like(q, 7.0)
            before = layer.kv_cache.clone()
            with torch.inference_mode():
                if layer.options.shares is None:
                    layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache, slots[window])
                    self._assert_only_written(layer, before, slots[window])
                layer.impl.forward(layer, q, k, v, layer.kv_cache, steps[window], output)
            for number, (request, more) in enumerate(work):
                rows = output[places[number] : places[number] + more].double()
                want = wanted(name, request, more)
                torch.testing.assert_close(
                    rows, want, rtol=self.close, atol=self.close * max(1.0, float(want.abs().max())),
                    msg=lambda text, name=name, number=number: f"{name}, request {number}: {text}",
                )  # fmt: skip
            assert not output[total:].any(), "padding"
        for request, more in work:
            request.seen += more

    def _packed(self, name: str, what: str, work: list[tuple[Request, int]], padding: int) -> Tensor:
        parts = [self.rows(name, what, request.tokens[: request.seen + more])[request.seen :] for request, more in work]
        spoilt = torch.full((padding, *parts[0].shape[1:]), 12345.0, dtype=torch.float64)
        return torch.cat([*parts, spoilt]).to(self.dtype)

    def _table(self, window: int | None, work: list[tuple[Request, int]], empty: int) -> Tensor:
        """Wide, and garbage behind what is needed: pages of others, and numbers of no page."""
        width = LONGEST // self.page
        table = torch.tensor([[self.rng.choice([1, 5, 2**30, -7]) for _ in range(width)] for _ in range(len(work) + empty)])
        for row, (request, _) in zip(table, work, strict=False):
            row[: len(request.pages[window])] = torch.tensor(request.pages[window])
        return table.to(torch.int32)

    def _slots(self, window: int | None, work: list[tuple[Request, int]], padding: int) -> Tensor:
        found = [
            request.pages[window][at // self.page] * self.page + at % self.page
            for request, more in work
            for at in range(request.seen, request.seen + more)
        ]
        return torch.tensor(found + [-1] * padding)

    def _assert_only_written(self, layer: Layer, before: Tensor, slots: Tensor) -> None:
        """Nothing of the cache but the rows of the new keys is another, bit for bit."""
        rows = [x.contiguous().view(torch.uint8).flatten(3).transpose(1, 2).flatten(0, 1) for x in (before, layer.kv_cache)]
        moved = (rows[0] != rows[1]).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert moved == sorted(slot for slot in slots.tolist() if slot >= 0), "the rows written are not those of the new keys"


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor, logit: Callable[[Tensor], Tensor] = lambda x: x,
          sinks: Tensor | None = None) -> Tensor:  # fmt: skip
    """Attention of ``q (n, H, D)`` to ``k, v (length, Hkv, D)``, by the sum of its definition; ``allowed (H or 1, n, length)``."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = logit(torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~allowed, -float("inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)], 2)
    weights = torch.nan_to_num(torch.softmax(logits, 2))[:, :, : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, v)
