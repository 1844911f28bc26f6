"""What may stand in a layer: named patterns and programs, as text that a file can keep; and how they are put into a model."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.applying import AppliedPatterns, apply
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.program_text import read_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NATIVE", "Assignment", "Candidate", "assignment_of", "candidates_from", "put_in"]

NATIVE = "native"  # what a layer has that is given nothing

# Layers that are given something, in order, and the name of the candidate of each.
Assignment = tuple[tuple[int, str], ...]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that may stand in a layer: a mask (soft cap, sinks and scale stay the layer's), a pattern or a program."""

    name: str
    value: Mask | Pattern | Program

    @property
    def kind(self) -> str:
        """``"mask"``, ``"pattern"`` or ``"program"``."""
        return "program" if isinstance(self.value, Program) else "mask" if isinstance(self.value, Mask) else "pattern"

    @property
    def text(self) -> str:
        """A line for people: the pattern, or what the program ends with."""
        if isinstance(self.value, Program):
            return str(self.value).splitlines()[-1].partition(" = ")[2]
        return str(as_pattern(self.value)).splitlines()[-1]

    def _plain_(self) -> str:
        return self.value.text

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; bound tables by their values."""
        bound = self.value.bound
        return {"text": self.value.text, "tables": {name: _table_as_json(bound[name]) for name in sorted(bound)}}

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Candidate:
        """What :meth:`as_json` was made of. Text is read, nothing is executed."""
        return cls(name, read_given(data["text"], {table: _table_from_json(value) for table, value in data["tables"].items()}))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for the same candidate, in every process."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:32]


def candidates_from(given: Any) -> dict[str, Candidate]:
    """Name -> candidate, of what a user gave.

    Raises :class:`~sparsedsl.PatternError` for what is no mapping from names to masks, patterns or programs.
    """
    if not isinstance(given, Mapping) or not given:
        raise PatternError(f"search(): candidates must be a dict of patterns or programs by name; got {shown(given)}")
    found = {}
    for name, value in given.items():
        if not isinstance(name, str) or not name or name == NATIVE:
            raise PatternError(
                f"search(): candidates must have names, texts other than {NATIVE!r}, which is what a layer has by itself; got {name!r}"
            )
        program = as_program(value)
        if program is not None:
            found[name] = Candidate(name, program)
        elif isinstance(value, (Mask, bool)):
            found[name] = Candidate(name, as_pattern(value).mask)
        else:
            found[name] = Candidate(name, as_pattern(value, where=f"search(): candidate {name!r}"))
    return found


def assignment_of(choice: Mapping[int, str]) -> Assignment:
    """The layers that are given something, in order."""
    return tuple((layer, name) for layer, name in sorted(choice.items()) if name != NATIVE)


def put_in(model: PreTrainedModel, chosen: Mapping[int, Candidate], *, backend: str = "auto") -> AppliedPatterns:
    """Put candidates into the layers of a model, until ``restore()`` of what is returned: the one place that knows how."""
    return apply(model, {layer: candidate.value for layer, candidate in chosen.items()}, backend=backend)


def _table_as_json(value: Any) -> dict[str, Any]:
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    data = zlib.compress(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), 9)
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(tensor.shape), "zlib_base64": base64.b64encode(data).decode()}


def _table_from_json(data: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, data["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise PatternError(f"a table of the dtype {data['dtype']!r}, which is none of torch's")
    raw = bytearray(zlib.decompress(base64.b64decode(data["zlib_base64"])))
    return torch.frombuffer(raw, dtype=dtype).reshape(data["shape"]) if raw else torch.empty(data["shape"], dtype=dtype)
