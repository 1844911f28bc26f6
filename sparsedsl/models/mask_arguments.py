"""What transformers knows when it makes a mask, kept as it is: offsets, padding, packed sequences.

transformers calls a registered mask function once per forward and layer type, and hands the result to the layers' attention function. Ours,
over the functions of the names that patterns are put over, makes a :class:`MaskRequest` for models with patterns; ``carried`` brings it to
the layers. Each layer with a pattern then asks the request for what it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, find_packed_sequence_indices

from sparsedsl.errors import ShapeError
from sparsedsl.models.carried import Stack, between_graphs, carrying, stacks_of, without_data
from sparsedsl.models.native import Facts
from sparsedsl.models.real_tokens import count_in_sequence, has_holes, leading_padding, place_of
from sparsedsl.models.traced import TracedRequest, note_traced

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["MaskFunction", "MaskRequest", "Packing", "register_masks", "request_in_graph", "unmasked_request"]

# transformers' own mask functions that a layer's pattern stands for -> what they say, and the name of their number.
_REPLACED = {
    "causal_mask_function": ("causal", None),
    "bidirectional_mask_function": ("bidirectional", None),
    "sliding_window_overlay.<locals>.inner_mask": ("window", "sliding_window"),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": ("distance", "sliding_window"),
    "chunked_overlay.<locals>.inner_mask": ("chunk", "chunk_size"),
}


@dataclass(frozen=True)
class Packing:
    """Several sequences in one row. ``sequence``, ``position``: (B, S), the sequence a token is in, and its place there."""

    sequence: torch.Tensor
    position: torch.Tensor


@dataclass(eq=False)
class MaskRequest:
    """One call of the mask function.

    ``q_offset``: cache slot of the first query. ``kv_offset``: cache slot of the first key that the layer hands out (a cropped
    sliding-window cache starts later than 0). ``padding``: (B, slots) bool, False = padding, or None when nothing is padded.
    ``packing``: see :class:`Packing`. ``facts``: the mask that transformers wants, see ``native.Facts``; None if its own words do
    not say it. ``overlays``: mask functions a pattern knows nothing of (image blocks, a caller's own). ``written``: how many slots are
    filled once the keys of this forward are in the cache; those up to the last query, where nothing else is said.
    """

    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    padding: torch.Tensor | None
    packing: Packing | None
    facts: Facts | None
    overlays: tuple[str, ...]
    make_native: Callable[[], Any]
    written: int = -1
    known: dict[Any, Any] = field(default_factory=dict)  # what was worked out from this request, by whatever names it
    _native: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.written < 0:
            self.written = self.q_offset + self.q_length

    def native_mask(self) -> Any:
        """The mask that transformers would have made: a tensor, a BlockMask or None. Made once."""
        if not self._native:
            self._native.append(self.make_native())
        return self._native[0]

    def part(self, first: int, end: int, keys: int) -> MaskRequest:
        """The request of the queries ``[first, end)`` and the first ``keys`` keys."""

        def native() -> Any:
            mask = self.native_mask()
            return None if mask is None else mask[:, :, first:end, :keys]

        rows, offset = end - first, self.q_offset + first
        return replace(self, q_length=rows, kv_length=keys, q_offset=offset, make_native=native, known={}, _native=[])

    def key_range(self, keys: int) -> tuple[int, int]:
        """The cache slots ``[start, stop)`` of a layer's ``keys`` keys; those a static cache has not written yet are left out."""
        if keys == self.kv_length:
            stop = self.kv_offset + keys
            spoken_for = self.padding is not None and self.padding.shape[1] >= stop
            return self.kv_offset, stop if spoken_for else min(stop, self.written)
        if keys <= self.written:  # this layer's cache keeps another length than the one the mask was sized by
            return self.written - keys, self.written
        raise ShapeError(
            f"the layer has {keys} keys, but transformers announced {self.kv_length} (slots {self.kv_offset} on) and "
            f"{self.written} tokens were seen; use a cache made by transformers, such as DynamicCache()"
        )

    def real(self, batch: int, stop: int) -> torch.Tensor:
        """(B, stop) bool: the slots that hold real tokens. Of a padded batch only."""
        assert self.padding is not None
        missing = stop - self.padding.shape[1]
        padding = torch.nn.functional.pad(self.padding, (0, missing)) if missing > 0 else self.padding
        return padding[:, :stop].expand(batch, -1)

    @functools.cached_property
    def has_holes(self) -> bool:
        """Whether there is padding between the real tokens of a row."""
        return self.padding is not None and has_holes(self.padding[:, : self.written])

    def keys_kept(self, start: int, count_slots: bool) -> int | None:
        """So many of the last keys, its own included, every query has at least, where those before slot ``start`` are gone; None: all."""
        if start == 0:
            return None
        if count_slots or not self.has_holes:
            return self.q_offset - start + 1
        key = ("kept", start)
        if key not in self.known:
            assert self.padding is not None
            real = self.real(self.padding.shape[0], self.written)
            asks = real[:, self.q_offset : self.q_offset + self.q_length].any(-1)
            kept = real[asks & real[:, :start].any(-1), start : self.q_offset].sum(-1)
            self.known[key] = int(kept.min()) + 1 if len(kept) else None
        known: int | None = self.known[key]
        return known

    def tables(self, start: int, stop: int, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
        """All that is data in this call, over the cache slots ``[start, stop)``; the same tensors for every layer that asks.

        - ``hf_start`` (1,): the first slot.
        - Where a slot is padding: ``left_padding`` (B,), padding before each row; ``hf_first``, ``hf_end`` (B,): from where to where a row
          without holes lies among these slots, also where its start is no more.
        - Where there are holes, (B, stop - start): ``hf_valid`` bool, real tokens; ``hf_place``, how many of its row stand before one.
        - In packed rows, (B, S): ``hf_sequence`` and ``hf_position``, see :class:`Packing`; ``hf_index``, how many tokens of its
          sequence stand before a token, and ``hf_length``, how many the sequence has.
        """
        key = ("tables", start, stop, batch, device)
        if key not in self.known:
            made = {"hf_start": torch.tensor([start], dtype=torch.int32, device=device)}
            made["left_padding"] = torch.zeros(batch, dtype=torch.int32, device=device)
            if self.padding is not None:
                real = self.real(batch, max(stop, self.padding.shape[1])).to(device)
                made["left_padding"] = leading_padding(real)
                made["hf_first"] = made["left_padding"] - start
                made["hf_end"] = made["hf_first"] + real[:, : self.written].sum(-1, dtype=torch.int32)
                if self.has_holes:
                    made["hf_valid"] = real[:, start:stop].contiguous()
                    made["hf_place"] = place_of(real)[:, start:stop].contiguous()
            if self.packing is not None:
                made["hf_sequence"] = self.packing.sequence.expand(batch, -1).to(device).contiguous()
                made["hf_position"] = self.packing.position.expand(batch, -1).to(device).contiguous()
                made["hf_index"], made["hf_length"] = count_in_sequence(made["hf_sequence"])
            self.known[key] = made
        tables: dict[str, torch.Tensor] = self.known[key]
        return tables

    def tables_at(self, slots: torch.Tensor, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The same over these cache slots, ascending, between which others are missing. ``hf_slot``: the slots, ``hf_stop``: how many there
        are in all; ``hf_valid`` and ``hf_place`` wherever a slot is padding."""
        stop, slots = int(slots[-1]) + 1, slots.to(device)
        made = {**self.tables(0, stop, batch, device), "hf_slot": slots, "hf_stop": slots[-1:] + 1}
        if self.padding is not None:
            real = self.real(batch, stop).to(device)
            made["hf_valid"], made["hf_place"] = real[:, slots], place_of(real)[:, slots]
        return made


def _padding(given: torch.Tensor | None, written: int, device: Any) -> torch.Tensor | None:
    """(B, slots) bool, or None where none of the slots that are written is padding."""
    if given is None:
        return None
    padding = given.to(device=device, dtype=torch.bool)
    # A mask that ends before the last query says that the slots behind it are padding.
    return None if bool(padding.all()) and padding.shape[1] >= written else padding


def request_in_graph(traced: TracedRequest, device: Any) -> MaskRequest:
    """The request that a graph stands for, once it runs."""
    packing, written = None, traced.q_offset + traced.q_length
    if traced.positions is not None:
        sequence = find_packed_sequence_indices(traced.positions)
        packing = None if sequence is None else Packing(sequence, traced.positions)
    padding = _padding(traced.padding, written, device)
    numbers = traced.q_length, traced.kv_length, traced.q_offset, traced.kv_offset
    return MaskRequest(*numbers, padding, packing, traced.facts, (), lambda: None, written)


def unmasked_request(length: int) -> MaskRequest:
    """What a layer means that attends in both directions and is called without any mask, as those of images are: all see all."""
    facts: Facts = frozenset({("bidirectional", None)})
    return MaskRequest(length, length, 0, 0, None, None, facts, (), lambda: None, length)


class MaskFunction:
    """A mask function for transformers' ``AttentionMaskInterface``, over the one that was registered there: ``native``.

    Models without patterns get what they got before.
    """

    def __init__(self, native: Callable[..., Any]) -> None:
        self.native = native

    def __call__(self, **arguments: Any) -> Any:
        stacks = stacks_of(arguments["config"]) if arguments.get("config") is not None else ()
        if not stacks:
            return self.native(**arguments)
        if torch.compiler.is_compiling():
            if stacks[0].between_graphs:
                return self._made_between_graphs(stacks, arguments)
            return note_traced(self.native, stacks, arguments)
        return self._made(stacks, arguments)

    def _made(self, stacks: tuple[Stack, ...], arguments: dict[str, Any]) -> Any:
        inside = [stack for stack in stacks if stack.inside]
        request = self._request(arguments, next((stack.seen for stack in inside if stack.seen is not None), None))
        if len(inside) == 1 and not inside[0].asks_for(request.facts):
            dtype = arguments["dtype"] if arguments["config"]._attn_implementation == "eager" else torch.bool
            return without_data(request, arguments["batch_size"], dtype, arguments["device"])
        mask = request.native_mask()
        if mask is not None:
            return carrying(request, mask)
        for stack in inside or stacks:
            stack.omit(request)
        return None

    _made_between_graphs = between_graphs(_made)

    def _request(self, arguments: dict[str, Any], seen: int | None) -> MaskRequest:
        q_offset, kv_length = arguments["q_offset"], arguments["kv_length"]
        if isinstance(q_offset, torch.Tensor):  # a static cache's own counter, which it moves on before the layer attends
            q_offset = int(q_offset)
        changed: dict[str, Any] = {"q_offset": q_offset}
        if arguments["q_length"] == 1 and arguments["kv_offset"] + kv_length > q_offset + 1:
            # Slots that are not written yet need a mask; transformers knows that of caches all of whose layers are static.
            changed["allow_is_causal_skip"] = False
        native = functools.partial(self.native, **{**arguments, **changed})
        if seen is not None and q_offset != seen:
            q_offset, kv_length = seen, seen + arguments["q_length"]
        padding = _padding(arguments["attention_mask"], q_offset + arguments["q_length"], arguments["device"])
        read = _Reading(arguments["config"])
        read.take(arguments["mask_function"])
        return MaskRequest(
            arguments["q_length"],
            kv_length,
            q_offset,
            arguments["kv_offset"],
            padding,
            read.packing(),
            frozenset(read.facts) if read.plain else None,
            tuple(read.overlays),
            native,
        )


def register_masks(native: str) -> None:
    """Let masks of the implementation ``native`` come with requests, for models that have patterns or converted layers."""
    if not isinstance(ALL_MASK_ATTENTION_FUNCTIONS[native], MaskFunction):
        AttentionMaskInterface.register(native, MaskFunction(ALL_MASK_ATTENTION_FUNCTIONS[native]))


class _Reading:
    """transformers' mask function, a tree of closures, taken apart: what it says, packed sequences, and what else there is."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.turns = getattr(config, "use_bidirectional_attention", False) is True  # Gemma 3: an `or` lambda undoes `causal`
        self.plain = not self.turns
        self.facts: set[tuple[str, int | None]] = set()
        self.sequence: torch.Tensor | None = None
        self.position: torch.Tensor | None = None
        self.overlays: list[str] = []

    def packing(self) -> Packing | None:
        """The packed sequences, if the function was about any."""
        if self.sequence is None or self.position is None:
            return None
        return Packing(self.sequence, self.position)

    def take(self, function: Callable[..., Any]) -> None:
        """Read one function and those inside it."""
        name, inside = function.__qualname__, _closure(function)
        own = function.__module__ == "transformers.masking_utils"
        if own and name in _REPLACED:
            word, number = _REPLACED[name]
            self.facts.add((word, int(inside[number]) if number else None))
        elif own and name in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
            for part in inside["mask_functions"]:
                self.take(part)
        elif own and name == "packed_sequence_mask_function.<locals>.inner_mask":
            self.sequence = inside["packed_sequence_mask"]
        elif own and name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
            self.position = inside["position_ids"]
            self.take(inside["mask_function"])
        elif not (self.turns and function.__module__.startswith("transformers.models.")):
            self.overlays.append(f"{function.__module__}.{name.split('.<locals>')[0]}")


def _closure(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
