"""The forward of a converted attention module: projections and rotation of the donor, the layer's program, the donor's ``o_proj``.

Input: what transformers calls an attention module with. Output: what it expects. With padding or packed rows every sequence runs by itself,
those of one length together, so that no program ever sees padding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from sparsedsl.errors import PatternError, ShapeError, TableError, UnsupportedError
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.execute.kept_summaries import KeptSummaries, summarised
from sparsedsl.lang.advice import surplus
from sparsedsl.lang.pattern import attend
from sparsedsl.models.carried import Stack, between_graphs, request_of
from sparsedsl.models.donor import Donor, Heads, check_projections, project
from sparsedsl.models.grouped_rows import TokenGroup, token_groups
from sparsedsl.models.layer import Layer, by_tokens, chunk_inputs, chunk_of
from sparsedsl.models.mask_arguments import MaskRequest
from sparsedsl.models.program_cache import Held, ProgramCacheLayer, bound_beside_chunks, keeps_state
from sparsedsl.program.graph import Program
from sparsedsl.program.in_layers import ROW, fitted, told_rows
from sparsedsl.program.relocation import reads_rows
from sparsedsl.runtime.call import wants_grad

__all__ = ["CONVERTED", "LAYER", "Converted", "converted_class", "program_cache"]

Tensor = torch.Tensor
LAYER = "sd_layer"  # the module in a converted one that holds what is new
CONVERTED = "_sparsedsl_converted"


@dataclass(eq=False)
class Converted:
    """What a converted attention module runs by. ``off``: the donor's own forward runs. ``reached``: this module's has run.
    ``checked``: the first tokens went through both, and the projections were the same. ``request``: stands for the mask of the next call,
    where there is none to carry it."""

    donor: Donor
    compiled: Compiled
    stack: Stack
    off: bool = False
    checked: bool = False
    reached: bool = False
    request: MaskRequest | None = None
    _fitted: dict[Program, Program] = field(default_factory=dict)

    def program(self, layer: Layer) -> Program:
        """The layer's, with what is the donor's own."""
        if layer.program not in self._fitted:
            own, donor = self.donor.native, self.donor
            score = None if "softcap" in layer.drops else own.score
            native = attend(own.mask, score, sink=None if "sinks" in layer.drops else own.sink)
            try:
                made = fitted(layer.program, donor.layer_idx, native, donor.scale, donor.head_dim)
            except UnsupportedError as error:
                raise UnsupportedError(f"{type(layer).__name__}: {error}") from error
            # Sequences run by their lengths: what a program says of rows it says of the batch's.
            self._fitted[layer.program] = told_rows(made) if reads_rows(made) else made
        return self._fitted[layer.program]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fitted": {}, "request": None}


@functools.cache
def converted_class(kind: Any) -> Any:
    """The class of a converted module: ``kind`` with another forward. ``donor_class``: ``kind``."""
    changes = {"forward": _forward, "donor_class": kind, "__reduce_ex__": _reduce}
    return type(f"Converted{kind.__name__}", (kind,), changes)


def _reduce(module: Any, protocol: int) -> Any:
    return _again, (type(module).donor_class,), module.__getstate__() if hasattr(module, "__getstate__") else vars(module)


def _again(kind: Any) -> Any:
    made = converted_class(kind)
    return made.__new__(made)


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **words: Any,
) -> tuple[Tensor, None]:
    converted: Converted = getattr(self, CONVERTED)
    if converted.off:
        own = type(self).donor_class.forward
        found: tuple[Tensor, None] = own(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **words,
        )
        return found
    return _run(self, converted, hidden_states, position_embeddings, attention_mask, past_key_values, words), None


@between_graphs
def _run(
    module: Any, converted: Converted, x: Tensor, position_embeddings: Any, mask: Any, cache: Any, words: dict[str, Any]
) -> Tensor:
    layer, index = getattr(module, LAYER), converted.donor.layer_idx
    _refuse_what_would_be_lost(module, index, words)
    if not converted.checked:
        check_projections(converted.donor, type(module).donor_class.forward, x, position_embeddings)
        converted.checked = True
    program = converted.program(layer)
    kept = None if cache is None else program_cache(cache, index, program)
    request = _request(converted, mask, x, 0 if kept is None else kept.slots)
    if cache is not None and cache.offloading and kept is not None:
        kept.prefetch()
    groups = token_groups(request, x.shape[0], x.device)
    if request.packing is not None and kept is not None:
        raise UnsupportedError(f"layer {index}: several sequences in a row (position_ids) go without a cache: use_cache=False")
    raw, rope = project(module, x, position_embeddings)
    given = _given(layer, program, x, raw, rope)
    if program.tables.keys() - program.bound.keys() >= {"sinks"}:
        given["sinks"] = module.sinks
    step = _Step(converted.compiled(program), layer, program, x, given)
    out = x.new_zeros(x.shape[0], converted.donor.heads, x.shape[1], given["v"].shape[3])
    try:
        for group in groups:
            held = None if kept is None else kept.take(group.rows, group.before)
            part, after = step.run(group, held, keep=kept is not None)
            out = group.put(part, out, 2)
            if kept is not None and after is not None:
                kept.put(group.rows, after, x.shape[0])
    except (ShapeError, TableError, UnsupportedError) as error:
        raise type(error)(f"layer {index} ({type(layer).__name__}): {error}") from error
    if kept is not None:
        kept.advance(x.shape[1], x.shape[0], x.device, padded=request.padding is not None)
        if cache.offloading:
            kept.offload()
    converted.reached = True
    o = layer.output(out.transpose(1, 2).reshape(*x.shape[:-1], -1), x)
    found: Tensor = module.o_proj(o)
    return found


def _given(layer: Layer, program: Program, x: Tensor, raw: Heads, rope: Heads) -> dict[str, Tensor]:
    """All inputs and tables of the program that the layer makes of these tokens, q, k and v first."""
    made = layer.inputs(x, raw, rope)
    where = f"{type(layer).__name__}.inputs"
    if not isinstance(made, dict) or not all(isinstance(value, Tensor) for value in made.values()):
        raise PatternError(f"{where} must return a dict of tensors, the inputs of its program by name; got {made!r:.80}")
    known = {"q", "k", "v", *program.inputs, *program.tables}
    if unknown := set(made) - known:
        raise TableError(f"{where}: {surplus(unknown, sorted(known), 'its program reads ' + ', '.join(sorted(known)))}")
    return {"q": rope.q, "k": rope.k, "v": rope.v} | made


@dataclass(frozen=True, eq=False)
class _Step:
    """One call of a module: ``given`` for all tokens of the batch."""

    attention: Any
    layer: Layer
    program: Program
    x: Tensor
    given: dict[str, Tensor]

    def run(self, group: TokenGroup, held: Held | None, keep: bool) -> tuple[Tensor, Held | None]:
        """The output of some sequences ``(n, heads, tokens, value_dim)``, and what is to be kept of them."""
        axes = by_tokens(self.program)
        tensors = {name: group.take(x, axes[name]) if name in axes else x for name, x in self.given.items()}
        q, k, v = (tensors.pop(name) for name in ("q", "k", "v"))
        if ROW.name in self.program.tables:
            tensors[ROW.name] = torch.tensor(group.rows, device=q.device)
        if not keep:
            marks = self._landmarks(group, None)[0]
            return self.attention(q, k, v, q_offset=0, **tensors, **marks), None
        tokens = group.before + q.shape[2]
        if keeps_state(self.program):
            state = None if held is None else held.state
            out, state = self.attention(q, k, v, q_offset=0, state=state, return_state=True, **tensors)
            return out, Held(tokens, state)
        by_keys = {name: x for name, x in (tensors | {"k": k, "v": v}).items() if name in axes and self._has_keys(name)}
        rows = by_keys if held is None else {n: torch.cat([held.rows[n], x], dim=axes[n]) for n, x in by_keys.items()}
        kept_rows, places = self._needed(rows, held, tokens, q.shape[1])
        if held is not None and held.places is not None:
            rows = {n: _in_their_places(x, axes[n], _with_new(held, tokens), tokens) for n, x in rows.items()}
        marks, hidden = self._landmarks(group, held)
        more = {name: x for name, x in tensors.items() if name not in rows} | {
            n: x for n, x in rows.items() if n not in ("k", "v")
        }
        kept = self._summaries(held, [q, *rows.values()])
        out = self.attention(q, rows["k"], rows["v"], q_offset=group.before, summaries=kept, **more, **marks)
        return out, Held(tokens, None, kept_rows, places, marks, hidden, kept)

    def _needed(
        self, rows: dict[str, Tensor], held: Held | None, tokens: int, heads: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:  # fmt: skip
        """Of rows for keys those that later tokens may ask for, and where they stand; None: everywhere."""
        bound = bound_beside_chunks(self.program)
        if bound is None:
            return rows, None
        places = _with_new(held, tokens)
        try:
            needed = bound.needs(places, tokens, *bound.sizes(heads=heads))
        except (ShapeError, TableError):  # how many depends on what only a call knows
            return rows, None
        at, axes = needed.nonzero().flatten(), by_tokens(self.program)
        return {name: x.index_select(axes[name], at.to(x.device)) for name, x in rows.items()}, places[at]

    def _summaries(self, held: Held | None, read: list[Tensor]) -> KeptSummaries | None:
        """Those of blocks that are over, where the program makes some and none of them wants a gradient."""
        if not summarised(self.program) or wants_grad(*read):
            return None
        return self.attention.keep_summaries() if held is None or held.summaries is None else held.summaries

    def _has_keys(self, name: str) -> bool:
        return name in ("k", "v") or "keys" in self.program.inputs[name].axes

    def _landmarks(self, group: TokenGroup, held: Held | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Landmarks of all chunks that are over, and the hidden states after the last of them."""
        names, chunk = [name for name in chunk_inputs(self.program) if name not in self.given], chunk_of(self.program)
        if chunk is None or not names:
            return {}, None
        x = group.take(self.x, 1)
        x = x if held is None or held.hidden is None else torch.cat([held.hidden, x], dim=1)
        over = x.shape[1] // chunk
        made = self.layer.landmarks(x[:, : over * chunk].unflatten(1, (over, chunk)))
        if set(made) != set(names):
            raise PatternError(
                f"{type(self.layer).__name__}.landmarks must return {', '.join(names)}; got {', '.join(made) or 'nothing'}"
            )
        if held is not None:
            made = {name: torch.cat([held.landmarks[name], marks], dim=2) for name, marks in made.items()}
        return made, x[:, over * chunk :]


