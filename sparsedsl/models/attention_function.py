"""One layer's attention: transformers' call in, a call of a compiled pattern or program out.

Input: a bound attention module, its query, key and value, and the forward's :class:`~sparsedsl.models.mask_arguments.MaskRequest`.
Output: what transformers expects of an attention function, ``(out (B, Sq, Hq, Dv), None)``.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.models.binding import BINDING, Binding, made_again
from sparsedsl.models.carried import between_graphs, request_of
from sparsedsl.models.continuous import attend_paged
from sparsedsl.models.derived import DerivedForm
from sparsedsl.models.graph_attention import attend_in_graph, run_by
from sparsedsl.models.grouped_rows import token_groups
from sparsedsl.models.kept_keys import KeptKeys
from sparsedsl.models.mask_arguments import MaskRequest, request_in_graph, unmasked_request
from sparsedsl.models.native import Facts
from sparsedsl.models.program_keys import FoldedKeys, StaticSummarisedKeys, WithSummaries
from sparsedsl.models.sequences import SequenceGroup, sequence_groups
from sparsedsl.models.traced import TracedRequest, traced_request
from sparsedsl.program.in_layers import ROW
from sparsedsl.runtime.call import wants_grad

__all__ = ["attend"]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[torch.Tensor, Any]:
    """The attention function of bound modules, as transformers' ``AttentionInterface`` wants it."""
    binding: Binding = getattr(module, BINDING)
    if arguments.get("cache") is not None:
        _refuse_words(binding, arguments)
        binding.reached = True
        return attend_paged(binding, module, query, key, value, attention_mask, arguments), None
    told, rows = arguments.get("is_causal"), query.shape[2]
    both_ways = not (getattr(module, "is_causal", True) if told is None else told)
    if torch.compiler.is_compiling():
        if binding.stack.between_graphs:
            found: tuple[torch.Tensor, Any] = _attend_between_graphs(module, query, key, value, attention_mask, **arguments)
            return found
        traced = traced_request(binding.stack, attention_mask, binding.facts)
        if traced is None and attention_mask is None and both_ways and rows == key.shape[2]:
            traced = TracedRequest(rows, rows, 0, 0, None, None, binding.facts)
        _refuse_what_would_be_lost(binding, attention_mask, traced, arguments)
        assert traced is not None
        binding.reached = True
        return attend_in_graph(binding, query, key, value, traced, arguments), None
    request = request_of(attention_mask)
    if attention_mask is None:
        request = _omitted_request(binding, rows, key.shape[2])
        if request is None and both_ways and rows == key.shape[2]:
            request = unmasked_request(rows)
    _refuse_what_would_be_lost(binding, attention_mask, request, arguments)
    binding.reached = True
    return _run(binding, query, key, value, request, arguments), None


_attend_between_graphs = between_graphs(attend)


def _run_in_graph(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    traced: TracedRequest,
    arguments: dict[str, Any],
) -> torch.Tensor:
    return _run(binding, query, key, value, request_in_graph(traced, query.device), arguments)


run_by(_run_in_graph, made_again)


def _omitted_request(binding: Binding, rows: int, keys: int) -> MaskRequest | None:
    """The request behind a missing mask. Of a fitted cache all tokens were announced; before it was fitted, what the layer then was for."""
    held, announced = binding.held, [keys]
    if isinstance(held, (KeptKeys, FoldedKeys)):
        announced = [
            held.seen,
            held.get_mask_sizes(0)[0],
            *([held.stands_for.get_mask_sizes(rows)[0]] if held.seen == rows else []),
        ]
    found = (binding.stack.omitted_request(rows, length, binding.facts) for length in announced)
    return next((request for request in found if request is not None), None)


