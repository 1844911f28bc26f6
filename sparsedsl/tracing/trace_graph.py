"""What a traced call leaves behind: nodes, the tensors they read, and the errors that say where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from sparsedsl.tracing.locate import Location, here

__all__ = ["Captured", "Partial", "Refused", "TraceNode", "Vector", "constant", "fail"]


class Refused(Exception):
    """What becomes a ``TraceError`` at the edge. No TypeError: torch takes one from an operator for "try the other operand"."""


@dataclass(eq=False)
class Captured:
    """A tensor read by the callable, and the table it becomes; ``tensor`` has at least one dimension."""

    tensor: torch.Tensor
    name: str


@dataclass(eq=False, frozen=True)
class TraceNode:
    """One scalar value of the traced computation.

    ``op``: ``"symbol"`` (args: its name), ``"const"`` (args: a number), ``"read"`` (args: a :class:`Captured`, then index
    nodes), or a name of :mod:`sparsedsl.tracing.operations` (args: nodes). ``dtype`` is torch's result type, ``common`` the
    type the operation computes in.
    """

    op: str
    args: tuple[Any, ...]
    dtype: torch.dtype
    common: torch.dtype
    where: Location | None = field(default_factory=here, repr=False)

    @property
    def inputs(self) -> tuple[TraceNode, ...]:
        """The nodes this one is computed from."""
        return tuple(a for a in self.args if isinstance(a, TraceNode))

    @property
    def is_const(self) -> bool:
        """Whether the value is known while tracing."""
        return self.op == "const"


@dataclass(frozen=True, eq=False)
class Partial:
    """A captured tensor with some of its indices given: ``doc[b]`` of a two-dimensional ``doc``. None marks a free index."""

    captured: Captured
    indices: tuple[TraceNode | None, ...]

    @property
    def free(self) -> list[int]:
        """Dimensions that have no index yet."""
        return [d for d, index in enumerate(self.indices) if index is None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is left."""
        return tuple(self.captured.tensor.shape[d] for d in self.free)

    def read(self) -> TraceNode:
        """The node of a read whose indices are complete."""
        dtype = self.captured.tensor.dtype
        return TraceNode("read", (self.captured, *self.indices), dtype, dtype)


@dataclass(frozen=True, eq=False)
class Vector:
    """A few values together, in the order of a tensor of ``shape``."""

    nodes: tuple[TraceNode, ...]
    shape: tuple[int, ...]


def constant(value: object, dtype: torch.dtype | None = None) -> TraceNode:
    """A number, in the type that torch gives it."""
    if dtype is None:
        dtype = {bool: torch.bool, int: torch.int64}.get(type(value), torch.get_default_dtype())
    return TraceNode("const", (value,), dtype, dtype)


def fail(what: str, instead: str, where: Location | None = None) -> NoReturn:
    """Refuse to trace: the operation, the line, and what to write instead."""
    where = where or here()
    place = f" at {where}" if where is not None else ""
    raise Refused(f"cannot trace {what}{place}. {instead}")
