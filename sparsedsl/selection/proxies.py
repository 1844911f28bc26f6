"""What scores are made of: attention of the last rows, smoothed; and one row for each block of tokens."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.heads import alike
from sparsedsl.selection.chunking import cut, rows_at_once
from sparsedsl.selection.scores import DotScores

__all__ = ["Pool", "Prober", "bounds", "by_distance", "estimate", "pooled", "probe", "smooth", "windowed"]

Tensor = torch.Tensor


class Pool(Protocol):
    """A backend's own way to make one row of every ``block`` rows of a tensor, as :func:`pooled` does."""

    def __call__(self, x: Tensor, block: int, how: str, pad: str, places: Tensor | None = None) -> Tensor | None:
        """The result; for "bounds" ``(2, B, H, blocks, D)``, the least and the greatest. With ``places`` of
        :func:`~sparsedsl.runtime.placed_rows.gather_rows`, whose copy is spared. None for what it does not take."""


class Prober(Protocol):
    """A backend's own way to :func:`probe`."""

    def __call__(
        self, q: Tensor, k: Tensor, *, rows: int, causal: bool, scale: float, keys_normalised: int, keys_kept: int, q_offset: int,
        length: int,
    ) -> Tensor | None:  # fmt: skip
        """The mean over the last ``rows`` queries, of which there are so many at least: ``(B, H, length)``, 0 after the keys that are kept.
        None for what it does not take."""


