"""What layers are given: by a mapping, by a function or all the same; and what a layer that was given something runs."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import PatternError, TableError, UnsupportedError
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.lang.advice import shown, way_in
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.lang.wrapped import Expression
from sparsedsl.models.binding import Binding
from sparsedsl.models.carried import Stack
from sparsedsl.models.derived import PROVIDED
from sparsedsl.models.native import native_facts, native_pattern
from sparsedsl.program.graph import as_program
from sparsedsl.program.in_layers import check_program, is_for_prefill

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["bind", "choose"]


def choose(patterns: Any, layers: list[int]) -> dict[int, Any]:
    """Layer index -> what the user gave for it."""
    if isinstance(patterns, Mapping):
        unknown = sorted(set(patterns) - set(layers), key=str)
        if unknown:
            raise PatternError(f"no attention layer has the index {unknown}; the model's attention layers are {layers}")
        given = {index: patterns[index] for index in layers if index in patterns}
    elif isinstance(patterns, (Expression, Pattern, bool)) or as_program(patterns) is not None:
        given = dict.fromkeys(layers, patterns)
    elif callable(patterns) and not isinstance(patterns, type):
        try:
            inspect.signature(patterns).bind(0)
        except TypeError:
            raise PatternError(
                f"patterns must be a pattern, a dict of them by layer, or a function of the layer's number; got {shown(patterns)}"
                f"{way_in(patterns)}"
            ) from None
        given = {index: patterns(index) for index in layers}
    elif isinstance(patterns, (list, tuple)):
        raise PatternError(
            "patterns must be a pattern, a dict of them by layer, or a function of the layer's number; got a "
            f"{type(patterns).__name__}. One for each layer from the first on: dict(enumerate(patterns))"
        )
    else:
        given = {index: as_pattern(patterns, where="patterns") for index in layers}
    return {index: value for index, value in given.items() if value is not None}


def bind(
    module: Any, index: int, given: object, config: PreTrainedConfig, told: bool, compiled: Compiled, stack: Stack, in_slots: bool
) -> Binding:
    """What a layer runs that was given this: soft cap, sink logits and scale of its own added where they are not said. ``in_slots``: its
    indices count slots of the cache."""
    program, facts = as_program(given), native_facts(module, index, config, told)
    if program is not None:
        own = native_pattern(module, index, config, told)
        check_program(program, index, own, PROVIDED)
        return Binding(index, own, is_for_prefill(program), True, facts, compiled, stack, program, in_slots)
    keeps_score = isinstance(given, (Mask, bool))
    pattern = as_pattern(given, where=f"the pattern of layer {index}")
    try:
        native = native_pattern(module, index, config, told)
    except UnsupportedError:
        if keeps_score:
            raise
        native = None
    if native is not None and keeps_score:
        pattern = replace(native, mask=pattern.mask, causal=pattern.causal)
    elif native is not None:
        lost = ["soft cap"] if native.has_score and not pattern.has_score else []
        lost += ["sink logits"] if native.sink is not None and pattern.sink is None else []
        if lost:
            warnings.warn(
                f"layer {index}: the model's own {' and '.join(lost)} are not part of the pattern and are left out; "
                "give a mask instead of a pattern to keep them, or add them as in sd.models.native_patterns(model)",
                stacklevel=4,
            )
    free = sorted(set(pattern.tables) - set(pattern.bound) - PROVIDED)
    if free:
        raise TableError(
            f"layer {index}: nothing binds the table{'s' if len(free) > 1 else ''} {', '.join(free)} of the pattern; "
            f"bind before applying: pattern.bind({free[0]}=tensor)"
        )
    is_native = pattern == native
    return Binding(index, pattern, is_native, keeps_score or is_native, facts, compiled, stack, None, in_slots)
