"""What reports hold as plain values, so that ``json.dumps`` takes it as it is: one rule for all of them, :func:`plain`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from pathlib import PurePath
from typing import Any, ClassVar

__all__ = ["Reported", "keys_of", "plain"]

# Entries of a tensor that are written out; larger ones are told by dtype and shape.
MOST_ENTRIES = 4096


class Reported:
    """What the library found, which is plain data too.

    Fields that begin with ``_`` are not part of it, nor those in ``_leaves_out``; ``_adds`` names properties that are.
    """

    _adds: ClassVar[tuple[str, ...]] = ()
    _leaves_out: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, lists, text, numbers, booleans and None: :func:`json.dumps` takes it as it is.

        Keys are the names of the fields and mean what these mean, units included; ``"report"`` is the name of the class. Masks, scores,
        patterns and programs are their text form, which :func:`sparsedsl.parse` reads; a verdict comes with its witness; numbers are
        numbers, but for those that JSON lacks, which are ``"inf"``, ``"-inf"`` and ``"nan"`` (``float`` reads them). Tensors are
        ``{"dtype", "shape", "values"}``, with None for the values of one with more than 4,096 entries. docs/reports.md has all keys.

        >>> import json
        >>> import sparsedsl as sd
        >>> found = sd.analyse(sd.kv_idx <= sd.q_idx + 1, 256).to_dict()
        >>> found["report"], found["flops"], found["causal"]["status"], found["causal"]["witness"]["kv_idx"]
        ('Analysis', 16777216, 'REFUTED', 1)
        >>> json.loads(json.dumps(found)) == found
        True
        """
        return {"report": type(self).__name__, **self._said()}

    def _said(self) -> dict[str, Any]:
        """The values by name."""
        return {name: plain(getattr(self, name), name) for name in keys_of(type(self))}


def keys_of(kind: type) -> tuple[str, ...]:
    """The names under which a dataclass is told in plain values, in order."""
    left_out = getattr(kind, "_leaves_out", ())
    named = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_") and field.name not in left_out]
    return (*named, *getattr(kind, "_adds", ()))


def plain(value: Any, name: str = "value") -> Any:
    """``value`` as JSON has it; see :meth:`Reported.to_dict`. ``name``: what it is called if it cannot be told.

    Raises TypeError for what has no rule: a report that holds such a thing says in ``_leaves_out`` that it is left out.

    >>> plain({"shape": (2, 3), "loss": float("inf"), "heads": {1, 0}})
    {'shape': [2, 3], 'loss': 'inf', 'heads': [0, 1]}
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Reported():
            return value._said()
        case Mapping():
            return {_key(key): plain(part, name) for key, part in value.items()}
        case tuple() | list():
            return [plain(part, name) for part in value]
        case Set():
            return sorted(plain(part, name) for part in value)
        case PurePath():
            return str(value)
    if hasattr(value, "_plain_"):
        return value._plain_()
    if hasattr(value, "numel") and hasattr(value, "dtype"):
        few = value.numel() <= MOST_ENTRIES
        words = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return {**words, "values": plain(value.tolist(), name) if few else None}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: plain(getattr(value, key), key) for key in keys_of(type(value))}
    raise TypeError(f"{name} is a {type(value).__name__}, which has no plain form")


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(plain(key, "a key"))
