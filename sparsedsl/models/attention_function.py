"""One layer's attention: transformers' call in, a call of a compiled pattern or program out.

Input: a bound attention module, its query, key and value, and the forward's :class:`~sparsedsl.models.mask_arguments.MaskRequest`.
Output: what transformers expects of an attention function, ``(out (B, Sq, Hq, Dv), None)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.analysis.proofs import PROVED, implies
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.execute.kept_summaries import KeptSummaries, summarised
from sparsedsl.lang.expressions import kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.models.carried import Stack, request_of
from sparsedsl.models.derived import DerivedForm, derive
from sparsedsl.models.kept_keys import KeptKeys, SummarisedKeys
from sparsedsl.models.mask_arguments import MaskRequest
from sparsedsl.models.native import Facts
from sparsedsl.models.programs import fitted, is_for_prefill
from sparsedsl.program.graph import Program
from sparsedsl.runtime.call import wants_grad

__all__ = ["BINDING", "Binding", "Compiled", "attend"]

BINDING = "_sparsedsl_binding"  # the attribute of a bound attention module


class Compiled:
    """Compiled patterns and programs, shared by all layers of a model: the same one is compiled once."""

    def __init__(self, backend: str, allow: tuple[str, ...] = ()) -> None:
        self.backend, self.allow = backend, allow
        self.made: dict[Any, Any] = {}

    def __call__(self, pattern: Pattern | Program) -> Any:
        key = (pattern.key, tuple(sorted((name, id(tensor)) for name, tensor in pattern.bound.items())))
        if key not in self.made:
            allow = self.allow if isinstance(pattern, Program) else ()
            self.made[key] = compile_pattern(pattern, backend=self.backend, allow=allow)
        return self.made[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": {}}  # a model saved whole compiles again

    def __deepcopy__(self, memo: Any) -> Compiled:
        return self


@dataclass(eq=False)
class Binding:
    """What one attention module runs. ``native``: the pattern is the model's own, which its caches are made for, and ``facts``
    what its mask says. ``keeps_score``: soft cap and sinks are the layer's own. ``program``: runs in place of the pattern, which then is
    the model's own; one for prefill leaves it all calls but that of a whole prompt. ``stack``: the layers it is one of. ``reached``: the
    module has called for it. ``held``: in a forward with a cache fitted to the pattern, the layer that holds its keys.
    ``bounds``: what is known of the caches of the layers it shares keys with."""

    index: int
    pattern: Pattern
    native: bool
    keeps_score: bool
    facts: Facts | None
    compiled: Compiled
    stack: Stack
    program: Program | None = None
    reached: bool = False
    held: KeptKeys | SummarisedKeys | None = None
    _by_scale: dict[Any, Any] = field(default_factory=dict)
    _by_form: dict[DerivedForm, tuple[Any, frozenset[str]]] = field(default_factory=dict)
    _fits: dict[int, bool] = field(default_factory=dict)
    bounds: dict[Any, Any] = field(default_factory=dict)

    def attention(self, form: DerivedForm) -> tuple[Any, frozenset[str]]:
        """The compiled pattern for calls of this form, and the names of the tables it is to be given."""
        if form not in self._by_form:
            pattern = derive(self.pattern, form)
            self._by_form[form] = self.compiled(pattern), frozenset(pattern.tables) - frozenset(pattern.bound)
        return self._by_form[form]

    def runs_program(self, whole: bool) -> bool:
        """Whether a call runs the program. ``whole``: queries and keys are those of all tokens so far."""
        return self.program is not None and (whole or not is_for_prefill(self.program))

    def program_attention(self, scale: float | None, head_dim: int) -> Any:
        """The compiled program, with what is the layer's own."""
        assert self.program is not None
        if scale not in self._by_scale:
            self._by_scale[scale] = self.compiled(fitted(self.program, self.index, self.pattern, scale, head_dim))
        return self._by_scale[scale]

    @property
    def sums_up_keys(self) -> bool:
        """Whether steps of decoding run a program that chooses by summaries of keys."""
        return self.program is not None and self.runs_program(whole=False) and bool(summarised(self.program))

    def fits_window(self, window: int) -> bool:
        """Whether what runs after a prompt provably asks for none but the last ``window`` keys, the query's own included."""
        if self.runs_program(whole=False):
            return False
        if window not in self._fits:
            self._fits[window] = self.native or implies(self.pattern.mask, q_idx - kv_idx < window) == PROVED
        return self._fits[window]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_by_form": {}, "_by_scale": {}, "held": None}


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
    request = request_of(attention_mask)
    if attention_mask is None:
        announced = binding.held.seen if isinstance(binding.held, KeptKeys) else key.shape[2]
        request = binding.stack.omitted_request(query.shape[2], announced, binding.facts)
    _refuse_what_would_be_lost(binding, attention_mask, request, arguments)
    binding.reached = True
    return _run(binding, query, key, value, request, arguments), None


