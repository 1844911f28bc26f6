"""One layer's attention inside transformers' continuous batching: new tokens of many requests, whose keys lie in a paged cache.

Input: a bound module's query, key and value ``(1, H, T, D)``, packed, and the words of transformers' paged calls. Output:
``(1, T, Hq, Dv)``.

1. :class:`PagedStep`: what one forward of the model says of all layers; made by the hook around the forward.
2. ``_refuse``: what would depend on how the scheduler cuts prompts, or on which request stands where.
3. New keys go into the cache. Of layers that keep every key, pages are then read where they lie, those that the pattern can see; rings
   of sliding layers, and keys for backends that read no pages, are handed out packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

from sparsedsl.analysis.proofs import PROVED, implies
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.packed_face import reads_pages
from sparsedsl.execute.scheduled import refuse_scheduled
from sparsedsl.lang.expressions import kv_idx, q_idx
from sparsedsl.models.binding import Binding
from sparsedsl.models.derived import DerivedForm, derive, moves_freely

__all__ = ["PagedStep", "attend_paged", "check_served", "paged_step"]

Tensor = torch.Tensor
_SLIDING = "sliding_attention"


@dataclass(eq=False)
class PagedStep:
    """One forward. ``positions``: (T,) of the new tokens, on the CPU. ``masks``: those that transformers made. ``lengths``: by kind of
    layer, where queries and keys of each request end, and the position of its first key."""

    positions: Tensor
    masks: tuple[Tensor, ...]
    lengths: dict[str, _Lengths] = field(default_factory=dict)

    def of(self, kind: str, words: dict[str, Any]) -> _Lengths:
        """The same for all layers of a kind: looked at once."""
        if kind not in self.lengths:
            self.lengths[kind] = _Lengths.read(self.positions, words["cu_seq_lens_q"], words["cu_seq_lens_k"][kind])
        return self.lengths[kind]


@dataclass(frozen=True, eq=False)
class _Lengths:
    """int64, on the CPU. ``q_ends``, ``k_ends``: (R + 1,). ``first_keys``: (R,), the position of the first key that is handed out."""

    q_ends: Tensor
    k_ends: Tensor
    first_keys: Tensor

    @staticmethod
    def read(positions: Tensor, q_ends: Tensor, k_ends: Tensor) -> _Lengths:
        q_ends, k_ends = (ends.to("cpu", torch.int64) for ends in (q_ends, k_ends))
        asks = q_ends.diff() > 0  # (a request without queries pads the step)
        first_queries = torch.where(asks, positions[q_ends[:-1].clamp(max=positions.numel() - 1)], 0)
        first_keys = torch.where(asks, first_queries + q_ends.diff() - k_ends.diff(), 0)
        return _Lengths(q_ends, k_ends, first_keys)


def check_served(bindings: Mapping[int, Binding], config: Any) -> None:
    """Refuse what no layer can run in continuous batching, before it begins.

    Raises:
        UnsupportedError: a scheduler's cuts, or its order of requests, would change what a layer gives; a layer's cache drops too much.
    """
    groups = group_layers_by_attn_type(config)
    for index, binding in bindings.items():
        _refuse(binding, config.sliding_window if index in groups.get(_SLIDING, ()) else None)


def paged_step(words: dict[str, Any]) -> PagedStep | None:
    """What the words of a forward say of continuous batching; None where they are those of another forward."""
    if words.get("cache") is None or words.get("position_ids") is None or "cu_seq_lens_q" not in words:
        return None
    masks = words.get("attention_mask")
    given = tuple(masks.values()) if isinstance(masks, dict) else () if masks is None else (masks,)
    return PagedStep(words["position_ids"][0].to("cpu", torch.int64), given)


def attend_paged(
    binding: Binding, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, words: dict[str, Any]
) -> Tensor:  # fmt: skip
    """What the layer runs, over each request by itself."""
    where, step = f"layer {binding.index}", binding.stack.step
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            f"{where}: lists of pages are made anew in each step, which is no part of a graph; pass a ContinuousBatchingConfig without "
            "torch.compile (varlen_compile_config, decode_compile_config)"
        )
    if step is None:
        raise UnsupportedError(
            f"{where} got a paged cache, and the forward around it did not: call the model itself, or model.generate_batch(), which do"
        )
    if words.get("block_table") is not None:
        raise UnsupportedError(
            f"{where}: a step of decoding by block tables leaves it to a kernel of flash attention to store keys. Pass "
            "ContinuousBatchingConfig(max_blocks_per_request=0)"
        )
    if mask is not None and not any(mask.data_ptr() == made.data_ptr() for made in step.masks):
        raise UnsupportedError(
            f"{where} got a mask that the model changed on the way, which the pattern would drop. Leave this layer native "
            "(patterns={...} without it)"
        )
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"{where}: lists of pages are made anew in each step, which a CUDA graph cannot do; pass "
            "ContinuousBatchingConfig(use_cuda_graph=False)"
        )
    cache = words["cache"]
    allocator = cache.layer_to_allocator[module.layer_idx]
    ring = allocator.sliding_window if allocator.layer_type == _SLIDING else None
    _refuse(binding, ring)
    lengths = step.of(allocator.layer_type, words)
    if bool((lengths.first_keys > 0).any()) and binding.program is not None and not binding.attends_alone:
        raise _dropped(binding, ring)
    attention, tables, scale = _what_runs(binding, query, lengths, words)
    packed: dict[str, Any] = {"scale": scale, "layout": "htd", **tables}
    try:
        backend = binding.compiled.backend  # (for triton pages would have to be listed on the CPU: that is to wait in each layer)
        paged = ring is None and backend != "triton" and reads_pages(backend, query.device)
        if paged and words["read_index"][allocator.index].numel():
            read = words["read_index"][allocator.index]
            nothing = {**words, "read_index": [read[:0]] * (allocator.index + 1)}
            cache.update(key, value, module.layer_idx, nothing)  # stores the new ones
            pools = allocator.get_cache_for_block_table(module.layer_idx)
            pages = _pages(read, lengths.k_ends, allocator.tokens_per_page)
            out = attention.paged(query[0], *pools, pages, lengths.k_ends.diff(), lengths.q_ends, **packed)
        else:
            key, value = cache.update(key, value, module.layer_idx, dict(words))
            out = attention.ragged(query[0], key[0], value[0], lengths.q_ends, lengths.k_ends, **packed)
    except (ShapeError, TableError, UnsupportedError) as error:
        raise type(error)(f"{where}: {error}") from error
    return out.transpose(0, 1)[None].contiguous()


def _pages(read: Tensor, k_ends: Tensor, page: int) -> Tensor:
    """(R, pages at most) int64: in which page of the pool each page of a request lies. ``read``: the row of the pool of each key."""
    lens = k_ends.diff()
    first = torch.arange(0, max(int(lens.max()), 1), page)
    at = torch.where(first < lens[:, None], k_ends[:-1, None] + first, 0)
    return (read[at.to(read.device)] // page).to("cpu", torch.int64)


def _what_runs(
    binding: Binding, query: Tensor, lengths: _Lengths, words: dict[str, Any]
) -> tuple[Any, dict[str, Tensor], float | None]:  # fmt: skip
    """What is compiled for the layer, its tables, and its scale where the call has to say it."""
    scale, head_dim, count = words.get("scaling"), query.shape[3], lengths.first_keys.numel()
    known = {"left_padding": torch.zeros(count, dtype=torch.int32, device=query.device)}
    if binding.program is not None and not binding.attends_alone:
        attention = binding.program_attention(scale, head_dim, by_row=False)
        wanted = frozenset(attention.program.tables) - frozenset(attention.program.bound)
        return attention, binding.tables(wanted, known, words), None
    form = DerivedForm()
    if bool(lengths.first_keys.any()):
        free = not binding.attends_alone and moves_freely(derive(binding.pattern, form))
        form = DerivedForm(cropped=True) if free else DerivedForm(padded=True)
        # Keys of a request are counted from its first one: where its row begins and ends among those that are handed out.
        known["hf_first"] = -lengths.first_keys.to(query.device, torch.int32)
        known["hf_end"] = lengths.k_ends.diff().to(query.device, torch.int32)
    attention, wanted = binding.attention(form, scale, head_dim)
    own_scale = binding.attends_alone or binding.pattern.scale is not None
    return attention, binding.tables(wanted, known, words), None if own_scale else scale


def _refuse(binding: Binding, ring: int | None) -> None:
    """Refuse what a scheduler's cuts, or its order of requests, would change. ``ring``: keys that the layer's cache keeps; None: all."""
    if ring in binding.served:
        return
    where, ways = f"layer {binding.index}", "Leave this layer native (patterns={...} without it), or generate by model.generate()"
    program = binding.program
    refuse_scheduled(program or derive(binding.pattern, DerivedForm()), where, "continuous batching", ways)
    if binding.stack.owners.get(binding.index, binding.index) != binding.index:
        raise UnsupportedError(f"{where} reads the keys of another layer, which paged caches do not hand out. {ways}")
    if ring is not None and (program is None or binding.attends_alone) and not _fits(binding, ring):
        raise _dropped(binding, ring)
    binding.served.add(ring)


def _fits(binding: Binding, ring: int) -> bool:
    """Whether none but the last keys, the query's own included, are asked for."""
    asked = binding.asks_for
    return asked is not None and implies(asked.mask, q_idx - kv_idx < ring) == PROVED


def _dropped(binding: Binding, ring: int | None) -> UnsupportedError:
    return UnsupportedError(
        f"layer {binding.index}: by the model's configuration its paged cache keeps the last {ring} keys (a sliding layer), and what it "
        f"runs may ask for earlier ones. Give it a window of {ring} keys or fewer, or generate by "
        "model.generate(past_key_values=handle.cache()), with the handle that models.apply returned"
    )