@torch.no_grad()
def probe(
    q: Tensor,
    k: Tensor,
    *,
    rows: int,
    causal: bool,
    scale: float,
    keys_normalised: int | None = None,
    keys_kept: int | None = None,
    q_offset: int = 0,
    reduce: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """How much the last ``rows`` queries attend to each key: their softmax, averaged (or summed) over the rows.

    In two passes over tiles of keys, one for the normalisers and one for the sums: no rows x keys tensor.

    Args:
        q: ``(B, Hq, Sq, D)``; its first row stands at position ``q_offset``. All rows, if there are fewer than ``rows``.
        k: ``(B, Hkv, Skv, D)``; half precision is cast tile by tile.
        causal: whether a row sees the keys up to its own position only.
        scale: factor of the logits.
        keys_normalised: the softmax goes over this many first keys; None: all.
        keys_kept: the result is of this many first keys; None: those that are normalised over, and no more than these.

    Returns:
        ``(B, Hq, keys_kept)`` float32 (float64 for float64). A row that sees no key adds nothing.

    Raises:
        ShapeError: ``keys_kept <= keys_normalised <= Skv`` does not hold, or q and k do not fit.

    >>> q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 4, 4)
    >>> probe(q, k, rows=2, causal=False, scale=0.5)
    tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    >>> probe(q, k, rows=1, causal=True, scale=0.5, q_offset=1, keys_kept=3)
    tensor([[[0.3333, 0.3333, 0.3333]]])
    """
    keys_normalised = k.shape[2] if keys_normalised is None else keys_normalised
    keys_kept = keys_normalised if keys_kept is None else keys_kept
    if not 0 <= keys_kept <= keys_normalised <= k.shape[2] or rows < 1:
        raise ShapeError(
            f"probe: rows {rows}, keys_kept {keys_kept}, keys_normalised {keys_normalised} of {k.shape[2]} keys; "
            "wanted 1 <= rows and 0 <= keys_kept <= keys_normalised <= keys"
        )
    rows = min(rows, q.shape[2])
    start = q.shape[2] - rows
    source = DotScores(q[:, :, start:], k, scale)
    batch, heads, _, _ = source.shape
    position = q_offset + start + torch.arange(rows, device=q.device)[:, None]
    step = rows_at_once(3 * source.cell_bytes * rows + source.block_bytes)

    def logits(keys: slice) -> Tensor:
        block = source.block(slice(0, rows), keys)
        if causal and keys.stop > q_offset + start + 1:
            block.masked_fill_(torch.arange(keys.start, keys.stop, device=q.device) > position, float("-inf"))
        return block

    total = torch.full((batch, heads, rows), float("-inf"), dtype=source.dtype, device=q.device)
    for keys in cut(0, keys_normalised, step):
        total = torch.logaddexp(total, torch.logsumexp(logits(keys), dim=-1))
    total = total.masked_fill(total == float("-inf"), 0.0)[..., None]  # exp(-inf - 0) is 0, exp(-inf + inf) is not
    sums = torch.empty((batch, heads, keys_kept), dtype=source.dtype, device=q.device)
    for keys in cut(0, keys_kept, step):
        sums[..., keys] = (logits(keys) - total).exp_().sum(2)
    return sums / rows if reduce == "mean" and rows else sums


@torch.no_grad()
def estimate(q: Tensor, k: Tensor, *, rows: int, block: int, scale: float) -> Tensor:
    """What the mean of the last ``rows`` queries pays the mean keys of blocks: ``(B, Hq, ceil(Skv / block))``.

    >>> estimate(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 4, 4), rows=1, block=2, scale=1.0)
    tensor([[[0.5000, 0.5000]]])
    """
    mean = q[:, :, -rows:].to(torch.promote_types(q.dtype, torch.float32)).mean(2, keepdim=True)
    mean, means = alike(mean, pooled(k, block, "mean", "valid"))
    return DotScores(mean, means, scale).scores()[:, :, 0].softmax(-1)


@torch.no_grad()
def by_distance(q: Tensor, k: Tensor, *, rows: int, scale: float, q_offset: int = 0) -> Tensor:
    """The causal softmax of the last ``rows`` queries, averaged over them by distance from the query: ``(B, H, Skv)``.

    A few rows at a time are held with all their keys.

    >>> by_distance(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), rows=2, scale=1.0)
    tensor([[[0.7500, 0.2500]]])
    """
    rows, keys = min(rows, q.shape[2]), k.shape[2]
    start = q.shape[2] - rows
    source = DotScores(q[:, :, start:], k, scale)
    batch, heads, _, _ = source.shape
    sums = torch.zeros((batch, heads, keys), dtype=source.dtype, device=q.device)
    number = torch.arange(keys, device=q.device)
    for some in cut(0, rows, rows_at_once(4 * source.cell_bytes * keys + source.row_bytes)):
        position = q_offset + start + torch.arange(some.start, some.stop, device=q.device)[:, None]
        mass = source.block(some, slice(0, keys)).masked_fill_(number > position, float("-inf")).softmax(-1)
        key = position - number  # at each distance
        there = (key >= 0) & (key < keys)
        sums += mass.gather(3, key.clamp(0, keys - 1).expand(mass.shape)).masked_fill_(~there, 0.0).sum(2)
    return sums / max(rows, 1)


def smooth(score: Tensor, pool: int, how: Literal["mean", "max"] = "mean") -> Tensor:
    """The mean or the greatest of ``pool`` (odd) neighbours along the last dimension of ``score (B, H, N)``, which are at least 0; beyond
    the ends are zeros, and count.

    >>> smooth(torch.tensor([[[7.0, 0.0, 0.0, 0.0]]]), 7)
    tensor([[[1., 1., 1., 1.]]])
    """
    if pool < 1 or pool % 2 == 0:
        raise PatternError(f"smooth: pool is {pool}; wanted an odd number of neighbours")
    if how == "max" and score.shape[-1]:
        return F.max_pool1d(score, pool, stride=1, padding=pool // 2)
    return F.avg_pool1d(score, pool, stride=1, padding=pool // 2, count_include_pad=True) if score.shape[-1] else score


def pooled(
    x: Tensor,
    block: int,
    how: Literal["mean", "sum", "max", "min", "first", "last"] = "mean",
    pad: Literal["valid", "zero"] = "valid",
) -> Tensor:
    """One row for every ``block`` tokens of ``x (B, H, N, D)``: ``(B, H, ceil(N / block), D)``, differentiable.

    Half precision comes out as float32 and is added up in it, piece by piece. What a ragged last block lacks is left out ("valid") or
    counts as zeros ("zero": the mean is divided by ``block``, the maximum is 0 at least).

    >>> x = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1)
    >>> pooled(x, 2).flatten(), pooled(x, 2, pad="zero").flatten(), pooled(x, 2, "last").flatten()
    (tensor([2., 5.]), tensor([2.0000, 2.5000]), tensor([3., 5.]))
    """
    if x.ndim != 4 or block < 1:
        raise ShapeError(f"pooled: x is {tuple(x.shape)} and block {block}; wanted (B, H, N, D) and 1 or more")
    if how not in ("mean", "sum", "max", "min", "first", "last") or pad not in ("valid", "zero"):
        raise PatternError(
            f"pooled: how is {how!r} and pad {pad!r}; wanted mean, sum, max, min, first or last, and valid or zero"
        )
    whole = x.shape[2] // block
    parts = []
    # In a wide dtype nothing is cast, and one piece does.
    step = whole if x.dtype == accumulated(x.dtype) else rows_at_once(4 * x.shape[0] * x.shape[1] * block * x.shape[3])
    for some in cut(0, whole, max(1, step)):
        parts.append(_reduced(x[:, :, some.start * block : some.stop * block].unflatten(2, (-1, block)), how))
    if tail := x.shape[2] - whole * block:
        rest = x[:, :, whole * block :]
        rest = rest if pad == "valid" else F.pad(rest, (0, 0, 0, block - tail))
        parts.append(_reduced(rest[:, :, None], how))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=2) if parts else x.new_zeros(x.shape, dtype=accumulated(x.dtype))


def windowed(x: Tensor, block: int, stride: int, how: Literal["mean", "sum", "max", "min", "first", "last"] = "mean") -> Tensor:
    """One row for every complete window of ``block`` tokens of ``x (B, H, N, D)``, one every ``stride``: ``(B, H, windows, D)``,
    differentiable. Half precision comes out as float32.

    >>> windowed(torch.tensor([1.0, 3.0, 5.0, 9.0]).view(1, 1, 4, 1), 2, 1).flatten()
    tensor([2., 4., 7.])
    """
    count = max(0, (x.shape[2] - block) // stride + 1)
    if not count:
        return x.new_zeros((*x.shape[:2], 0, x.shape[3]), dtype=accumulated(x.dtype))
    parts = []
    for some in cut(0, count, rows_at_once(4 * x.shape[0] * x.shape[1] * block * x.shape[3])):
        tokens = x[:, :, some.start * stride : (some.stop - 1) * stride + block]
        parts.append(_reduced(tokens.unfold(2, block, stride).transpose(3, 4), how))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def bounds(k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest of each channel within every ``block`` keys of ``k (B, H, N, D)``.

    >>> low, high = bounds(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2)
    >>> low.flatten(), high.flatten()
    (tensor([1., 5.]), tensor([3., 5.]))
    """
    return pooled(k, block, "min"), pooled(k, block, "max")


def _reduced(x: Tensor, how: str) -> Tensor:
    """``x (B, H, n, block, D)`` over the block."""
    dtype = accumulated(x.dtype)
    match how:
        case "mean":
            return x.to(dtype).mean(3)
        case "sum":
            return x.to(dtype).sum(3)
        case "max":
            return x.amax(3).to(dtype)
        case "min":
            return x.amin(3).to(dtype)
        case "first":
            return x[:, :, :, 0].to(dtype)
        case _:
            return x[:, :, :, -1].to(dtype)
