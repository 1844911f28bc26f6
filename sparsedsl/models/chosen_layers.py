"""What :func:`sparsedsl.models.convert` is given, layer by layer: patterns, programs, classes of layers, functions that make one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.models.derived import PROVIDED
from sparsedsl.models.donor import Donor
from sparsedsl.models.hybrids.given_program import Given
from sparsedsl.models.layer import Layer
from sparsedsl.program.graph import as_program
from sparsedsl.program.in_layers import check_program, is_for_prefill

__all__ = ["choose_layers", "is_pattern", "layer_for"]


def choose_layers(layers: Any, known: list[int]) -> dict[int, Any]:
    """Layer index -> what was given for it."""
    if isinstance(layers, Mapping):
        if unknown := sorted(set(layers) - set(known), key=str):
            raise PatternError(f"no attention layer has the index {unknown}; the model's attention layers are {known}")
        given = {index: layers[index] for index in known if index in layers}
    elif (
        isinstance(layers, type) or is_pattern(layers) or as_program(layers) is not None or isinstance(layers, functools.partial)
    ):
        given = dict.fromkeys(known, layers)
    elif callable(layers) and not isinstance(layers, nn.Module):
        given = {index: layers(index) for index in known}
    else:
        raise PatternError(
            "convert(): layers must be a mapping from layer index, a function of it, a Layer class, a pattern or a program; got "
            f"{shown(layers)}"
        )
    return {index: value for index, value in given.items() if value is not None}


def is_pattern(given: Any) -> bool:
    """Whether it runs as :func:`apply` runs it."""
    program = as_program(given)
    if program is not None:
        return program.static is not None or is_for_prefill(program)
    return isinstance(given, (Mask, Pattern, bool))


def layer_for(given: Any, donor: Donor) -> Layer:
    """The layer that was given, for this donor."""
    program = as_program(given)
    if program is not None:
        check_program(program, donor.layer_idx, donor.native, PROVIDED)
        return Given.of(donor, program)
    if not callable(given) or isinstance(given, nn.Module):
        raise PatternError(
            f"layer {donor.layer_idx} was given {shown(given)}; wanted a Layer class, a function that makes one, or a program"
        )
    made = given(donor)
    if not isinstance(made, Layer):
        raise PatternError(f"layer {donor.layer_idx}: {shown(given)} gave {shown(made)}; wanted an sd.models.Layer")
    return made
