"""``torch.vmap`` over calls: as one call on a larger batch where the pattern cannot tell batch entries apart, else one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH
from sparsedsl.torch_private import batch_dim, is_batched, is_wrapped, unwrapped

__all__ = ["map_call", "reads_batch", "samples", "stacked"]

Tensor = torch.Tensor
Call = Callable[[list[Any], list[Any]], Sequence[Tensor]]


def reads_batch(pattern: Pattern) -> bool:
    """Whether mask, score or sink depend on ``b``."""
    return any(BATCH in expr.free_symbols for expr in pattern.exprs)


def map_call(
    call: Call,
    size: int,
    batched: list[Any],
    batched_dims: Sequence[Any],
    tables: list[Any],
    tables_dims: Sequence[Any],
    *,
    fold: bool,
) -> tuple[list[Tensor], list[int]]:
    """``call(batched, tables)`` for each of ``size`` samples; returns the results and the dimension of each that counts samples.

    Args:
        call: takes tensors with a batch dimension first, then tables; its results have a batch dimension first if ``fold``.
        batched, tables: tensors, some with one dimension more, which ``..._dims`` names; or None.
        fold: the pattern does not read ``b``, and no table gets a gradient of its own for each sample.
    """
    if fold and all(dim is None for dim in tables_dims):
        folded = [t if t is None else _front(t, dim, size).flatten(0, 1) for t, dim in zip(batched, batched_dims, strict=True)]
        results = [t.unflatten(0, (size, t.shape[0] // size)) for t in call(folded, tables)]
    else:
        dims = [*batched_dims, *tables_dims]
        each = []
        for number in range(size):
            sample = [t if dim is None else t.select(dim, number) for t, dim in zip([*batched, *tables], dims, strict=True)]
            each.append(call(sample[: len(batched)], sample[len(batched) :]))
        results = [torch.stack(same) for same in zip(*each, strict=True)]
    return results, [0] * len(results)


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


# ---- values under the wrappers of torch.func ---------------------------------------------------------------------------------


def stacked(t: Tensor) -> Tensor:
    """The values of a tensor that a transform of ``torch.func`` has wrapped: those of all samples, counted by dimensions in front."""
    if is_batched(t):
        inner, dim = unwrapped(t), batch_dim(t)
        plain = stacked(inner)
        return plain.movedim(plain.ndim - inner.ndim + dim, 0)
    return stacked(unwrapped(t)) if is_wrapped(t) else t


def samples(tables: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The plain tables of each sample of a vmap; of float tables, whose values decide nothing, the first stands for all."""
    plain = {name: stacked(t).reshape(-1, *t.shape) for name, t in tables.items()}
    count = max((t.shape[0] for t in plain.values() if not t.is_floating_point()), default=1)
    for number in range(count):
        yield {name: t[number % t.shape[0]] for name, t in plain.items()}