def _refuse_what_would_be_lost(
    binding: Binding, mask: Any, request: MaskRequest | TracedRequest | None, arguments: dict[str, Any]
) -> None:
    """Nothing that the model or its caller asks for is dropped in silence."""
    where = f"layer {binding.index}"
    if request is None:
        got = "no mask at all" if mask is None else f"a finished mask {tuple(getattr(mask, 'shape', ()))}"
        raise UnsupportedError(
            f"{where} got {got}, where the pattern needs to know padding and cache offsets. Pass a 2-D attention_mask "
            "(1 = real token), and write what a 4-D one says as a table in the pattern; where it is the model that changes its mask on "
            "the way (an indexer's choice of keys, compressed keys), leave this layer native (patterns={...} without it)"
        )
    if request.overlays:
        raise UnsupportedError(
            f"{where}: the model combines its mask with {', '.join(request.overlays)}, which the pattern would drop. "
            "Leave this layer native for such inputs (patterns={...} without it, or handle.restore())"
        )
    if binding.native and request.facts is not None and request.facts != binding.facts:
        raise UnsupportedError(
            f"{where}: the model asks for the mask {_words(request.facts)}, but its configuration was read as "
            f"{_words(binding.facts)}; give this layer a pattern of your own, or leave it native"
        )
    _refuse_words(binding, arguments)


def _refuse_words(binding: Binding, arguments: dict[str, Any]) -> None:
    """The same, for what is said beside the mask."""
    where = f"layer {binding.index}"
    if arguments.get("dropout"):
        raise UnsupportedError(
            f"{where}: attention dropout is {arguments['dropout']} in training, and patterns have none; set "
            "config.attention_dropout = 0 before the model is made, or call model.eval()"
        )
    if arguments.get("output_attentions"):
        raise UnsupportedError(
            f"{where}: output_attentions=True asks for the S x S weights, which a compiled pattern never has; "
            "call without it, or handle.restore() and use attn_implementation='eager'"
        )
    if arguments.get("position_bias") is not None:
        raise UnsupportedError(f"{where}: the layer adds a position bias, which the pattern would drop; leave this layer native")
    if binding.keeps_score and arguments.get("softcap") is not None and not binding.pattern.has_score:
        raise UnsupportedError(
            f"{where}: the layer caps its logits at {arguments['softcap']}, which its native pattern does not know"
        )


def _words(facts: Facts | None) -> str:
    return " & ".join(word if number is None else f"{word}({number})" for word, number in sorted(facts or (), key=str))


def _run(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    arguments: dict[str, Any],
) -> torch.Tensor:
    """(B, Sq, Hq, Dv): by the pattern or the program, whichever this call is for."""
    held = binding.held
    if isinstance(held, KeptKeys):
        handed = _handed(binding, held, key)
        held.settle(request.padding)
        start, stop = slots = int(handed[0]), int(handed[-1]) + 1
        if stop - start > handed.numel():
            return _run_with_gaps(binding, query, key, value, request, handed, arguments)
    elif isinstance(held, FoldedKeys) and not held.holds_all and request.packing is None:
        return _run_from_states(binding, held, query, key, value, request, arguments)
    else:
        if isinstance(held, FoldedKeys):  # several sequences in a row have no state together
            held.hold_all()
        whole = isinstance(held, StaticSummarisedKeys)  # every slot at its place, those included that are not written yet
        start, stop = slots = (0, request.written) if whole else request.key_range(key.shape[2])
    key, value = key[:, :, : stop - start], value[:, :, : stop - start]
    if binding.attends_alone:
        return _run_pattern(binding, query, key, value, request, slots, arguments)
    if binding.program is not None and (request.padding is not None or request.packing is not None):
        return _run_on_sequences(binding, query, key, value, request, slots, arguments)
    if start == 0 and binding.runs_program(whole=request.q_offset == 0 and query.shape[2] == key.shape[2]):
        return _run_program(binding, query, key, value, request.q_offset, arguments).transpose(1, 2).contiguous()
    return _run_pattern(binding, query, key, value, request, slots, arguments)