def _with_new(held: Held | None, tokens: int) -> Tensor:
    """The places of what is held, and of the tokens that came since."""
    if held is None or held.places is None:
        return torch.arange(tokens)
    return torch.cat([held.places, torch.arange(held.tokens, tokens)])


def _in_their_places(rows: Tensor, axis: int, places: Tensor, tokens: int) -> Tensor:
    """Rows for all tokens, zeros where nobody asks for them."""
    sizes = [*rows.shape]
    sizes[axis] = tokens
    return rows.new_zeros(sizes).index_copy(axis, places.to(rows.device), rows)


# ---- what the model says beside hidden states ------------------------------------------------------------------------------------


def program_cache(cache: Cache, index: int, program: Program) -> ProgramCacheLayer:
    """The layer of a cache that keeps what a converted layer needs; put there if the cache is still empty."""
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise UnsupportedError(
            f"layer {index}: a converted layer keeps its tokens in a transformers Cache; got {type(cache).__name__}"
        )
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    found: Any = cache.layers[index]
    if isinstance(found, ProgramCacheLayer):
        if found.program != program:
            raise UnsupportedError(f"layer {index}: the cache was begun by another layer's program; begin with a new one")
        return found
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise UnsupportedError(
            f"layer {index}: a converted layer keeps other things than {type(found).__name__} has room for; use the default cache, or "
            "past_key_values=handle.cache() with the handle that sd.models.convert returned"
        )
    if found.get_seq_length():
        raise UnsupportedError(
            f"layer {index}: the cache holds {found.get_seq_length()} tokens of the donor's own attention, from which the converted layer "
            "cannot go on; begin with a new cache"
        )
    cache.layers[index] = made = ProgramCacheLayer(index, program)
    return made


