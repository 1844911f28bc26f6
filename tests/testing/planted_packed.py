"""Kernels on packed sequences and on pages, right ones and ones with one planted fault each, as loops over sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(H, M, D)`` over keys ``(Hk, N, D)``: out and LSE, 0 and minus infinity for rows that see nothing."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = (q.double() @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))
    weights = torch.exp(scores - lse.masked_fill(torch.isinf(lse), 0.0)[..., None])
    return (weights @ v).to(q.dtype), lse.float()


def last_rows(rows: int, keys: int, causal: bool) -> Tensor:
    """Who sees whom where rows are the last positions of the keys."""
    if not causal:
        return torch.ones(rows, keys, dtype=torch.bool)
    return torch.arange(keys) <= torch.arange(rows)[:, None] + keys - rows


@dataclass(frozen=True)
class Varlen:
    """``fault``: "" for none; "skips empty": sequences are counted without those that have no queries; "straddles": keys are taken in tiles
    of 4, the last of which reaches into the next sequence; "no keys": a sequence without keys divides 0 by 0."""

    fault: str = ""
    causal: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), torch.full((q.shape[1], q.shape[0]), float("-inf"))
        queries = list(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True))
        keys = list(zip(cu_seqlens_k[:-1].tolist(), cu_seqlens_k[1:].tolist(), strict=True))
        if self.fault == "skips empty":
            queries = [(a, b) for a, b in queries if b > a]
        for (q0, q1), (k0, k1) in zip(queries, keys, strict=False):
            end = min(k0 + -(-(k1 - k0) // 4) * 4, len(k)) if self.fault == "straddles" else k1
            seen = last_rows(q1 - q0, k1 - k0, self.causal)
            seen = torch.cat([seen, torch.ones(q1 - q0, end - k1, dtype=torch.bool)], 1)
            parts = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:end], v[k0:end]))
            out[q0:q1], lse[:, q0:q1] = (x.transpose(0, 1) if x.ndim == 3 else x for x in attend(*parts, seen))
            if self.fault == "no keys" and k1 == k0:
                out[q0:q1] = float("nan")
        return out, lse


@dataclass(frozen=True)
class Paged:
    """``fault``: "" for none; "tail": the rows of the last page behind the last key are seen; "row 0": all entries read the pages of the
    first; "page as position": keys stand where their page lies in the cache; "whole row": the table is read behind the last page."""

    fault: str = ""

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor
    ) -> tuple[Tensor, Tensor]:
        size, found = k_cache.shape[1], []
        for entry, length in enumerate(seq_lens.tolist()):
            count = block_table.shape[1] if self.fault == "whole row" else -(-length // size)
            pages = block_table[0 if self.fault == "row 0" else entry, :count].long()
            k, v = (cache[pages].flatten(0, 1).transpose(0, 1) for cache in (k_cache, v_cache))
            if self.fault != "tail":
                k, v = k[:, :length], v[:, :length]
            keys, rows = k.shape[1], q.shape[2]
            position = torch.arange(keys)
            if self.fault == "page as position":
                position = (pages[:, None] * size + torch.arange(size)).flatten()[:keys]
            seen = position <= torch.arange(rows)[:, None] + length - rows
            if self.fault == "tail":
                seen = torch.ones(rows, keys, dtype=torch.bool) if rows == 1 else seen
            found.append(attend(q[entry], k, v, seen))
        return torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])


def single(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: Any) -> Tensor:
    """A right kernel with one list of starts, and the longest length."""
    assert max_seqlen == int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return Varlen(causal=True)(q, k, v, cu_seqlens, cu_seqlens)[0]