def _run_pattern(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    slots: tuple[int, int],
    arguments: dict[str, Any],
) -> torch.Tensor:
    """The pattern over the keys in these cache slots."""
    start, stop = slots
    # What a fitted cache has let go of no query asks for.
    kept = None if isinstance(binding.held, KeptKeys) else request.keys_kept(start, binding.in_slots)
    if kept is not None and not binding.fits_window(kept):
        raise _dropped(binding, start, request.has_holes and not binding.in_slots)
    form = DerivedForm(
        padded=request.padding is not None,
        holes=request.has_holes,
        packed=request.packing is not None,
        cropped=start > 0,
        slots=binding.in_slots,
    )
    known = request.tables(start, stop, query.shape[0], query.device)
    return _run_derived(binding, form, query, key, value, request.q_offset - start, known, arguments)


def _handed(binding: Binding, held: KeptKeys, key: torch.Tensor) -> torch.Tensor:
    """The cache slots of a layer's keys."""
    if held.handed.numel() != key.shape[2]:
        raise ShapeError(
            f"layer {binding.index}: its cache handed out {held.handed.numel()} keys, and the layer attends to {key.shape[2]}; which of "
            "them are which is not known. Leave this layer native, or give it a cache that holds every key: DynamicCache()"
        )
    return held.handed


def _run_with_gaps(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    slots: torch.Tensor,
    arguments: dict[str, Any],
) -> torch.Tensor:
    """The pattern over keys in these cache slots, ascending; those between them no query of the pattern sees."""
    padded = request.padding is not None
    form = DerivedForm(padded=padded, holes=padded, gaps=True, slots=binding.in_slots)
    known = request.tables_at(slots, query.shape[0], query.device)
    return _run_derived(binding, form, query, key, value, key.shape[2] - query.shape[2], known, arguments)


def _run_derived(
    binding: Binding,
    form: DerivedForm,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_offset: int,
    known: dict[str, torch.Tensor],
    arguments: dict[str, Any],
) -> torch.Tensor:
    """The pattern in its form for this call, with those of the tables ``known`` that it reads."""
    scale = arguments.get("scaling")
    attention, wanted = binding.attention(form, scale, query.shape[3])
    tables = binding.tables(wanted, known, arguments)
    scale = scale if binding.pattern.scale is None and not binding.attends_alone else None
    out = attention(query, key, value, q_offset=q_offset, scale=scale, **tables)
    return out.transpose(1, 2).contiguous()


def _dropped(binding: Binding, start: int, has_holes: bool) -> UnsupportedError:
    way_out = "past_key_values=handle.cache(), with the handle that models.apply returned"
    if has_holes:  # a window of so many tokens reaches over padding to earlier slots than the cache was made for
        way_out = "past_key_values=transformers.DynamicCache(), without a configuration"
    return UnsupportedError(
        f"layer {binding.index}: its cache has dropped the keys before position {start} (a sliding-window cache), and "
        f"the pattern may ask for them. Use one that keeps them: {way_out}"
    )


def _run_on_sequences(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    slots: tuple[int, int],
    arguments: dict[str, Any],
) -> torch.Tensor:
    """The program on the real tokens of each sequence, of those together that have as many; where it runs for a whole prompt only, the
    pattern on the other rows. Padding gives zeros."""
    _check_counts_tokens(binding, request)
    groups = sequence_groups(request, *slots, query.shape[0], query.device)
    chosen = [group for group in groups if binding.runs_program(group.whole)]
    if not all(group.complete for group in chosen):
        raise _dropped(binding, slots[0], has_holes=False)
    out = None
    if len(chosen) < len(groups):
        out = _run_pattern(binding, query, key, value, request, slots, arguments).clone()
    for group in chosen:
        tensors = group.queries.gather(query, 2), group.keys.gather(key, 2), group.keys.gather(value, 2)
        keeps = request.packing is None  # (a row of several sequences has no one that goes on)
        result = _run_program(binding, *tensors, group.q_offset, arguments, group, keeps).transpose(1, 2)
        if group.queries.are_all:
            return result.contiguous()
        if out is None:
            out = result.new_zeros(query.shape[0], query.shape[2], *result.shape[2:])
        group.queries.scatter(result, out, 1)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]) if out is None else out


