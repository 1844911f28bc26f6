"""Data of Ring-linear models: the decay of each head in each layer, and which layers are what."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word
from sparsedsl.program.tensors import check_block

__all__ = ["DecayTable", "decay_table", "schedule"]

T = TypeVar("T")


@dataclass(frozen=True)
class DecayTable(Sequence[float]):
    """Decay factors in (0, 1], one a head; ``log_decay`` holds their logarithms, which kernels compute with."""

    log_decay: tuple[float, ...]

    def __getitem__(self, head: Any) -> Any:
        return math.exp(self.log_decay[head]) if isinstance(head, int) else DecayTable(self.log_decay[head])

    def __len__(self) -> int:
        return len(self.log_decay)

    def __iter__(self) -> Iterator[float]:
        return map(math.exp, self.log_decay)


def slopes(heads: int) -> tuple[float, ...]:
    """``2 ** (-8 (h + 1) / heads)``, as in ALiBi; where ``heads`` is no power of two, those of the power below, then every second one of
    the power above.

    >>> [round(slope, 4) for slope in slopes(4)]
    [0.25, 0.0625, 0.0156, 0.0039]
    """
    power = 1 << (heads.bit_length() - 1)
    first = tuple(2.0 ** (-8.0 * (head + 1) / power) for head in range(power))
    return first if power == heads else first + slopes(2 * power)[0::2][: heads - power]


def decay_table(heads: int, layer: int, layers: int, *, depth: str = "hf", rule: str = "power") -> DecayTable:
    """How much of a head's state is left after one token: ``exp(-slope_h * c_layer)``.

    Args:
        heads: query heads.
        layer: this layer, from 0.
        layers: all layers of the model.
        depth: ``c`` by layer. Public code disagrees: ``"hf"``: ``1 - (layer - 1) / (layers - 1) + 1e-5`` (the published model code, where
            ``c_0`` is above 1); ``"serve"``: ``1 - layer / (layers - 1) + 1e-5`` (SGLang, vLLM, Flood).
        rule: slope by head. ``"power"``: :func:`slopes`, head 0 fades fastest (Ring); ``"linear"``: ``8 h / heads``, with
            ``c = 1 - layer / layers``, head 0 never fades (Lightning Attention); ``depth`` has no part in it.

    Source: Ring-linear (arXiv 2510.19338).

    >>> import sparsedsl as sd
    >>> [round(x, 4) for x in sd.decay_table(4, layer=0, layers=20, depth="serve")]
    [0.7788, 0.9394, 0.9845, 0.9961]
    """
    heads, layers = check_block("decay_table", "heads", heads), check_block("decay_table", "layers", layers, 2)
    layer = check_block("decay_table", "layer", layer, 0)
    if layer >= layers:
        raise PatternError(f"decay_table(): layer must be below layers, which is {layers}; got {layer}")
    check_word("decay_table(): rule", rule, ("power", "linear"))
    check_word("decay_table(): depth", depth, ("hf", "serve"))
    if rule == "linear":
        return DecayTable(tuple(-8.0 * head / heads * (1 - layer / layers) for head in range(heads)))
    factor = 1 - (layer - (depth == "hf")) / (layers - 1) + 1e-5
    return DecayTable(tuple(-slope * factor for slope in slopes(heads)))


def schedule(
    layers: int, group: int, *, full: T | Callable[[int], T], other: T | Callable[[int], T], last: int | None = None
) -> dict[int, T]:
    """Which layer does what, in groups: ``group - 1`` layers of one kind, then one full one; layers beyond the last group are full.

    Args:
        layers: of the model.
        group: layers in a group; 1: all are full.
        full: the pattern of the full layers, or a function of the layer's number that gives it. A class (or a ``functools.partial`` of one)
            is no such function: it is what the layer becomes, as for :func:`sparsedsl.models.convert`.
        other: the pattern of the others, or such a function.
        last: place of the full layer within its group, from 0; default the last.

    Returns:
        Layer -> pattern, as :func:`sparsedsl.models.apply` and :func:`sparsedsl.models.convert` take it.

    Source: Ring-linear (arXiv 2510.19338); native hybrid attention with ``last`` (arXiv 2510.07019).

    >>> import sparsedsl as sd
    >>> plan = sd.schedule(20, 5, full="softmax", other="linear")
    >>> [layer for layer, kind in plan.items() if kind == "softmax"]
    [4, 9, 14, 19]
    """
    layers, group = check_block("schedule", "layers", layers), check_block("schedule", "group", group)
    last = group - 1 if last is None else check_block("schedule", "last", last, 0)
    if last >= group:
        raise PatternError(f"schedule(): last must be below group, which is {group}; got {last}")

    def kind(layer: int) -> T:
        chosen: Any = full if layer % group == last or layer >= layers // group * group else other
        return chosen(layer) if _makes_patterns(chosen) else chosen

    return {layer: kind(layer) for layer in range(layers)}


def _makes_patterns(chosen: Any) -> bool:
    if isinstance(chosen.func if isinstance(chosen, functools.partial) else chosen, type):
        return False
    return isinstance(chosen, Callable) and not hasattr(chosen, "axes")  # type: ignore[arg-type]
