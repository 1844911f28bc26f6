"""What a layer costs with each candidate: FLOPs, bytes of its KV cache, time, or a function of the user."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import sympy
import torch
from transformers import AttentionInterface

from sparsedsl.analysis.proofs import PROVED, implies
from sparsedsl.analysis.report import analyse
from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask, kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.carried import calling
from sparsedsl.models.derived import PROVIDED
from sparsedsl.models.layer_search.candidates import NATIVE, Candidate
from sparsedsl.models.layers import text_config
from sparsedsl.program.graph import Program

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["COSTS", "Costs", "LayerShape", "analysis_of", "cost_table", "kept_keys", "layer_shapes"]

Costs = dict[int, dict[str, float]]  # layer -> candidate, or "native" -> cost
COSTS = ("flops", "cache_bytes", "prefill_time")
_RECORDER = "sparsedsl_shapes"
_SHAPE = "_sparsedsl_shape"


@dataclass(frozen=True)
class LayerShape:
    """What a layer hands to its attention: heads, widths, bytes of a number."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    item: int


def layer_shapes(model: PreTrainedModel, layers: Mapping[int, Any], ids: torch.Tensor) -> dict[int, LayerShape]:
    """Layer index -> shape, as a forward over token ids ``(1, S)`` shows them."""
    AttentionInterface.register(_RECORDER, _record)
    with torch.no_grad(), _calling(layers, text_config(model)):
        model.base_model(input_ids=ids, use_cache=False)
    return {index: vars(module).pop(_SHAPE) for index, module in layers.items()}


def _record(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **words: Any) -> Any:
    """An attention function that leaves the shape with the module, and gives zeros."""
    vars(module)[_SHAPE] = LayerShape(q.shape[1], k.shape[1], q.shape[3], v.shape[3], k.element_size())
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None


@contextlib.contextmanager
def _calling(layers: Mapping[int, Any], config: Any) -> Iterator[None]:
    view, own = calling(config, _RECORDER), {index: module.config for index, module in layers.items()}
    try:
        for module in layers.values():
            module.config = view
        yield
    finally:
        for index, module in layers.items():
            module.config = own[index]


def cost_table(
    cost: str | Callable[[int, Any], float], length: int, shapes: Mapping[int, LayerShape], native: Mapping[int, Pattern],
    candidates: Mapping[str, Candidate],
) -> Costs:  # fmt: skip
    """What each layer costs by itself and with each candidate; ``cost``: ``"flops"``, ``"cache_bytes"`` or a function of layer and pattern.

    Raises :class:`~sparsedsl.PatternError` where a function gives anything but a number of at least 0.
    """
    known: dict[Any, float] = {}

    def once(layer: int, value: Any) -> float:
        thing = value if isinstance(value, Program) else as_pattern(value)
        key = shapes[layer], thing, tuple(sorted((name, id(tensor)) for name, tensor in thing.bound.items()))
        if key not in known:
            known[key] = _flops(value, length, key[0]) if cost == "flops" else _cache_bytes(value, length, key[0])
        return known[key]

    def asked(layer: int, value: Any) -> float:
        assert callable(cost)
        found = cost(layer, value)
        if isinstance(found, bool) or not isinstance(found, numbers.Real) or not 0 <= float(found) < math.inf:
            raise PatternError(f"search(): cost({layer}, {shown(value)}) must be a number of at least 0; got {shown(found)}")
        return float(found)

    ask = asked if callable(cost) else once
    return {
        layer: {NATIVE: ask(layer, native[layer]), **{name: ask(layer, one.value) for name, one in candidates.items()}}
        for layer in native
    }


def analysis_of(value: Mask | Pattern | Program, length: int, shape: LayerShape) -> Any:
    """:func:`sparsedsl.analyse` of what a layer of that shape runs over ``length`` tokens."""
    thing: Any = value if isinstance(value, Program) else as_pattern(value)
    free = PROVIDED & set(thing.tables) - set(thing.bound)  # given by the layer at every call; no pair depends on sinks
    tables = {name: torch.zeros(shape.heads if name == "sinks" else 1, dtype=torch.int32) for name in free}
    if "sinks" in tables:
        tables["sinks"] = tables["sinks"].float()
    return analyse(
        thing, length, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim, head_dim_v=shape.value_dim,
        sizes=None, **cast(dict[str, Any], tables),
    )  # fmt: skip


def _flops(value: Any, length: int, shape: LayerShape) -> float:
    return float(analysis_of(value, length, shape).flops)


def _cache_bytes(value: Any, length: int, shape: LayerShape) -> float:
    keys = length if isinstance(value, Program) else kept_keys(as_pattern(value).mask, length)
    return float(keys * shape.kv_heads * (shape.head_dim + shape.value_dim) * shape.item)


def kept_keys(mask: Mask, length: int) -> int:
    """How many keys a layer must keep after ``length`` tokens: the first ``n`` and the last ``w``, the least that is proved to do.

    Looked for among the numbers that stand in the mask; all keys where none of them does.

    >>> import sparsedsl as sd
    >>> window = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 128)
    >>> kept_keys(window, 4096), kept_keys(window | ((sd.kv_idx < 4) & (sd.kv_idx <= sd.q_idx)), 4096)
    (128, 132)
    >>> kept_keys(sd.kv_idx <= sd.q_idx, 4096)
    4096
    """
    written = {abs(part) for number in mask.expr.atoms(sympy.Rational) for part in (int(number.p), int(number.q))}
    near = {number + more for number in written for more in (0, 1)} - {0}
    pairs = {(first, last) for first in {0, *near} for last in near if first + last < length}
    for first, last in sorted(pairs, key=sum):
        if implies(mask, (q_idx - kv_idx < last) | (kv_idx < first)) == PROVED:
            return first + last
    return length
