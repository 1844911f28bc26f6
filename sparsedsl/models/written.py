"""Patterns of a model as text in its configuration: ``config.sparsedsl``, which transformers saves and loads with all else.

``{"version": 1, "applied": [entry, ..]}`` with an entry for each handle, oldest first: ``stack``, the class of the model that the layers
lie in; ``backend``, ``allow`` and ``indices``; ``layers``, index -> text form of what the layer was given; ``tables``, index -> name of a
bound table -> its name in the file :data:`TABLES_FILE`. Text forms are read by a parser of our own: nothing in a folder is executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.lang.expressions import as_mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.graph import as_program
from sparsedsl.program.program_text import read_given

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ATTRIBUTE", "TABLES_FILE", "Tables", "entries_in", "entry_of", "given_of", "note", "put_note"]

ATTRIBUTE = "sparsedsl"
TABLES_FILE = "sparsedsl.safetensors"
VERSION = 1


class Tables:
    """The tensors that are bound to tables, each once, by the names they have in the file."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def name_of(self, table: str, tensor: torch.Tensor) -> str:
        """The name of a table's tensor in the file."""
        for name, known in self.tensors.items():
            if known is tensor and name.rpartition(".")[0] == table:
                return name
        name = f"{table}.{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def entry_of(stack: str, handle: Any, tables: Tables) -> dict[str, Any]:
    """What is written of one handle of :func:`sparsedsl.models.apply`; the tensors it needs are added to ``tables``."""
    entry: dict[str, Any] = {"stack": stack, "backend": handle.backend, "allow": list(handle.allow), "indices": handle.indices}
    entry |= {"layers": {}, "tables": {}}
    for index, given in handle.given.items():
        whole: Any = as_program(given) or (given if isinstance(given, Pattern) else as_mask(given))
        entry["layers"][str(index)] = whole.text
        names = {}
        for name, tensor in whole.bound.items():
            if not isinstance(tensor, torch.Tensor):
                raise UnsupportedError(
                    f"layer {index}: the table {name!r} is bound to a {type(tensor).__name__}, and only tensors are saved; bind a tensor"
                )
            names[name] = tables.name_of(name, tensor)
        if names:
            entry["tables"][str(index)] = names
    return entry


def given_of(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[int, Any]:
    """Layer index -> what the layer was given, of an entry that was read; ``tensors`` are those of the file."""
    found = {}
    for index, text in entry["layers"].items():
        names = entry.get("tables", {}).get(index, {})
        found[int(index)] = read_given(text, {name: tensors[stored] for name, stored in names.items()})
    return found


def note(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The whole of what stands in a configuration."""
    return {"version": VERSION, "applied": list(entries)}


def put_note(config: PreTrainedConfig, by_stack: list[list[dict[str, Any]]]) -> None:
    """Write the entries of all stacks that run by a configuration into it; nothing is left of none."""
    stacks = [{entry["stack"] for entry in entries} for entries in by_stack]
    if sum(map(len, stacks)) > len(set().union(*stacks)):
        why = "two models with patterns shared this configuration, and it does not say which of them was saved"
        setattr(config, ATTRIBUTE, {"version": VERSION, "refused": why})
    elif any(by_stack):
        setattr(config, ATTRIBUTE, note(entry for entries in by_stack for entry in entries))
    elif hasattr(config, ATTRIBUTE):
        delattr(config, ATTRIBUTE)


def entries_in(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The entries of a configuration that was loaded; none where it has no patterns."""
    written = getattr(config, ATTRIBUTE, None)
    if written is None:
        return []
    if not isinstance(written, dict) or written.get("version") != VERSION:
        raise PatternError(
            f"config.{ATTRIBUTE} is {str(written)[:80]!r}, and this sparsedsl reads version {VERSION}: it was written by another version, "
            "which can read it"
        )
    if "refused" in written:
        raise UnsupportedError(
            f"config.{ATTRIBUTE} holds no patterns: {written['refused']}. Give each model a configuration of its own "
            "(copy.deepcopy(config)) before it is made, or save with sd.models.save_pretrained(model, folder)"
        )
    return list(written["applied"])
