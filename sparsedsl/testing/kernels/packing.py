"""Kernels on packed sequences and on pages: their arguments, made of ordinary tensors, and their results as such.

*Packed*: ``fn(q, k, v, cu_seqlens)`` or ``fn(q, k, v, cu_seqlens_q, cu_seqlens_k)``: q is ``(rows of all sequences, H, D)``, k and v
alike, and ``cu_seqlens`` int32 ``(sequences + 1)`` says where each begins. ``out`` is ``(rows, H, Dv)``, the LSE ``(H, rows)``.
``max_seqlen_q`` and ``max_seqlen_k`` are given where the signature names them. Positions count from 0 in every sequence.

*Paged*: ``fn(q, k_cache, v_cache, block_table, seq_lens)``: q is ``(B, H, M, D)``, caches ``(pages, page_size, Hk, D)``,
``block_table`` int32 ``(B, pages of the longest and more)``, ``seq_lens`` int32 ``(B,)``: how many keys an entry has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

import torch

__all__ = ["PAGED", "VARLEN", "Misshapen", "Pages", "Part", "cut_pages", "packed_arguments", "packing_of", "unpacked"]

Tensor = torch.Tensor
VARLEN, PAGED = "varlen", "paged"
_VARLEN_WORDS = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")
# What stands in pages and rows of pages that are nobody's, as in a cache that was used before: large, and finite in every dtype.
_STALE = 3000.0


class Misshapen(Exception):
    """What a packed kernel gave has another shape than its inputs say."""


@dataclass(frozen=True)
class Part:
    """One sequence: q ``(H, rows, D)``, k ``(Hk, keys, D)``, v ``(Hk, keys, Dv)``."""

    q: Tensor
    k: Tensor
    v: Tensor


def packing_of(names: Sequence[str]) -> str:
    """How a kernel with these arguments wants its tensors: "varlen", "paged", or "" for one tensor each.

    >>> packing_of(["q", "k", "v", "cu_seqlens"]), packing_of(["q", "k_cache", "v_cache", "block_table", "seq_lens"]), packing_of(["q"])
    ('varlen', 'paged', '')
    """
    if "block_table" in names:
        return PAGED
    return VARLEN if any(name.startswith("cu_seqlens") for name in names) else ""


def packed_arguments(names: Sequence[str], parts: Sequence[Part]) -> dict[str, Any]:
    """What a kernel of packed sequences is given beside q, k and v: of these words those that it names."""
    q_lens, kv_lens = [x.q.shape[1] for x in parts], [x.k.shape[1] for x in parts]
    device = parts[0].q.device
    starts = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (q_lens, kv_lens)]
    values = (starts[0], *starts, max(q_lens), max(q_lens), max(kv_lens))
    return {name: value for name, value in zip(_VARLEN_WORDS, values, strict=True) if name in names}


def unpacked(out: Any, lse: Any, parts: Sequence[Part]) -> list[tuple[Tensor, Tensor | None]]:
    """The results of every sequence: out ``(H, rows, Dv)`` and the LSE ``(H, rows)``."""
    rows, heads, width = sum(x.q.shape[1] for x in parts), parts[0].q.shape[0], parts[0].v.shape[2]
    for name, value, shape in (("out", out, (rows, heads, width)), ("lse", lse, (heads, rows))):
        if value is not None and tuple(getattr(value, "shape", ())) != shape:
            raise Misshapen(f"{name} has shape {tuple(getattr(value, 'shape', ()))}, wanted {shape} of packed sequences")
    ends = list(accumulate(x.q.shape[1] for x in parts))
    pieces = [slice(end - x.q.shape[1], end) for end, x in zip(ends, parts, strict=True)]
    return [(out[piece].transpose(0, 1), None if lse is None else lse[:, piece]) for piece in pieces]


@dataclass(frozen=True)
class Pages:
    """Keys and values cut into pages. ``table``: which page holds which part of an entry, and what is no page behind the last one."""

    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    lengths: Tensor


def cut_pages(parts: Sequence[Part], size: int, *, seed: int, poison: bool = False, shared: bool = False) -> Pages:
    """The keys and values of entries in pages of ``size`` rows, in an order drawn by ``seed``.

    ``poison``: rows that are nobody's hold NaN, and not large numbers. ``shared``: the first two entries begin with the same page, and so
    must their keys.
    """
    stale = float("nan") if poison else _STALE
    drawn, (heads, _, width), width_v = Random(seed), parts[0].k.shape, parts[0].v.shape[2]
    counts = [-(-part.k.shape[1] // size) for part in parts]
    numbers = list(range(sum(counts) + 2))
    drawn.shuffle(numbers)
    like = parts[0].k
    k_cache, v_cache = (like.new_full((len(numbers), size, heads, n), stale) for n in (width, width_v))
    # Behind the last page of an entry stands what a table may hold there: the number of no page.
    table = torch.full((len(parts), max(counts) + 1), -1 if seed % 2 else 1_000_000, dtype=torch.int32, device=like.device)
    used = iter(numbers)
    for entry, (part, count) in enumerate(zip(parts, counts, strict=True)):
        for place in range(count):
            number = int(table[0, 0]) if shared and entry == 1 and place == 0 else next(used)
            table[entry, place] = number
            rows = slice(place * size, min((place + 1) * size, part.k.shape[1]))
            k_cache[number, : rows.stop - rows.start] = part.k[:, rows].transpose(0, 1)
            v_cache[number, : rows.stop - rows.start] = part.v[:, rows].transpose(0, 1)
    lengths = torch.tensor([part.k.shape[1] for part in parts], dtype=torch.int32, device=like.device)
    return Pages(k_cache, v_cache, table, lengths)