def _request(converted: Converted, mask: Any, x: Tensor, slots: int) -> MaskRequest:
    """What transformers' mask would have said: where padding is, where sequences begin."""
    where, request = f"layer {converted.donor.layer_idx}", converted.request or request_of(mask)
    if request is None and mask is None:
        omitted = (r for r in reversed(converted.stack.omitted.values()) if r.q_offset == slots and r.q_length == x.shape[1])
        request = next(omitted, None)
    if request is None:
        got = "no mask at all" if mask is None else f"a finished mask {tuple(getattr(mask, 'shape', ()))}"
        raise UnsupportedError(
            f"{where} got {got}, where a converted layer needs to know padding and sequences. Pass a 2-D attention_mask (1 = real token)"
        )
    if request.overlays:
        raise UnsupportedError(
            f"{where}: the model combines its mask with {', '.join(request.overlays)}, which a converted layer would drop; leave this "
            "layer as it is for such inputs (handle.identity(), or a mapping without it)"
        )
    if request.q_offset != slots or request.q_length != x.shape[1]:
        raise ShapeError(
            f"{where}: the model reads slots {request.q_offset} to {request.q_offset + request.q_length}, and the layer's cache has seen "
            f"{slots} and gets {x.shape[1]}; use a cache that every layer fills alike"
        )
    return request


def _refuse_what_would_be_lost(module: Any, index: int, words: dict[str, Any]) -> None:
    if words.get("cache") is not None:
        raise UnsupportedError(
            f"layer {index}: paged caches (continuous batching) hold keys, and no states or summaries of a converted layer; use "
            "model.generate()"
        )
    dropout = getattr(module, "attention_dropout", 0)
    if module.training and dropout:
        raise UnsupportedError(
            f"layer {index}: the configuration asks for attention dropout {dropout} in training, and programs have none; set "
            "config.attention_dropout = 0 before the model is made"
        )
    if words.get("output_attentions"):
        raise UnsupportedError(
            f"layer {index}: output_attentions=True asks for the S x S weights, which a converted layer never has"
        )
