"""What may stand in a layer: named patterns, programs and hybrid layers, as a file can keep them; and how they are put into a model."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.applying import AppliedPatterns, apply
from sparsedsl.models.converting import Conversion, convert
from sparsedsl.models.donor import Donor, Heads
from sparsedsl.models.layer import Layer, chunk_of
from sparsedsl.models.registry import class_named, name_of
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.program_text import read_given

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NATIVE", "Assignment", "Candidate", "Hybrid", "Runs", "assignment_of", "candidates_from", "put_in"]

NATIVE = "native"  # what a layer has that is given nothing

# Layers that are given something, in order, and the name of the candidate of each.
Assignment = tuple[tuple[int, str], ...]


@dataclass(frozen=True, eq=False)
class Hybrid:
    """A class of hybrid layers and what its constructor gets after the donor: plain values. Called with a donor, it makes the layer."""

    made_by: type[Layer]
    arguments: Mapping[str, Any]

    def __call__(self, donor: Donor) -> Layer:
        """The layer, new: with the same parameters each time, whatever was drawn before."""
        with torch.random.fork_rng():
            torch.manual_seed(donor.layer_idx)
            made: Layer = self.made_by(donor, **self.arguments)
            return made

    def __repr__(self) -> str:
        return f"{self.made_by.__name__}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


@dataclass(frozen=True, eq=False)
class Runs:
    """What runs in a layer. Of a hybrid layer (``in_layer``): ``tables`` that it gives its program, as it begins; ``sizes`` of axes of the
    inputs that it makes, by name; the names of these inputs."""

    value: Mask | Pattern | Program
    tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    in_layer: bool = False


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that may stand in a layer: a mask (soft cap, sinks and scale stay the layer's), a pattern, a program, a hybrid layer."""

    name: str
    value: Mask | Pattern | Program | Hybrid

    @property
    def kind(self) -> str:
        """``"mask"``, ``"pattern"``, ``"program"`` or ``"layer"``."""
        if isinstance(self.value, Hybrid):
            return "layer"
        return "program" if isinstance(self.value, Program) else "mask" if isinstance(self.value, Mask) else "pattern"

    def runs(self, donor: Donor | None) -> Runs:
        """What it runs in a layer; of a hybrid layer the program that it makes for this donor."""
        if not isinstance(self.value, Hybrid):
            return Runs(self.value)
        assert donor is not None
        layer, heads = self.value(donor), _no_heads(donor)
        chunk = chunk_of(layer.program)
        with torch.no_grad():
            given = layer.inputs(torch.zeros(1, 1, donor.hidden_size), heads, heads)
            if chunk is not None:
                given |= layer.landmarks(torch.zeros(1, 1, chunk, donor.hidden_size))
        program = layer.program
        inputs = [(node, given[name]) for name, node in program.inputs.items() if name in given]
        sizes = {axis: size for node, value in inputs for axis, size in zip(node.axes, value.shape, strict=True)}
        return Runs(
            program,
            {name: given[name] for name in program.tables if name in given},
            sizes,
            tuple(node.name for node, _ in inputs),
            True,
        )

    @property
    def text(self) -> str:
        """A line for people: the pattern, what the program ends with, or how the layer is made."""
        if isinstance(self.value, Hybrid):
            return repr(self.value)
        if isinstance(self.value, Program):
            return str(self.value).splitlines()[-1].partition(" = ")[2]
        return str(as_pattern(self.value)).splitlines()[-1]

    def _plain_(self) -> str:
        return repr(self.value) if isinstance(self.value, Hybrid) else self.value.text

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data; bound tables by their values, the class of a layer by the name it is registered with."""
        if isinstance(self.value, Hybrid):
            return {"layer": name_of(self.value.made_by), "arguments": dict(self.value.arguments)}
        bound = self.value.bound
        return {"text": self.value.text, "tables": {name: _table_as_json(bound[name]) for name in sorted(bound)}}

    @classmethod
    def from_json(cls, name: str, data: Mapping[str, Any]) -> Candidate:
        """What :meth:`as_json` was made of. Text is read, nothing is executed or imported."""
        if "layer" in data:
            return cls(name, Hybrid(class_named(data["layer"], f"candidate {name!r}"), data["arguments"]))
        return cls(name, read_given(data["text"], {table: _table_from_json(value) for table, value in data["tables"].items()}))

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for the same candidate, in every process."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:32]


def candidates_from(given: Any) -> dict[str, Candidate]:
    """Name -> candidate, of what a user gave.

    Raises :class:`~sparsedsl.PatternError` for what is no mapping from names to masks, patterns, programs or hybrid layers.
    """
    if not isinstance(given, Mapping) or not given:
        raise PatternError(f"search(): candidates must be a dict of patterns, programs or layers by name; got {shown(given)}")
    found = {}
    for name, value in given.items():
        if not isinstance(name, str) or not name or name == NATIVE:
            raise PatternError(
                f"search(): candidates must have names, texts other than {NATIVE!r}, which is what a layer has by itself; got {name!r}"
            )
        program = as_program(value)
        if isinstance(value, (type, functools.partial, Layer)):
            found[name] = Candidate(name, _hybrid(name, value))
        elif program is not None:
            found[name] = Candidate(name, program)
        elif isinstance(value, (Mask, bool)):
            found[name] = Candidate(name, as_pattern(value).mask)
        else:
            found[name] = Candidate(name, as_pattern(value, where=f"search(): candidate {name!r}"))
    return found


def _no_heads(donor: Donor) -> Heads:
    """Zeros of one token, which no rotation changes."""
    q = torch.zeros(1, donor.heads, 1, donor.head_dim)
    return Heads(q, q[:, : donor.kv_heads], torch.zeros(1, donor.kv_heads, 1, donor.value_dim), lambda rows: rows)


def _hybrid(name: str, given: Any) -> Hybrid:
    made_by, arguments = (given.func, given.keywords) if isinstance(given, functools.partial) else (given, {})
    positional = isinstance(given, functools.partial) and bool(given.args)
    if not (isinstance(made_by, type) and issubclass(made_by, Layer)) or positional:
        raise PatternError(
            f"search(): candidate {name!r} must be a class of layers, or functools.partial of one with arguments by name, such as "
            f"functools.partial(sd.models.NHA, slots=16), which a report can keep; got {shown(given)}"
        )
    try:
        plain = json.loads(json.dumps(arguments))
    except (TypeError, ValueError) as error:
        raise PatternError(
            f"search(): candidate {name!r}: the arguments of {made_by.__name__} must be plain values, which a report can keep ({error})"
        ) from None
    name_of(made_by)  # refuses a class that a report could not name
    return Hybrid(made_by, plain)


def assignment_of(choice: Mapping[int, str]) -> Assignment:
    """The layers that are given something, in order."""
    return tuple((layer, name) for layer, name in sorted(choice.items()) if name != NATIVE)


def put_in(model: PreTrainedModel, chosen: Mapping[int, Candidate], *, backend: str = "auto") -> AppliedPatterns | Conversion:
    """Put candidates into the layers of a model, until ``restore()`` of what is returned: the one place that knows how.

    Hybrid layers, and what stands beside them, by :func:`convert`; else by :func:`apply`.
    """
    given: dict[int, Any] = {layer: candidate.value for layer, candidate in chosen.items()}
    if any(isinstance(value, Hybrid) for value in given.values()):
        return convert(model, given, backend=backend)
    return apply(model, given, backend=backend)


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