def _refuse_what_would_be_lost(binding: Binding, mask: Any, request: MaskRequest | None, arguments: dict[str, Any]) -> None:
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
    if arguments.get("cache") is not None:
        raise UnsupportedError(f"{where}: paged caches (continuous batching) are not supported; use model.generate()")
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
    held = binding.held
    if isinstance(held, KeptKeys):
        slots = held.handed
        if slots.numel() != key.shape[2]:
            raise ShapeError(
                f"layer {binding.index}: its cache handed out {slots.numel()} keys, and the layer attends to {key.shape[2]}; which of them "
                "are which is not known. Leave this layer native, or give it a cache that holds every key: DynamicCache()"
            )
        held.settle(request.padding)
        if int(slots[-1]) + 1 - int(slots[0]) > slots.numel():
            return _run_with_gaps(binding, query, key, value, request, arguments, slots)
        start, stop = int(slots[0]), int(slots[-1]) + 1
    else:
        start, stop = request.key_range(key.shape[2])
    key, value = key[:, :, : stop - start], value[:, :, : stop - start]
    if binding.runs_program(whole=request.q_offset == 0 and query.shape[2] == key.shape[2]) and start == 0:
        return _run_program(binding, query, key, value, request, arguments)
    if start > 0 and not isinstance(held, KeptKeys) and not binding.fits_window(request.q_offset - start + 1):
        raise UnsupportedError(
            f"layer {binding.index}: its cache has dropped the keys before position {start} (a sliding-window cache), and "
            "the pattern may ask for them. Use one that keeps them: past_key_values=handle.cache(), with the handle that "
            "models.apply returned"
        )
    form = DerivedForm(padded=request.padding is not None, packed=request.packing is not None, cropped=start > 0)
    attention, wanted = binding.attention(form)
    tables = _tables(binding, wanted, request.tables(start, stop, query.shape[0], query.device), arguments)
    scale = arguments.get("scaling") if binding.pattern.scale is None else None
    out = attention(query, key, value, q_offset=request.q_offset - start, scale=scale, **tables)
    return out.transpose(1, 2).contiguous()


def _run_with_gaps(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    arguments: dict[str, Any],
    slots: torch.Tensor,
) -> torch.Tensor:
    """The same over keys that stand at these cache slots, ascending; those between them no query of the pattern sees."""
    attention, wanted = binding.attention(DerivedForm(padded=request.padding is not None, gaps=True))
    stop, slots = int(slots[-1]) + 1, slots.to(query.device)
    known = request.tables(0, stop, query.shape[0], query.device)
    known = {**known, "hf_slot": slots, "hf_stop": slots[-1:] + 1}
    if "hf_valid" in known:
        known["hf_valid"] = known["hf_valid"][:, slots]
    tables = _tables(binding, wanted, known, arguments)
    scale = arguments.get("scaling") if binding.pattern.scale is None else None
    out = attention(query, key, value, q_offset=key.shape[2] - query.shape[2], scale=scale, **tables)
    return out.transpose(1, 2).contiguous()


def _tables(
    binding: Binding, wanted: frozenset[str], known: dict[str, torch.Tensor], arguments: dict[str, Any]
) -> dict[str, Any]:
    """The tables that are data of the call, by name."""
    tables = {name: known[name] for name in wanted if name in known}
    if "sinks" in wanted:
        if arguments.get("s_aux") is None:
            raise UnsupportedError(
                f"layer {binding.index} has no sink logits, but what it runs reads the table 'sinks'; bind it: bind(sinks=tensor)"
            )
        tables["sinks"] = arguments["s_aux"]
    return tables


def _run_program(
    binding: Binding,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    request: MaskRequest,
    arguments: dict[str, Any],
) -> torch.Tensor:
    if request.padding is not None or request.packing is not None:
        what = "padding" if request.padding is not None else "several sequences in a row (position_ids)"
        way_out = "sequences of one length, or one at a time" if request.padding is not None else "each sequence by itself"
        raise UnsupportedError(
            f"layer {binding.index}: the batch has {what}, and a program chooses among all tokens of a row. Give {way_out}, or leave "
            "this layer native, or give it a pattern"
        )
    attention = binding.program_attention(arguments.get("scaling"), query.shape[3])
    wanted = frozenset(attention.program.tables) - frozenset(attention.program.bound)
    tables = _tables(binding, wanted, request.tables(0, key.shape[2], query.shape[0], query.device), arguments)
    try:
        out = attention(query, key, value, q_offset=request.q_offset, **tables, **_summaries(binding, attention, query, key))
    except (ShapeError, TableError, UnsupportedError) as error:
        raise type(error)(f"layer {binding.index}: {error}") from error
    return out.transpose(1, 2).contiguous()


def _summaries(binding: Binding, attention: Any, query: torch.Tensor, key: torch.Tensor) -> dict[str, KeptSummaries]:
    """The summaries that the layer's cache keeps, where none of them wants a gradient or a graph."""
    if not isinstance(binding.held, SummarisedKeys) or torch.compiler.is_compiling() or wants_grad(query, key):
        return {}
    return {"summaries": binding.held.summaries(attention)}
