"""Which layer a saved model means: by name, never by code."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.lang.advice import meant, shown
from sparsedsl.models.donor import Donor
from sparsedsl.models.hybrids.dsa import DSA
from sparsedsl.models.hybrids.gated_delta import GatedDelta
from sparsedsl.models.hybrids.given_program import Given
from sparsedsl.models.hybrids.hsa import HSA
from sparsedsl.models.hybrids.lolcats import LoLCATs
from sparsedsl.models.hybrids.moba import MoBA
from sparsedsl.models.hybrids.nha import NHA
from sparsedsl.models.hybrids.nsa import NSA
from sparsedsl.models.hybrids.ring_linear import RingLinear
from sparsedsl.models.layer import Layer

__all__ = ["NOTE", "VERSION", "class_named", "entry_of", "layer_of", "name_of", "register_layer"]

# The attribute of a configuration that says which layers were converted: ``{"version": 1, "layers": {index: entry}}``.
NOTE, VERSION = "sparsedsl_layers", 1

L = TypeVar("L", bound=type[Layer])

_KNOWN: dict[str, type[Layer]] = {
    kind.__name__: kind for kind in (DSA, GatedDelta, Given, HSA, LoLCATs, MoBA, NHA, NSA, RingLinear)
}


def register_layer(kind: L, name: str | None = None) -> L:
    """Let saved models with layers of this class be loaded; also as a decorator.

    A saved model names its layers' classes; :func:`sparsedsl.models.from_pretrained` makes those it knows, and imports nothing: register
    your class before it is called.

    Args:
        kind: a subclass of :class:`Layer` whose constructor's arguments, but for the donor, are numbers, strings, None, and lists of these.
        name: what it is saved as; default ``module.Class``. Must be the same where it is saved and where it is loaded.

    Raises:
        PatternError: no such class, or a name that another one has.

    >>> import sparsedsl as sd
    >>> @sd.models.register_layer
    ... class Wide(sd.models.NHA):
    ...     pass
    """
    if not (isinstance(kind, type) and issubclass(kind, Layer)):
        raise PatternError(f"register_layer() takes a subclass of sd.models.Layer; got {shown(kind)}")
    name = _name(kind) if name is None else name
    if _KNOWN.get(name, kind) is not kind and _name(_KNOWN[name]) != _name(kind):
        raise PatternError(f"register_layer(): {name!r} is the name of {_KNOWN[name]!r} already; give another")
    _KNOWN[name] = kind
    return kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def name_of(kind: type[Layer]) -> str:
    """The name that a class is registered with.

    Raises:
        PatternError: it is not.
    """
    for name, known in _KNOWN.items():
        if known is kind:
            return name
    raise PatternError(
        f"{kind.__name__} is not registered, so that no file can name it; decorate it with @sd.models.register_layer"
    )


def class_named(name: Any, where: str) -> type[Layer]:
    """The class that was registered with a name.

    Raises:
        UnsupportedError: none was; ``where`` says what is looked for.
    """
    if name not in _KNOWN:
        raise UnsupportedError(
            f"{where} is a {name!r}, which is not registered here; import its class and call sd.models.register_layer(Class) first"
            f"{meant(str(name), list(_KNOWN))}"
        )
    return _KNOWN[name]


def entry_of(layer: Layer) -> dict[str, Any]:
    """What a configuration says of a layer; of one that cannot be made again, why."""
    names = [name for name, kind in _KNOWN.items() if kind is type(layer)]
    entry = {"class": names[0] if names else _name(type(layer)), "program": layer.program.text}
    bound = sorted(layer.program.bound)
    try:
        arguments = json.loads(json.dumps(layer.arguments))
    except (TypeError, ValueError) as error:
        return {**entry, "cannot": _warned(layer, f"its arguments {layer.arguments!r:.200} are not plain values ({error})")}
    if bound:
        return {**entry, "cannot": _warned(layer, f"its program has tensors bound to {', '.join(bound)}")}
    return {**entry, "arguments": arguments}


def _warned(layer: Layer, why: str) -> str:
    warnings.warn(
        f"layer {layer.layer_idx} ({type(layer).__name__}) could not be loaded again if it were saved: {why}", stacklevel=5
    )
    return why


def layer_of(entry: Mapping[str, Any], donor: Donor) -> Layer:
    """The layer that a configuration speaks of, new."""
    name, where = entry.get("class"), f"layer {donor.layer_idx}"
    if "cannot" in entry:
        raise UnsupportedError(
            f"{where} ({name}) cannot be made again: {entry['cannot']}. Convert a donor, and load the weights by hand"
        )
    kind = class_named(name, where)
    arguments, known = entry.get("arguments") or {}, inspect.signature(kind.__init__).parameters
    if surplus := set(arguments) - set(known):
        raise PatternError(
            f"{where}: {name} takes no {', '.join(sorted(surplus))}; the configuration was written by another version of it"
        )
    made = kind(donor, **arguments)
    if made.program.text != entry.get("program"):
        raise UnsupportedError(
            f"{where}: {name} makes another program now than the one that was saved:\n{made.program.text}\nand the saved one:\n"
            f"{entry.get('program')}\nLoad it with the version of the class that it was trained with"
        )
    return made
