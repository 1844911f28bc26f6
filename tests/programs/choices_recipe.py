"""The problems of the golden values of choices: numbers made by a hash, so that other code can make the same ones; sums to tell them by."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["chosen", "dig", "numbers", "scores_of", "value_of"]

Tensor = torch.Tensor


def numbers(seed: int, *shape: int) -> Tensor:
    """Numbers in [-1, 1) in float64, each a hash of its row-major index and ``seed``."""
    i = torch.arange(math.prod(shape), dtype=torch.int64)
    h = (2654435761 * i + 40503 * seed) % 2**32
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    h = (h ^ (h >> 13)) * 3266489917 % 2**32
    return ((h ^ (h >> 16)).double() / 2**31 - 1).view(shape)


def dig(x: Tensor) -> float:
    """One number that any change of ``x`` changes."""
    flat = x.detach().double().reshape(-1)
    return float((flat * numbers(99, flat.numel())).sum())


def value_of(attn: Any, node: Any, **given: Any) -> Any:
    """What a node gives in a call, as the backend of ``attn`` computes it."""
    from sparsedsl.backends.reference.nodes import Reference
    from sparsedsl.execute.dispatch import Dispatch
    from sparsedsl.execute.node_rules import lowered
    from sparsedsl.runtime.program_call import check_program_call

    q, k, v = (given.pop(name) for name in "qkv")
    call = check_program_call(attn.program, q, k, v, given)
    return (Reference(call) if attn.backend == "reference" else lowered(call, Dispatch(attn.backend), lse=False)).value(node)


def scores_of(attn: Any, node: Any, **given: Any) -> Tensor:
    """The scores that a node gives, all of them."""
    found = value_of(attn, node, **given)
    return found if isinstance(found, Tensor) else found.scores()


def chosen(attn: Any, label: str, **given: Any) -> list[list[list[int]]]:
    """Head -> row -> numbers of what was chosen, of the first batch entry."""
    found = attn.choices(**given)[label]
    table = found if isinstance(found, Tensor) else found.table()
    return [[row.nonzero()[:, 0].tolist() for row in head] for head in table[0]]
