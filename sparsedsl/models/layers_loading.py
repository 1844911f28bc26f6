"""The layers of a converted model from a folder: by name, and their weights from the files that the donor was loaded from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sparsedsl.errors import PatternError
from sparsedsl.models.converted import LAYER
from sparsedsl.models.converting import Conversion, convert
from sparsedsl.models.layers import text_config
from sparsedsl.models.registry import NOTE, VERSION, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["is_new", "load_layers"]


def is_new(key: str) -> bool:
    """Whether a weight's name is that of a parameter which a converted layer brings."""
    return f".{LAYER}." in f".{key}"


def load_layers(
    model: PreTrainedModel, folder: str | os.PathLike[str], saved: Any, place: Mapping[str, Any], *, backend: str = "auto"
) -> Conversion | None:
    """Convert a loaded donor as its configuration says, and load what is new; None where it says nothing. ``saved``: names of the weights
    that transformers found no place for; ``place``: where the folder is, as transformers takes it."""
    note = vars(text_config(model)).get(NOTE)
    if note is None:
        return None
    if not isinstance(note, dict) or note.get("version") != VERSION:
        raise PatternError(
            f"config.{NOTE} is {str(note)[:80]!r}, and this sparsedsl reads version {VERSION}: it was written by another version, which "
            "can read it"
        )
    conversion = convert(
        model, {int(index): _Saved(entry) for index, entry in note["layers"].items()}, init=None, backend=backend
    )
    wanted = {name for name, _ in model.named_parameters() if is_new(name)} | {
        name for name, _ in model.named_buffers() if is_new(name)
    }
    found = {key for key in saved if is_new(key)}
    if wanted != found:
        raise PatternError(
            f"{os.fspath(folder)!r}: converted layers lack {', '.join(sorted(wanted - found)[:4]) or 'nothing'} and do not read "
            f"{', '.join(sorted(found - wanted)[:4]) or 'anything else'}; it was written by another version of them"
        )
    _read(model, folder, wanted, dict(place))
    return conversion


class _Saved:
    """Makes the layer that a configuration speaks of."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def __call__(self, donor: Any) -> Any:
        return layer_of(self.entry, donor)


def _read(model: PreTrainedModel, folder: str | os.PathLike[str], names: set[str], place: dict[str, Any]) -> None:
    """Read weights by name into a model."""
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **place)
    files = dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    if index is not None:
        with open(index, encoding="utf-8") as text:
            files = {name: file for name, file in json.load(text)["weight_map"].items() if name in names}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for file in sorted(set(files.values())):
        path = cached_file(folder, file, **place)
        with safe_open(path, framework="pt") as opened, torch.no_grad():
            for name in (name for name, where in files.items() if where == file):
                value, own = opened.get_tensor(name), tensors[name]
                if value.shape != own.shape:
                    raise PatternError(f"{os.fspath(folder)!r}: {name} has shape {tuple(value.shape)}; wanted {tuple(own.shape)}")
                own.data = value.to(own.device)