def _run_from_states(
    binding: Binding,
    held: FoldedKeys,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    arguments: dict[str, Any],
) -> torch.Tensor:
    """The program on new tokens alone, from the states that the cache keeps of the real tokens of each row."""
    _check_counts_tokens(binding, request)
    if key.shape[2] != query.shape[2]:
        raise ShapeError(
            f"layer {binding.index}: its cache holds a state, to which {query.shape[2]} tokens come, and the layer attends to "
            f"{key.shape[2]} keys. Leave this layer native, or call the model without a cache: use_cache=False"
        )
    attention = binding.program_attention(arguments.get("scaling"), query.shape[3], by_row=False)
    wanted = frozenset(attention.program.tables) - frozenset(attention.program.bound)
    tables = binding.tables(wanted, {}, arguments)
    batch, heads, length, _ = query.shape
    out = query.new_zeros(batch, heads, length, value.shape[3])
    for group in token_groups(request, batch, query.device):
        q, k, v = (group.take(x, 2) for x in (query, key, value))
        state = held.state(binding.index, group.rows, group.before)
        try:
            part, after = attention(q, k, v, q_offset=0, state=state, return_state=True, **tables)
        except (ShapeError, TableError, UnsupportedError) as error:
            raise type(error)(f"layer {binding.index}: {error}") from error
        held.keep(binding.index, group.rows, after)
        out = group.put(part, out, 2)
    held.settle()
    return out.transpose(1, 2).contiguous()


def _check_counts_tokens(binding: Binding, request: MaskRequest) -> None:
    if binding.count_slots and request.padding is not None:
        raise UnsupportedError(
            f"layer {binding.index}: the batch has padding, and a program chooses among tokens, not among slots. Call "
            "sd.models.apply(..., indices='tokens'), which is the default, or give sequences of one length"
        )


def _run_program(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    q_offset: int,
    arguments: dict[str, Any],
    group: SequenceGroup | None = None,
    keeps: bool = True,
) -> torch.Tensor:
    """(B, Hq, Sq, Dv). ``group``: which sequences of the batch these are, where not the rows as they stand. ``keeps``: summaries of their
    keys may go into the cache."""
    attention = binding.program_attention(arguments.get("scaling"), query.shape[3], by_row=group is not None)
    wanted = frozenset(attention.program.tables) - frozenset(attention.program.bound)
    known = {} if group is None else {ROW.name: group.rows}
    if "left_padding" in wanted:
        batch = query.shape[0] if group is None else group.queries.batch
        known["left_padding"] = torch.zeros(batch, dtype=torch.int32, device=query.device)
    tables = binding.tables(wanted, known, arguments)
    try:
        rows = list(range(query.shape[0])) if group is None else group.queries.numbers
        kept = _summaries(binding, attention, query, key, rows) if keeps else {}
        out: torch.Tensor = attention(query, key, value, q_offset=q_offset, **tables, **kept)
    except (ShapeError, TableError, UnsupportedError) as error:
        raise type(error)(f"layer {binding.index}: {error}") from error
    return out


def _summaries(
    binding: Binding, attention: Any, query: torch.Tensor, key: torch.Tensor, rows: list[int]
) -> dict[str, KeptSummaries]:  # fmt: skip
    """The summaries that the layer's cache keeps of these rows, where none of them wants a gradient or a graph."""
    if (
        not (isinstance(binding.held, WithSummaries) and binding.sums_up_keys)
        or torch.compiler.is_compiling()
        or wants_grad(query, key)
    ):
        return {}
    return {"summaries": binding.held.summaries(attention, rows)}
