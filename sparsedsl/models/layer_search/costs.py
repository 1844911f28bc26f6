"""What a layer costs with each candidate: FLOPs, bytes of its KV cache, time, or a function of the user."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface

from sparsedsl.analysis.cached_keys import STATE
from sparsedsl.analysis.report import analyse
from sparsedsl.errors import PatternError, ShapeError, TableError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.execute.kept_summaries import finished_blocks, summarised
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.carried import calling
from sparsedsl.models.derived import PROVIDED
from sparsedsl.models.donor import Donor
from sparsedsl.models.layer_search.candidates import NATIVE, Candidate, Runs
from sparsedsl.models.layers import text_config
from sparsedsl.program.axes import KNOWN, base_of, block_of
from sparsedsl.program.graph import Program
from sparsedsl.program.scores import Bound
from sparsedsl.program.tensors import Input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["COSTS", "Costs", "LayerShape", "analysis_of", "cost_table", "layer_shapes"]

Costs = dict[int, dict[str, float]]  # layer -> candidate, or "native" -> cost
COSTS = ("flops", "cache_bytes", "prefill_time")
_DTYPES = {2: "bfloat16", 4: "float32", 8: "float64"}  # by bytes of a number
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
    candidates: Mapping[str, Candidate], donors: Mapping[int, Donor],
) -> Costs:  # fmt: skip
    """What each layer costs by itself and with each candidate; ``cost``: ``"flops"``, ``"cache_bytes"`` or a function of layer and pattern.

    ``donors``: of the layers, where hybrid layers are among the candidates.

    Raises :class:`~sparsedsl.PatternError` where a function gives anything but a number of at least 0.
    """
    known: dict[Any, float] = {}

    def once(layer: int, runs: Runs) -> float:
        thing = runs.value if isinstance(runs.value, Program) else as_pattern(runs.value)
        key = shapes[layer], runs.in_layer, thing, tuple(sorted((name, id(tensor)) for name, tensor in thing.bound.items()))
        if key not in known:
            count = _flops if cost == "flops" else _layer_bytes if runs.in_layer else _cache_bytes
            known[key] = count(runs, length, key[0])
        return known[key]

    def asked(layer: int, runs: Runs) -> float:
        assert callable(cost)
        found = cost(layer, runs.value)
        if isinstance(found, bool) or not isinstance(found, numbers.Real) or not 0 <= float(found) < math.inf:
            raise PatternError(f"search(): cost({layer}, {shown(runs.value)}) must be a number of at least 0; got {shown(found)}")
        return float(found)

    ask = asked if callable(cost) else once
    return {
        layer: {
            NATIVE: ask(layer, Runs(own)),
            **{name: ask(layer, one.runs(donors.get(layer))) for name, one in candidates.items()},
        }
        for layer, own in native.items()
    }


def analysis_of(runs: Runs, length: int, shape: LayerShape) -> Any:
    """:func:`sparsedsl.analyse` of what a layer of that shape runs over ``length`` tokens."""
    thing: Any = runs.value if isinstance(runs.value, Program) else as_pattern(runs.value)
    free = PROVIDED & set(thing.tables) - set(thing.bound) - set(
        runs.tables
    )  # given by the layer at every call; no pair depends on sinks
    tables = {name: torch.zeros(shape.heads if name == "sinks" else 1, dtype=torch.int32) for name in free}
    if "sinks" in tables:
        tables["sinks"] = tables["sinks"].float()
    words: dict[str, Any] = {"head_dim": shape.head_dim, "head_dim_v": shape.value_dim, **tables, **runs.tables}
    return analyse(thing, length, heads=shape.heads, kv_heads=shape.kv_heads, **words)


def _flops(runs: Runs, length: int, shape: LayerShape) -> float:
    return float(analysis_of(runs, length, shape).flops)


def _cache_bytes(runs: Runs, length: int, shape: LayerShape) -> float:
    """What the layer's cache holds at most: what is proved to do."""
    bound, keys = cache_bound(runs.value), length
    try:
        if bound.kind == STATE:
            sizes = shape.kv_heads, shape.head_dim, _DTYPES[shape.item]
            return float(bound.bytes(length, *sizes, head_dim_v=shape.value_dim, heads=shape.heads))
        keys = bound.most(length, heads=shape.heads)
    except (ShapeError, TableError):  # how many depends on what only a call knows
        pass
    return float(keys * shape.kv_heads * (shape.head_dim + shape.value_dim) * shape.item)


def _layer_bytes(runs: Runs, length: int, shape: LayerShape) -> float:
    """What the cache of a hybrid layer holds at most: its state, or a row of each of its inputs for every key or every block of keys, and
    the summaries of blocks that are over."""
    program = runs.value
    assert isinstance(program, Program)
    bound = cache_bound(program)
    if bound.state_bytes is not None:
        own = {name: size for name, size in runs.sizes.items() if name not in KNOWN}
        words: dict[str, Any] = {
            "head_dim_v": shape.value_dim,
            "heads": shape.heads,
            "sizes": own,
            "given": runs.given,
            **runs.tables,
        }
        return float(bound.bytes(length, shape.kv_heads, shape.head_dim, _DTYPES[shape.item], **words))
    known = {"k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.value_dim}
    numbers = length * sum(known.values())

    def width(of: Input) -> int:
        return known.get(of.name) or math.prod(runs.sizes[axis] for axis in of.axes if base_of(axis) != "keys")

    for of in program.inputs.values():
        blocks = [-(-length // block_of(axis)) for axis in of.axes if base_of(axis) == "keys"]
        if of.name in runs.given and blocks:
            numbers += math.prod(blocks) * width(of)
    for node, of in summarised(program).items():
        numbers += finished_blocks(node, length) * width(of) * (2 if isinstance(node, Bound) else 1)
    return float(numbers * shape.item)
