"""Tensors that the callable reads: the names they get, and the facts that may be claimed about them.

Names come from the variable, attribute or container entry that holds the tensor where it is first used. A tensor computed
*inside* the callable is named after its source and its content, so that tracing twice gives the same name and the same tensor
object.
"""

from __future__ import annotations

import hashlib
import keyword
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from sparsedsl.lang.symbols import RESERVED_NAMES
from sparsedsl.tracing.locate import user_frames

__all__ = ["content_name", "extremes", "find_name", "intern", "is_monotone", "lowest", "sanitise"]

_UNUSABLE = RESERVED_NAMES | {"inf", "nan", "table"}
_DEPTH = 3  # attributes of attributes of a variable
_LARGEST = 1 << 26  # elements of a table whose facts are still measured

# The same storage seen the same way is one tensor object as long as somebody holds it, since expressions are joined by identity.
_interned: weakref.WeakValueDictionary[tuple[Any, ...], torch.Tensor] = weakref.WeakValueDictionary()


def sanitise(name: str) -> str:
    """``name`` as a legal table name."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII).strip("_") or "table"
    if name[0].isdigit():
        name = f"t{name}"
    return f"{name}_table" if keyword.iskeyword(name) or name in _UNUSABLE else name


def find_name(tensor: torch.Tensor) -> str | None:
    """The variable, attribute or entry that holds ``tensor`` in the code being traced; the innermost function's name wins."""
    for frame in user_frames():
        code = frame.f_code
        words = {*code.co_names, *(n for c in code.co_consts if hasattr(c, "co_names") for n in c.co_names)}
        variables = {**frame.f_locals}
        variables |= {n: frame.f_globals[n] for n in sorted(words - variables.keys()) if n in frame.f_globals}
        for name, value in variables.items():
            if value is tensor:
                return name
        for name, value in variables.items():
            found = _inside(value, name, tensor, words, _DEPTH)
            if found is not None:
                return found
    return None


def _inside(value: object, name: str, tensor: torch.Tensor, words: set[str], depth: int) -> str | None:
    """The name of ``tensor`` somewhere in ``value``, which is called ``name``."""
    parts = list(_parts(value, name, words))
    for part_name, part in parts:
        if part is tensor:
            return part_name
    if depth > 1:
        for part_name, part in parts:
            found = _inside(part, part_name, tensor, words, depth - 1)
            if found is not None:
                return found
    return None


def _parts(value: object, name: str, words: set[str]) -> Iterator[tuple[str, Any]]:
    """What ``value`` holds: entries of containers, parameters and buffers of modules, attributes that the code names."""
    if isinstance(value, (list, tuple)):
        yield from ((f"{name}_{i}", part) for i, part in enumerate(value[:64]))
    elif isinstance(value, dict):
        yield from ((str(key), part) for key, part in list(value.items())[:64])
    elif isinstance(value, torch.nn.Module):
        for group in ("_parameters", "_buffers", "_modules"):
            for key, part in value.__dict__.get(group, {}).items():
                yield key if key in words else f"{name}_{key}", part
    if not isinstance(value, (torch.Tensor, type)) and hasattr(value, "__dict__"):
        yield from ((key, part) for key, part in sorted(vars(value).items(), key=lambda item: str(item[0])) if key in words)


def content_name(base: str, tensor: torch.Tensor, live: bool) -> str:
    """``base`` and a digest: of which part of a captured tensor a ``live`` view shows, else of the values."""
    seen = repr((tensor.dtype, tuple(tensor.shape))).encode()
    if live:
        seen += repr((tensor.stride(), tensor.storage_offset())).encode()
    else:
        seen += tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{base}_{hashlib.sha256(seen).hexdigest()[:8]}"


def intern(tensor: torch.Tensor, name: str, live: bool) -> torch.Tensor:
    """The one object for this view of its base, or for this content under ``name``."""
    base = tensor._base if live else None
    key: tuple[Any, ...] = (name, tensor.dtype, tuple(tensor.shape), tensor.device)
    if base is not None:
        key = (id(base), tensor.requires_grad, *key[1:], tensor.stride(), tensor.storage_offset())
    known = _interned.get(key)
    if known is not None and (known._base is base if base is not None else torch.equal(known, tensor)):
        return known
    _interned[key] = tensor
    return tensor


def lowest(tensor: torch.Tensor) -> int | None:
    """The smallest value of an integer table; None where it is not measured."""
    return int(_wide(tensor).min()) if 0 < tensor.numel() <= _LARGEST else None


def extremes(tensor: torch.Tensor) -> tuple[int, int]:
    """The least and the greatest value of an integer table; those of its type where they are not measured, of int64 an int32's."""
    if 0 < tensor.numel() <= _LARGEST:
        low, high = torch.aminmax(_wide(tensor))
        return int(low), int(high)
    limits = torch.iinfo(tensor.dtype if tensor.dtype.itemsize < 8 else torch.int32)
    return limits.min, limits.max


def is_monotone(tensor: torch.Tensor) -> bool:
    """Whether an integer table never falls along its last dimension; one entry is no evidence."""
    if not 0 < tensor.numel() <= _LARGEST or tensor.shape[-1] < 2:
        return False
    tensor = _wide(tensor)
    return bool((tensor[..., 1:] >= tensor[..., :-1]).all())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """torch compares no unsigned integers wider than a byte."""
    return tensor.to(torch.int64) if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor
