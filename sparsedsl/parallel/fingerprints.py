"""What tables hold, as text: a plan is made of some tables, and a call with others would miss keys."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import torch

from sparsedsl.analysis.caches import Cache

__all__ = ["digests"]

Tensor = torch.Tensor
_KNOWN: Cache[str] = Cache()


def digests(tables: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of the values of each table, whatever its width and device; looked at once while a tensor lives unchanged.

    >>> digests({"x": torch.tensor([1, 2])}) == digests({"x": torch.tensor([1, 2], dtype=torch.int32)})
    True
    """
    return {name: _KNOWN.get(None, [table], functools.partial(_digest, table)) for name, table in tables.items()}


def _digest(table: Tensor) -> str:
    wide = table.detach().to("cpu", torch.float64 if table.is_floating_point() else torch.int64).contiguous()
    return hashlib.sha256(repr(tuple(wide.shape)).encode() + wide.numpy().tobytes()).hexdigest()
