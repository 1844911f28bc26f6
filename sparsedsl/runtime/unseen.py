"""Keys that a query may not see have no effect on it, whatever they hold: NaN, infinity, numbers so large that products overflow.

Tiles hold pairs outside of the mask too, whose weights are 0; and 0 times NaN is NaN. To keep such pairs out of every product would
slow down every call. So a call is made as it is, and its results, of which every bad number makes NaN or infinity, are looked at
once. Only where some are found it is made again, with what is bad put to 0: queries that see nothing bad take these results, the
others keep what arithmetic gave them. Which queries see which keys is attention too, with equal weights.

Nothing is looked at on a GPU, where to look is to wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.runtime.dtypes import accumulated

__all__ = ["Sight", "guarded_backward", "guarded_forward"]

Tensor = torch.Tensor
# Larger than any logit: what is left of a weight of a row with such an LSE is 0.
NO_WEIGHT = torch.finfo(torch.float32).max / 4


@dataclass(frozen=True, eq=False)
class Sight:
    """Attention with equal weights: ``forward(v)`` gives ``(out, lse)`` for ``v (B, Hkv, Skv, 1)``, ``backward(out, lse, grad_out)`` the
    gradient of v; all in float32."""

    shape: torch.Size
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]

    def rows(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The queries that see one of ``keys (B, Hkv, Skv)``, and those of ``rows (B, Hq, Sq)`` that see any key."""
        out, lse = self.forward(keys[..., None].float())
        return (out[..., 0] > 0) | (rows & (lse > float("-inf")))

    def keys(self, rows: Tensor) -> Tensor:
        """The keys ``(B, Hkv, Skv)`` that one of ``rows (B, Hq, Sq)`` sees."""
        none = torch.zeros((*self.shape, 1), device=rows.device)
        return self.backward(*self.forward(none), rows[..., None].float())[..., 0] > 0


def guarded_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, run: Callable[[Tensor, Tensor, Tensor], Any],
    sight: Callable[[], Sight | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``run(q, k, v)``, which gives ``(out, lse)``, where keys that a query may not see have no effect on it. An LSE may be empty. ``run``
    may give a third result, whether ``out`` is known to be finite.

    ``sight``: who sees whom, asked for only where something bad is found; None where ``run`` has seen to it already.
    """
    out, lse, *known = run(q, k, v)
    if any(known) or out.device.type != "cpu" or _all_finite(out):
        return out, lse
    seen: Sight | None = None
    for rows, keys in _bad(q, k, v, scale):
        seen = seen or sight()
        if seen is None:
            break
        clear = ~seen.rows(rows, keys)
        own, own_lse = run(*_zeroed(q, k, v, rows, keys))[:2]
        out = torch.where(clear[..., None], own, out)
        lse = torch.where(clear, own_lse, lse) if lse.numel() else lse
        if _all_finite(own):
            break
    return out, lse


def guarded_backward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    run: Callable[..., Sequence[Tensor]], places: str, sight: Callable[[], Sight | None],
) -> list[Tensor]:  # fmt: skip
    """``run(q, k, v, out, lse, grad_out, grad_lse)``, which gives gradients, where pairs that do not attend have no effect on them.

    ``results``: out, LSE and their gradients. ``places``: of each gradient whether it has an entry for each query ("q"), for each key
    ("k"), or belongs to all ("*").
    """
    grads = list(run(q, k, v, *results))
    if q.device.type != "cpu" or _all_finite(*grads):
        return grads
    out, lse, grad_out, grad_lse = results
    wrong = ~(_finite_rows(out) & _finite_rows(grad_out) & (lse < float("inf")))
    if grad_lse is not None:
        wrong |= ~grad_lse.isfinite()
    seen = sight()
    if seen is None:
        return grads
    for bad, keys in _bad(q, k, v, scale, wrong, grad_out):
        rows = seen.rows(bad, keys)
        touched = seen.keys(rows)
        none = bad | rows
        own = run(
            *_zeroed(q, k, v, none, keys), out.masked_fill(none[..., None], 0.0), lse.masked_fill(rows, NO_WEIGHT),
            grad_out.masked_fill(none[..., None], 0.0), None if grad_lse is None else grad_lse.masked_fill(none, 0.0),
        )  # fmt: skip
        kept = {"q": rows[..., None], "k": touched[..., None], "*": rows.any()}
        for number, (place, new) in enumerate(zip(places, own, strict=True)):
            old, where = grads[number], kept[place]
            if place == "q" and old.shape[1] != where.shape[1]:  # heads that share an entry
                where = where.unflatten(1, (old.shape[1], -1)).any(2)
            grads[number] = torch.where(where, old, new)
        if _all_finite(*own):
            break
    return grads


def _all_finite(*tensors: Tensor) -> bool:
    """Whether there is no NaN or infinity, by one pass without a copy; False also where a sum leaves the range of floats."""
    return math.isfinite(sum([float(t.sum(dtype=accumulated(t.dtype))) for t in tensors]))


def _finite_rows(t: Tensor) -> Tensor:
    return t.isfinite().all(-1)


def _bad(
    q: Tensor, k: Tensor, v: Tensor, scale: float, wrong: Tensor | None = None, grad_out: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries ``(B, Hq, Sq)`` and keys ``(B, Hkv, Skv)`` that make NaN or infinity of a product with 0; then, with finite keys so large
    that their products overflow, once more. ``wrong``: queries that are bad whatever they hold."""
    rows = ~_finite_rows(q)
    rows = rows if wrong is None else rows | wrong
    keys = ~(_finite_rows(k) & _finite_rows(v))
    if bool(rows.any()) or bool(keys.any()):
        yield rows, keys
    huge = _overflows(k, q, rows, max(1.0, 2 * scale))
    if grad_out is not None:
        huge |= _overflows(v, grad_out, rows, 1.0)
    if bool((huge & ~keys).any()):
        yield rows, keys | huge


def _overflows(keys: Tensor, x: Tensor, rows: Tensor, factor: float) -> Tensor:
    """Keys whose product with some row of x, but for ``rows``, may leave the range of floats."""
    largest = x.masked_fill(rows[..., None], 0.0).abs().amax().double()
    most = torch.finfo(torch.float32).max / 4 / (x.shape[3] * factor)
    return keys.abs().amax(-1).double() * largest > most


def _zeroed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor) -> list[Tensor]:
    """With these queries and keys put to 0."""
    return [t.masked_fill(bad[..., None], 0.0) for t, bad in zip((q, k, v), (rows, keys, keys), strict=True)]
