"""Textbook pieces that the dense meaning is written with. The lowering has none of them: what is wrong here is wrong on one side only."""

from __future__ import annotations

import torch

from sparsedsl.errors import ShapeError

__all__ = ["NEVER", "gumbel_noise", "joined_heads", "log_sum", "of_one_size", "per_head", "pooled", "repeat_kv", "softmax"]

Tensor = torch.Tensor
NEVER = float("-inf")


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension; rows of -inf alone are 0."""
    if not x.shape[-1]:
        return x
    peak = x.detach().amax(-1, keepdim=True)
    raised = torch.exp(x - torch.where(peak == NEVER, 0.0, peak))
    total = raised.sum(-1, keepdim=True)
    return raised / torch.where(total == 0, 1.0, total)


def log_sum(x: Tensor) -> Tensor:
    """``log(sum(exp(x)))`` over the last dimension; -inf, without a gradient, of rows of -inf alone."""
    peak = x.detach().amax(-1)
    total = torch.exp(x - torch.where(peak == NEVER, 0.0, peak)[..., None]).sum(-1)
    return torch.where(total == 0, NEVER, torch.where(peak == NEVER, 0.0, peak) + torch.log(torch.where(total == 0, 1.0, total)))


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """``x (B, H, ..)`` for ``heads`` heads, a multiple of H: neighbouring ones share one of ``x``."""
    group = heads // x.shape[1]
    return x if group == 1 else torch.stack([x[:, head // group] for head in range(heads)], dim=1)


def of_one_size(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the larger number of heads."""
    heads = max(x.shape[1], y.shape[1])
    if heads % x.shape[1] or heads % y.shape[1]:
        raise ShapeError(f"{x.shape[1]} and {y.shape[1]} heads do not fit: one must be a multiple of the other")
    return repeat_kv(x, heads), repeat_kv(y, heads)


def joined_heads(x: Tensor, heads: int, how: str) -> Tensor:
    """``x (B, H, ..)`` with ``H / heads`` neighbouring heads as one."""
    return torch.stack([_joined(part, 1, how) for part in x.split(x.shape[1] // heads, dim=1)], dim=1)


def pooled(x: Tensor, block: int, how: str, pad: str) -> Tensor:
    """``x (B, H, N, D)`` with ``block`` neighbouring rows as one. ``pad`` ``"zero"``: a ragged last block counts as if zeros followed."""
    parts = []
    for rows in x.split(block, dim=2):
        if pad == "zero":
            rows = torch.cat([rows, rows.new_zeros((*rows.shape[:2], block - rows.shape[2], rows.shape[3]))], dim=2)
        parts.append(_joined(rows, 2, how))
    return torch.stack(parts, dim=2) if parts else x


def _joined(x: Tensor, dim: int, how: str) -> Tensor:
    match how:
        case "mean":
            return x.sum(dim) / x.shape[dim]
        case "sum":
            return x.sum(dim)
        case "max":
            return x.amax(dim)
        case "min":
            return x.amin(dim)
        case "first":
            return x.select(dim, 0)
        case "last":
            return x.select(dim, -1)
    raise ValueError(how)


def per_head(flags: Tensor, heads: int) -> Tensor:
    """Flags of query heads for fewer heads: those of any head of a group."""
    return torch.stack([part.any(1) for part in flags.split(flags.shape[1] // heads, dim=1)], dim=1)


def gumbel_noise(size: tuple[int, ...], seed: Tensor, first_row: int, device: torch.device) -> Tensor:
    """``-log(-log(u))`` in float32, ``u`` made of 23 bits of a hash of seed, batch entry and head, position of the row, and block."""
    batch, heads, rows, blocks = size
    entry_and_head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row = first_row + torch.arange(rows, device=device).view(rows, 1)
    bits = _hashed(_hashed(_hashed(entry_and_head + seed.long() * 65536) ^ row) ^ torch.arange(blocks, device=device))
    share = ((bits // 512).float() + 0.5) / 8388608
    return -torch.log(-torch.log(share))


def _hashed(x: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits."""
    x = x % 2**32
    x = (x ^ (x // 2**16)) * 0x7FEB352D % 2**32
    x = (x ^ (x // 2**15)) * 0x846CA68B % 2**32
    return x ^ (x // 2**16)
